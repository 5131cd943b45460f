"""The job table against real databases of the installed engine, run once per series.

Not covered: what ``oq-run`` makes of it (``tests/local``).
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import inspect
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import pytest

from oq_runtime import processes
from oq_runtime.engine import abort, job, jobtable, queue
from oq_runtime.engine.jobtable import DatabaseError, JobTable, Outside, Status
from oq_runtime.errors import InputError
from oq_runtime.files import private
from tests.leftovers import wait_for

#: a new virtual environment compiles the engine for minutes
pytestmark = pytest.mark.timeout(900)

#: a program that has a title and waits
TITLED = "import sys, setproctitle, time; setproctitle.setproctitle(sys.argv[1]); time.sleep(99)"


class Database:
    """A job database of the engine's, and its actions on it."""

    def __init__(self, path: Path, wait_s: float = 5.0) -> None:
        from openquake.commonlib import dbapi

        self.path = path
        how = {"isolation_level": None, "detect_types": sqlite3.PARSE_DECLTYPES, "timeout": wait_s}
        self.db = dbapi.Db(sqlite3.connect, str(path), **how)

    def call(self, action: str, *arguments: Any) -> Any:
        from openquake.server.db import actions

        if found := getattr(actions, action, None):
            return found(self.db, *arguments)
        return self.db(action, *arguments)  # SQL, as ``logs.dbcmd`` takes it

    def job(self, status: str = "executing", host: str = socket.gethostname(), **more: Any) -> int:
        """Make a row and return its number."""
        arguments = [str(self.path.parent), "classical", "a test", getpass.getuser(), None, host]
        number = int(self.call("create_job", *arguments))
        self.call("update_job", number, {"status": status, "start_time": datetime.now(UTC), **more})
        return number

    def status(self, number: int) -> str:
        return str(self.call("get_job", number).status)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "db.sqlite3"
    jobtable.make(path)
    return path


@pytest.fixture
def database(made: Path, tmp_path: Path) -> Database:
    (tmp_path / "db.sqlite3").write_bytes(made.read_bytes())
    return Database(tmp_path / "db.sqlite3")


@pytest.fixture
def table(database: Database) -> JobTable:
    return JobTable(database.call)


@contextlib.contextmanager
def program(*command: str) -> Iterator[int]:
    process = subprocess.Popen(command)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def titled(title: str) -> contextlib.AbstractContextManager[int]:
    @contextlib.contextmanager
    def started() -> Iterator[int]:
        with program(sys.executable, "-c", TITLED, title) as pid:
            assert wait_for(lambda: (seen := processes.look(pid)) and seen.name == title)
            yield pid

    return started()


