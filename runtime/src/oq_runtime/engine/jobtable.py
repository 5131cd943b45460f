"""The engine's job table: the only place that knows it.

``JobTable`` speaks the engine's named actions through one function, which is the seam for another
way to the database: ``logs.dbcmd`` in a process that has imported the engine. ``Outside`` is for
one that has not, and must not, for that takes seconds.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import getpass
import os
import re
import socket
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import zmq

from oq_runtime import processes
from oq_runtime.engine.unpickler import Names, Refused, loads
from oq_runtime.errors import InputError, OqRuntimeError
from oq_runtime.text import clean

#: performs a named action of the engine's ``server.db.actions`` and returns its result
Call = Callable[..., Any]

#: seconds by which the clocks of two sources may differ; a pid is not given away again as fast
SLACK_SECS = 60.0
#: the biggest number of a row
MOST_ROWS = 2**63 - 1
#: unfinished jobs that one look at the table may find
MOST_JOBS = 100_000
#: seconds for the database to answer a process that does not import the engine
ANSWER_SECS = 5.0
#: seconds for another process to finish a database that lacks a part
HALF_MADE_SECS = 3.0
#: and for one that makes it, or holds the lock for no good reason
LOCK_SECS = 30.0


#: what can be done about errors of SQLite, by the beginnings of their names, and about all others
REMEDIES = {
    "SQLITE_BUSY": "another program has it open: end that, or try again",
    "SQLITE_CANTOPEN": "let this user write there",
    "SQLITE_FULL": "free space there",
    "SQLITE_IOERR": "see whether its disk is well, and raise the limit of the size of a file "
    "(ulimit -f) where there is one",
    "SQLITE_READONLY": "let this user write there",
}
DAMAGED = "repair or move it away"


class Status(enum.StrEnum):
    """The column ``status``; those of UNFINISHED are told by the engine process itself."""

    CREATED = "created"
    SUBMITTED = "submitted"  # waits for others, see ``queue``
    EXECUTING = "executing"
    COMPLETE = "complete"
    SHARED = "shared"  # complete, and shown to all users of the WebUI
    FAILED = "failed"
    ABORTED = "aborted"
    DELETED = "deleted"


#: what is known of a job that cannot tell its end itself
GONE = "its process is gone (journalctl -k --grep oom says whether for lack of memory)"
UNFINISHED = (Status.CREATED, Status.SUBMITTED, Status.EXECUTING)
COMPLETE = (Status.COMPLETE, Status.SHARED)


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the table. ``started_s``: seconds since 1970, 0 where it is not known."""

    id: int
    user: str
    status: str
    pid: int
    host: str
    started_s: float
    path: str = ""


class DatabaseError(OqRuntimeError):
    """The job database cannot be read or written; the text names it and the remedy."""


