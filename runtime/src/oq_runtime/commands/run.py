"""``oq-run``: run jobs with a live display, and leave nothing behind.

This process does not import the engine. It starts the session (broker and private agent) and the
engine process (``job``) side by side, draws the progress, passes signals on, and mends the state of
a job whose engine process was killed.
"""

# ruff: noqa: E402
from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the rest is imported

import contextlib
import json
import os
import selectors
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import click
import zmq
from rich.console import Console

from oq_runtime import config
from oq_runtime.commands.progress import Display, StatusReader
from oq_runtime.config import SESSION_VARIABLE, Config, check_cores
from oq_runtime.errors import ConfigError, OqRuntimeError
from oq_runtime.files import private
from oq_runtime.session import launch
from oq_runtime.wire.protocol import Status

EXIT_FAILED, EXIT_INPUT, EXIT_NO_WORKERS, EXIT_INTERRUPTED = 1, 2, 3, 130
#: seconds that an interrupted engine process has to end by itself
STOP_SECS = 3.0
#: seconds after which a node that is missing, or a wait, is worth a line
TELL_SECS = 3.0
#: seconds for the DbServer to answer
DBSERVER_SECS = 2
#: what the engine does for a job that fails, for one whose engine process cannot any more
MEND = (
    "UPDATE job SET status='failed', is_running=0, stop_time=datetime('now') "
    "WHERE id=? AND status IN ('created', 'submitted', 'executing')"
)


class BadInput(click.ClickException):
    exit_code = EXIT_INPUT

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"oq-run: {self.format_message()}", err=True)


