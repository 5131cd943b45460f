"""The engine process of ``oq-run``: create the jobs, run them, say what became of them.

Imports the engine, reads a JSON specification on stdin (``session``, its directory, and the options
of ``commands.run``), and writes one JSON object per line to a descriptor: ``loaded`` (the engine),
``note`` (a line for the user), ``created``, ``waiting`` (for what) and ``running`` (a job),
``finished`` (its summary), ``skipped`` (one that was ended before its turn), ``failed`` (one line
on what is wrong), ``survey`` (of a job that is not run) and at last ``end`` (the exit code).
Tracebacks go to the engine's log, which is in the job database.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oq_runtime import processes
from oq_runtime.config import SESSION_VARIABLE
from oq_runtime.engine import archives, jobtable, kept, messages, queue, reads, resume, survey
from oq_runtime.engine.history import History
from oq_runtime.engine.hook import activate
from oq_runtime.engine.jobtable import JobTable, Status
from oq_runtime.errors import (
    BrokerLost,
    ConfigError,
    InputError,
    JournalError,
    NoWorkers,
    UnsupportedEngine,
)
from oq_runtime.files import compiling, detached, journal
from oq_runtime.files.journal import Consumed, Reader, Writer
from oq_runtime.session.client import Session
from oq_runtime.text import CONTINUED, clean

Report = Callable[[dict[str, Any]], None]

COMPLETE, FAILED, BAD_INPUT, NO_WORKERS, INTERRUPTED = 0, 1, 2, 3, 130
#: seconds for the DbServer to answer before there is a job: it may just be starting
DBSERVER_SECS = 30.0
#: seconds that the files of a job have to close
CLOSE_SECS = 60


class Ignored(logging.Handler):
    """Collects the names of the parameters that the engine does not know and only warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.fullmatch(r"The parameter '(.+)' is unknown, ignoring", record.getMessage()):
            self.names.append(found.group(1))

    def __enter__(self) -> Ignored:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