class JobTable:
    """The jobs, as a process of the engine reads and ends them.

    :param call: performs a named action and returns its result
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.host = socket.gethostname()

    @classmethod
    def of_engine(cls) -> JobTable:
        """Return the table as the engine of this process is configured to reach it."""
        from openquake.commonlib import logs

        return cls(logs.dbcmd)

    def job(self, number: int, user: str | None = None) -> Job | None:
        """Return a job; -1 stands for the last one of a user, -2 for the one before."""
        if abs(number) > MOST_ROWS:
            return None
        row = self.call("get_job", number, user)
        if row is None or row.status == Status.DELETED:
            return None
        started_s = seconds(row.start_time)
        path = f"{row.ds_calc_dir}.hdf5"
        status, host = clean(row.status), row.host or ""
        return Job(row.id, row.user_name, status, row.pid or 0, host, started_s, path)

    def unfinished(self) -> list[Job]:
        """Return the jobs of this host that the table says are not at their end, oldest first."""
        wanted = {"is_running": "1", "include_shared": "0", "limit": MOST_JOBS}
        found = []
        for row in self.call("get_calcs", wanted, []):
            # the same places in all engine series
            number, user, status, *_, pid, _, _, host, start = row[:11]
            if host == self.host and status in UNFINISHED:
                found.append(Job(number, user, status, pid or 0, host, seconds(start)))
        return sorted(found, key=lambda job: job.id)

    def own(self, number: int, status: Status) -> None:
        """Say that a job belongs to this process, and how far it is."""
        row = {"status": status.value, "pid": os.getpid(), "is_running": 1}
        self.call("update_job", number, row)

    def begin_again(self, number: int) -> None:
        """Forget what a job has left that did not complete: it is run again under its number."""
        self.call("DELETE FROM output WHERE oq_job_id=?x", number)
        # or its process would be too young for it, see ``is_of``
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        self.call("update_job", number, {"start_time": now, "stop_time": None})
        self.own(number, Status.SUBMITTED)

    def finish(self, number: int, status: Status) -> None:
        """Give a job its last status."""
        self.call("finish", number, status.value)

    def jobs_of_output(self, output: int) -> list[int]:
        """Return the job that has left an output, if there is one."""
        rows = self.call("SELECT oq_job_id FROM output WHERE id=?x", min(output, MOST_ROWS))
        return [number for (number,) in rows]

    def last_lines(self, number: int, most: int) -> list[str]:
        """Return the last lines of the log of a job, the last one first."""
        lines = "SELECT message FROM log WHERE job_id=?x ORDER BY id DESC LIMIT ?x"
        return [row.message for row in self.call(lines, number, most)]

    def level_of_errors(self, number: int) -> str:
        """Return the level of the last traceback in the log of a job; it differs with the series.

        :raises ValueError: where there is none
        """
        levels = (
            "SELECT level FROM log WHERE job_id=?x AND level IN ('ERROR', 'CRITICAL') "
            "ORDER BY id DESC LIMIT 1"
        )
        [row] = self.call(levels, number)
        return str(row.level)

    def mend(self) -> list[Job]:
        """Set to ``failed`` the jobs of this host whose engine process is gone; return them.

        The engine would wait for them for ever before it starts the next job.
        """
        lost = [job for job in self.unfinished() if job.pid and not lives(job)]
        for job in lost:
            self.finish(job.id, Status.FAILED)
            # for those who look at the job in the WebUI, or with oq engine --show-log
            self.call("log", job.id, datetime.now(UTC), "ERROR", "oq_runtime", GONE)
        return lost

    def end_own(self, status: Status) -> None:
        """Give the jobs of this process that are not calculating yet their last status.

        The engine has told the table that they are executing, and only tells it their end once
        they calculate. Other jobs would wait for them for ever.
        """
        for job in self.unfinished():
            if job.pid == os.getpid() and job.status == Status.EXECUTING:
                self.finish(job.id, status)

    def skip_old_results(self, datadir: Path) -> None:
        """Let the next job get a number above those of results that this table does not know.

        They are of a job database that was lost or reset. The engine would refuse each of their
        numbers, one per try.
        """
        last = self.call("get_job", -1)
        number = start = last.id if last else 0
        while (datadir / f"calc_{number + 1}.hdf5").exists():
            number += 1
        if number > start:
            what = ("custom", "results of another job database", user_name(), Status.DELETED.value)
            with contextlib.suppress(sqlite3.IntegrityError):  # the table is beyond it
                self.call("import_job", number, *what, None, str(datadir))

    def check(self) -> None:
        """Raise InputError where the tables are older than the engine."""
        if outdated := self.call("check_outdated"):
            raise InputError(f"{outdated}".replace("\n", " "))


def install_actions(actions: Any) -> None:
    """Let the start of the WebUI fail the jobs that are lost, and no others.

    The engine's application sets every job that is executing to ``failed``, also where a command of
    ``manage.py`` loads it. They would go on, and others beside them.

    :param actions: the module ``openquake.server.db.actions``
    """

    def reset_is_running(db: Any) -> None:
        JobTable(lambda action, *arguments: getattr(actions, action)(db, *arguments)).mend()

    actions.reset_is_running = reset_is_running


def install_dump(dump: Any) -> None:
    """Have ``oq dump`` take the whole table, and of that only complete jobs.

    The engine copies the file. What others have written last, such as the DbServer, is in another
    one beside it, and there the engine's own changes of its copy stay.

    :param dump: the module ``openquake.commands.dump``
    """
    engine_save = dump.smart_save

    @functools.wraps(engine_save)
    def smart_save(database: str, *args: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, Path(database).name)
            with (
                contextlib.closing(sqlite3.connect(database)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
                target.execute("PRAGMA journal_mode = DELETE")
            engine_save(str(copy), *args)

    dump.smart_save = smart_save


def lives(job: Job) -> bool:
    """Whether the engine process of a job of this host may be there; what is hidden counts."""
    return processes.exists(job.pid) and is_of(job, processes.look(job.pid), processes.boot_s())


def is_of(job: Job, process: processes.Process | None, boot_s: float) -> bool:
    """Whether the process that has the pid of a job now may be the job's.

    A job keeps its pid until it ends, so whoever has got it since then was started later, or never
    was an engine. The title counts before the clocks, which may have been put right meanwhile.

    :param process: None where ``/proc`` does not show it
    :param boot_s: when the machine was booted, in seconds since 1970
    """
    if process is not None and process.name == f"oq-job-{job.id}":
        return bool(process.command)
    if job.started_s and boot_s > job.started_s + SLACK_SECS:
        return False
    if process is None:
        return True
    if job.started_s and process.started_s > job.started_s + SLACK_SECS:
        return False
    program = process.command.partition(" ")[0]
    return "python" in Path(program).name or process.name.startswith("oq-job-")


def seconds(moment: Any) -> float:
    """Return a time of the table, UTC as text or as datetime, in seconds since 1970; 0: none."""
    if not moment:
        return 0.0
    if not isinstance(moment, datetime):
        try:
            moment = datetime.fromisoformat(str(moment))
        except ValueError:
            return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return float(moment.timestamp())


def user_name() -> str:
    """Return the user as the engine calls them."""
    return getpass.getuser()


def served(host: str | None) -> bool:
    """Whether the job table is asked for through the DbServer of ``host``, or is a file here.

    Source: ``dbcmd`` in ``openquake/commonlib/logs.py`` of engine 3.26.
    """
    return host != "127.0.0.1" or user_name() == "openquake"


# ---- parents


def parent(table: JobTable, wanted: str | None, tell: Callable[[str], None]) -> int | str | None:
    """Return the job that ``--hc`` names, or the path that it is.

    A negative number counts the user's complete jobs from the last one.

    :param tell: is given a line where others than complete ones were left out
    :raises InputError: for a job that cannot be started from, with the reason
    """
    if wanted is None:
        return None
    if not re.fullmatch("-?[0-9]+", wanted):
        if wanted.endswith(".hdf5"):
            check_datastore(Path(wanted), f"--hc {wanted}")
        return wanted
    number = int(wanted)
    job = table.job(number) if number >= 0 else last_complete(table, -number, tell)
    name = f"--hc {number}"
    if job is None:
        what = "there is no such job" if number >= 0 else "you have no such complete job"
        raise InputError(f"{name}: {what}; list them with oq engine --lhc")
    name += f": job {job.id} of {clean(job.user)}"
    if job.status in UNFINISHED:
        raise InputError(f"{name} is {job.status}; wait for its end")
    if job.status not in COMPLETE:
        raise InputError(f"{name} is {job.status}; run it again, or start from a complete one")
    check_datastore(Path(job.path), name)
    return job.id


def last_complete(table: JobTable, count: int, tell: Callable[[str], None]) -> Job | None:
    """Return the user's last complete job, or the one ``count`` before it."""
    user, skipped, before = user_name(), [], None
    for position in range(-1, -MOST_JOBS, -1):
        job = table.job(position, user)
        if job is None or job == before:  # the engine repeats the first one
            return None
        before = job
        if job.status not in COMPLETE:
            skipped.append(job)
        elif (count := count - 1) == 0:
            if skipped:
                left = ", ".join(f"job {other.id} is {other.status}" for other in skipped[:3])
                tell(f"starting from job {job.id}, the last complete one ({left})")
            return job
    return None


