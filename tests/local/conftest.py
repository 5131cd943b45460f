"""A private engine (configuration, data directory, database, TMPDIR) and a check for leftovers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.leftovers import shm, unused_shm, wait_for

HERE = Path(__file__).parent


def session_processes(tmpdir: Path, name: str = "") -> list[psutil.Process]:
    """The live processes that belong to ``tmpdir``, or only those with a log ``<name>*.log``.

    Workers rename themselves and lose command line and environment doing so; what stays is their
    stderr, a file of the session.
    """
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            log = os.readlink(f"/proc/{process.pid}/fd/2")
            ours = log.startswith(f"{tmpdir}/oq-run-")
            if name:
                ours = ours and Path(log).name.startswith(name)
            elif not ours:
                ours = any(f"{tmpdir}/" in word for word in process.cmdline())
                ours = ours or process.environ().get("TMPDIR") == str(tmpdir)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def sessions(tmpdir: Path) -> list[Path]:
    return sorted(tmpdir.glob("oq-run-*"))


def leftovers_of(tmpdir: Path, shm_before: set[str]) -> list[str]:
    """One line per process, directory or shared memory that outlived its session."""
    lines = [f"process {p}" for p in session_processes(tmpdir)]
    lines += [f"directory {path}" for path in sessions(tmpdir)]
    new = shm() - shm_before
    return lines + ([f"/dev/shm/{name}" for name in unused_shm(new)] if new else [])


@pytest.fixture(scope="session")
def engine_home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a private engine, without TMPDIR."""
    home = tmp_path_factory.mktemp("engine")
    (home / "oqdata").mkdir()
    cfg = home / "openquake.cfg"
    cfg.write_text(
        f"[dbserver]\nmulti_user = false\nhost = 127.0.0.1\nfile = {home}/oqdata/db.sqlite3\n"
        "[oq_runtime]\ncode = import oq_runtime.activate\n"
    )
    # modules are compiled once, as for users, or a signal comes while the first one is compiled
    others = ("OQ_", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return env | {
        "OQ_CONFIG_FILE": str(cfg),
        "OQ_DATADIR": str(home / "oqdata"),
        "CI": "true",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(HERE),
        "COLUMNS": "200",
    }


@pytest.fixture(scope="session")
def light_home(
    engine_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same for tasks that need no calculator, which takes seconds to import."""
    cfg = tmp_path_factory.mktemp("light") / "openquake.cfg"
    cfg.write_text(Path(engine_home["OQ_CONFIG_FILE"]).read_text() + "preload =\n")
    return engine_home | {"OQ_CONFIG_FILE": str(cfg)}


@pytest.fixture
def tmpdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t")  # short: sockets have paths of at most 107 bytes


@pytest.fixture
def env(
    request: pytest.FixtureRequest,
    engine_home: dict[str, str],
    light_home: dict[str, str],
    tmpdir: Path,
) -> dict[str, str]:
    home = light_home if request.node.get_closest_marker("light") else engine_home
    return home | {"TMPDIR": str(tmpdir)}


@pytest.fixture(autouse=True)
def leftovers(tmpdir: Path) -> Iterator[None]:
    """After each test: no process, no session directory, no shared memory is left."""
    before = shm()
    yield
    clean = wait_for(lambda: not leftovers_of(tmpdir, before))
    lines = [] if clean else leftovers_of(tmpdir, before)
    for process in session_processes(tmpdir):  # the next tests need the cores
        process.send_signal(signal.SIGKILL)
    assert not lines, lines
