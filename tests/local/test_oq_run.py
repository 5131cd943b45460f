"""``oq-run`` from outside: bad input, one real job, an interrupt."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import reports
from tests.conformance.compare import compare
from tests.leftovers import wait_for
from tests.reports import Page

from .conftest import session_processes

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LIMIT_INTERRUPT_S = 5.0


TINY = "classical/case_02/job.ini"


def corpus(job: str) -> Path:
    spec = importlib.util.find_spec("openquake.qa_tests_data")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / job


def start(env: dict[str, str], *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "oq_runtime.commands.run", *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(env: dict[str, str], *args: object) -> tuple[int, str, str]:
    process = start(env, *args)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, out, err


def limited(env: dict[str, str], first: str, *args: object) -> tuple[int, str]:
    """Exit code and message of an ``oq-run`` in a shell that has done something first."""
    command = [sys.executable, "-m", "oq_runtime.commands.run", "--no-progress", *map(str, args)]
    shell = ["sh", "-c", f'{first}; exec "$@"', "sh"]
    done = subprocess.run([*shell, *command], env=env, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stderr


def one_line(err: str) -> str:
    """The message of a refused job: one line, besides those of the engine's log."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("oq-run:")]
    assert len(ours) == 1, err
    # the second one once, on a slow machine; the third of a job of an earlier test
    known = re.compile(r"\[|loading the engine|job \d+ did not come to its end")
    rest = [line for line in lines if line not in ours and not known.match(line)]
    assert not rest, err
    return ours[0]


def jobs(env: dict[str, str]) -> list[tuple[int, str, int]]:
    path = Path(env["OQ_DATADIR"]) / "db.sqlite3"
    if not path.exists():
        return []
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return connection.execute("SELECT id, status, is_running FROM job ORDER BY id").fetchall()


def example(tmp_path: Path, name: str = "hazard_classical") -> Path:
    folder = tmp_path / name
    shutil.copytree(EXAMPLES / name, folder)
    return folder


# ---- refused before the engine starts


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_text(""), "empty"),
        (os.mkfifo, "pipe"),
        (lambda path: path.write_text(" \n\n"), "empty"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.write_bytes(bytes(range(256)) * 10), "not a text file"),
        (lambda path: path.write_bytes(b"[general]\n\0\0"), "not a text file"),
        (lambda path: path.open("wb").truncate(1 << 30), "has 1074 MB; give a job file"),
        (
            lambda path: path.write_bytes("[general]\ndescription = Zürich".encode("latin-1")),
            "not UTF-8 at byte 25 (line 2); save it as UTF-8, e.g. iconv",
        ),
        (lambda path: path.write_text("[general]", encoding="utf-16"), "is UTF-16; save it as"),
    ],
    ids=[
        "missing",
        "empty",
        "pipe",
        "blank",
        "directory",
        "binary",
        "zeros",
        "datastore",
        "latin-1",
        "utf-16",
    ],
)
def test_bad_file(
    env: dict[str, str], tmp_path: Path, make: Callable[[Path], object], word: str
) -> None:
    path = tmp_path / "job.ini"
    make(path)
    code, out, err = run(env, path)
    assert (code, out) == (2, "")
    line = one_line(err)
    assert str(path) in line and word in line


@pytest.mark.parametrize("cores", ["0", "99999", "-2", "two", "1.5"])
def test_bad_cores(env: dict[str, str], cores: str) -> None:
    code, out, err = run(env, EXAMPLES / "hazard_classical/job.ini", f"--cores={cores}")
    assert (code, out) == (2, "")
    assert re.search(r"--cores=\S+: give a number from 1 to \d+", one_line(err))


def test_bad_parameter_option(env: dict[str, str]) -> None:
    code, _, err = run(env, EXAMPLES / "hazard_classical/job.ini", "-p", "nonsense")
    assert code == 2
    assert "name=value" in one_line(err)


def test_bad_log_file(env: dict[str, str], tmp_path: Path) -> None:
    job = EXAMPLES / "hazard_classical/job.ini"
    code, _, err = run(env, job, "--log-file", tmp_path / "missing" / "log")
    assert code == 2
    assert "--log-file" in one_line(err)


def test_too_few_open_files(env: dict[str, str]) -> None:
    code, err = limited(env, "ulimit -n 20", "--cores=1", EXAMPLES / "hazard_classical/job.ini")
    assert code == 2
    said = "only 20 files may be open at a time, and 30 are needed here; raise the hard limit"
    assert said in one_line(err)