def check_datastore(path: Path, name: str) -> None:
    """Raise InputError where the datastore of a parent cannot be read."""
    import h5py

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # whose writer may be waited for for ever
            raise InputError(f"{name}: its datastore {path} is no file")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise InputError(f"{name}: its datastore {path} is not there any more") from None
    except OSError as exc:
        remedy = "its owner must let you read it"
        raise InputError(f"{name}: its datastore {path}: {exc.strerror}; {remedy}") from None
    try:
        with h5py.File(path, "r"):
            pass
    except OSError as exc:
        what, remedy = "is damaged", "run that job again"
        if "unable to lock" in str(exc):
            what, remedy = "is open for writing in another program", "close it there"
        elif "already open for write" in str(exc):
            what = "is open for writing in another program, or one was killed that wrote in it"
            remedy = "close it there, or run that job again"
        raise InputError(f"{name}: its datastore {path} {what}; {remedy}") from None


# ---- without the engine


class Record:
    """An object in an answer of the DbServer, whatever its class: its attributes."""


ANSWERS: Names = {("datetime", cls.__name__): cls for cls in (datetime, timedelta, timezone)} | {
    ("openquake.baselib.parallel", "Result"): Record,
    ("openquake.baselib.parallel", "Pickled"): Record,
    ("openquake.baselib.performance", "Monitor"): Record,
    ("openquake.commonlib.dbapi", "Row"): Record,
}
STATUS_OF = "SELECT status FROM job WHERE id=?"
FIND = "SELECT user_name, status, ds_calc_dir FROM job WHERE id=?"
IS_UNFINISHED = f"status IN ({', '.join(repr(str(status)) for status in UNFINISHED)})"
# one that an abort has marked may still say that it is running
END = (
    f"UPDATE job SET status=CASE WHEN {IS_UNFINISHED} THEN ? ELSE status END, is_running=0, "
    f"stop_time=datetime('now') WHERE id=? AND ({IS_UNFINISHED} OR is_running=1)"
)