def no_process() -> int:
    """A pid that nobody has."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# ---- a database that is not there yet


def whole(path: Path) -> bool:
    return Database(path).job() == 1


def test_made_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite3"
    jobtable.make(path)
    assert whole(path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f".{path.name}.")] == [
        f".{path.name}.lock"
    ]


def test_made_from_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite3"
    path.write_bytes(b"")
    jobtable.make(path)
    assert whole(path)


def half_made() -> list[str]:
    """The statements with which the engine begins a database."""
    from openquake.server.db.schema import upgrades

    script = Path(upgrades.__file__).parent / "0000-base_schema.sql"
    return [text for text in script.read_text().split("\n\n") if text.strip()]


@pytest.mark.parametrize("statements", [0, 1, 3, None], ids=["page", "job", "some", "base"])
def test_made_from_half_a_database(tmp_path: Path, statements: int | None) -> None:
    path = tmp_path / "db.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for text in half_made()[:statements]:
            connection.execute(text)
        connection.commit()
    jobtable.make(path)
    assert whole(path)


def test_an_interrupted_start_leaves_no_half(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite3"
    jobtable.made(path)  # whatever is imported for it
    for pause_s in (0.0, 0.01, 0.03, 0.06):
        child = os.fork()
        if child == 0:
            jobtable.make(path)
            os._exit(0)
        time.sleep(pause_s)  # the subject of the test
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not path.exists() or jobtable.made(path), pause_s
    jobtable.make(path)
    assert whole(path)


def test_two_first_starts(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite3"
    jobtable.made(path)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            jobtable.make(path)
            Database(path).job()
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert whole_ids(path) == [1, 2, 3]


def whole_ids(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [number for (number,) in connection.execute("SELECT id FROM job ORDER BY id")]


def test_a_database_with_jobs_is_kept(database: Database) -> None:
    number = database.job("complete")
    jobtable.make(database.path)
    assert database.status(number) == "complete"


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("of the user")
    lock = tmp_path / ".db.sqlite3.lock"
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(sqlite3.OperationalError, match=str(lock)):
        jobtable.make(tmp_path / "db.sqlite3")
    assert (tmp_path / "precious").read_text() == "of the user"


def test_a_lock_that_is_never_given_back_is_waited_for_with_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobtable, "LOCK_SECS", 0.3)
    with (tmp_path / ".db.sqlite3.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobtable.make(tmp_path / "db.sqlite3")
    assert jobtable.made(tmp_path / "db.sqlite3")


def test_what_is_no_database_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite3"
    path.write_bytes(b"not a database " * 1000)
    with pytest.raises(sqlite3.DatabaseError):
        jobtable.make(path)
    assert path.read_bytes() == b"not a database " * 1000


def test_tables_older_than_the_engine(database: Database, table: JobTable) -> None:
    table.check()
    database.db(
        "DELETE FROM revision_info WHERE version = (SELECT MAX(version) FROM revision_info)"
    )
    with pytest.raises(InputError, match="upgrade-db"):
        table.check()


# ---- jobs whose process is gone


def test_mend(database: Database, table: JobTable) -> None:
    gone = no_process()
    with titled("oq-job-1") as running, program("sleep", "99") as sleeping:
        lives = database.job(pid=running)
        assert lives == 1
        dead = {
            "no such process": database.job(pid=gone),
            "waited": database.job("submitted", pid=gone),
            "created": database.job("created", pid=gone),
            "another program": database.job(pid=sleeping),
            "older than the process": database.job(
                pid=os.getpid(), start_time=datetime.now(UTC) - timedelta(days=3)
            ),
            "before the boot": database.job(
                pid=os.getpid(), start_time=datetime(2020, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
            ),
        }
        kept = {
            "alive": lives,
            "this process": database.job(pid=os.getpid()),
            "without a pid": database.job("created"),
            "on another host": database.job(host="elsewhere", pid=gone),
        }
        ended = database.job("complete", pid=gone)
        mended = [job.id for job in table.mend()]
    assert mended == sorted(dead.values())
    for number in mended:  # for those who look there
        [line] = database.call("get_log", number)
        assert re.search(r" ERROR\] oq_runtime its process is gone", line)
    assert {what: database.status(number) for what, number in dead.items()} == dict.fromkeys(
        dead, "failed"
    )
    statuses = {what: database.status(number) for what, number in kept.items()}
    assert not [what for what, status in statuses.items() if status == "failed"]
    assert database.status(ended) == "complete"


def test_a_job_of_days_is_found(database: Database, table: JobTable) -> None:
    # the engine's get_executing_jobs leaves out what began more than two days ago
    number = database.job(pid=no_process(), start_time=datetime.now(UTC) - timedelta(days=9))
    assert [job.id for job in table.unfinished()] == [number]


def test_the_start_of_the_webui_fails_the_lost_jobs_alone(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openquake.server.db import actions

    monkeypatch.setattr(actions, "reset_is_running", actions.reset_is_running)
    jobtable.install_actions(actions)
    lives, lost = database.job(pid=os.getpid()), database.job(pid=no_process())
    database.call("reset_is_running")
    assert (database.status(lives), database.status(lost)) == ("executing", "failed")


def test_end_own(database: Database, table: JobTable) -> None:
    own, other = database.job(pid=os.getpid()), database.job(pid=1)
    table.end_own(Status.ABORTED)
    assert (database.status(own), database.status(other)) == ("aborted", "executing")


# ---- the queue


def test_a_wait_is_told_and_ends(database: Database, table: JobTable) -> None:
    told: list[str] = []
    with titled("oq-job-1") as pid:
        before = database.job(pid=pid)
        number = database.job("created")

        def tell(line: str) -> None:
            told.append(line)
            assert database.status(number) == "submitted"
            database.call("finish", before, "complete")

        queue.wait(table, number, 1, tell)
    [line] = told
    assert re.search(
        rf"job {before} of {getpass.getuser()} \(executing since ....-..-.. ..:..\)", line
    )
    assert "serialize_jobs" in line and f"oq abort {before}" in line


def test_a_wait_for_memory_is_told_once_and_ends(
    database: Database, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the engine's own, which would wait without a word to most."""
    from openquake.engine import engine

    limit = re.search(r"used_mem < (\d+):", inspect.getsource(engine.run_calc))
    assert limit and int(limit[1]) == queue.MOST_MEMORY_PERCENT
    number, used, told = database.job("created"), iter((91.0, 85.0, 79.9)), list[str]()
    monkeypatch.setattr(queue, "LOOK_SECS", 0)
    memory = types.SimpleNamespace(virtual_memory=lambda: types.SimpleNamespace(percent=next(used)))
    monkeypatch.setattr(queue, "psutil", memory)
    queue.wait_for_memory(table, number, told.append)
    assert database.status(number) == "submitted"
    [line] = told
    assert line.startswith("waiting: 91 % of this machine's memory is in use")