def test_too_small_files(env: dict[str, str]) -> None:
    code, err = limited(env, "ulimit -f 400", corpus(TINY))  # of 512 bytes
    assert code == 2
    said = "a file may have 200 KiB at most here, and a job needs more than 128 MiB; raise this"
    assert said in one_line(err)


# ---- refused by the engine; each costs its import


def edited(tmp_path: Path, old: str, new: str, file: str = "job.ini") -> Path:
    folder = example(tmp_path)
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return folder / "job.ini"


def test_unknown_calculation_mode(env: dict[str, str], tmp_path: Path) -> None:
    job = edited(tmp_path, "= classical\n", "= astrological\n")
    code, _, err = run(env, job, "--no-progress")
    assert code == 2
    line = one_line(err)
    assert "calculation_mode" in line and "astrological" in line


def test_missing_source_model(env: dict[str, str], tmp_path: Path) -> None:
    folder = example(tmp_path)
    (folder / "source_model_low.xml").unlink()
    code, _, err = run(env, folder / "job.ini", "--no-progress")
    assert code == 2
    assert "source_model_low.xml" in one_line(err)


@pytest.mark.slow
def test_blank_in_a_file_name(env: dict[str, str], tmp_path: Path) -> None:
    job = example(tmp_path, "event_based_risk") / "job.ini"
    job.write_text(job.read_text().replace("= exposure.xml", "= my exposure.xml"))
    code, _, err = run(env, job, "--no-progress")
    assert code == 2
    assert one_line(err).count("a blank ends a file name here") == 1


def test_directory_of_exports_that_cannot_be_made(env: dict[str, str]) -> None:
    job = EXAMPLES / "hazard_classical/job.ini"
    code, _, err = run(env, job, "--exports=csv", "--export-dir=/proc/none/x", "--no-progress")
    assert code == 2
    said = "export_dir=/proc/none/x: No such file or directory; set another directory in the job"
    assert said in one_line(err)


def test_directory_of_exports_is_not_looked_at_when_nothing_is_exported(
    env: dict[str, str],
) -> None:
    job = corpus("classical/case_02/job.ini")
    code, _, err = run(env, job, "-p", "export_dir=/proc/none/x", "--no-progress")
    assert code == 0, err


@pytest.mark.slow
def test_malformed_xml(env: dict[str, str], tmp_path: Path) -> None:
    folder = example(tmp_path)
    path = folder / "source_model_low.xml"
    path.write_text(path.read_text()[:-40])
    code, _, err = run(env, folder / "job.ini", "--no-progress")
    assert code == 2
    assert re.search(r"oq-run: \S+/source_model_low\.xml: \d+: no element found", one_line(err))
    assert jobs(env)[-1][1:] == ("failed", 0)
    assert not [job for job in jobs(env) if job[1] == "executing" or job[2]]


def test_undecodable_exposure(env: dict[str, str], tmp_path: Path) -> None:
    # found by the engine in the calculation, which names no file
    folder = example(tmp_path, "event_based_risk")
    [path] = folder.glob("exposure*.csv")
    path.write_bytes(path.read_bytes() + "a1,à".encode("latin-1"))
    option = "ignore_encoding_errors=true"  # which this engine has, and does not heed
    code, _, err = run(env, folder / "job.ini", "--no-progress", "-p", option)
    line = one_line(err)
    assert code == 2, err
    assert str(path) in line and "not UTF-8 at byte" in line and "not in 3.25 and 3.26" in line
    assert jobs(env)[-1][1:] == ("failed", 0)


def test_whole_sentence(env: dict[str, str], tmp_path: Path) -> None:
    # the engine's explanation of a parameter has several lines
    job = edited(tmp_path, "[general]\n", "[general]\nexports = csv\n")
    before = len(jobs(env))
    code, _, err = run(env, job, "--no-progress", "-p", "uniform_hazard_spectra=true,poes=")
    assert code == 2, err
    said = "When computing hazard maps and/or uniform hazard spectra, the poes list must be"
    assert f"{job}: {said}" in one_line(err)
    assert len(jobs(env)) == before  # no number is taken


@pytest.mark.slow
def test_no_such_parent(env: dict[str, str]) -> None:
    job = EXAMPLES / "hazard_classical/job.ini"
    for number in ("99999", "99999999999999999999"):  # also one that no table can have
        code, _, err = run(env, job, "--hc", number, "--no-progress")
        assert code == 2
        assert f"--hc {number}: there is no such job" in one_line(err)