def check_file(name: str) -> str:
    """Return the absolute path of a job file; raises BadInput naming the file and the remedy."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            raise BadInput(f"{name} is a directory; give the job file in it")
        data = path.read_bytes()
    except OSError as exc:
        raise BadInput(f"{name}: {exc.strerror}; check the path of the job file") from exc
    if path.suffix == ".zip":
        return str(path.resolve())
    if not data.strip():
        raise BadInput(f"{name} is empty; a job file has sections such as [general]")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise BadInput(f"{name} is not a text file; give a job file (.ini)") from exc
    if "\0" in text:
        raise BadInput(f"{name} is not a text file; give a job file (.ini)")
    return str(path.resolve())


def parse_params(params: tuple[str, ...]) -> dict[str, str]:
    """Return ``name=value,...`` options as a dictionary."""
    pairs = {}
    for item in ",".join(params).split(",") if params else ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise BadInput(f"-p {item}: give name=value")
        pairs[name.strip()] = value
    return pairs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, required=True, metavar="JOB.ini ...")
@click.option("--hc", metavar="ID", help="Start from the results of this job; -1: the last one.")
@click.option("-p", "params", multiple=True, metavar="NAME=VALUE", help="Override a parameter.")
@click.option("--exports", default="", metavar="csv,...", help="Export results in these formats.")
@click.option("--export-dir", type=click.Path(file_okay=False), help="Where to export to.")
@click.option("--log-file", "-L", type=click.Path(dir_okay=False), help="The engine's log.")
@click.option(
    "--log-level",
    default="info",
    type=click.Choice(["debug", "info", "warn", "error", "critical"]),
    show_default=True,
)
@click.option("--cores", help="Run on this machine alone with so many workers; -1: all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--no-progress", is_flag=True, help="No progress display.")
@click.version_option(package_name="oq-runtime")
def main(
    files: tuple[str, ...],
    hc: str | None,
    params: tuple[str, ...],
    exports: str,
    export_dir: str | None,
    log_file: str | None,
    log_level: str,
    cores: str | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    """Run OpenQuake calculations through the ZeroMQ runtime.

    With several files, the first one is the hazard that the others start from. Exit codes:
    0 complete, 1 a job failed, 2 bad input, 3 no workers, 130 interrupted.
    """
    spec = {
        "files": [check_file(name) for name in files],
        "hc": hc,
        "params": parse_params(params),
        "exports": exports,
        "export_dir": str(Path(export_dir).expanduser().resolve()) if export_dir else None,
        "log_file": str(Path(log_file).expanduser().resolve()) if log_file else None,
        "log_level": log_level,
    }
    if spec["log_file"] and not os.access(Path(str(spec["log_file"])).parent, os.W_OK):
        raise BadInput(f"--log-file {log_file}: its directory is missing or not writable")
    try:
        sections = config.read()
        if cores:  # on this machine, whatever cluster there is; but with the same limits
            check_cores(cores)
            sections = {"oq_runtime": sections.get("oq_runtime", {}) | {"cores": cores}}
        settings = Config.from_sections(sections)
    except ConfigError as exc:
        ours = cores and str(exc).startswith("cores=")
        raise BadInput(f"--{exc}" if ours else str(exc)) from exc
    run = Run(spec, settings, Console(stderr=True), quiet=no_progress or as_json)
    code = run.execute()
    if as_json:
        result = {"exit": code, "error": run.error, "retries": run.retries, "jobs": run.finished}
        click.echo(json.dumps(result))
    else:
        run.print_summary()
    sys.exit(code)


class Run:
    """One call of ``oq-run``.

    :param spec: what ``job`` is to do
    :param settings: the cluster, or the cores of this machine
    :param console: for the display and the engine's log lines (stderr)
    :param quiet: show no progress
    """

    def __init__(
        self, spec: dict[str, Any], settings: Config, console: Console, *, quiet: bool
    ) -> None:
        self.spec = spec
        self.settings = settings
        self.slots = 1  # the most that were there at a time
        self.console = console
        self.quiet = quiet
        self.jobs: list[int] = []
        self.finished: list[dict[str, Any]] = []
        self.retries = 0
        self.error = ""
        self.true_since_s: dict[str, float] = {}  # of what there is to be told, and what has been
        self.told: set[str] = set()
        self.database: str | None = None
        self.interrupted_s: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.outcome: int | None = None  # exit code, as the engine process says itself

    def execute(self) -> int:
        """Run the jobs and return the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._interrupt)
        try:
            directory = launch.start(self.settings, os.getpid())
        except ConfigError as exc:
            self.error = str(exc)
            return EXIT_INPUT
        except (OqRuntimeError, OSError) as exc:
            self.error = str(exc)
            return EXIT_NO_WORKERS
        try:
            return self._engine(directory)
        finally:
            # broker and agent end with this process; do not wait for that when the caller may
            # import us, and let nothing of the session outlive the command
            stop_session(directory)

    def _engine(self, directory: Path) -> int:
        env = dict(os.environ)
        env[SESSION_VARIABLE] = str(directory)
        env["OQ_DISTRIBUTE"] = "zmq"
        if self.settings.cluster is None:
            env["OQ_NUM_CORES"] = str(self.settings.cores)
        report_in, report_out = os.pipe()
        process = self.process = subprocess.Popen(
            [sys.executable, "-m", "oq_runtime.engine.job", str(report_out), str(os.getpid())],
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
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(self.spec).encode())
        log = threading.Thread(target=self._copy_log, args=(process.stdout,), daemon=True)
        log.start()
        status = StatusReader(directory)
        display = Display(None if self.quiet else self.console)
        try:
            self._follow(process, report_in, status, display)
        finally:
            display.close()
            status.close()
        code = process.wait()
        log.join(timeout=5)
        return self._verdict(code if self.outcome is None else self.outcome)

    def _copy_log(self, stream: IO[bytes]) -> None:
        traceback = False
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            # a traceback is for the log (the job database has it), not for the screen
            traceback = line.startswith("Traceback (") or (traceback and line.startswith(" "))
            if not traceback and line.startswith("["):
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _follow(
        self,
        process: subprocess.Popen[bytes],
        report_in: int,
        status: StatusReader,
        display: Display,
    ) -> None:
        selector = selectors.DefaultSelector()
        selector.register(report_in, selectors.EVENT_READ)
        pending = b""
        with os.fdopen(report_in, "rb", buffering=0) as stream:
            while True:
                if selector.select(0.3):
                    data = stream.read(65536)
                    if not data:
                        break
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        self._take(json.loads(line))
                if found := status.poll():
                    self.retries = sum(phase.retries for phase in found.phases)
                    self.slots = max(self.slots, sum(node.slots for node in found.nodes))
                    self._tell(found)
                    display.show(found)
                if self.interrupted_s and time.monotonic() - self.interrupted_s > STOP_SECS:
                    process.kill()

    def _tell(self, status: Status) -> None:
        """Say what the job waits for, and which nodes it has to do without, once each."""
        now = time.monotonic()
        lines = [f"waiting: {status.note}"] if status.note else []
        lines += [f"without {node.host}: {node.reason}" for node in status.nodes if node.reason]
        self.true_since_s = {line: self.true_since_s.get(line, now) for line in lines}
        for line, since_s in self.true_since_s.items():
            if line not in self.told and now - since_s >= TELL_SECS:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
                self.told.add(line)
        self.told &= set(lines)

    def _take(self, row: dict[str, Any]) -> None:
        match row["kind"]:
            case "created":
                self.jobs.append(row["job"])
                self.database = row["database"]
            case "finished":
                self.finished.append(row)
            case "input" | "failed":
                self.error = row["error"]
                self.finished.append(row) if row["kind"] == "failed" else None
            case "end":
                self.outcome = row["code"]

    def _interrupt(self, *_: object) -> None:
        if self.interrupted_s is None:
            self.interrupted_s = time.monotonic()
            if self.process is not None:
                self.process.send_signal(signal.SIGINT)

    def _verdict(self, code: int) -> int:
        if self.interrupted_s is not None:
            self.error = "interrupted"
            code = EXIT_INTERRUPTED
        elif code < 0:
            self.error = (
                self.error or f"the engine process was killed by {signal.Signals(-code).name}"
            )
            code = EXIT_FAILED
        elif code == EXIT_INTERRUPTED:
            self.error = "the job was aborted from elsewhere"
        elif code == EXIT_FAILED and self.error.startswith("NoWorkers"):
            code = EXIT_NO_WORKERS
        if code and not self.error:
            self.error = f"the engine process ended with exit code {code}"
        if code not in (0, EXIT_INPUT) and self.database:
            mend(self.database, self.jobs)
        return code

    def print_summary(self) -> None:
        """Print the outcome for a person."""
        out = Console(highlight=False)
        for row in self.finished:
            if row["kind"] == "failed":
                continue
            capacity = self.slots * row["seconds"]
            out.print(
                f"job {row['job']} {row['state']} in {row['seconds']:.1f} s: {row['tasks']} tasks, "
                f"{self.retries} retried, slot efficiency {row['busy_seconds'] / capacity:.0%}"
            )
            out.print(f"datastore {row['datastore']} ({row['bytes'] / 1e6:.1f} MB)", soft_wrap=True)
            for output in row["outputs"]:
                out.print(f"  {output['id']:>5}  {output['name']}")
        if self.error:
            where = f" (oq engine --show-log {self.jobs[-1]})" if self.jobs else ""
            click.echo(f"oq-run: {self.error}{where}", err=True)