@pytest.mark.parametrize("at_a_time, waits", [(1, True), (2, False), (0, False)])
def test_jobs_at_a_time(table: JobTable, database: Database, at_a_time: int, waits: bool) -> None:
    database.job(pid=os.getpid())
    number = database.job("created")
    assert bool(queue.ahead(table, number, at_a_time)) == waits


def test_no_wait_for_the_dead(database: Database, table: JobTable) -> None:
    with program("sleep", "99") as pid:  # got the pid of a job that died
        dead = database.job(pid=pid)
        queue.wait(table, database.job("created"), 1, pytest.fail)
    assert database.status(dead) == "failed"


# ---- oq abort


def test_abort_ends_the_process_of_the_row(database: Database, table: JobTable) -> None:
    with titled("oq-job-1") as foreign, titled("oq-job-1") as own:
        number = database.job(pid=own)
        assert abort.end(table, number) == f"Job {number} aborted"
        assert not Path(f"/proc/{own}").exists() or processes.look(own).command == ""  # type: ignore[union-attr]
        assert processes.look(foreign).name == "oq-job-1"  # type: ignore[union-attr]
    assert database.status(number) == "aborted"


def test_abort_of_a_stopped_process(
    database: Database, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abort, "END_SECS", 0.3)
    with titled("oq-job-1") as pid:
        os.kill(pid, signal.SIGSTOP)
        number = database.job(pid=pid)
        assert abort.end(table, number) == f"Job {number} aborted"
        assert processes.look(pid).command == ""  # type: ignore[union-attr]


