"""``oq-run``: run jobs with a live display, and leave nothing behind.

This process does not import the engine. It starts the session (broker and private agent) and the
engine process (``job``) side by side, draws the progress, passes signals on, and mends the state of
a job whose engine process was killed.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the rest is imported

import contextlib
import json
import os
import re
import select
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
from click.core import ParameterSource
from rich.console import Console

from oq_runtime import cgroups, config, descriptors, logind, processes
from oq_runtime.cluster import jobs as cluster_jobs
from oq_runtime.cluster.pool import Pool
from oq_runtime.commands import checks, sessions
from oq_runtime.commands.checks import EXIT_INPUT, BadInput
from oq_runtime.commands.enginelog import LINE_CHARACTERS, EngineLog
from oq_runtime.commands.lines import (
    describe,
    exports,
    next_steps,
    place,
    reported,
    shared_out,
    slots,
    surveyed,
    waits_for,
)
from oq_runtime.commands.notice import Notice
from oq_runtime.commands.progress import AT_WORK, Display, StatusReader, screen
from oq_runtime.config import Config, check_cores
from oq_runtime.engine import jobtable
from oq_runtime.errors import ConfigError, JournalError, OqRuntimeError
from oq_runtime.files import compiling, detached, journal
from oq_runtime.files.journal import Reader
from oq_runtime.node import memory
from oq_runtime.priority import Priority
from oq_runtime.report import output
from oq_runtime.session import launch
from oq_runtime.text import clean, grouped
from oq_runtime.wire.protocol import Status

EXIT_FAILED, EXIT_NO_WORKERS, EXIT_INTERRUPTED = 1, 3, 130
STATES = {0: jobtable.Status.COMPLETE, EXIT_INTERRUPTED: jobtable.Status.ABORTED}
#: what ends a job: Ctrl-C, Ctrl-\, a terminal that is closed, a system that stops
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: seconds that an interrupted engine process has to end by itself
STOP_SECS = 2.5
#: seconds after which a node that is missing, or a wait, is worth a line
TELL_SECS = 3.0
#: seconds that the import of the engine may take without a word, and what is said then
LOAD_SECS = 8.0
LOADING = "loading the engine, which takes minutes where numba has not compiled it yet"
#: seconds between two looks at the row of the job, and how long it may say that the job has ended
#: before the engine process says so
LOOK_SECS, ENDED_SECS = 1.0, 10.0
#: seconds between two looks at the counters of the broker
STATUS_SECS = 0.3
#: seconds to wait for a locked database in which a job is to be ended
LOCK_SECS = 1.5
#: of a session, in the order of their pids
PROCESSES = ("engine process", "broker process", "agent process")
#: the comma before another parameter
NEXT_PARAM = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")
#: options of which nothing is a value
MAY_BE_EMPTY = ("exports", "report")
#: what the table says of a job that was deleted
GONE = (None, jobtable.Status.DELETED)
#: the file beside the results that has what a detached oq-run says
OUTPUT = "oq-run_{}.log"
STOPPED = "oq-run is stopped, the tasks go on; fg shows them again"


def parse_params(params: tuple[str, ...]) -> dict[str, str]:
    """Return ``name=value,...`` options as a dictionary; values may have commas, too."""
    pairs = {}
    for item in (item for text in params for item in NEXT_PARAM.split(text)):
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise BadInput(f"-p {item}: give name=value")
        pairs[name.strip()] = value
    return pairs


class Command(click.Command):
    """Prints the JSON object of a call that is refused, or interrupted before it has begun."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        if "--watch" in given[:-1]:  # its number may be missing, and -1 looks like an option
            at = given.index("--watch") + 1
            if given[at] == "-1":
                del given[at]
        if "--json" in given:
            for number in ENDINGS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, end_at_once)
        try:
            return super().main(given, *more, **options | {"standalone_mode": False})
        except click.ClickException as exc:
            exc.show()
            if "--json" in given:
                print_json(exc.exit_code, exc.format_message(), [])
            sys.exit(exc.exit_code)


def end_at_once(*_: object) -> None:
    """End an interrupted call that has nothing to end yet."""
    print_json(EXIT_INTERRUPTED, "interrupted", [])
    sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)


EPILOG = """The rest is done by the engine's own commands: oq engine --lhc and --lrc list jobs,
--lo ID outputs, --eos ID DIR exports them, --dc ID deletes a job; oq abort ID ends one."""


