"""``oq-run`` when something ends, fills up or is misspelt: exit code, message, state, leftovers.

Not covered: deaths of workers and of tasks (``test_starmap``), refused options and files
(``test_oq_run``).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from oq_runtime.commands.sessions import STAGE
from oq_runtime.core.limits import DEFAULTS
from oq_runtime.files import journal, private
from oq_runtime.session import launch
from tests.leftovers import LIMIT_S, wait_for
from tests.squatter import AS_ANYBODY

from .conftest import sessions
from .test_oq_run import EXAMPLES, corpus, edited, example, jobs, one_line, run, start

pytestmark = pytest.mark.timeout(240)

#: a small job that any engine completes in 2 s
SMALL = "classical/case_02/job.ini"


def state(env: dict[str, str], number: int) -> tuple[str, int]:
    """The status and ``is_running`` of a job in the database."""
    return {job: (status, is_running) for job, status, is_running in jobs(env)}[number]


def assert_closed(env: dict[str, str], number: int) -> None:
    """The datastore of a job that did not complete can be opened by whoever wants to look at it."""
    import h5py

    with h5py.File(Path(env["OQ_DATADIR"]) / f"calc_{number}.hdf5") as file:
        assert "oqparam" in file


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Calculating:
    """An ``oq-run`` of the hazard example that has sent its first classical tasks."""

    def __init__(self, env: dict[str, str], tmpdir: Path) -> None:
        self.tmpdir = tmpdir
        self.process = start(env, EXAMPLES / "hazard_classical/job.ini", "--no-progress")
        self.number = self._number_when_sent()
        [self.engine] = psutil.Process(self.process.pid).children()
        [directory] = sessions(tmpdir)
        broker, agent = json.loads((directory / "pids").read_text())
        self.broker, self.agent = psutil.Process(broker), psutil.Process(agent)
        workers = self.agent.children(recursive=True)
        assert workers, "an agent without workers did the tasks before"
        # recorded now: processes that have renamed themselves cannot be recognised later
        self.others = [self.engine, self.broker, self.agent, *workers]

    def _number_when_sent(self) -> int:
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.match(r"\[\S+ \S+ #(\d+) WARNING\] Sent \d+ classical", line):
                return int(found.group(1))
        pytest.fail("the job ended before it sent classical tasks:\n" + "".join(lines))

    def left(self) -> list[str]:
        lines = [f"process {process}" for process in alive(self.others)]
        return lines + [f"directory {path}" for path in sessions(self.tmpdir)]

    def end(self, phase: str) -> tuple[int, str]:
        """Exit code and stderr of ``oq-run``; it and its session must end within the limit."""
        started_s = time.monotonic()
        ended = wait_for(lambda: self.process.poll() is not None)
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        assert ended, f"{phase}: oq-run still runs after {LIMIT_S:.0f} s ({load})"
        rest_s = LIMIT_S - (time.monotonic() - started_s)
        clean = wait_for(lambda: not self.left(), rest_s)
        assert clean, f"{phase}: left after {LIMIT_S:.0f} s ({load}): {self.left()}"
        assert self.process.stderr is not None
        return self.process.returncode, self.process.stderr.read()


@pytest.fixture
def calculating(env: dict[str, str], tmpdir: Path) -> Iterator[Calculating]:
    calculating = Calculating(env, tmpdir)
    yield calculating
    calculating.process.kill()
    calculating.process.wait()


# ---- a process of the session ends


@pytest.mark.parametrize("name", ["SIGTERM", "SIGQUIT"])
def test_signal(env: dict[str, str], calculating: Calculating, name: str) -> None:
    phase = f"{name} to oq-run"
    calculating.process.send_signal(signal.Signals[name])
    code, err = calculating.end(phase)
    assert code == 130, (phase, err)
    assert "interrupted" in one_line(err), phase
    assert state(env, calculating.number) == ("aborted", 0), phase
    assert_closed(env, calculating.number)


#: the disk takes five seconds when the files of a job are closed, which begins with an alarm
SLOW_DISK = """
import signal, time
real = signal.alarm
signal.alarm = lambda seconds: (real(seconds), time.sleep(5))
"""


def test_interrupted_job_closes_its_files_on_a_slow_disk(
    env: dict[str, str], tmpdir: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    path = os.pathsep.join(filter(None, [str(tmp_path / "slow"), env.get("PYTHONPATH", "")]))
    calculating = Calculating(env | {"PYTHONPATH": path}, tmpdir)
    calculating.process.send_signal(signal.SIGINT)
    try:
        _, err = calculating.process.communicate(timeout=60)
    finally:
        calculating.process.kill()
    assert calculating.process.returncode == 130 and "interrupted" in err.splitlines()[-1], err
    assert "waiting: the job has ended; its files are being closed" in err
    assert_closed(env, calculating.number)


@pytest.mark.parametrize(
    "victim, expected, words",
    [
        ("engine", 1, r"engine process .*SIGKILL"),
        ("broker", 1, r"broker"),
        ("agent", 3, r"agent"),
    ],
)
def test_kill(
    env: dict[str, str], calculating: Calculating, victim: str, expected: int, words: str
) -> None:
    phase = f"SIGKILL to the {victim}"
    getattr(calculating, victim).kill()
    code, err = calculating.end(phase)
    assert code == expected, (phase, err)
    assert re.search(words, one_line(err)), (phase, err)
    assert state(env, calculating.number) == ("failed", 0), phase
    if victim != "engine":
        assert_closed(env, calculating.number)


def test_stopped_process_is_named(calculating: Calculating) -> None:
    said = calculating.process.stderr
    assert said is not None
    for name in ("engine", "broker", "agent"):
        victim = getattr(calculating, name)
        victim.suspend()
        told = f"waiting: the {name} process of this job is stopped; kill -CONT {victim.pid} lets"
        assert any(line.startswith(told) for line in said), "the job has ended"
        victim.resume()
    calculating.process.send_signal(signal.SIGINT)
    code, err = calculating.end("SIGINT")
    assert code == 130, err


def test_kill_of_oq_run(env: dict[str, str], calculating: Calculating) -> None:
    # nobody is left to tell the database; the next job must not wait for this one
    phase = "SIGKILL to oq-run"
    calculating.process.kill()
    calculating.end(phase)
    code, out, err = run(env, corpus(SMALL), "--json")
    assert code == 0, (phase, "the next job", out, err)
    assert json.loads(out)["jobs"][0]["state"] == "complete", (phase, out)
    assert state(env, calculating.number) == ("failed", 0), phase


def launching(env: dict[str, str], **more: str) -> subprocess.Popen[str]:
    """Start the launcher of a session of this process, with one worker slot."""
    command = [sys.executable, "-m", "oq_runtime.session.launch", str(os.getpid()), "1", "1000000"]
    command += [DEFAULTS.as_text(), "info", "normal"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env | more, stdout=pipe, stderr=pipe, text=True)


def launched(launcher: subprocess.Popen[str]) -> Path:
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, err
    return Path(json.loads(out)["directory"])


def kill(pids: list[int]) -> None:
    """Kill processes at once and wait for their ends."""
    processes = [psutil.Process(pid) for pid in pids]
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, signum)
    assert wait_for(lambda: not alive(processes)), alive(processes)


@pytest.mark.light
def test_power_cut(env: dict[str, str], tmpdir: Path, tmp_path: Path) -> None:
    # all processes of a session at once: nobody is left to tidy up but the next session
    def made(name: str, lock: str) -> Path:
        (tmpdir / name).mkdir(mode=0o700)
        (tmpdir / name / "lock").write_text(lock)
        return tmpdir / name

    cut, living = launched(launching(env)), launched(launching(env))
    kill(launch.pids(cut))
    memory = private.memory_of(cut)
    assert cut.exists() and memory.exists(), "there is nothing to tidy up"
    # a reboot empties the shared memory
    made("oq-run-rebooted", socket.gethostname())
    kept = [made("oq-run-elsewhere", "another"), made("oq-run-without-locks", "")]
    for name, age_s in (("killed-at-once", private.STALE_SECS + 60), ("made-just-now", 0)):
        unlocked = made(f"oq-run-{name}", "")
        (unlocked / "lock").rename(unlocked / "lock.new")
        os.utime(unlocked, (time.time() - age_s,) * 2)
    kept.append(unlocked)
    spelt = tmp_path / "spelt"
    spelt.symlink_to(tmpdir)
    newest = tmpdir / launched(launching(env, TMPDIR=str(spelt))).name
    assert sessions(tmpdir) == sorted([living, newest, *kept])
    assert not memory.exists()
    for directory in kept:
        shutil.rmtree(directory)
    for directory in (living, spelt / newest.name):  # as its processes spell it
        launch.stop(directory)


@pytest.mark.light
def test_the_lock_alone_keeps_a_session(tmpdir: Path) -> None:
    session = tmpdir / "oq-run-without-a-process"
    session.mkdir(mode=0o700)
    lock = launch.lock(session)
    launch.sweep(tmpdir)
    assert sessions(tmpdir) == [session]
    os.close(lock)
    launch.sweep(tmpdir)
    assert not sessions(tmpdir)


@pytest.mark.light
def test_a_session_whose_lock_was_cleaned_away_stays(tmpdir: Path) -> None:
    """As by systemd-tmpfiles, which removes plain files of ten days and spares sockets."""
    session = tmpdir / "oq-run-for-weeks"
    session.mkdir(mode=0o700)
    lock = launch.lock(session)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(session / "control"))
        (session / "lock").unlink()
        os.utime(session, (time.time() - private.STALE_SECS - 60,) * 2)
        launch.sweep(tmpdir)
        assert sessions(tmpdir) == [session]
    os.close(lock)
    shutil.rmtree(session)


@pytest.mark.light
@pytest.mark.parametrize("stays", ["broker", "agent"])
def test_one_process_keeps_a_session(env: dict[str, str], tmpdir: Path, stays: str) -> None:
    starting = (
        "import os; from oq_runtime import config; from oq_runtime.session import launch; "
        "print(launch.start(config.Config.from_sections(config.read()), os.getppid()))"
    )
    # without stdin, whose number the next file to be opened gets
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", starting]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    session = Path(done.stdout.strip())
    stopped, dead = launch.pids(session)
    if stays == "agent":
        stopped, dead = dead, stopped
    os.kill(stopped, signal.SIGSTOP)
    kill([dead])
    another = launched(launching(env))
    assert sessions(tmpdir) == sorted([session, another])
    os.kill(stopped, signal.SIGCONT)
    launch.stop(session)
    launch.stop(another)


@pytest.mark.light
def test_what_tasks_have_started_ends_with_a_session(env: dict[str, str], tmpdir: Path) -> None:
    """Also where the agent was killed, which would have ended it."""
    session = launched(launching(env))
    _, agent = launch.pids(session)
    assert wait_for(psutil.Process(agent).children, 60), "the agent has no fork server"
    inherited = psutil.Process(agent).children()[0].environ()
    left, other = (
        subprocess.Popen(["sleep", "600"], env=given, start_new_session=True)
        for given in (inherited, inherited | {launch.MARK: f"{session}-of-another"})
    )
    kill([agent])
    launch.stop(session)
    assert left.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


# ---- oq abort


def abort(env: dict[str, str], number: int) -> str:
    """What ``oq abort`` says; it must not fail."""
    result = subprocess.run(
        [sys.executable, "-m", "openquake.commands", "abort", str(number)],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


#: a program that has a title and waits
TITLED = "import sys, setproctitle, time; setproctitle.setproctitle(sys.argv[1]); time.sleep(999)"


@pytest.mark.slow
def test_abort(env: dict[str, str], calculating: Calculating) -> None:
    # beside a process that has the title, as job of another database
    title = f"oq-job-{calculating.number}"
    foreign = subprocess.Popen([sys.executable, "-c", TITLED, title])
    try:
        assert wait_for(lambda: psutil.Process(foreign.pid).name() == title)
        said = abort(env, calculating.number)
        assert f"Job {calculating.number} aborted" in said
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()
    code, err = calculating.end("oq abort")
    assert code == 130, err
    assert "aborted from elsewhere" in one_line(err)
    assert state(env, calculating.number) == ("aborted", 0), said
    assert_closed(env, calculating.number)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_row_that_says_aborted_or_is_deleted(
    env: dict[str, str], calculating: Calculating, stopped: bool
) -> None:
    # as after an abort that told another process, or one that does not listen
    if stopped:
        calculating.engine.suspend()
    change = "UPDATE job SET status='aborted'" if stopped else "DELETE FROM job"
    with contextlib.closing(sqlite3.connect(Path(env["OQ_DATADIR"], "db.sqlite3"))) as db, db:
        db.execute(f"{change} WHERE id=?", (calculating.number,))
    code, err = calculating.end(change)
    assert code == 130, err
    if stopped:
        assert "aborted from elsewhere" in one_line(err)
        assert state(env, calculating.number) == ("aborted", 0)
        return
    assert one_line(err) == "oq-run: the job was deleted from elsewhere"
    assert calculating.number not in journal.numbers(Path(env["OQ_DATADIR"]))
    assert calculating.number not in [number for number, *_ in jobs(env)]


@pytest.mark.slow
def test_abort_of_a_killed_job(env: dict[str, str], calculating: Calculating) -> None:
    phase = "SIGKILL to the engine and oq-run"
    calculating.process.kill()
    calculating.engine.kill()
    calculating.end(phase)
    assert state(env, calculating.number) == ("executing", 1), f"{phase}: nothing to abort"
    said = abort(env, calculating.number)
    assert "Unable to find a process" in said
    assert state(env, calculating.number) == ("failed", 0), said
    with contextlib.closing(sqlite3.connect(Path(env["OQ_DATADIR"], "db.sqlite3"))) as db, db:
        db.execute("UPDATE job SET status='\x1b[31mred' WHERE id=?", (calculating.number,))
    assert "\\x1b[31mred" in abort(env, calculating.number), "whoever reaches the table writes it"


# ---- other jobs, and what they leave


def row(env: dict[str, str], pid: int, status: str = "executing") -> int:
    """Put a job of this host and user into the database; return its number."""
    database = Path(env["OQ_DATADIR"], "db.sqlite3")
    if not database.exists():
        run(env, corpus(SMALL), "--json")
    running = status in ("created", "submitted", "executing")
    values = (getpass.getuser(), status, running, pid, socket.gethostname(), env["OQ_DATADIR"])
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        cursor = db.execute(
            "INSERT INTO job (description, user_name, calculation_mode, status, is_running, pid, "
            "host, ds_calc_dir) VALUES ('test', ?, 'classical', ?, ?, ?, ?, ?)",
            values,
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid


def test_wait_for_another_job(env: dict[str, str]) -> None:
    before = subprocess.Popen([sys.executable, "-c", TITLED, "oq-job-before"])
    try:
        assert wait_for(lambda: psutil.Process(before.pid).name() == "oq-job-before")
        number = row(env, before.pid)
        process = start(env, corpus(SMALL), "--json", "--log-level", "error")
        assert process.stderr is not None
        line = process.stderr.readline()
        told_s = time.monotonic()
        assert re.match(rf"waiting for job {number} of {getpass.getuser()} \(executing", line), line
        assert "serialize_jobs" in line and f"oq abort {number}" in line
        assert [status for _, status, _ in jobs(env)[-2:]] == ["executing", "submitted"]
        [stage] = Path(env["TMPDIR"]).glob(f"{launch.PREFIX}*/{STAGE}")
        assert wait_for(lambda: stage.read_text() == "waiting for another job")
        watching = start(env, "--watch", jobs(env)[-1][0])
        assert (
            watching.stderr is not None and "waiting for another job" in watching.stderr.readline()
        )
        time.sleep(3)  # the subject of the test: it does not count as run time
    finally:
        before.kill()
        before.wait()
    out, err = process.communicate(timeout=60)
    waited_s = time.monotonic() - told_s
    assert process.returncode == 0, err
    assert watching.wait(30) == 0
    assert state(env, number) == ("failed", 0)
    [job] = json.loads(out)["jobs"]
    assert job["seconds"] < waited_s - 3, "the wait counts as run time"


def test_pid_of_another_program(env: dict[str, str]) -> None:
    with subprocess.Popen(["sleep", "999"]) as other:
        try:
            number = row(env, other.pid)
            code, out, err = run(env, corpus(SMALL), "--json")
        finally:
            other.kill()
    assert code == 0, (out, err)
    assert state(env, number) == ("failed", 0)
    assert f"job {number} of {getpass.getuser()} did not come to its end" in err


@contextlib.contextmanager
def own_database(env: dict[str, str], folder: Path) -> Iterator[dict[str, str]]:
    """The environment with a data directory and a job database of its own, not made yet."""
    text = Path(env["OQ_CONFIG_FILE"]).read_text()
    cfg = folder / "openquake.cfg"
    cfg.write_text(re.sub(r"file = .*", f"file = {folder}/oqdata/db.sqlite3", text))
    (folder / "oqdata").mkdir()
    yield env | {"OQ_CONFIG_FILE": str(cfg), "OQ_DATADIR": str(folder / "oqdata")}


def test_first_start_after_one_that_was_interrupted(env: dict[str, str], tmp_path: Path) -> None:
    with own_database(env, tmp_path) as own:
        (tmp_path / "oqdata" / "db.sqlite3").write_bytes(b"")
        code, out, err = run(own, corpus(SMALL), "--json")
    assert code == 0, (out, err)
    assert jobs(own) == [(1, "complete", 0)]


def test_results_of_another_database(env: dict[str, str], tmp_path: Path) -> None:
    with own_database(env, tmp_path) as own:
        for number in (1, 2, 3):
            (tmp_path / "oqdata" / f"calc_{number}.hdf5").write_bytes(b"")
        code, out, err = run(own, corpus(SMALL), "--json")
    assert code == 0, (out, err)
    assert json.loads(out)["jobs"][0]["job"] == 4


@pytest.mark.slow
def test_locked_database(env: dict[str, str], calculating: Calculating) -> None:
    phase = "SIGKILL to the engine, and a locked database"
    with contextlib.closing(sqlite3.connect(Path(env["OQ_DATADIR"], "db.sqlite3"))) as db:
        db.execute("BEGIN IMMEDIATE")
        calculating.engine.kill()
        code, err = calculating.end(phase)
        db.rollback()
    assert code == 1, (phase, err)
    assert "Traceback" not in err and "the engine process was killed by SIGKILL" in err
    assert re.search(r"the job database \S+: database is locked; the next oq-run will", err), err


# ---- signals that a parent ignores


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HUP", "INT"])
def test_ignored_signal(env: dict[str, str], name: str) -> None:
    # as with nohup, or in the background of a script
    command = [sys.executable, "-m", "oq_runtime.commands.run", str(corpus(SMALL)), "--json"]
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' {name}; exec \"$@\"", "sh", *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        os.killpg(process.pid, signal.Signals[f"SIG{name}"])
        if "Exposing the outputs" in line:
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["jobs"][0]["state"] == "complete"


# ---- start-up


CLUSTER = "[distribution]\noq_distribute = zmq\n[zworkers]\nhost_cores = 192.0.2.1 1\n"
#: calls ``oq engine`` with each of the arguments, and prints the exit codes
ENGINE = """
import sys
from openquake.baselib import sap
from openquake.commands import engine
for words in sys.argv[1:]:
    try:
        sap.run(engine.main, words.split())
    except SystemExit as exc:
        print(exc.code)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have files of others")