class Outside:
    """The job table for a process that does not import the engine.

    :param place: the file, or the DbServer's tcp:// URL
    :param answer_s: seconds to wait for an answer, or for a lock
    :raises DatabaseError: out of each method
    """

    def __init__(self, place: str, answer_s: float = ANSWER_SECS) -> None:
        self.place = place
        self.answer_s = answer_s

    def status(self, number: int) -> str | None:
        """Return the status of a job, None where there is no such job."""
        if self.place.startswith("tcp://"):
            row = self._ask("get_job", number)
            return None if row is None else clean(str(row.status))
        with self._open() as connection:
            row = connection.execute(STATUS_OF, (number,)).fetchone()
            return clean(str(row[0])) if row else None

    def find(self, number: int) -> tuple[str, str, Path] | None:
        """Return user, status and datastore of a job, None where there is no such job."""
        if self.place.startswith("tcp://"):
            found = self._ask("get_job", number)
            row = found and (found.user_name, found.status, found.ds_calc_dir)
        elif not os.path.exists(self.place):
            return None
        else:
            with self._open() as connection:
                row = connection.execute(FIND, (number,)).fetchone()
        if not row or row[1] == Status.DELETED:
            return None
        user, status, place = map(str, row)
        return clean(user), clean(status), Path(f"{place}.hdf5")

    def finish(self, numbers: Sequence[int], status: Status) -> None:
        """Give those of the jobs that the table takes for unfinished their last status."""
        if self.place.startswith("tcp://"):
            for number in numbers:
                if self.status(number) in UNFINISHED:
                    self._ask("finish", number, status.value)
            return
        with self._open() as connection, connection:
            connection.executemany(END, [(status.value, number) for number in numbers])

    @classmethod
    def configured(cls, sections: Mapping[str, Mapping[str, str]]) -> Outside:
        """Return the table of a configuration, as the engine would reach it."""
        dbserver = sections.get("dbserver", {})
        host = os.environ.get("OQ_DATABASE") or dbserver.get("host")
        if served(host):
            return cls(f"tcp://{host}:{dbserver.get('port', '')}")
        return cls(os.path.expanduser(dbserver.get("file", "")))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self.place, timeout=self.answer_s)
            ) as connection:
                yield connection
        except sqlite3.Error as exc:
            raise DatabaseError(f"the job database {self.place}: {exc}") from exc

    def _ask(self, action: str, *arguments: Any) -> Any:
        """Perform a named action as the DbServer's clients do."""
        with zmq.Context() as context, context.socket(zmq.REQ) as dbserver:
            dbserver.linger = 0
            try:
                dbserver.connect(self.place)
            except zmq.ZMQError as exc:
                what = f"the DbServer {self.place}: {exc.strerror}"
                raise DatabaseError(f"{what}; set host and port in [dbserver]") from exc
            dbserver.send_pyobj((action, *arguments))
            if not dbserver.poll(int(self.answer_s * 1000)):
                raise DatabaseError(f"the DbServer {self.place} does not answer")
            answer = dbserver.recv()
        try:
            result = loads(answer, ANSWERS)
            if result.tb_str:
                raise DatabaseError(f"the DbServer {self.place} could not {action}")
            return loads(result.pik.pik, ANSWERS)
        except (Refused, AttributeError) as exc:
            raise DatabaseError(f"what answers at {self.place} is no DbServer") from exc