@pytest.mark.parametrize(
    "folder, words",
    [
        ("{}/file", "it is a file: move it away or set OQ_DATADIR"),
        ("{}/file/oqdata", "a file is in its way: move that away or set OQ_DATADIR"),
        ("/proc/none", "No such file or directory; set OQ_DATADIR"),
    ],
)
def test_unwritable_data_directory(
    env: dict[str, str], tmp_path: Path, folder: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    job = EXAMPLES / "hazard_classical/job.ini"
    more = {"OQ_DATADIR": folder.format(tmp_path)}
    code, _, err = run(env | more, job, "--no-progress")
    assert code == 2
    line = one_line(err)
    assert more["OQ_DATADIR"] in line and words in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("reachable", [True, False])
def test_data_directory_of_another_user(env: dict[str, str], reachable: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        check_as_nobody(env, Path(name), reachable)


def check_as_nobody(env: dict[str, str], tmp_path: Path, reachable: bool) -> None:
    tmp_path.chmod(0o755 if reachable else 0o700)
    (tmp_path / "oqdata").mkdir(mode=0o755)
    code = "from oq_runtime.commands import checks; checks.check_directories({})"
    more = {"OQ_DATADIR": str(tmp_path / "oqdata")}
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", code],
        env=env | more,
        capture_output=True,
        text=True,
    )
    who = f"root, who owns {tmp_path}/oqdata," if reachable else f"the owner of {tmp_path}/oqdata"
    said = f"{tmp_path}/oqdata: Permission denied; ask {who} to let you"
    assert said in result.stderr


# ---- users


def as_number(
    env: dict[str, str], *command: str, nproc: int = 100
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without an entry in passwd, with a limit of processes."""
    become = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    # the interpreter, which it starts again, may lie in the home of root
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return subprocess.run(
        ["prlimit", f"--nproc={nproc}", *become, *reads, *command],
        env=env,
        capture_output=True,
        text=True,
        cwd="/",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_too_few_processes(env: dict[str, str]) -> None:
    few = {"PATH": env["PATH"], "HOME": "/tmp", "OQ_DATADIR": "/tmp"}
    job = str(EXAMPLES / "hazard_classical/job.ini")
    command = [sys.executable, "-m", "oq_runtime.commands.run", "--no-progress", "--cores=1", job]
    result = as_number(few, *command, nproc=12)
    assert result.returncode == 2
    said = "19 processes and threads are needed here, and 1 are in use of the 12 of this user"
    assert said in one_line(result.stderr)


#: starts the processes of a session and prints how many slots it has
SESSION = """
import os
from oq_runtime.commands.checks import check_user
from oq_runtime.config import Config
from oq_runtime.files import private
from oq_runtime.session import client, launch
check_user()
directory = launch.start(Config(cores=1), os.getpid())
print(client.Session(directory).slots, private.memory_of(directory).exists())
launch.stop(directory)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_user_without_a_name(env: dict[str, str]) -> None:
    few = {"PATH": env["PATH"], "HOME": "/tmp"}
    for named in ("from oq_runtime.commands.checks import check_user; check_user()",
                  "import oq_runtime.activate"):  # fmt: skip
        code = f"{named}; import getpass; print(getpass.getuser())"
        result = as_number(few, sys.executable, "-c", code)
        assert (result.returncode, result.stdout.strip()) == (0, "54321"), result.stderr
    result = as_number(few, sys.executable, "-c", SESSION)
    assert (result.returncode, result.stdout) == (0, "1 True\n"), result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_no_shared_memory_where_the_end_of_a_log_in_removes_it(
    env: dict[str, str], tmp_path: Path
) -> None:
    """As of a job that a service runs for its user, who logs in and out meanwhile."""
    busctl = tmp_path / "busctl"
    busctl.write_text("#!/bin/sh\ncase $* in *RemoveIPC) echo b true;; esac\n")
    busctl.chmod(0o755)
    few = {"PATH": f"{tmp_path}:{env['PATH']}", "HOME": "/tmp"}
    result = as_number(few, sys.executable, "-c", SESSION)
    assert (result.returncode, result.stdout) == (0, "1 False\n"), result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "command",
    [
        ["commands.run", str(EXAMPLES / "hazard_classical/job.ini")],
        ["commands.journal", "show"],
        ["commands.report", "1"],
        ["webui"],
    ],
    ids=str,
)
def test_user_without_a_home(env: dict[str, str], command: list[str]) -> None:
    few = {"PATH": env["PATH"]}
    module, *args = command
    result = as_number(few, sys.executable, "-m", f"oq_runtime.{module}", *args)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "HOME is not set, and user 54321 has no entry in passwd" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_home_where_nothing_can_be_written(env: dict[str, str]) -> None:
    """Numba refuses to be imported where it has no place for what it compiles."""
    code = (
        "import os, pathlib; from oq_runtime.files import compiling; "
        "compiling.find_cache(pathlib.Path('/tmp')); print(os.environ['NUMBA_CACHE_DIR']); "
        "import openquake.baselib.performance"
    )
    few = {"PATH": env["PATH"], "USER": "54321", "HOME": "/proc/none"}
    result = as_number(few, sys.executable, "-c", code)
    place = Path("/tmp/oq-numba-54321")
    assert (result.returncode, result.stdout.strip()) == (0, str(place)), result.stderr
    assert list(place.rglob("*.nbi")), "nothing was compiled"
    shutil.rmtree(place)


def test_damaged_database(env: dict[str, str], tmp_path: Path) -> None:
    cfg = tmp_path / "openquake.cfg"
    (tmp_path / "db.sqlite3").write_bytes(b"not a database " * 1000)
    text = Path(env["OQ_CONFIG_FILE"]).read_text()
    cfg.write_text(re.sub(r"file = .*", f"file = {tmp_path}/db.sqlite3", text))
    job = EXAMPLES / "hazard_classical/job.ini"
    code, _, err = run(env | {"OQ_CONFIG_FILE": str(cfg)}, job, "--hc", "5", "--no-progress")
    assert code == 2
    assert "database" in one_line(err)


# ---- archives


def packed(tmp_path: Path, *more: str) -> Path:
    """An archive with a small job, and further members of these names."""
    path = tmp_path / "archive.zip"
    folder = corpus("classical/case_02")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            if file.suffix in (".ini", ".xml", ".csv") and "expected" not in file.parts:
                archive.write(file, f"model/{file.name}")
        for name in more:
            archive.write(folder / "job.ini", name)
    return path


def test_archive(env: dict[str, str], tmpdir: Path, tmp_path: Path) -> None:
    path = packed(tmp_path, "model/other.ini", "__MACOSX/model/._job.ini", "model/desktop.ini")
    path = path.rename(tmp_path / "ARCHIVE.ZIP")  # as from an old disk
    code, _, err = run(env, path, "--no-progress", "--exports", "csv")
    assert code == 0, err
    assert f"{path} holds 2 job files: running job.ini, not other.ini" in err
    assert list(tmp_path.glob("hazard_curve-mean*.csv")), list(tmp_path.iterdir())
    assert not list(tmpdir.iterdir())


def test_archive_that_lacks_a_file(env: dict[str, str], tmpdir: Path, tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(corpus("classical/case_02/job.ini"), "job.ini")
    code, _, err = run(env, path, "--no-progress")
    assert code == 2, err
    assert "oq-run: archive.zip: job.ini: No such file: archive.zip: " in one_line(err)
    assert not list(tmpdir.iterdir())


# ---- real jobs


@pytest.mark.slow
def test_the_job_of_verify(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What verify.yml runs on the master takes the answer for a sound job as one."""
    (tmp_path / "venv").symlink_to(sys.prefix)
    shutil.copytree(corpus(TINY).parent, tmp_path / "verify")
    (tmp_path / "verify" / corpus(TINY).name).rename(tmp_path / "verify/job.ini")
    places = {"prefix": str(tmp_path), "home": "", "config_dir": "", "shared_dir": ""}
    monkeypatch.setattr(sys, "argv", ["-", "master", json.dumps(places)])
    verify = runpy.run_path(str(ROOT / "roles/openquake_verify/files/verify.py"))
    job = verify["job"]
    job.__globals__["OPENQUAKE"] = ("env", "-i", *(f"{name}={env[name]}" for name in env))
    before = set(jobs(env))
    assert job().startswith("complete after ")
    assert {status for _, status, _ in set(jobs(env)) - before} <= {"deleted"}


def test_small_job(env: dict[str, str]) -> None:
    code, out, err = run(env, corpus("classical/case_02/job.ini"), "--json")
    assert code == 0, err
    assert "Traceback" not in err
    result = json.loads(out)
    assert result["exit"] == 0 and result["error"] == ""
    [job] = result["jobs"]
    assert job["state"] == "complete" and job["exported"] == []
    assert {output["name"] for output in job["outputs"]} >= {"Hazard Curves"}
    assert Path(job["datastore"]).stat().st_size == job["bytes"]
    assert (job["job"], "complete", 0) in jobs(env)
    code, out, err = run(env, "--explain", job["job"])
    first, *others = out.splitlines()
    assert (code, err) == (0, "") and len(others) < 10
    assert re.fullmatch(
        rf"job {job['job']}, classical \(.*\): complete, [\d.]+ s, \d+ slots?", first
    )
    assert any(re.match(r"tasks: \d+ \w+ \(median [\d.]+ m?s, ", line) for line in others)
    code, out, _ = run(env, "--explain", job["job"], "--json")
    uses = json.loads(out)["uses"]
    assert sum(uses.values()) == pytest.approx(1, abs=0.01) and uses["computed"] > 0


@pytest.mark.slow
def test_a_job_that_failed_is_explained_and_reported(env: dict[str, str], tmp_path: Path) -> None:
    """It fails in its last step: its tasks are known, and the curves that it has."""
    fails = "postproc_func=disagg_by_rel_sources.main"  # which is given too few arguments
    code, out, err = run(env, corpus(TINY), "-p", fails, "--json", "--report", tmp_path)
    assert code == 1, err
    [job] = json.loads(out)["jobs"]
    assert job["state"] == "failed" and job["report"] == str(tmp_path / f"report_{job['job']}.html")
    page = Page(Path(job["report"]).read_text())
    assert {"hcurves", "timeline"} <= {figure.output for figure in page.figures}
    words = "".join(page.words)
    assert "The job is failed: this is what there is of it." in words and "TypeError" in words
    code, out, err = run(env, "--explain", job["job"])
    assert (code, err) == (0, "")
    first, *others = out.splitlines()
    assert re.fullmatch(r"job \d+, classical \(.*\): failed, [\d.]+ s, \d+ slots?", first), first
    assert any(re.match(r"tasks: \d+ \w+ \(median ", line) for line in others), out


@pytest.mark.slow
def test_a_job_of_the_engine_alone_is_explained_and_reported(
    env: dict[str, str], tmp_path: Path
) -> None:
    alone = env | {"OQ_DISTRIBUTE": "processpool", "OQ_NUM_CORES": "2"}
    oq = Path(sys.executable).with_name("oq")
    done = subprocess.run(
        [oq, "engine", "--run", corpus(TINY)], env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    number, state, _ = jobs(env)[-1]
    assert state == "complete"
    code, out, err = run(env, "--explain", number)
    assert (code, err) == (0, "")
    first, *functions, last = out.splitlines()
    assert re.fullmatch(rf"job {number}, classical \(.*\): [\d.]+ s", first), first
    assert any(re.match(r"classical\w*: 1 task, ", line) for line in functions), out
    assert last.startswith("not known: when, where and on how many slots the tasks ran")
    done = subprocess.run(
        [sys.executable, "-m", "oq_runtime.commands.report", str(number), tmp_path],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path}/report_{number}.html\n", done.stderr
    page = Page(Path(done.stdout.rstrip()).read_text())
    assert [figure.output for figure in page.figures] == ["hcurves"]
    assert "none: the engine ran it alone" in page.words


OTHER_IMPORT = """
import sys
from oq_runtime.files import compiling
with compiling.once():
    print(flush=True)
    sys.stdin.read()
"""


def test_without_streams(env: dict[str, str], tmp_path: Path) -> None:
    env = env | {"OQ_DATADIR": str(tmp_path)}
    job = str(corpus("classical/case_02/job.ini"))
    command = [sys.executable, "-m", "oq_runtime.commands.run", job]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], env=env)
    assert done.returncode == 0
    assert list(tmp_path.glob("calc_*.hdf5"))


@pytest.mark.parametrize("stream, code", [(1, 1), (2, 0)])
def test_stream_without_room(env: dict[str, str], tmp_path: Path, stream: int, code: int) -> None:
    env = env | {"OQ_DATADIR": str(tmp_path)}
    job = str(corpus("classical/case_02/job.ini"))
    command = [sys.executable, "-m", "oq_runtime.commands.run", job, "--no-progress"]
    shell = ["sh", "-c", f'exec "$@" {stream}>/dev/full', "sh", *command]
    done = subprocess.run(shell, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert list(tmp_path.glob("calc_*.hdf5"))
    if stream == 1:
        said = "oq-run: stdout: No space left on device; list the jobs with oq engine --lhc"
        assert one_line(done.stderr) == said
    else:
        assert " complete in " in done.stdout


@pytest.mark.slow
def test_number_of_another_job_is_no_parameter(env: dict[str, str]) -> None:
    code, out, err = run(env, corpus(TINY), "--json")
    assert code == 0, err
    [job] = json.loads(out)["jobs"]
    before = Path(job["datastore"]).stat()
    code, _, err = run(env, corpus(TINY), "-p", f"job_id={job['job']}", "--no-progress")
    assert code == 2
    assert "job_id is no parameter of a job file" in one_line(err)
    after = Path(job["datastore"]).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert jobs(env)[-1] == (job["job"], "complete", 0)


@pytest.mark.slow
def test_archive_keeps_no_journal(env: dict[str, str], tmp_path: Path) -> None:
    """Its files are elsewhere each time, so it could not go on."""
    folder = example(tmp_path)
    with zipfile.ZipFile(tmp_path / "job.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    dying = {"OQ_RUNTIME_FAULT": "before_end:5:3"}
    code, _, err = run(env | dying, tmp_path / "job.zip", "--no-progress", "--cores=1")
    assert code == 1, err
    number = jobs(env)[-1][0]
    assert f"--resume {number}" not in err
    assert not Path(env["OQ_DATADIR"], f"calc_{number}.journal").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (["JOB", "--watch"], "--watch shows a job that runs"),
        (["JOB", "--log-file", "PIPE"], "is a pipe; give a file"),
        (["JOB", "--log-file", "/proc/none"], "--log-file /proc/none: No such file"),
        (["JOB", "--hc", ""], "--hc is empty; leave it out or give a value"),  # an unset variable
        (["JOB", "--resume="], "--resume is empty"),
        (["JOB", "--export-dir", ""], "--export-dir is empty"),
        (["~no_such_user/job.ini"], "there is no such user; write ./~no_such_user/job.ini"),
        (["JOB", "--export-dir", "~no_such_user"], "there is no such user"),
    ],
)
def test_odd_calls(env: dict[str, str], tmp_path: Path, args: list[str], words: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    given = {"JOB": str(corpus(TINY)), "PIPE": str(tmp_path / "pipe")}
    code, _, err = run(env, *(given.get(word, word) for word in args))
    assert code == 2
    assert words in one_line(err)


@pytest.mark.parametrize(
    "first, expected, words",
    [
        (
            "mkdir {0}/gone; cd {0}/gone; rmdir {0}/gone",
            2,
            "working directory is not there any more",
        ),
        ("ulimit -t 2", 1, "more than the 2 s of processor time that it may use here (ulimit -t)"),
        (
            "export LC_ALL=C PYTHONUTF8=0 TMPDIR={0}/à; mkdir {0}/à",
            2,
            "is not UTF-8, or not in this locale",
        ),
    ],
    ids=["directory", "time", "locale"],
)
def test_odd_places(
    env: dict[str, str], tmp_path: Path, first: str, expected: int, words: str
) -> None:
    code, err = limited(env, first.format(tmp_path), corpus(TINY))
    assert code == expected, err
    assert words in one_line(err)


@pytest.mark.slow
def test_few_open_files_may_be_more(env: dict[str, str]) -> None:
    code, err = limited(env, "ulimit -Sn 20", corpus(TINY))
    assert code == 0, err


@pytest.mark.slow
def test_relative_directory_for_temporary_files(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "oq_runtime.commands.run", str(corpus(TINY)), "--no-progress"]
    here = env | {"TMPDIR": "tmp"}
    done = subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert wait_for(lambda: not list((tmp_path / "tmp").glob("oq-run-*")), 20)


def importing(process: psutil.Process, cache: Path) -> bool:
    """Whether a process has begun to wait for its turn to import the engine."""
    return any(file.path.startswith(f"{cache}/oq-runtime/") for file in process.open_files())


@pytest.mark.slow
def test_import_that_takes_long(env: dict[str, str], tmpdir: Path, tmp_path: Path) -> None:
    """Another process of this user has not come to the end of the first import."""
    env = env | {"XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_IMPORT],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        process = start(env, corpus("classical/case_02/job.ini"), "--json")
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("numba has not compiled it yet" in line for line in lines)
        assert wait_for(lambda: session_processes(tmpdir, "forkserver"), 20)
        [server] = session_processes(tmpdir, "forkserver")
        assert wait_for(lambda: importing(server, tmp_path)), "it waits as well"
        other.communicate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["jobs"][0]["state"] == "complete"


@pytest.mark.slow
def test_names_of_the_engine_exports_and_next_commands(env: dict[str, str], tmp_path: Path) -> None:
    """Nothing goes to /tmp itself; the commands that are named at the end work.

    In a folder with blanks and accents, with the model above it, and a job file of an editor that
    marks UTF-8 and ends lines as Windows does.
    """
    top = tmp_path / "Progetto 2026 (copia) #1"
    folder = top / "jobs à côté" / "run 1"
    folder.mkdir(parents=True)
    shutil.copytree(corpus("classical/case_02"), top / "model")
    text = (top / "model/job.ini").read_text() + "\nexport_dir = /tmp\n"
    text = text.replace("= source_model_logic", "= ../../model/source_model_logic")
    job = folder / "job.ini"
    job.write_text(text, encoding="utf-8-sig", newline="\r\n")
    levels = "intensity_measure_types_and_levels={'PGA': [0.1, 0.2], 'SA(0.3)': [0.1, 0.2]}"
    code, out, err = run(env, "--run", job, "--param", levels, "-e", "csv", "-l", "warn")
    assert code == 0, err
    assert f"exporting to {folder}, not to /tmp as job.ini says" in err
    number = jobs(env)[-1][0]
    shown = re.search(rf"^exported (\d+) files to {re.escape(str(folder))}: (.*)$", out, re.M)
    assert shown, out
    files = list(folder.glob(f"*_{number}.csv"))
    assert len(files) == int(shown[1]) and any("SA(0.3)" in file.name for file in files)
    assert not list(Path("/tmp").glob(f"hazard_curve-mean*_{number}.csv"))
    oq = Path(sys.executable).with_name("oq")
    plot = re.search(r"^plot: oq plot (.*)$", out, re.MULTILINE)
    assert plot and plot[1].endswith(f" {number} -s hcurves_{number}.png"), out
    log = ("engine", "--show-log", str(number))
    for command in (("plot", *shlex.split(plot[1])), log):
        shown_by = subprocess.run(
            [oq, *command],
            env=env | {"MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert shown_by.returncode == 0, shown_by.stderr
    assert (tmp_path / f"hcurves_{number}.png").stat().st_size


def test_dry_run(env: dict[str, str], tmpdir: Path, tmp_path: Path) -> None:
    before = jobs(env) if Path(env["OQ_DATADIR"], "db.sqlite3").exists() else []
    job = example(tmp_path) / "job.ini"
    code, out, err = run(env, job, "--dry-run")
    size = "classical, 181 sites, 8 sources, 18 realizations; about 40 tasks in its main phase"
    assert (code, out) == (0, f"{job}: {size}\n"), err
    code, out, _ = run(env, job, "--dry-run", "--json", "-p", "region=-24 -31, -24 -30, -23 -30")
    [row] = json.loads(out)["jobs"]
    assert code == 0 and 1 < row["sites"] < 181
    assert jobs(env) == before
    assert not list(tmpdir.iterdir()), "the engine makes a file there for its sources"


def test_a_job_that_was_checked_is_the_one_that_the_engine_runs(env: dict[str, str]) -> None:
    """The engine changes the parameters that it checks: sites of a file become a site model."""
    job = corpus("classical/case_13/job.ini")
    code, out, err = run(env, job, "--json")
    assert code == 0, err
    [ours] = json.loads(out)["jobs"]
    alone = env | {"OQ_DISTRIBUTE": "no"}
    argv = [sys.executable, "-m", "openquake.commands", "engine", "--run", str(job)]
    done = subprocess.run(argv, env=alone, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [path] = Path(env["OQ_DATADIR"]).glob(f"calc_{ours['job'] + 1}.hdf5")
    assert compare(path, Path(ours["datastore"])) == []


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(reports.JOBS))
def test_dry_run_in_each_mode(env: dict[str, str], job: str) -> None:
    code, out, err = run(env, corpus(f"{job}.ini"), "--dry-run")
    mode = job.partition("/")[0].replace("disagg", "disaggregation")
    sizes = r"\d+ sites?, (\d+ sources?, )?\d+ realizations?; about \d+ tasks in its main phase\n"
    assert code == 0 and re.fullmatch(rf".*job\w*\.ini: {mode}\w*, {sizes}", out), (out, err)


@pytest.mark.slow
def test_nothing_is_left_of_what_the_engine_has_started(
    env: dict[str, str], tmp_path: Path
) -> None:
    """As its own pool of processes is, when it is killed."""
    cfg, mark = tmp_path / "openquake.cfg", tmp_path / "mark"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(999)"
    code = (
        "import oq_runtime.activate, subprocess, sys; 'oq_runtime.engine.job' in sys.orig_argv and "
        f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=open({str(mark)!r}, 'w'))"
    )
    text = Path(env["OQ_CONFIG_FILE"]).read_text()
    cfg.write_text(text.replace("import oq_runtime.activate", code))
    done, _, err = run(env | {"OQ_CONFIG_FILE": str(cfg)}, corpus(TINY), "--dry-run")
    assert done == 0, err
    pid = int(mark.read_text())
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists()), "the engine's child is left"


def test_modules_beside_a_job_are_nobodys(env: dict[str, str], tmp_path: Path) -> None:
    """The folder of a job may be a colleague's, and what lies there is not run."""
    folder, mark = example(tmp_path), tmp_path / "mark"
    for name in ("msgspec", "zmq", "psutil", "numpy", "h5py", "toml", "click", "json", "secrets"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('{name} ')\n")
    command = Path(sys.executable).with_name("oq-run")  # as users do: Python's -m adds the folder
    done = subprocess.run(
        [command, "job.ini", "--dry-run"],
        env=env | {"PYTHONPATH": f"{env['PYTHONPATH']}:"},  # so it was meant for more
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["missing.ini"], "No such file"),
        (["--nonsense"], "No such option"),
        ([], "give a job file"),
        ([EXAMPLES / "hazard_classical/job.ini", "-p", "nonsense"], "name=value"),
        ([EXAMPLES / "hazard_classical/job.ini", "--cores", "0"], "--cores=0"),
        ([EXAMPLES / "hazard_classical/job.ini", "--log-level", "loud"], "log-level"),
        ([EXAMPLES / "hazard_classical/job.ini", "-p", "no_such=1"], "no_such"),
    ],
)
def test_json_of_what_is_refused(env: dict[str, str], arguments: list[object], word: str) -> None:
    code, out, err = run(env, *arguments, "--json")
    result = json.loads(out)
    assert code == result["exit"] == 2, err
    assert word in result["error"] and result["jobs"] == []


def test_help_names_the_commands_of_the_engine(env: dict[str, str]) -> None:
    code, out, _ = run(env, "--help")
    assert code == 0
    assert all(
        word in " ".join(out.split()) for word in ("--lhc", "--lo ID", "--eos ID DIR", "--dc")
    )


def test_interrupt(env: dict[str, str], tmpdir: Path) -> None:
    process = start(env, EXAMPLES / "hazard_classical/job.ini", "--json")
    descriptor = process.stderr
    assert descriptor is not None
    for line in descriptor:  # wait for the first tasks of the calculation
        if re.search(r"Sent \d+ classical", line):
            break
    else:
        pytest.fail("the job never sent its tasks")
    assert wait_for(lambda: session_processes(tmpdir, "worker-"), 20)
    started_s = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    took_s = time.monotonic() - started_s
    assert process.returncode == 130, err
    assert "Traceback" not in err
    result = json.loads(out)
    assert (result["exit"], result["error"]) == (130, "interrupted")
    [row] = result["jobs"]
    assert row["state"] == "aborted" and row["seconds"] > 0
    assert wait_for(lambda: not session_processes(tmpdir))
    assert jobs(env)[-1][1:] == ("aborted", 0)
    assert took_s < LIMIT_INTERRUPT_S, f"{took_s:.1f} s"
    code, told, err = run(env, "--explain", jobs(env)[-1][0])
    assert code == 0 and ": aborted, " in told.splitlines()[0], (told, err)


def test_relative_data_directory_and_exports_as_a_parameter(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    job = corpus("classical/case_02/job.ini")
    options = ["-p", "exports=csv", "--export-dir", out, "--json"]
    code, text, err = run(env | {"OQ_DATADIR": "data"}, job, *options)
    assert code == 0, err
    assert json.loads(text)["jobs"][0]["datastore"].startswith(f"{tmp_path}/data/")
    assert list(out.glob("*.csv"))