def mend(database: str, jobs: list[int]) -> None:
    """Set to ``failed`` those of the jobs that the database takes for unfinished.

    Directly, or as the DbServer's clients do: importing the engine for this would take seconds.

    :param database: a file, or the DbServer's tcp:// URL
    """
    if not database.startswith("tcp://"):
        with contextlib.closing(sqlite3.connect(database, timeout=2)) as db, db:
            db.executemany(MEND, [(job,) for job in jobs])
        return
    with zmq.Context() as context, context.socket(zmq.REQ) as dbserver:
        dbserver.linger = 0
        dbserver.connect(database)
        for job in jobs:
            dbserver.send_pyobj((MEND.replace("?", "?x"), job))
            if not dbserver.poll(DBSERVER_SECS * 1000):
                return  # the next job of this host will do it
            dbserver.recv()


def stop_session(directory: Path) -> None:
    """End the broker and the agent of a session and remove its directory."""
    pids = launch.pids(directory)
    descriptors = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptors.append(os.pidfd_open(pid))
            os.kill(pid, signal.SIGTERM)
    selector = selectors.DefaultSelector()
    for descriptor in descriptors:
        selector.register(descriptor, selectors.EVENT_READ)
    deadline = time.monotonic() + STOP_SECS
    while selector.get_map() and time.monotonic() < deadline:
        for key, _ in selector.select(0.1):
            selector.unregister(key.fileobj)
            os.close(key.fd)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if selector.get_map():
                os.kill(pid, signal.SIGKILL)
    private.remove(directory)


if __name__ == "__main__":
    main()