def test_refused_cluster(env: dict[str, str], tmp_path: Path) -> None:
    """By the engine's own command as well: one line, and no job of which the database knows.

    Here by somebody outside the group of the cluster, whose secret and directories are shut.
    """
    cfg, secret, theirs = (tmp_path / name for name in ("openquake.cfg", "authkey", "theirs"))
    secret.write_text(32 * "s")
    theirs.mkdir()
    for path in secret, theirs:
        path.chmod(0o700)
        os.chown(path, 12345, 12345)
    cluster = f"{CLUSTER}[dbserver]\nreceiver_host = 192.0.2.9\nauthkey = file:{secret}\n"
    cfg.write_text(Path(env["OQ_CONFIG_FILE"]).read_text().replace("[dbserver]\n", cluster))
    before = jobs(env)
    result = subprocess.run(
        [*AS_ANYBODY, sys.executable, "-c", ENGINE, f"--run {corpus(SMALL)}", "--lhc"],
        env=env | {"OQ_CONFIG_FILE": str(cfg), "OQ_DATADIR": str(theirs / "mine/oqdata")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["2", "2"], result.stderr
    run, lhc = result.stderr.splitlines()
    assert "ask its administrator to put you into the group of the file, and log in again" in run
    assert f"{theirs}/mine/oqdata: Permission denied; ask the owner of" in lhc
    assert jobs(env) == before


@pytest.mark.parametrize("delay_s", [0.05, 0.5, 1.5])
def test_interrupt_during_start(env: dict[str, str], tmpdir: Path, delay_s: float) -> None:
    phase = f"SIGINT {delay_s} s after the start"
    process = start(env, EXAMPLES / "hazard_classical/job.ini", "--json")
    time.sleep(delay_s)  # the subject of the test
    started_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    took_s = time.monotonic() - started_s
    if err.startswith("Fatal Python error: init_"):
        return  # it came while the interpreter began, before there was anything of ours
    # a shell shows 130 as well for a process that SIGINT ended before Python had a handler
    assert process.returncode in (130, -signal.SIGINT), (phase, err)
    assert "Traceback" not in err, (phase, err)
    if process.returncode == 130:
        assert json.loads(out)["exit"] == 130, (phase, out)
    assert took_s < LIMIT_S, f"{phase}: ended after {took_s:.1f} s, load {os.getloadavg()[0]:.1f}"
    assert wait_for(lambda: not sessions(tmpdir)), f"{phase}: {sessions(tmpdir)}"


# ---- full disks


@contextlib.contextmanager
def tmpfs(path: Path, nbytes: int) -> Iterator[None]:
    """Mount a file system of ``nbytes`` at ``path``; skips where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"this root cannot mount: {result.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Fill the file system of ``folder`` but for ``leave`` bytes."""
    stat = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(stat.f_bavail * stat.f_frsize - leave))


def test_full_data_directory(env: dict[str, str], tmp_path: Path) -> None:
    with tmpfs(tmp_path, 1 << 20):
        fill(tmp_path)
        code, _, err = run(env | {"OQ_DATADIR": str(tmp_path)}, corpus(SMALL), "--no-progress")
    assert code == 2, err
    assert str(tmp_path) in one_line(err)


@pytest.mark.slow
@pytest.mark.parametrize("leave", [56_000, 64_000, 120_000])
def test_data_directory_fills_up(env: dict[str, str], tmp_path: Path, leave: int) -> None:
    # the datastore of the job takes 170 kB; with 50 to 65 kB HDF5 crashes in the middle of a
    # write, with 120 kB also when Python ends
    before = len(jobs(env)) if Path(env["OQ_DATADIR"], "db.sqlite3").exists() else 0
    with tmpfs(tmp_path, 4 << 20):
        fill(tmp_path, leave)
        code, _, err = run(env | {"OQ_DATADIR": str(tmp_path)}, corpus(SMALL), "--no-progress")
    assert code == 1, err
    line = one_line(err)
    assert "No space left" in line and str(tmp_path) in line
    assert [job[1:] for job in jobs(env)[before:]] == [("failed", 0)]


def test_limit_of_the_size_of_a_file(env: dict[str, str], tmp_path: Path) -> None:
    """Above that of the new job database, and below that of the datastore, 170 kB."""
    with own_database(env, tmp_path) as own:
        process = start(own, corpus(SMALL), "--no-progress")
        try:
            assert process.stderr is not None
            assert any(" running " in line for line in process.stderr), "there is no job"
            [engine] = psutil.Process(process.pid).children()
            engine.rlimit(psutil.RLIMIT_FSIZE, (130_000, 130_000))
            _, err = process.communicate(timeout=100)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 1, err
    line = one_line(err)
    assert "File too large" in line and "raise the limit of the size of a file (ulimit -f)" in line


def test_full_temporary_directory(env: dict[str, str], tmpdir: Path) -> None:
    with tmpfs(tmpdir, 64 << 10):
        fill(tmpdir)
        code, _, err = run(env, corpus(SMALL), "--no-progress")
        assert code == 3, (code, err)
        assert re.search("No space left|TMPDIR|temporary", one_line(err))
        assert wait_for(lambda: not sessions(tmpdir)), sessions(tmpdir)


# ---- parameters that the engine does not know


def test_unknown_parameter(env: dict[str, str], tmp_path: Path) -> None:
    job = edited(tmp_path, "[general]\n", "[general]\ncolour = blue\n")
    code, _, err = run(env, job, "--no-progress")
    assert code == 2, err
    line = one_line(err)
    assert str(job) in line and "colour" in line


def test_misspelt_parameter(env: dict[str, str]) -> None:
    job = EXAMPLES / "hazard_classical/job.ini"
    code, _, err = run(env, job, "-p", "truncation_levl=3", "--no-progress")
    assert code == 2, err
    line = one_line(err)
    assert "truncation_levl" in line and re.search(r"truncation_level\b", line)


# ---- whole jobs


@pytest.mark.slow
def test_event_based_risk_example(env: dict[str, str], tmp_path: Path) -> None:
    """With an exposure as a spreadsheet saves it."""
    import h5py

    job = example(tmp_path, "event_based_risk") / "job.ini"
    exposure = job.with_name("exposure.csv")
    lines = exposure.read_text().splitlines()
    exposure.write_text("\n".join(lines), encoding="utf-8-sig", newline="\r\n")
    code, out, err = run(env, job, "--json")
    assert code == 0, (out, err)
    result = json.loads(out)
    assert result["exit"] == 0 and result["error"] == ""
    [job] = result["jobs"]
    assert job["state"] == "complete"
    assert {output["name"] for output in job["outputs"]} >= {"Average Asset Losses Statistics"}
    assert state(env, job["job"]) == ("complete", 0)
    with h5py.File(job["datastore"]) as file:
        ids = file["assetcol/array"]["id"].tolist()
    assert sorted(ids) == sorted(line.partition(",")[0].encode() for line in lines[1:])


HAZARD, RISK = "classical_damage/case_1a/job_haz.ini", "classical_damage/case_1a/job_risk.ini"


#: seconds that the engine takes to be imported, at least
IMPORT_S = 1.0


def exported(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.csv") if path.stat().st_size)


def parent(env: dict[str, str], number: int) -> int:
    """The job from whose hazard ``number`` started, as its datastore says."""
    import h5py

    with h5py.File(Path(env["OQ_DATADIR"]) / f"calc_{number}.hdf5") as file:
        return int(json.loads(file["oqparam"][()])["hazard_calculation_id"])


@pytest.mark.slow
def test_hazard_and_risk_files(env: dict[str, str], tmp_path: Path) -> None:
    export = ["--exports", "csv", "--export-dir", tmp_path / "out"]
    last = row(env, os.getpid(), "failed")
    old = Path(env["OQ_DATADIR"], f"calc_{last + 2}.hdf5")  # of another database
    old.write_bytes(b"")
    started_s = time.monotonic()
    fault = {"OQ_RUNTIME_FAULT": "before_end:0:1"}  # the first task of the hazard
    # and two more, of which one is deleted and one is aborted before its turn
    process = start(env | fault, *map(corpus, [HAZARD, RISK, RISK, RISK]), "--json", *export)
    assert process.stderr is not None
    assert any(" running " in line for line in process.stderr), "there is no job"
    with contextlib.closing(sqlite3.connect(Path(env["OQ_DATADIR"], "db.sqlite3"))) as db, db:
        db.execute("DELETE FROM job WHERE id=?", (last + 4,))
        db.execute("UPDATE job SET status='aborted' WHERE id=?", (last + 5,))
    out, err = process.communicate(timeout=200)
    took_s = time.monotonic() - started_s
    assert process.returncode == 130, (out, err)
    result = json.loads(out)
    hazard, risk, third, fourth = result["jobs"]
    assert (hazard["job"], risk["job"]) == (last + 1, last + 3)
    assert [job["state"] for job in (hazard, risk)] == ["complete", "complete"]
    assert third["state"] == "deleted" and third["job"] not in [row for row, *_ in jobs(env)]
    assert fourth["state"] == state(env, fourth["job"])[0] == "aborted"
    assert result["error"] == (
        f"job {last + 4} was deleted before its turn; job {last + 5} was aborted before its turn"
    )
    old.unlink()
    assert parent(env, risk["job"]) == hazard["job"]
    assert (hazard["retries"], risk["retries"]) == (1, 0), "each job has its own"
    assert hazard["seconds"] + risk["seconds"] < took_s - IMPORT_S
    for job in (hazard, risk):
        names = exported(tmp_path / "out")
        assert any(name.endswith(f"_{job['job']}.csv") for name in names), names


def test_two_jobs_from_one_parent_that_a_reader_has_open(env: dict[str, str]) -> None:
    """As a notebook has it: neither the jobs nor the reader are refused."""
    import h5py

    code, out, err = run(env, corpus("classical_damage/case_1a/job_haz.ini"), "--json")
    assert code == 0, (out, err)
    [hazard] = json.loads(out)["jobs"]
    parent = hazard["job"]
    risk = corpus("classical_damage/case_1a/job_risk.ini")
    with h5py.File(Path(env["OQ_DATADIR"]) / f"calc_{parent}.hdf5") as file:
        both = [start(env, risk, "--hc", parent, "--no-progress") for _ in range(2)]
        said = [process.communicate(timeout=200)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert "hcurves-rlzs" in file or "hcurves-stats" in file
    assert {state for number, state, _ in jobs(env) if number >= parent} == {"complete"}


def test_other_sites_than_those_of_the_parent(env: dict[str, str], tmp_path: Path) -> None:
    """The engine takes them for the same, and fails somewhere by an index."""
    job = corpus("classical/case_02/job.ini")
    code, out, err = run(env, job, "-p", "sites=0.0 0.0, 0.1 0.0, 0.2 0.0", "--json")
    assert code == 0, err
    [parent] = json.loads(out)["jobs"]
    child = ["-p", "sites=0.0 0.0, 0.2 0.0", "--hc", parent["job"]]
    code, out, err = run(env, job, *child, "--json")
    assert code == 1, (out, err)
    said = (
        f"; its sites (2) are not those of job {parent['job']} (3), from which it starts: give it "
        "the same sites, or none"
    )
    assert json.loads(out)["error"].endswith(said), out
    # as the WebUI runs it, which shows the log
    shutil.copytree(job.parent, folder := tmp_path / "job")
    text = (folder / "job.ini").read_text()
    (folder / "job.ini").write_text(text.replace("sites = 0.0 0.0", "sites = 0.0 0.0, 0.2 0.0"))
    words = ["--run", str(folder / "job.ini"), "--hc", str(parent["job"])]
    oq = [sys.executable, "-m", "openquake.commands", "engine"]
    done = subprocess.run([*oq, *words], env=env, capture_output=True, text=True)
    assert done.returncode, (done.stdout, done.stderr)
    show = [*oq, "--show-log", str(jobs(env)[-1][0])]
    log = subprocess.run(show, env=env, capture_output=True, text=True).stdout
    assert said in log, log


@pytest.mark.slow
def test_calculations_come_from_another_machine(env: dict[str, str], tmp_path: Path) -> None:
    """As docs/running.md says: they are listed there, and risk starts from their hazard."""
    code, out, err = run(env, corpus(HAZARD), "--json")
    assert code == 0, (out, err)
    [hazard] = json.loads(out)["jobs"]
    there = tmp_path / "oqdata"
    cfg = Path(env["OQ_CONFIG_FILE"]).read_text()
    (tmp_path / "openquake.cfg").write_text(cfg.replace(str(Path(env["OQ_DATADIR"])), str(there)))
    new = env | {"OQ_CONFIG_FILE": str(tmp_path / "openquake.cfg"), "OQ_DATADIR": str(there)}
    oq = (sys.executable, "-m", "openquake.commands")
    for home, *words in (
        (env, "dump", "all.zip"), (new, "restore", "all.zip", there), (new, "engine", "--lhc")
    ):  # fmt: skip
        done = subprocess.run([*oq, *words], env=home, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert f" {hazard['job']}| " in done.stdout, done.stdout
    code, out, err = run(new, corpus(RISK), "--hc", hazard["job"], "--json")
    assert code == 0, (out, err)
    [risk] = json.loads(out)["jobs"]
    assert parent(new, risk["job"]) == hazard["job"] < risk["job"]


@pytest.mark.slow
def test_start_from_the_last_job(env: dict[str, str], tmp_path: Path) -> None:
    code, out, err = run(env, corpus(HAZARD), "--json")
    assert code == 0, (out, err)
    [hazard] = json.loads(out)["jobs"]
    export = ["--exports", "csv", "--export-dir", tmp_path / "out"]
    code, out, err = run(env, corpus(RISK), "--hc", "-1", "--json", *export)
    assert code == 0, (out, err)
    [risk] = json.loads(out)["jobs"]
    assert risk["state"] == "complete"
    assert parent(env, risk["job"]) == hazard["job"]
    names = exported(tmp_path / "out")
    assert any(name.endswith(f"_{risk['job']}.csv") for name in names), names