class Jobs:
    """The jobs of one ``oq-run``, from their files to their summaries.

    :param spec: what is to be done
    :param report: is given what there is to be told
    """

    def __init__(self, spec: dict[str, Any], report: Report) -> None:
        load()
        from openquake.baselib import config
        from openquake.commonlib import logs, readinput
        from openquake.engine import engine

        report({"kind": "loaded"})

        self.spec = spec
        self.report = report
        self.config = config
        self.logs = logs
        self.readinput = readinput
        self.engine = engine
        self.table = JobTable.of_engine()
        self.parent: int | str | None = None
        self.unpacked: dict[Path, str] = {}  # directory -> the archive in it
        self.rest: list[Any] = []  # the engine's contexts of the jobs that are not at their end
        self.retried = 0  # attempts of the jobs that are
        self.facts: list[dict[str, str]] = []  # of each job, which must be the same to go on
        self.inputs: list[list[Path]] = []  # its files, which must be so, too
        self.stamps: dict[int, dict[str, str]] = {}  # when these were changed last
        self.values: list[dict[str, str]] = []  # and of its parameters
        self.before: Reader | None = None  # the journal that the first job goes on from
        self.place = ""  # where the job database is
        self.claimed: int | None = None  # and what keeps others from it

    def run(self) -> int:
        """Run all jobs, one after the other; return the exit code."""
        try:
            self.place = self.open_table()
            if self.spec["resume"]:
                self.before = self.go_on()
            self.parent = jobtable.parent(self.table, self.spec["hc"], self.note)
            params = [self.read(Path(name)) for name in self.spec["files"]]
            checked = [
                self.check(one, lacking=bool(number) and self.parent is None)
                for number, one in enumerate(params)
            ]
            if self.spec["dry_run"]:
                for name, one, oq in zip(self.spec["files"], params, checked, strict=True):
                    what = survey.survey(self.readinput, oq, one) if oq else {}
                    self.report({"kind": "survey", "file": name, **what})
                return COMPLETE
            if self.spec["journal_bytes"]:
                self.facts = [resume.facts(one) for one in params]
                self.inputs = [
                    resume.inputs(one, oq) for one, oq in zip(params, checked, strict=True)
                ]
                self.values = [resume.values(oq) if oq else {} for oq in checked]
            if self.before is not None:
                resume.check(self.before, self.as_now(0, self.parent, params[0]))
            self.create(params, self.place)
            hazard = self.rest[0]
            code = COMPLETE
            for job in list(self.rest):
                if job is not hazard and (ended := self.ended(job.calc_id)):
                    code = INTERRUPTED
                    self.rest.remove(job)
                    self.report({"kind": "skipped", "job": job.calc_id, "ended": ended})
                    continue
                if job is not hazard and self.parent is None:
                    job.params["hazard_calculation_id"] = hazard.calc_id
                self.run_one(job)
            return code
        except KeyboardInterrupt:
            self.finish(Status.ABORTED)
            return INTERRUPTED
        except SystemExit as exc:
            if str(exc.code).startswith("Killed"):  # the engine's answer to SIGTERM
                self.finish(Status.ABORTED)
                return INTERRUPTED
            return self.failed(exc)
        except Exception as exc:
            return self.failed(exc)
        finally:
            for folder in self.unpacked:
                shutil.rmtree(folder, ignore_errors=True)

    def retries(self) -> int:
        """Return how many attempts were made again since the last job's end."""
        before = self.retried
        with contextlib.suppress(BrokerLost):  # which keeps count
            if session := Session.existing():
                self.retried = session.retries()
        return self.retried - before

    def note(self, text: str) -> None:
        self.report({"kind": "note", "text": text})

    def finish(self, status: Status) -> None:
        """Give the jobs that have not come to their end their last status."""
        with contextlib.suppress(sqlite3.Error):  # oq-run does it, or says that it could not
            for job in self.rest:
                found = self.table.job(job.calc_id)
                if found is not None and found.status not in jobtable.COMPLETE:
                    self.table.finish(job.calc_id, status)

    def ended(self, number: int) -> Status | None:
        """Return how somebody has ended a job while it waited for its turn; None: nobody has."""
        found = self.table.job(number)
        if found is None:
            return Status.DELETED
        return Status.ABORTED if found.status == Status.ABORTED else None

    def failed(self, exc: BaseException) -> int:
        """Report an error in the words of the user; return the exit code."""
        if not isinstance(exc, InputError):
            traceback.print_exception(exc, file=sys.stderr)
        self.finish(Status.FAILED)
        job = self.rest[0] if self.rest else None
        if isinstance(exc, InputError):  # ours, and explained where it was raised
            code, text = BAD_INPUT, str(exc)
        elif isinstance(exc, NoWorkers):
            code, text = NO_WORKERS, messages.explain(exc)
        elif isinstance(exc, sqlite3.Error):
            code, text = FAILED, f"the job database {self.place}: {jobtable.explain(exc)}"
        elif full := messages.no_room(exc):
            code, text = FAILED, full
        elif unseen := messages.unseen(exc, self.config.directory.shared_dir):
            code, text = FAILED, unseen
        elif messages.of_input(exc):
            inputs = messages.files(job.params["inputs"]) if job else ()
            code, text = BAD_INPUT, messages.input_text(exc, inputs)
        else:
            code, text = FAILED, messages.explain(exc)
            if job and messages.unforeseen(text):
                text += messages.starting_elsewhere(self.table, job)
        number = job.calc_id if job else None
        what = {"job": number, "error": self.as_given(text), "retries": self.retries()}
        self.report({"kind": "failed", **what})
        return code

    def as_given(self, text: str) -> str:
        """Return a text with the paths that the user knows instead of where they are unpacked."""
        for folder, archive in self.unpacked.items():
            text = text.replace(f"{folder / archives.FILES}/", f"{archive}: ")
        return text

    # ---- before there is a job

    def open_table(self) -> str:
        """Make the job table usable; return where it is.

        :raises InputError: where that cannot be
        """
        host = os.environ.get("OQ_DATABASE", self.config.dbserver.host)
        if jobtable.served(host):
            place = f"tcp://{host}:{self.config.dbserver.port}"
        else:
            place = os.path.expanduser(self.config.dbserver.file)
        try:
            if place.startswith("tcp://"):
                self.await_dbserver(place)
            else:
                jobtable.make(Path(place))
                # what it logs gives the root logger a handler, and the engine then sets no level
                logging.getLogger().handlers.clear()
            self.table.check()
            for job in self.table.mend():
                self.note(
                    f"job {job.id} of {clean(job.user)} did not come to its end, and "
                    f"{jobtable.GONE}: it is failed{self.kept(job.id)}"
                )
                journal.set_told(journal.directory_of(self.datadir, job.id))
            self.tell_of_others()
        except sqlite3.Error as exc:
            raise InputError(f"the job database {place}: {jobtable.explain(exc)}") from exc
        return place

    def await_dbserver(self, place: str) -> None:
        """Wait until the DbServer answers; the engine would do so for ten minutes, and in silence.

        :raises InputError: when it does not
        """
        deadline_s = time.monotonic() + DBSERVER_SECS
        told = ""
        while True:
            try:
                jobtable.Outside(place).status(0)
                return
            except jobtable.DatabaseError as exc:
                what = f"{exc}; is its service, openquake-dbserver, running, and its port open?"
                if time.monotonic() > deadline_s:
                    raise InputError(what) from exc
                if told != what:
                    self.note(f"waiting: {(told := what)}")

    @property
    def datadir(self) -> Path:
        """Of the results, the journals among them."""
        return Path(self.logs.get_datadir())

    def kept(self, number: int) -> str:
        """Return how a job that is not complete can go on, if it can."""
        kept = number in journal.numbers(self.datadir)
        return f"; to go on with it: oq-run --resume {number}" if kept else ""

    def tell_of_others(self) -> None:
        """Say once which jobs can go on whose rows others have mended, as after a power cut."""
        for number in journal.untold(self.datadir):
            job = self.table.job(number)
            results = self.datadir / f"calc_{number}.hdf5"  # a row may be of another database
            if job is None or (job.user, job.path) != (jobtable.user_name(), str(results)):
                continue
            if job.status == Status.FAILED and number != self.spec["resume"]:
                self.note(f"job {number} did not come to its end{self.kept(number)}")
                journal.set_told(journal.directory_of(self.datadir, number))

    def read(self, path: Path) -> dict[str, Any]:
        """Read a job file or an archive; return the engine's parameters.

        :raises InputError: for what cannot be read
        """
        archive = path if path.suffix.lower() == ".zip" else None
        if archive is not None:
            path = self.unpack(archive)
        try:
            params: dict[str, Any] = self.readinput.get_params(str(path))
        except (Exception, SystemExit) as exc:
            text = messages.encoding(exc, [str(path)]) or messages.explain(exc)
            raise InputError(self.about(path, text)) from exc
        params.update(self.spec["params"])
        if "job_id" in params:  # the engine would overwrite that job
            raise InputError(
                self.about(
                    path,
                    "job_id is no parameter of a job file; leave it out, a job is given its number",
                )
            )
        params["exports"] = self.spec["exports"]
        if self.spec["export_dir"]:
            params["export_dir"] = self.spec["export_dir"]
        elif "export_dir" not in self.spec["params"] and survey.is_temporary(
            given := params.get("export_dir", "")
        ):
            del params["export_dir"]
            if self.spec["exports"]:
                self.note(
                    f"exporting to {(archive or path).parent}, not to {given} as {path.name} says, "
                    "which is emptied and belongs to all; --export-dir gives another place"
                )
        if self.parent is not None:
            params["hazard_calculation_id"] = self.parent
        if archive is not None:
            params["inputs"]["input_zip"] = str(archive)
            # beside the archive: what is unpacked goes with the job
            params["export_dir"] = str(archive.parent / params.get("export_dir", "."))
        return params

    def unpack(self, archive: Path) -> Path:
        """Unpack an archive and return its job file, the first where there are several."""
        shared = self.datadir if self.spec["cluster"] else None
        try:
            folder = archives.place(Path(os.environ[SESSION_VARIABLE]), shared)
        except OSError as exc:
            raise InputError(f"{archive}: no room to unpack it: {exc}") from exc
        self.unpacked[folder] = archive.name
        first, *others = archives.unpack(archive, folder)
        if others:
            names = ", ".join(path.name for path in others)
            self.note(
                f"{archive} holds {1 + len(others)} job files: running {first.name}, not {names}; "
                "unpack it to run another"
            )
        return first

    def check(self, params: dict[str, Any], *, lacking: bool) -> Any:
        """Let the engine check the parameters of a job; return them as its ``OqParam``.

        :param lacking: a second stage takes from the first, which has not run yet, what it lacks;
            where that is something that counts, the result is None
        :raises InputError: for a parameter that is unknown, or wrong
        """
        from openquake.commonlib.oqvalidation import OqParam

        path = params["inputs"]["job_ini"]
        if wrong := messages.no_file(messages.files(params["inputs"])):
            raise InputError(self.about(path, wrong))
        checked = None
        try:
            with Ignored() as ignored, contextlib.suppress(*[Exception] if lacking else []):
                # it changes what it is given, and would take that for another job when it runs it
                checked = self.readinput.get_oqparam(copy.deepcopy(params))
        except (Exception, SystemExit) as exc:
            inputs = messages.files(params["inputs"])
            text = messages.encoding(exc, inputs) or messages.explain(exc)
            if isinstance(exc, OSError) and str(exc.filename) in params.get("export_dir", ""):
                text = f"export_dir={params['export_dir']}: {exc.strerror}; {messages.EXPORT}"
            raise InputError(self.about(path, text)) from exc
        if ignored.names:
            raise InputError(self.about(path, messages.unknown(ignored.names, dir(OqParam))))
        return checked

    def about(self, path: Path | str, text: str) -> str:
        return self.as_given(text if str(path) in text else f"{path}: {text}")

    # ---- jobs

    def create(self, params: list[dict[str, Any]], place: str) -> None:
        """Give each job a number."""
        spec = self.spec
        for one in params:
            self.table.skip_old_results(self.datadir)
            if self.before is not None and not self.rest:
                one["job_id"] = number = self.before.head["job"]
                for path in left_by(self.datadir, number):
                    path.unlink()
            try:
                [job] = self.engine.create_jobs(
                    [one],
                    spec["log_level"],
                    spec["log_file"],
                    hc_id=self.parent,
                )
            except BaseException as exc:
                for number in created_in(exc):
                    self.table.finish(number, Status.FAILED)
                raise
            self.rest.append(job)
            if job.params.pop("job_id", None):  # or the results would have it as a parameter
                self.table.begin_again(job.calc_id)
            # a job after the first waits, as the engine's queue understands it
            self.table.own(job.calc_id, Status.SUBMITTED if self.rest[1:] else Status.CREATED)
            self.report({"kind": "created", "job": job.calc_id, "database": place})

    def run_one(self, job: Any) -> None:
        """Run a job when it is its turn, and report its summary."""
        # the nodes of a cluster share their slots; see ``queue``
        at_a_time = 0 if self.spec["cluster"] else self.config.distribution.serialize_jobs

        def tell(what: str, text: str) -> None:
            self.report({"kind": "waiting", "job": job.calc_id, "what": what, "text": text})

        turn, memory = (functools.partial(tell, what) for what in ("another job", "memory"))
        queue.wait(self.table, job.calc_id, at_a_time, turn)
        queue.wait_for_memory(self.table, job.calc_id, memory)
        self.report({"kind": "running", "job": job.calc_id})
        started, started_s = time.monotonic(), time.time()
        with self.history(job) as history:
            self.engine.run_jobs([job])
        seconds = time.monotonic() - started
        self.rest.remove(job)
        figures = {"seconds": round(seconds, 2), "retries": self.retries()}
        row = summary(self.logs, job.calc_id, started_s)
        if history is not None:  # what was taken over took no slot of this run
            row["busy_seconds"] = round(row["busy_seconds"] - history.saved_s, 2)
        self.report({"kind": "finished", **row, **figures})

    # ---- what is kept of a job until it is complete

    def go_on(self) -> Reader:
        """Return the journal of the job that goes on.

        :raises InputError: where it cannot be read, or the job is not there any more
        """
        number: int = self.spec["resume"]
        directory = journal.directory_of(self.datadir, number)
        try:
            self.claimed = journal.claim(directory)
            reader = Reader(directory)
        except (JournalError, OSError) as exc:
            raise InputError(f"--resume {number}: {exc}") from exc
        job = self.table.job(number)
        if job is None:
            raise InputError(f"--resume {number}: the job database has no such job")
        if job.status in jobtable.COMPLETE:  # killed before it could remove its journal
            raise InputError(f"--resume {number}: the job is complete; oq-journal prune {number}")
        if job.status in jobtable.UNFINISHED:  # a dead one has just been mended
            raise InputError(f"--resume {number}: the job is {job.status}; wait for its end")
        # a number says little: the database may be another one by now, or the journal renamed
        then = (reader.head["job"], reader.head.get("database", self.place), job.user)
        if then != (number, self.place, jobtable.user_name()):
            raise InputError(
                f"--resume {number}: the journal is that of job {then[0]} in {then[1]}, and job "
                f"{number} in {self.place} is {clean(job.user)}'s; "
                f"oq-journal prune {number} removes it"
            )
        self.note(f"going on with job {number}: the results of {reader.results} tasks are kept")
        return reader

    def as_now(
        self, number: int, parent: int | str | None, params: Mapping[str, Any]
    ) -> dict[str, str]:
        """Return what must be the same of a job, with the bytes that its inputs have just now.

        Raises JournalError where that cannot be told; InputError for a job that is to go on.
        """
        self.stamps[number] = resume.stamps(self.inputs[number])
        files = resume.digests(self.inputs[number])
        try:
            resume.check_sources(params)
            of_parent = resume.of_parent(self.table, parent, params["base_path"])
        except JournalError as exc:
            if self.before is not None:
                raise InputError(f"--resume {self.spec['resume']}: {exc}") from exc
            raise
        return self.facts[number] | files | of_parent

    @contextlib.contextmanager
    def history(self, job: Any) -> Iterator[History | None]:
        """Keep the history of a job while it runs, and the journal when it does not complete."""
        # what is unpacked of an archive is elsewhere each time, and so the tasks are not the same
        archive = "input_zip" in job.params["inputs"]
        kept = self.spec["journal_bytes"] and not archive
        if self.spec["reuse"] and archive:
            self.note("--reuse is of no use here: what comes in an archive has no journal")
        history = self.begin_history(job) if kept else None
        History.begin(history)
        complete = False
        try:
            yield history
            complete = True
        finally:
            History.begin(None)
            if history is not None:
                for_others = complete and history.collector is not None
                # one that the machine's next start goes on with may not have got to a result
                waits = self.spec["detached"] is not None and not complete
                worth = bool(history.results) and (for_others or not complete)
                history.close(keep=worth or waits)
                if history.results and for_others:
                    self.keep_for_others(history.writer.directory)

    def keep_for_others(self, directory: Path) -> None:
        """Keep the journal of a job that is complete, if all is as it was when the job began."""
        number = len(self.spec["files"]) - len(self.rest)
        try:
            now = resume.stamps(self.inputs[number])
            if changed := resume.differences(self.stamps[number], now):
                raise JournalError(f"touched since its start: {'; '.join(changed)}")
            journal.set_complete(directory)
        except (JournalError, OSError) as exc:  # the job is complete all the same
            self.note(f"no other job can begin with the results of this one: {exc}")
            shutil.rmtree(directory, ignore_errors=True)

    def begin_history(self, job: Any) -> History | None:
        directory = journal.directory_of(self.datadir, job.calc_id)
        number = len(self.spec["files"]) - len(self.rest)
        hazard = job.params.get("hazard_calculation_id")
        spec = {name: self.spec[name] for name in ("params", "exports", "export_dir", "reuse")}
        spec |= {"files": self.spec["files"][number:], "hc": hazard and str(hazard)}
        if not self.values[number] and (oq := self.check(job.params, lacking=True)):
            # what it lacked is there by now
            self.inputs[number] = resume.inputs(job.params, oq)
            self.values[number] = resume.values(oq)
        try:
            # it may have waited for long
            facts = self.facts[number] = self.as_now(number, hazard, job.params)
        except JournalError as exc:
            self.note(f"the job runs without a journal, and cannot be resumed: {exc}")
            return None
        head = {"job": job.calc_id, "database": self.place, "spec": spec, "facts": facts}
        head["values"] = self.values[number]
        before, self.before = self.before, None
        if before is not None:
            resume.check(before, facts)

        def deleted(other: int) -> bool:  # a row may be in another database
            row = self.table.job(other)
            if row is None:
                return not (self.datadir / f"calc_{other}.hdf5").exists()
            # killed before it could remove its journal
            unused = not journal.is_complete(journal.directory_of(self.datadir, other))
            return row.status in jobtable.COMPLETE and unused

        most_bytes = self.spec["journal_bytes"]
        writer = claimed = None
        try:
            for other in journal.make_room(self.datadir, most_bytes, job.calc_id, deleted):
                self.note(f"job {other} cannot go on any more: its journal made room for others")
            free_bytes = shutil.disk_usage(self.datadir).free
            # of what is there already the disk need not have room
            budget_bytes = min(most_bytes, journal.size(directory) + free_bytes // 2)
            claimed = self.claimed if before is not None else None
            if before is None and self.spec["reuse"] and head["values"]:
                before, claimed = self.take_over(directory, head, budget_bytes)
            if before is not None:
                before.cut_tail()
            writer = Writer(directory, head, budget_bytes=budget_bytes, claimed=claimed)
            if self.spec["detached"] is None:
                detached.forget(directory)
            else:
                detached.note(directory, tuple(self.spec["detached"]))
        except (ConfigError, JournalError, OSError) as exc:
            if self.spec["resume"] and before is not None:  # not of the jobs after the one resumed
                raise InputError(f"--resume {job.calc_id}: {exc}") from exc
            self.note(f"the job runs without a journal, and cannot be resumed: {exc}")
            if writer is not None:
                writer.discard()
            elif claimed is not None:  # of what was taken over
                shutil.rmtree(directory, ignore_errors=True)
                os.close(claimed)
            return None

        def show(done: int, total: int) -> None:
            self.report({"kind": "replayed", "done": done, "total": total})

        collector = reads.begin() if self.spec["reuse"] else None
        return History(writer, before, self.note, collector, show)

    def take_over(
        self, directory: Path, head: dict[str, Any], most_bytes: int
    ) -> tuple[Reader | None, int | None]:
        """Make a journal of what holds for a job of that of a complete one, if there is such.

        :param directory: of the journal, with what is to be in its ``head``
        :returns: the journal, and what keeps others from it
        """
        datadir, file = directory.parent, head["spec"]["files"][0]
        most, events, reader = 0, 0, None
        for number in journal.complete(datadir):
            try:
                one = Reader(journal.directory_of(datadir, number))
                hold = resume.usable(one, head["facts"], file, head["values"])
            except (JournalError, LookupError, TypeError):  # damaged, or of another version
                continue
            results = sum(isinstance(record.event, Consumed) for record in one.records[:hold])
            if results > most and journal.size(one.directory) <= most_bytes:
                most, events, reader = results, hold, one
        if reader is None:
            self.note("no complete job has results for this one")
            return None, None
        try:
            claimed = journal.copy(reader, events, directory, head)
        except (JournalError, OSError) as exc:  # such as of one that makes room just now
            self.note(f"the results of job {reader.head['job']} cannot be taken over: {exc}")
            return None, None
        with contextlib.suppress(OSError):  # gone since
            journal.set_complete(reader.directory)
        self.note(f"beginning with the results of job {reader.head['job']}")
        return Reader(directory), claimed


def left_by(datadir: Path, number: int) -> Iterator[Path]:
    """Yield the files of results that a job has left which did not complete.

    Some engines put rates into a directory of the job, where they would add up.
    """
    yield from datadir.glob(f"calc_{number}[._]*hdf5")
    folder = datadir / f"calc_{number}"
    if not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.geteuid():
        yield from folder.glob("*.hdf5")


def created_in(exc: BaseException) -> set[int]:
    """Return the numbers of the jobs that the engine created before it failed to create one."""
    frames = [frame for frame, _ in traceback.walk_tb(exc.__traceback__)]
    values = [value for frame in frames for value in frame.f_locals.values()]
    contexts = [value for value in values if type(value).__name__ == "LogContext"]
    return {value.calc_id for value in contexts if hasattr(value, "calc_id")}


def summary(logs: Any, job_id: int, started_s: float) -> dict[str, Any]:
    """Read the figures of a finished job from the database and its datastore."""
    from openquake.commonlib import datastore

    tasks, busy_s = 0, 0.0
    with datastore.read(job_id) as dstore:
        path, oq = Path(dstore.filename), dstore["oqparam"]
        if "task_info" in dstore:
            info = dstore["task_info"][:]
            tasks, busy_s = len(info), float(info["duration"].sum())
        nodes = kept.tasks_of_nodes(dstore.hdf5)
    lines = logs.dbcmd("list_outputs", job_id, True)
    outputs = []
    for line in lines:
        number, _, name = line.partition("|")
        if number.strip().isdigit():
            outputs.append({"id": int(number), "name": name.strip()})
    return {
        "job": job_id,
        "state": clean(logs.dbcmd("get_job", job_id).status),
        "tasks": tasks,
        "nodes": nodes,
        "busy_seconds": round(busy_s, 2),
        "datastore": str(path),
        "bytes": path.stat().st_size,
        "outputs": outputs,
        "imts": list(oq.imtls),
        "exported": [str(file) for file in survey.exported(Path(oq.export_dir), job_id, started_s)],
    }


def load() -> None:
    """Import the engine, and have the lines of a message of its log known as such."""
    with compiling.once():
        importlib.import_module("openquake.engine.engine")
    from openquake.commonlib import logs

    def marked(self: logging.StreamHandler[Any], record: logging.LogRecord) -> str:
        return logging.StreamHandler.format(self, record).replace("\n", f"\n{CONTINUED}")

    logs.LogStreamHandler.format = marked


def run(report: Report) -> int:
    """Run what ``oq-run`` asks for; return the exit code."""
    try:
        with contextlib.suppress(Exception):  # raised again by Jobs
            load()  # in the time that oq-run takes to make the session
        spec = json.load(sys.stdin)
        # the engine leaves files there
        tempfile.tempdir = os.environ[SESSION_VARIABLE] = spec["session"]
        return Jobs(spec, report).run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except UnsupportedEngine as exc:
        code, error = BAD_INPUT, str(exc)
    except Exception as exc:
        traceback.print_exc(file=sys.stderr)
        *_, (file, function, line) = messages.frames(exc)
        where = f"{function} in {file.rpartition('/site-packages/')[2]}: {line}"
        code, error = FAILED, f"the engine cannot be loaded: {messages.explain(exc)} ({where})"
    report({"kind": "failed", "job": None, "error": error, "retries": 0})
    return code


def main() -> None:
    activate()  # before the engine's parallel module is loaded
    processes.die_with_parent()
    if os.getppid() != int(sys.argv[2]):
        sys.exit("oq-run has ended")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where oq-run's parent ignores them
        signal.signal(number, signal.default_int_handler)
    with os.fdopen(int(sys.argv[1]), "w") as stream:

        def report(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row) + "\n")
            stream.flush()

        code = run(report)
        # from here on nothing can change the outcome, nor the interpreter's own end be safer
        report({"kind": "end", "code": code})
        remove_temporary()
        close_files()
    os._exit(code)


def remove_temporary() -> None:
    """Remove what the engine would remove at the interpreter's end, where custom_tmp is set."""
    if general := sys.modules.get("openquake.baselib.general"):
        with contextlib.suppress(OSError):
            general.removetmp()


def close_files() -> None:
    """Close the HDF5 files that a job has left open, or nobody could open them again.

    HDF5 may crash in it after a full disk, and a file system may keep it waiting; so the outcome
    of the job must have been reported before.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(CLOSE_SECS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if h5py := sys.modules.get("h5py"):
        for identifier in h5py.h5f.get_obj_ids(types=h5py.h5f.OBJ_FILE):
            with contextlib.suppress(Exception):
                h5py.File(identifier).close()


if __name__ == "__main__":
    main()