def test_abort_of_one_job_of_several_of_a_process(database: Database, table: JobTable) -> None:
    with titled("oq-job-1") as pid:
        first = database.job(pid=pid)
        second, third = (database.job("submitted", pid=pid) for _ in range(2))
        said = abort.end(table, third)
        assert said == f"Job {third} aborted before its turn; job {first} goes on"
        assert [database.status(n) for n in (first, third)] == ["executing", "aborted"]
        assert processes.look(pid).command  # type: ignore[union-attr]
        database.call("finish", first, "complete")
        database.call("update_job", second, {"status": "executing"})
        assert abort.end(table, second) == f"Job {second} aborted"  # the title is the first one's
        assert processes.look(pid).command == ""  # type: ignore[union-attr]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_abort_of_a_job_of_somebody_else(database: Database, table: JobTable) -> None:
    with titled("oq-job-1") as pid:
        number = database.job(pid=pid)
        reading, writing = os.pipe()
        if not (child := os.fork()):
            try:
                os.setuid(65534)
                os.write(writing, abort.end(table, number).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with os.fdopen(reading) as said:
            told = said.read()
        assert told.endswith("only they or root can abort it"), told
        assert processes.look(pid).command  # type: ignore[union-attr]
    assert database.status(number) == "executing"


def test_abort_without_a_process(database: Database, table: JobTable) -> None:
    with program("sleep", "99") as pid:
        number = database.job(pid=pid)
        assert "Unable to find" in abort.end(table, number)
        assert processes.look(pid).name == "sleep"  # type: ignore[union-attr]
    assert database.status(number) == "failed"


def test_abort_of_what_is_not_there_to_abort(database: Database, table: JobTable) -> None:
    assert abort.end(table, 99) == "There is no job 99"
    complete = database.job("complete")
    assert abort.end(table, complete) == f"Job {complete} is complete"
    elsewhere = database.job(host="elsewhere", pid=no_process())
    assert "elsewhere" in abort.end(table, elsewhere)
    assert database.status(elsewhere) == "executing"


def test_delete_of_a_running_job(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from openquake.commands import abort as engine_abort
    from openquake.commands import engine
    from openquake.commonlib import logs

    monkeypatch.setattr(logs, "dbcmd", database.call)
    for module, name in [(engine_abort, "main"), (engine, "abort"), (engine, "del_calculation")]:
        monkeypatch.setattr(module, name, getattr(module, name))
    abort.install_abort(engine_abort)
    engine.abort = engine_abort.main
    abort.install_delete(engine)
    with titled("oq-job-1") as pid:
        number = database.job(pid=pid)
        kept = private.own(database.path.parent / f"calc_{number}.journal")
        database.call("update_job", number, {"user_name": "anna"})
        engine.del_calculation(number, confirmed=True)
        said = f"Job {number} belongs to anna; only they can delete it\n"
        assert capsys.readouterr().out == said
        assert database.status(number) == "executing" and kept.exists()
        assert processes.look(pid).command  # type: ignore[union-attr]
        database.call("update_job", number, {"user_name": getpass.getuser()})
        engine.del_calculation(number, confirmed=True)
        assert processes.look(pid).command == ""  # type: ignore[union-attr]
    assert not kept.exists()
    assert capsys.readouterr().out == f"Job {number} aborted\nRemoved {number}\n"
    assert JobTable(database.call).job(number) is None


def test_a_dump_has_the_whole_table(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what a DbServer has written last, and no job that is not complete."""
    from openquake.commands import dump

    monkeypatch.setattr(dump, "db", database.db)
    monkeypatch.setattr(dump, "smart_save", dump.smart_save)
    jobtable.install_dump(dump)
    number = database.job("complete")  # still in the file beside it
    database.job()
    results(database, number)
    dump.main(str(tmp_path / "dump.zip"))
    with zipfile.ZipFile(tmp_path / "dump.zip") as archive:
        assert sorted(archive.namelist()) == [f"calc_{number}.hdf5", "db.sqlite3"]
        archive.extract("db.sqlite3", tmp_path / "there")
    assert whole_ids(tmp_path / "there" / "db.sqlite3") == [number]


# ---- parents


def results(database: Database, number: int) -> Path:
    path = database.path.parent / f"calc_{number}.hdf5"
    h5py.File(path, "w").close()
    return path


def refused(table: JobTable, wanted: object) -> str:
    with pytest.raises(InputError) as error:
        jobtable.parent(table, str(wanted), pytest.fail)
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"--hc {wanted}: "), text
    return text


def test_parent(database: Database, table: JobTable) -> None:
    number = database.job("complete")
    results(database, number)
    assert jobtable.parent(table, None, pytest.fail) is None
    assert jobtable.parent(table, str(number), pytest.fail) == number
    assert jobtable.parent(table, "some.ini", pytest.fail) == "some.ini"


def test_the_last_complete_parent(database: Database, table: JobTable) -> None:
    first, second = database.job("complete"), database.job("complete")
    results(database, first)
    results(database, second)
    failed = database.job("failed")
    database.job("complete", user_name="other")
    told: list[str] = []
    assert jobtable.parent(table, "-1", told.append) == second
    assert told == [f"starting from job {second}, the last complete one (job {failed} is failed)"]
    assert jobtable.parent(table, "-2", told.append) == first
    assert "no such complete job" in refused(table, -3)


def test_refused_parents(database: Database, table: JobTable) -> None:
    assert "no such job" in refused(table, 99)
    failed = database.job("failed", user_name="al\x1b[2Jice")
    assert f"job {failed} of al\\x1b[2Jice is failed" in refused(table, failed)
    assert "aborted" in refused(table, database.job("aborted"))
    assert "wait for its end" in refused(table, database.job(pid=os.getpid()))
    gone = database.job("complete")
    assert f"calc_{gone}.hdf5 is not there any more" in refused(table, gone)
    damaged = database.job("complete")
    (database.path.parent / f"calc_{damaged}.hdf5").write_bytes(b"no results" * 99)
    assert f"calc_{damaged}.hdf5 is damaged" in refused(table, damaged)


def test_a_parent_that_was_not_closed(database: Database, table: JobTable) -> None:
    path = database.path.parent / "calc_5.hdf5"
    child = os.fork()
    if child == 0:
        file = h5py.File(path, "w", libver="latest")
        file.swmr_mode = True
        os._exit(0)  # as after SIGKILL
    os.waitpid(child, 0)
    with pytest.raises(InputError, match="or one was killed that wrote in it; close it"):
        jobtable.parent(table, str(path), pytest.fail)


def test_a_parent_that_another_program_writes(
    database: Database, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = database.path.parent / "calc_6.hdf5"
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    code = f"import h5py; file = h5py.File({str(path)!r}, 'w'); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="open for writing in another program; close it there"):
            jobtable.parent(table, str(path), pytest.fail)
        other.communicate(b"\n")


# ---- numbers


def test_old_results_are_skipped_at_once(database: Database, table: JobTable) -> None:
    first = database.job("complete")
    for number in range(first + 1, first + 6):
        results(database, number)
    table.skip_old_results(database.path.parent)
    assert database.job() == first + 6
    assert table.job(first + 5) is None
    table.skip_old_results(database.path.parent)
    assert database.job() == first + 7


# ---- logs and outputs


def test_what_is_read_of_logs_and_outputs(database: Database, table: JobTable) -> None:
    number, other = database.job(), database.job()
    for level, line in (("INFO", "one"), ("CRITICAL", "two"), ("INFO", "three")):
        database.call("log", number, datetime.now(UTC), level, "p", line)
    assert table.last_lines(number, 2) == ["three", "two"]
    assert table.level_of_errors(number) == "CRITICAL"
    assert not table.last_lines(other, 2)
    database.call("create_outputs", number, [("hcurves", 1)], 1)
    assert table.jobs_of_output(1) == [number]
    assert table.jobs_of_output(10**30) == []


# ---- the jobs of an oq-run


def of_oq_run(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> tuple[job.Jobs, dict[str, Any], list[dict[str, Any]]]:
    """The jobs of an ``oq-run`` in this process, parameters of one, and what will be reported."""
    from openquake.commonlib import dbapi

    monkeypatch.setattr(dbapi, "db", database.db)
    monkeypatch.setenv("OQ_DATABASE", "127.0.0.1")
    monkeypatch.setenv("OQ_DATADIR", str(database.path.parent))
    file = database.path.parent / "job.ini"
    file.write_text("[general]\ndescription = a test\ncalculation_mode = classical\n")
    spec: dict[str, Any] = {
        "params": {},
        "exports": "",
        "export_dir": "",
        "log_level": "info",
        "log_file": None,
    }
    told: list[dict[str, Any]] = []
    found = job.Jobs(spec, told.append)
    found.place = str(database.path)
    return found, found.read(file), told


def test_a_job_that_the_engine_could_not_create_has_failed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, params, _ = of_oq_run(database, monkeypatch)
    database.job("complete")
    gone = database.job("complete")
    database.db(
        "DELETE FROM job WHERE id=?x", gone
    )  # the next number is that after it all the same
    results(database, gone + 1)
    with pytest.raises(RuntimeError, match="pre-existing file"):
        jobs.create([params], "")
    assert database.status(gone + 1) == "failed"


def test_a_database_that_is_locked_is_one_line_at_the_start(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, params, told = of_oq_run(Database(database.path, wait_s=0.1), monkeypatch)
    monkeypatch.setitem(jobs.config.dbserver, "file", str(database.path))
    jobs.create([params], "")
    lost = database.job(pid=no_process(), user_name="al\x1b[2Jice")
    with contextlib.closing(sqlite3.connect(database.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError) as mended:
            jobs.open_table()
        with pytest.raises(sqlite3.OperationalError) as created:
            jobs.create([params], "")
        assert jobs.failed(created.value) == job.FAILED
    words = "database is locked; another program has it open: end that, or try again"
    text = f"the job database {database.path}: {words}"
    assert (str(mended.value), told[-1]["error"]) == (text, text)
    jobs.open_table()
    assert told[-1]["text"].startswith(f"job {lost} of al\\x1b[2Jice did not come to its end")


# ---- without the engine


def outside_of_a_file(database: Database) -> contextlib.AbstractContextManager[str]:
    return contextlib.nullcontext(str(database.path))


@contextlib.contextmanager
def dbserver(database: Database) -> Iterator[str]:
    """The engine's DbServer on this database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cfg = database.path.parent / "openquake.cfg"
    cfg.write_text(f"[dbserver]\nmulti_user = true\nfile = {database.path}\n")
    code = f"from openquake.server import dbserver; dbserver.run_server('127.0.0.1:{port}')"
    env = os.environ | {"OQ_CONFIG_FILE": str(cfg)}
    with (database.path.parent / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=log, stderr=log)
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("place", [outside_of_a_file, dbserver])
def test_outside(
    database: Database, place: Callable[[Database], contextlib.AbstractContextManager[str]]
) -> None:
    executing, complete = database.job(), database.job("complete")
    with place(database) as url:
        outside = Outside(url, answer_s=30.0)
        assert outside.status(executing) == "executing"
        assert outside.status(99) is None
        outside.finish([executing, complete], Status.ABORTED)
        assert (outside.status(executing), outside.status(complete)) == ("aborted", "complete")


def test_a_locked_database_is_one_line(database: Database) -> None:
    number = database.job()
    with contextlib.closing(sqlite3.connect(database.path)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseError, match=r"db\.sqlite3: database is locked$"):
            Outside(str(database.path), answer_s=0.1).finish([number], Status.FAILED)


def test_a_dbserver_that_does_not_answer() -> None:
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1:9 does not answer"):
        Outside("tcp://127.0.0.1:9", answer_s=0.1).status(1)