@click.command(cls=Command, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, metavar="JOB.ini ...")
@click.option(
    "--resume", metavar="ID", help="Go on with a job that did not complete; -1: last one."
)
@click.option(
    "--reuse",
    is_flag=True,
    help="Begin with the results of a complete job, as far as they hold; keep those of this one.",
)
@click.option("--no-journal", is_flag=True, help="Keep nothing to go on from after a crash.")
@click.option("--run", is_flag=True, hidden=True)  # as oq engine has it
@click.option(
    "--hc",
    "--hazard-calculation-id",
    "hc",
    metavar="ID",
    help="Start from the results of this job; -1: the last one.",
)
@click.option(
    "-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="Override a parameter."
)
@click.option(
    "-e", "--exports", default="", metavar="csv,...", help="Export results in these formats."
)
@click.option("--export-dir", type=click.Path(file_okay=False), help="Where to export to.")
@click.option("--log-file", "-L", type=click.Path(dir_okay=False), help="The engine's log.")
@click.option(
    "-l",
    "--log-level",
    default="info",
    type=click.Choice(["debug", "info", "warn", "error", "critical"]),
    show_default=True,
)
@click.option("--cores", help="Run on this machine alone with so many workers; -1: all cores.")
@click.option(
    "--priority",
    type=click.Choice([one.value for one in Priority]),
    default=Priority.NORMAL.value,
    show_default=True,
    help="Beside the jobs of others on a cluster.",
)
@click.option("--dry-run", is_flag=True, help="Read the input, say how large the job is, and end.")
@click.option(
    "--detach", is_flag=True, help="Return as soon as the job has its number; see --watch."
)
@click.option("--tell", type=int, hidden=True)  # a descriptor for the number
@click.option(
    "--watch",
    is_flag=False,
    flag_value=0,
    type=int,
    metavar="[ID]",
    help="Show a job of yours that runs on this machine: the latest one, or ID.",
)
@click.option(
    "--explain",
    type=int,
    metavar="ID",
    help="Say where the time of a job went; -1: last one.",
)
@click.option(
    "--report",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Write a page about each job at its end: to FILE, or beside the exports. See oq-report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--no-progress", is_flag=True, help="No progress display.")
@click.version_option(package_name="oq-runtime")
def main(
    files: tuple[str, ...],
    resume: str | None,
    reuse: bool,
    no_journal: bool,
    run: bool,
    hc: str | None,
    params: tuple[str, ...],
    exports: str,
    export_dir: str | None,
    log_file: str | None,
    log_level: str,
    cores: str | None,
    priority: str,
    dry_run: bool,
    detach: bool,
    tell: int | None,
    watch: int | None,
    explain: int | None,
    report: str | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    """Run OpenQuake calculations through the ZeroMQ runtime.

    With several files, the first one is the hazard that the others start from. Exit codes:
    0 complete, 1 a job failed, 2 bad input, 3 no workers, 130 interrupted.
    """
    processes.open_standard()
    descriptors.raise_limit()  # of all that is started
    for name, value in click.get_current_context().params.items():
        if value == "" and name not in MAY_BE_EMPTY:  # of a shell's variable that is not set
            raise BadInput(f"--{name.replace('_', '-')} is empty; leave it out or give a value")
    checks.check_user()
    checks.check_file_size()
    checks.check_places()
    if temporary := os.environ.get("TMPDIR"):  # what is started works in other directories
        os.environ["TMPDIR"] = os.path.abspath(temporary)
    if watch is not None:
        check_alone("watch", "shows a job that runs")
        watched(watch or None, as_json)
    if explain is not None:
        check_alone("explain", "tells of a job that was run")
        explained(explain, as_json)
    target = None if report is None else check_report(report, export_dir, files, dry_run)
    if bool(files) == bool(resume):
        raise BadInput("give a job file, or --resume ID alone")
    if resume and (hc or params or exports or export_dir or dry_run or reuse):
        raise BadInput("--resume goes on as the job was begun: leave out --hc, -p, -e, --reuse")
    spec: dict[str, Any] = {
        "files": [checks.check_file(name) for name in files],
        "hc": hc,
        "resume": None,
        "reuse": reuse,
        "params": (given := parse_params(params)),
        "exports": exports or given.pop("exports", ""),
        "export_dir": str(checks.absolute(export_dir)) if export_dir else None,
        "log_file": checks.check_log(log_file) if log_file else None,
        "log_level": log_level,
        "dry_run": dry_run,
    }
    options = again(cores, priority, log_level, spec["log_file"], target)
    spec["detached"] = None if tell is None else options
    compiling.find_cache(Path(os.environ.get("TMPDIR") or tempfile.gettempdir()))
    try:
        sections = whole = config.read()
        if cores:  # on this machine, whatever cluster there is; but with the same limits
            check_cores(cores)
            sections = {"oq_runtime": sections.get("oq_runtime", {}) | {"cores": cores}}
        settings = Config.from_sections(sections)
        launch.check(settings)  # whoever is no user of the cluster has no directory there either
        checks.check_directories(whole)
        datadir = checks.data_directory(whole)
        checks.check_priority(Priority(priority), settings)
        cgroups.check_processes(0 if settings.cluster else settings.cores)
    except ConfigError as exc:
        ours = cores and str(exc).startswith("cores=")
        raise BadInput(f"--{exc}" if ours else str(exc)) from exc
    spec["cluster"] = settings.cluster is not None
    spec["journal_bytes"] = 0 if no_journal else settings.journal_bytes
    if (resume or reuse) and not spec["journal_bytes"]:
        option = "--resume" if resume else "--reuse"
        raise BadInput(f"{option} needs a journal: leave out --no-journal, and set journal_gb")
    if resume:
        spec |= earlier(datadir, resume)
    if detach:
        run_detached(datadir, as_json)
    call = Run(
        spec,
        settings,
        screen(sys.stderr),
        datadir,
        priority=Priority(priority),
        quiet=no_progress or as_json,
        tell=tell,
    )
    call.announce()
    code = call.execute()
    if target is not None:
        unreported = call.report(target)
        code = code or unreported
    try:
        if as_json:
            print_json(code, call.error, call.surveys if dry_run else call.finished)
        else:
            call.print_summary()
        sys.stdout.flush()
    except OSError as exc:  # what has been calculated stays
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        click.echo(f"oq-run: stdout: {exc.strerror}; list the jobs with oq engine --lhc", err=True)
        code = code or EXIT_FAILED
    call.end_notice(code)
    call.forget_detached(code)
    sys.exit(code)


def check_alone(option: str, what: str) -> None:
    """Raise BadInput where something else is asked for with an option that runs no job."""
    context = click.get_current_context()
    shown = {option, "as_json", "no_progress"}
    given = [
        name
        for name in context.params
        if name not in shown and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if given:
        names = {name.name: max(name.opts, key=len) for name in main.params}
        other = "a job file" if given[0] == "files" else names[given[0]]
        raise BadInput(f"--{option} {what}: leave out {other}")


def check_report(name: str, export_dir: str | None, files: Sequence[str], dry_run: bool) -> Path:
    """Return the file for the report, or the directory for those of all jobs."""
    if dry_run:
        raise BadInput("--report tells of a job that was run; leave it out with --dry-run")
    target = checks.absolute(name or export_dir or ".")
    if name and not os.path.isdir(target):
        if target.suffix != output.SUFFIX:
            raise BadInput(
                f"--report {name}: the name of a report ends in {output.SUFFIX}; write --report "
                "behind the job files"
            )
        if len(files) > 1:
            raise BadInput(f"--report {name}: there is one for each job; give a directory")
    if name or os.path.isdir(target):  # the engine makes the directory of the exports
        try:
            output.check_place(target / output.SUFFIX if os.path.isdir(target) else target)
        except OqRuntimeError as exc:
            raise BadInput(f"--report: {exc}") from exc
    return target


def again(
    cores: str | None, priority: str, log_level: str, log_file: str | None, report: Path | None
) -> list[str]:
    """Return the options that a job is given when it goes on, beside ``--resume``."""
    given: dict[str, object] = {"cores": cores, "priority": priority, "log-level": log_level}
    given |= {"log-file": log_file, "report": report}
    return [f"--{name}={value}" for name, value in given.items() if value]


def watched(number: int | None, as_json: bool) -> NoReturn:
    """Show a job that another ``oq-run`` runs, until its end."""
    try:
        job, state = sessions.watch(number, screen(sys.stderr))
    except OqRuntimeError as exc:
        raise BadInput(str(exc)) from exc
    code, said, error = EXIT_FAILED, f"is {state}", ""
    if state in jobtable.COMPLETE:
        code = 0
    elif state in GONE:
        state = jobtable.Status.DELETED
        said = error = "was deleted"
    elif state in jobtable.UNFINISHED:
        said = error = (
            "did not come to its end: its oq-run was killed; the next oq-run sets it to failed and "
            "says whether it can go on"
        )
    if as_json:
        print_json(code, error and f"job {job} {error}", [{"job": job, "state": state}])
    else:
        click.echo(f"job {job} {said}")
    sys.exit(code)


def explained(number: int, as_json: bool) -> NoReturn:
    """Say where the time of a job went."""
    from oq_runtime.commands.report import find
    from oq_runtime.report.words import explained  # not wanted by the others: h5py

    try:
        told = explained(find(str(number))[0])
    except OqRuntimeError as exc:
        raise BadInput(f"--explain: {exc}") from exc
    click.echo(json.dumps(told) if as_json else "\n".join(map(clean, told["lines"])))
    sys.exit(0)


def run_detached(folder: Path, as_json: bool) -> NoReturn:
    """Run this command without a terminal, and return when its first job has a number.

    It is in a session of its own, so that the end of this one does not reach it. What it says until
    then, that it loads the engine or waits for another job, is said here as well.

    :param folder: for what it says
    """
    arguments = [word for word in sys.argv[1:] if word != "--detach"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    number_in, number_out = os.pipe()
    stream, name = tempfile.mkstemp(".log", "oq-run_", folder)
    under, unkept = logind.outlive()
    command = processes.python("oq_runtime.commands.run", f"--tell={number_out}", *arguments)
    process = subprocess.Popen(
        [*under, *command],
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=stream,
        pass_fds=[number_out],
        start_new_session=True,
    )
    os.close(stream)
    os.close(number_out)
    output = Path(name)
    with os.fdopen(number_in) as numbers, output.open(errors="replace") as saying:
        try:
            while not select.select([numbers], [], [], STATUS_SECS)[0]:
                if not as_json:  # its one line may be the last word
                    click.echo(saying.read(), nl=False, err=True)
            number = numbers.readline().strip()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            number = ""
        if not number:  # there is no job: what it says is all that there is
            code = process.wait()
            output.unlink()
            said = saying.read().splitlines()
            for line in said:
                click.echo(line, err=not (as_json and line == said[-1]))
            sys.exit(code)
    output = output.rename(folder / OUTPUT.format(number))
    if as_json:
        print_json(0, "", [{"job": int(number), "state": "created", "output": str(output)}])
    else:
        ways = f"watch it with oq-run --watch {number}, end it with oq abort {number}"
        click.echo(f"job {number} runs detached; {ways}; its output is in {output}")
    if unkept:
        click.echo(unkept, err=True)
    sys.exit(0)


def print_json(code: int, error: str, jobs: Sequence[dict[str, Any]]) -> None:
    """Print what became of a call on stdout."""
    retries = sum(row.get("retries", 0) for row in jobs)
    result = {"exit": code, "error": error, "retries": retries, "jobs": jobs}
    click.echo(json.dumps(result))


def earlier(datadir: Path, number: str) -> dict[str, Any]:
    """Return what a job that did not complete was asked for."""
    try:
        found = journal.find(datadir, number)
        directory = journal.directory_of(datadir, found)
        if journal.claimed(directory):
            raise BadInput(f"--resume {number}: job {found} runs; watch it with --watch {found}")
        if journal.is_complete(directory):
            raise BadInput(f"--resume {number}: job {found} is complete; --reuse begins with it")
        reader = Reader(directory)
    except JournalError as exc:
        raise BadInput(f"--resume {number}: {exc}") from exc
    asked: dict[str, Any] = reader.head["spec"]
    reader.close()
    for name in asked["files"]:
        checks.check_file(name)
    return asked | {"resume": found}


class Run:
    """One call of ``oq-run``.

    :param spec: what ``job`` is to do
    :param settings: the cluster, or the cores of this machine
    :param console: for the display and the engine's log lines (stderr)
    :param datadir: of the results
    :param priority: beside the jobs of others
    :param quiet: show no progress
    :param tell: a descriptor for the number of the first job
    """

    def __init__(
        self,
        spec: dict[str, Any],
        settings: Config,
        console: Console,
        datadir: Path,
        *,
        priority: Priority,
        quiet: bool,
        tell: int | None = None,
    ) -> None:
        self.datadir, self.priority = datadir, priority
        self.tell = tell
        self.directory: Path | None = None  # of the session
        self.spec = spec
        self.settings = settings
        self.slots = 1  # the most that were there at a time
        self.display = Display(console, quiet=quiet)
        self.quiet = quiet
        self.jobs: list[int] = []
        self.finished: list[dict[str, Any]] = []
        self.surveys: list[dict[str, Any]] = []  # of jobs that are not run
        self.error = ""
        # of a node and its reason, or of what is waited for; and what of it has been told
        self.true_since_s: dict[tuple[str, str], float] = {}
        self.told: set[tuple[str, str]] = set()
        self.interrupted_s: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.outcome: int | None = None  # exit code, as the engine process says itself
        self.pending: dict[int, bytes] = {}  # descriptor -> what has come of its next line
        self.log = EngineLog(lambda line: self.display.print(line), percents=quiet)
        self.table: jobtable.Outside | None = None
        self.current: int | None = None  # the job that has its turn
        self.turn_s = 0.0  # since when
        self.waiting: int | None = None  # the job that waits for its turn
        self.next_look_s = self.ended_s = 0.0  # at its row; since when it says that it has ended
        self.aborted = False  # from elsewhere
        self.deleted: int | None = None  # the job whose row is gone
        self.skipped: list[str] = []  # how jobs were ended before their turn
        self.loaded = False  # the engine, or it was said that this takes long
        self.status: Status | None = None  # of the broker, the last one
        self.others: list[str] = []  # lines on whose jobs have the slots that it waits for
        self.unanswered = ""  # why the job table cannot be read just now
        self.oom_kills = memory.oom_kills()
        self.stage = ""  # as those see it who watch the job
        self.notice: Notice | None = None
        self.began_s = time.monotonic()

    def announce(self) -> None:
        """Say what is run, where, on how many slots: long before the engine is there."""
        if self.quiet:
            return
        jobs = " and ".join(describe(Path(name)) for name in self.spec["files"])
        how = "" if self.priority is Priority.NORMAL else f", {self.priority}"
        self._print(f"running {jobs} on {place(self.settings)}{how}")
        self.display.enter("starting")
        self.display.show()

    def execute(self) -> int:
        """Run the jobs and return the exit code."""
        for number in ENDINGS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, or by a script
                signal.signal(number, self._interrupt)
        self.display.mind_stop(STOPPED)
        process, reports = self._load()
        try:
            directory = self.directory = launch.start(self.settings, os.getpid(), self.priority)
        except (OqRuntimeError, OSError) as exc:
            self.display.close()
            process.kill()
            with process, reports:
                pass
            self.error = str(exc)
            return EXIT_INPUT if isinstance(exc, ConfigError) else EXIT_NO_WORKERS
        if self.settings.notify and not self.spec["dry_run"]:
            self.notice = Notice(self.settings.notify)
            given = "; ".join(describe(Path(file)) for file in self.spec["files"])
            self.notice.add(description=given)
        try:
            return self._engine(directory, process, reports)
        finally:
            self.display.close()
            # broker and agent end with this process; do not wait for that when the caller may
            # import us, and let nothing of the session outlive the command
            launch.stop(directory)

    def _load(self) -> tuple[subprocess.Popen[bytes], BinaryIO]:
        """Start the engine process, which imports the engine while the session is made.

        :returns: the process, and what it reports
        """
        env = dict(os.environ)
        env["OQ_DISTRIBUTE"] = "no" if self.spec["dry_run"] else "zmq"
        if "OQ_DATADIR" in env:  # the engine changes directories
            env["OQ_DATADIR"] = str(self.datadir)
        if not env.get("PYTHONHASHSEED", "").isdigit():  # or it is "random"
            env["PYTHONHASHSEED"] = "0"  # a journal holds for the same order of sets only
        if self.settings.cluster is None:
            env["OQ_NUM_CORES"] = str(self.settings.cores)
        self.loaded = compiling.done()
        report_in, report_out = os.pipe()
        process = self.process = subprocess.Popen(
            processes.python("oq_runtime.engine.job", str(report_out), str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[report_out],
            env=env,
            start_new_session=True,  # signals of the terminal come through this process
        )
        os.close(report_out)
        if self.interrupted_s is not None:  # before there was a process to tell
            process.send_signal(signal.SIGINT)
        return process, os.fdopen(report_in, "rb")

    def _engine(self, directory: Path, process: subprocess.Popen[bytes], reports: BinaryIO) -> int:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps({"session": str(directory), **self.spec}).encode())
        self.display.enter("loading the engine")
        status = StatusReader(directory)
        try:
            with process.stdout as log, reports:
                self._follow(process, reports.fileno(), log.fileno(), status)
            if not self.quiet:
                self.display.show(status.last(STATUS_SECS))
        finally:
            status.close()
        end_group(process.pid)
        code = process.wait()
        return self._verdict(code if self.outcome is None else self.outcome)

    def _follow(
        self,
        process: subprocess.Popen[bytes],
        reports: int,
        log: int,
        status: StatusReader,
    ) -> None:
        """Show what the engine process says until it has ended."""
        selector = selectors.DefaultSelector()
        selector.register(reports, selectors.EVENT_READ, self._take)
        selector.register(log, selectors.EVENT_READ, self.log.take)
        next_s = ended_s = 0.0
        started_s = time.monotonic()
        # its children may keep the log open
        while selector.get_map() and not (ended_s and time.monotonic() > ended_s + TELL_SECS):
            for key, _ in selector.select(STATUS_SECS):
                if not self._lines(key.fd, key.data):
                    selector.unregister(key.fd)
            now = time.monotonic()
            if not ended_s and reports not in selector.get_map():
                ended_s = now
            if now >= next_s:
                next_s = now + STATUS_SECS
                self.log.release()
                if found := status.poll():
                    self.slots = max(self.slots, sum(node.slots for node in found.nodes))
                    self.status = found
                self._look(now)
                self._tell(now)
                self._show_stage()
                self.display.show(found)
            if not self.loaded and now - started_s > LOAD_SECS:
                self._print(LOADING)
                self.loaded = True
            if self.interrupted_s and now - self.interrupted_s > STOP_SECS and not self.closing:
                process.kill()
        self.log.release()

    def _show_stage(self) -> None:
        """Have those who watch the job see what is done besides tasks."""
        if self.directory is not None and self.display.stage != self.stage:
            self.stage = self.display.stage
            with contextlib.suppress(OSError):  # a full disk
                sessions.note_stage(self.directory, self.stage)

    def _lines(self, descriptor: int, take: Callable[[bytes], None]) -> bool:
        """Hand the lines that have come to their reader; return False at the end."""
        data = os.read(descriptor, 65536)
        *lines, rest = (self.pending.get(descriptor, b"") + data).split(b"\n")
        self.pending[descriptor] = rest
        for line in lines:
            take(line)
        return bool(data)

    def _print(self, line: str) -> None:
        self.display.print(clean(line, LINE_CHARACTERS))

    def _look(self, now: float) -> None:
        """Interrupt the engine process when the job table says that its job has ended.

        ``oq abort`` may have told the wrong process, or one that does not listen.
        """
        number = self.current or self.waiting
        if self.table is None or number is None or self.interrupted_s or now < self.next_look_s:
            return
        self.next_look_s = now + LOOK_SECS
        try:
            status = self.table.status(number)
        except jobtable.DatabaseError as exc:
            self.unanswered = str(exc)
        else:
            self.unanswered = ""
            if status in (*jobtable.UNFINISHED, *jobtable.COMPLETE):
                self.ended_s = 0.0
                return
            self.ended_s = self.ended_s or now
            # a failed one is on its way out, or set so by a command that did not find it
            if status != jobtable.Status.FAILED or now - self.ended_s > ENDED_SECS:
                self.aborted = True
                self._interrupt()

    def _tell(self, now: float) -> None:
        """Say what the job waits for, and which nodes it has to do without, once each."""
        waits = dict.fromkeys(self._standstills(), "")
        nodes = self.status.nodes if self.status else []
        if self.status:
            what, why = waits_for(self.status, cluster=self.spec["cluster"])
            waits |= {why: what} if why else {}
        found = [("", why) for why in waits]
        found += [(node.host, node.reason) for node in nodes if node.reason]
        self.true_since_s = {fact: self.true_since_s.get(fact, now) for fact in found}
        waited = [(now - self.true_since_s["", why], what) for why, what in waits.items() if what]
        waited_s, what = max(waited, default=(0.0, ""))
        self.display.wait(what if waited_s >= TELL_SECS else "", waited_s)
        untold = [
            fact
            for fact, since_s in self.true_since_s.items()
            if fact not in self.told and now - since_s >= TELL_SECS
        ]
        for host, note in untold:
            if not host:
                self._print(f"waiting: {note}")
                if waits[note] in ("slots", "workers"):
                    threading.Thread(target=self._ask_others, daemon=True).start()
        while self.others:
            self._print(self.others.pop())
        for line in grouped((host, reason) for host, reason in untold if host):
            self._print(f"without {line}")
        self.told = self.told.union(untold).intersection(found)

    def _ask_others(self) -> None:
        """Find out whose jobs have the workers of the nodes just now; may wait for name servers."""
        assert self.settings.cluster is not None and self.directory is not None
        with contextlib.suppress(Exception):  # it is no more than a help
            found = cluster_jobs.jobs(Pool(self.settings.cluster).ask("status"))
            found.pop(self.directory.name, None)
            if named := cluster_jobs.at_work(found.values()):
                self.others.append(f"at work now: {named}")

    @property
    def closing(self) -> bool:
        """Whether the job has ended; killed before its files are closed, they cannot be opened."""
        return self.outcome is not None

    def _standstills(self) -> Iterator[str]:
        """Yield what keeps the job from going on, on this machine."""
        assert self.directory is not None and self.process is not None
        if self.closing:
            yield "the job has ended; its files are being closed, for a minute at most"
        if self.closing or self.interrupted_s is not None:
            return  # it ends, whatever it waits for
        if self.unanswered:
            yield self.unanswered
        pids = (self.process.pid, *launch.pids(self.directory))
        for name, pid in zip(PROCESSES, pids, strict=False):
            if processes.stopped(pid):
                yield f"the {name} of this job is stopped; kill -CONT {pid} lets it go on"

    def _take(self, line: bytes) -> None:
        """Take a report of the engine process."""
        row = json.loads(line)
        match row.pop("kind"):
            case "loaded":
                self.loaded = True
                self.display.enter("reading the job")
            case "note":
                self._print(row["text"])
            case "created":
                self.jobs.append(row["job"])
                if self.notice is not None:
                    self.notice.add(jobs=self.jobs)
                assert self.directory is not None
                try:
                    sessions.note(self.directory, row["job"], row["database"], self.spec["cluster"])
                except OSError as exc:
                    self._print(f"{self.directory}: {exc.strerror}; --watch will not find the job")
                if self.tell is not None:
                    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                        os.write(self.tell, f"{row['job']}\n".encode())
                    os.close(self.tell)
                    self.tell = None
                self.table = jobtable.Outside(row["database"], answer_s=STATUS_SECS)
            case "waiting":
                self._print(row["text"])
                self.waiting = row["job"]
                self.display.enter(f"waiting for {row['what']}", f"job {row['job']}")
            case "running":
                self.current, self.turn_s = row["job"], time.monotonic()
                self.display.enter(AT_WORK, f"job {row['job']}")
            case "replayed":
                self.display.replay(row["done"], row["total"])
            case "finished":
                self.current = None
                self.finished.append(row)
            case "skipped":
                self.skipped.append(f"job {row['job']} was {row['ended']} before its turn")
                self.finished.append({"job": row["job"], "state": row["ended"], "seconds": 0.0})
            case "failed":
                self.error = row["error"]
                if row["job"] is not None:
                    self.finished.append(self._ended(row["job"], EXIT_FAILED) | row)
            case "survey":
                self.surveys.append(row)
            case "end":
                self.outcome = row["code"]

    def _interrupt(self, *_: object) -> None:
        if self.interrupted_s is None and not self.closing:
            self.interrupted_s = time.monotonic()
            if self.process is not None:
                self.process.send_signal(signal.SIGINT)

    def _verdict(self, code: int) -> int:
        if self.interrupted_s is not None and not self.aborted:
            self.error = "interrupted"
            code = EXIT_INTERRUPTED
        elif self.skipped and code == EXIT_INTERRUPTED:
            self.error = "; ".join(self.skipped)
        elif self.aborted or code == EXIT_INTERRUPTED or (code < 0 and self._is_aborted()):
            if self._status() in GONE:
                self.deleted = self.current or self.jobs[-1]
                # its engine process may have been killed before it could
                journal.remove(journal.directory_of(self.datadir, self.deleted))
            how = "deleted" if self.deleted else "aborted"
            self.error = f"the job was {how} from elsewhere"
            code = EXIT_INTERRUPTED
        elif code < 0:
            self.error = f"the engine process {processes.ending(code)}"
            if -code in (signal.SIGKILL, signal.SIGXCPU) and (most_s := processes.time_limit_s()):
                self.error += (
                    f", after more than the {most_s} s of processor time that it may use here "
                    "(ulimit -t)"
                )
            elif -code == signal.SIGKILL and memory.oom_kills() > self.oom_kills:
                self.error += (
                    ": the kernel was out of memory; run the job where there is more, or with "
                    "fewer --cores"
                )
            elif checks.is_full(self.datadir):  # HDF5 crashes in some of its writes then
                self.error += (
                    f": No space left on device: {self.datadir}; free space or set OQ_DATADIR to "
                    "another directory"
                )
            code = EXIT_FAILED
        if code and not self.error:
            self.error = f"the engine process {processes.ending(code)}"
        if code and self.jobs:
            self._end_rows(code)
        told = {row["job"] for row in self.finished}
        self.finished += [self._ended(job, code) for job in self.jobs if job not in told]
        return code

    def _ended(self, job: int, code: int) -> dict[str, Any]:
        """Return what is known of a job that has not come to its end."""
        aborted = code == EXIT_INTERRUPTED
        state = jobtable.Status.ABORTED if aborted else jobtable.Status.FAILED
        seconds = time.monotonic() - self.turn_s if job == self.current else 0.0
        return {"job": job, "state": state, "seconds": round(seconds, 2)}

    def _is_aborted(self) -> bool:
        return self._status() in (jobtable.Status.ABORTED, *GONE)

    def _status(self) -> str | None:
        """Return what the table says of the job that is or was under way, "" if that is unknown."""
        with contextlib.suppress(jobtable.DatabaseError):
            if self.table is not None and self.jobs:
                table = jobtable.Outside(self.table.place, answer_s=LOCK_SECS)
                return table.status(self.current or self.jobs[-1])
        return ""

    def _end_rows(self, code: int) -> None:
        """End the jobs for which the engine process could not do it any more."""
        aborted = code == EXIT_INTERRUPTED
        status = jobtable.Status.ABORTED if aborted else jobtable.Status.FAILED
        assert self.table is not None
        try:
            jobtable.Outside(self.table.place, answer_s=LOCK_SECS).finish(self.jobs, status)
        except jobtable.DatabaseError as exc:
            self._print(f"{exc}; the next oq-run will set the job to failed")

    def report(self, target: Path) -> int:
        """Write a page about each job that has left a datastore; return an exit code.

        Another process does it: it imports the engine.

        :param target: a file, or a directory
        """
        code = 0
        for row in self.finished if self.interrupted_s is None or self.aborted else ():
            path = Path(row.get("datastore") or self.datadir / f"calc_{row['job']}.hdf5")
            if not os.path.exists(path):
                self._print(f"there is no report of job {row['job']}: it has no results")
                continue
            if not self.quiet:
                self._print(f"writing the report of job {row['job']}")
            error = "" if "outputs" in row else clean(self.error, LINE_CHARACTERS)
            words = [str(path), str(target), f"--error={error}"]
            made = subprocess.run(
                processes.python("oq_runtime.commands.report", *words), stdout=subprocess.PIPE
            )
            if made.returncode:  # it has said why
                code = EXIT_FAILED
            else:
                row["report"] = os.fsdecode(made.stdout).rstrip("\n")
        return code

    def end_notice(self, code: int) -> None:
        """Have the notice sent, if there is to be one; say when it could not be."""
        if self.notice is None:
            return
        seconds = round(time.monotonic() - self.began_s, 1)
        state = STATES.get(code, jobtable.Status.FAILED)
        for number in ENDINGS:  # it goes on by itself
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        facts = {"state": state, "error": self.error, "seconds": seconds}
        if unsent := self.notice.end(self._print, **facts):
            self._print(f"the notice of [oq_runtime] notify could not be sent: {unsent}")

    def forget_detached(self, code: int) -> None:
        """Let no job go on by itself, unless this machine goes down or there was no node."""
        if code == EXIT_NO_WORKERS or (code == EXIT_INTERRUPTED and processes.going_down()):
            return
        for number in self.jobs:
            detached.forget(journal.directory_of(self.datadir, number))

    def print_summary(self) -> None:
        """Print the outcome for a person."""
        out = Console(highlight=False, markup=False, soft_wrap=True)
        for row in self.surveys:
            out.print(clean(surveyed(row, slots(self.settings))))
        for row in self.finished:
            if "outputs" not in row:
                out.print(f"job {row['job']} {row['state']} after {row['seconds']:.1f} s")
                for line in reported(row):
                    out.print(clean(line))
                continue
            capacity = self.slots * max(row["seconds"], 0.01)
            out.print(
                f"job {row['job']} {row['state']} in {row['seconds']:.1f} s: {row['tasks']} tasks, "
                f"{row['retries']} retried, slot efficiency {row['busy_seconds'] / capacity:.0%}"
            )
            for line in shared_out(row["nodes"]):
                out.print(clean(line, LINE_CHARACTERS))
            out.print(f"datastore {clean(row['datastore'])} ({row['bytes'] / 1e6:.1f} MB)")
            for one in row["outputs"]:
                out.print(f"  {one['id']:>5}  {clean(one['name'])}")
            for line in (*exports(row["exported"]), *reported(row), *next_steps(row)):
                out.print(clean(line))
        if self.error:
            number = self.current or (self.jobs[-1] if self.jobs and not self.skipped else None)
            if self.deleted:  # with its log, and what there was to go on from
                number = None
            where = f"oq engine --show-log {number}" if number else ""
            if number in journal.numbers(self.datadir):
                where += f"; to go on: oq-run --resume {number}"
                journal.set_told(journal.directory_of(self.datadir, number))
            where = f" ({where})" if where else ""
            click.echo(f"oq-run: {clean(self.error, LINE_CHARACTERS)}{where}", err=True)


def end_group(pid: int) -> None:
    """Wait for the end of a process, and end what it has left: the engine's own pool outlives it.

    :param pid: of a child that leads a group of processes
    """
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        # its number stays its own until it is waited for in earnest
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
