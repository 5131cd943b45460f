"""The seams that the adapter takes hold of are in the installed engine; run once per series.

Only ``openquake.baselib`` is imported, in a process of its own per test; one small real job at the
end shows that the whole of the locked engine works together.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from oq_runtime.engine import hook
from tests.leftovers import wait_for

pytestmark = pytest.mark.timeout(120)

ACTIVE = """
from openquake.baselib import parallel, workerpool
from oq_runtime.engine import versions
# install_parallel has called check_seams before it replaced anything
assert versions.installed() in versions.TESTED, versions.installed()
assert parallel.Starmap.submit.__module__ == "oq_runtime.engine.adapter", parallel.Starmap.submit
assert parallel.Socket.__module__ == "oq_runtime.engine.adapter"
from openquake.baselib import zeromq
assert type(zeromq.context).__module__ == "oq_runtime.engine.dbserver"
assert workerpool.WorkerMaster.__module__ == "oq_runtime.engine.workerpool"
assert parallel.submit["processpool"].__module__ == parallel.__name__
assert parallel.submit["no"].__module__ == parallel.__name__
"""

WORKER = """
from openquake.baselib import config, parallel
from oq_runtime.node import worker
config.directory.custom_tmp = "/tmp"
worker.prepare()
# what a task stores there would be missing elsewhere, and where its result is taken over
assert bool(config.directory.custom_tmp) != hasattr(parallel, "scratch_dir")
"""

PRISTINE = """
from openquake.baselib import parallel
from oq_runtime.engine import adapter
adapter.check_seams(parallel)
assert parallel.Starmap.submit.__module__ == parallel.__name__
"""

OTHER_VERSION = """
import logging
from openquake import baselib
baselib.__version__ = "3.99.1"
from openquake.baselib import parallel
from oq_runtime.engine import adapter
logging.basicConfig(format="%(message)s")
adapter.Receiver()
adapter.Receiver()
"""

MISSING = """
import importlib, sys
from oq_runtime.engine import hook
from oq_runtime.errors import UnsupportedEngine
for where, (_, names) in hook.INSTALLERS.items():
    module = importlib.import_module(where)
    for name in names:
        value = vars(module).pop(name)
        try:
            hook._install(module)
        except UnsupportedEngine as exc:
            print(where, name, exc, sep="|")
        setattr(module, name, value)
from openquake.server.db import actions
assert actions.reset_is_running.__module__ == "oq_runtime.engine.jobtable"
"""

FAKE_SEAM = """
from openquake.baselib import parallel
from oq_runtime.engine import adapter
from oq_runtime.errors import UnsupportedEngine
def safely_call(func, args): pass
parallel.safely_call = safely_call
try:
    adapter.check_seams(parallel)
except UnsupportedEngine as exc:
    print(exc)
else:
    raise SystemExit("a changed seam was accepted")
"""


def run(tmp_path: Path, code: str, *, active: bool = True) -> subprocess.CompletedProcess[str]:
    cfg = tmp_path / "openquake.cfg"
    cfg.write_text("[oq_runtime]\n" + ("code = import oq_runtime.activate\n" if active else ""))
    env = {**os.environ, "OQ_CONFIG_FILE": str(cfg), "TMPDIR": str(tmp_path), "CI": "true"}
    for name in ("OQ_DISTRIBUTE", "OQ_RUNTIME_SESSION", "OQ_RUNTIME_WORKER"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_seams_fit(tmp_path: Path) -> None:
    run(tmp_path, PRISTINE, active=False)


def test_the_hook_takes_over(tmp_path: Path) -> None:
    run(tmp_path, ACTIVE)
    assert not list(tmp_path.glob("oq-run-*")), "importing alone must start no session"


def test_results_of_tasks_are_whole(tmp_path: Path) -> None:
    run(tmp_path, WORKER)


def test_another_version_that_fits_is_taken_with_one_warning(tmp_path: Path) -> None:
    lines = run(tmp_path, OTHER_VERSION).stderr.splitlines()
    assert len(lines) == 1, lines
    for version in ("3.99.1", "3.23.5", "3.25.1", "3.26.2"):
        assert version in lines[0]


@pytest.mark.timeout(900)  # numba compiles what is imported here for the first time
def test_what_an_engine_lacks_is_named(tmp_path: Path) -> None:
    lines = run(tmp_path, MISSING).stdout.splitlines()
    rows = [(where, name) for where, (_, names) in hook.INSTALLERS.items() for name in names]
    for (where, name), line in zip(rows, lines, strict=True):
        assert line.startswith(f"{where}|{name}|"), line
        assert f"{where} has no {name})" in line and "install one of" in line


def test_changed_seam_is_named(tmp_path: Path) -> None:
    lines = run(tmp_path, FAKE_SEAM, active=False).stdout.splitlines()
    assert len(lines) == 1
    assert "safely_call(func, args)" in lines[0]


def test_a_real_job_runs(tmp_path: Path) -> None:
    """Through a DbServer, which finds nothing to refuse in what the engine's clients send."""
    spec = importlib.util.find_spec("openquake.qa_tests_data")
    assert spec is not None and spec.submodule_search_locations
    job = Path(spec.submodule_search_locations[0]) / "classical/case_18/job.ini"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cfg = tmp_path / "openquake.cfg"
    cfg.write_text(
        "[oq_runtime]\ncode = import oq_runtime.activate\n"
        f"[dbserver]\nhost = 127.0.0.1\nport = {port}\nfile = {tmp_path}/db.sqlite3\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("OQ_")} | {
        "OQ_CONFIG_FILE": str(cfg),
        "OQ_DATADIR": str(tmp_path / "oqdata"),
        "LOGNAME": "openquake",  # for whom the engine has a DbServer also on one machine
        "TMPDIR": str(tmp_path),
        "CI": "true",
        "NUMBA_DISABLE_JIT": "1",  # compiling takes a minute or two, and changes no seam
    }
    log = tmp_path / "dbserver.log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "openquake.commands", "dbserver", "start", "-f"]
        server = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, cwd=tmp_path)
    try:
        assert wait_for(lambda: "DB server started" in log.read_text(), 60), log.read_text()
        command = [sys.executable, "-m", "oq_runtime.commands.run", str(job), "--json"]
        done = subprocess.run(command, env=env, text=True, capture_output=True)
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads(done.stdout)["jobs"]
    assert (row["state"], row["tasks"] > 0) == ("complete", True), row
    assert "refused" not in log.read_text(), log.read_text()