# ---- a database that is not there yet


def make(database: Path) -> None:
    """Make the job database where there is none, or one that was never finished.

    It is made beside its place and put there whole, one process at a time: whoever is interrupted
    leaves nothing that another could take for a database.

    :raises sqlite3.Error: when what is there is no job database
    """
    if made(database):
        return
    from openquake.commonlib import dbapi
    from openquake.server.db import actions

    path = database.with_name(f".{database.name}.lock")
    try:  # others may have put a link there
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise sqlite3.OperationalError(f"{path}: {exc.strerror}") from exc
    with os.fdopen(lock):
        deadline_s = time.monotonic() + LOCK_SECS
        while not _locked(lock) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        deadline_s = time.monotonic() + HALF_MADE_SECS
        while database.exists() and time.monotonic() < deadline_s and not made(database):
            time.sleep(0.1)  # a command of the engine may be making it
        if made(database):
            return
        new = database.with_name(f".{database.name}.{os.getpid()}")
        try:
            db = dbapi.Db(sqlite3.connect, str(new), isolation_level=None)
            actions.upgrade_db(db)
            db.close()
            for suffix in ("-wal", "-shm"):  # of the one that is replaced
                database.with_name(database.name + suffix).unlink(missing_ok=True)
            new.replace(database)
        finally:
            new.unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    """Take a lock if it is free, or if the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def explain(exc: sqlite3.Error) -> str:
    """Return what SQLite says of the job database, and what can be done about it."""
    if isinstance(exc.__context__, sqlite3.Error):  # the engine's own lacks the name, and has SQL
        exc = exc.__context__
    name = getattr(exc, "sqlite_errorname", "")
    remedy = next((text for kind, text in REMEDIES.items() if name.startswith(kind)), DAMAGED)
    return f"{exc}; {remedy}"


def made(database: Path) -> bool:
    """Whether a job database is there that can be used, or must be kept.

    One that is empty, or has no jobs and lacks a part, was not finished.
    """
    from openquake.server.db.schema.upgrades import upgrader

    if not database.exists():
        return False
    with contextlib.closing(sqlite3.connect(database, timeout=ANSWER_SECS)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if not tables:
            return False
        if connection.execute("SELECT EXISTS (SELECT * FROM job)").fetchone() == (1,):
            return True
        versioned = upgrader.version_table in tables
        return versioned and not upgrader.check_versions(connection)
