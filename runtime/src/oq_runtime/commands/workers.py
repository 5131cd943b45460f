"""``oq-workers``: what the nodes of the cluster are doing, and telling them to stop or go on."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import click
import msgspec
from rich.table import Table
from rich.text import Text

from oq_runtime import processes
from oq_runtime.cluster.jobs import Job, jobs
from oq_runtime.cluster.pool import Answer, Killed, Pool, Unreachable, unreachable
from oq_runtime.commands import sessions
from oq_runtime.commands.printing import Group
from oq_runtime.commands.progress import NARROW_COLUMNS, screen
from oq_runtime.config import Config, read
from oq_runtime.errors import ConfigError, NoWorkers, OqRuntimeError
from oq_runtime.text import clean, duration, grouped
from oq_runtime.wire import security

EXIT_SILENT, EXIT_INPUT = 1, 2
#: columns of a table that goes into a file or a pipe: nothing is wrapped
WIDE_COLUMNS = 1000
HOST_TITLES = ["host", "slots", "jobs", "memory", "engine", "state", "beat age"]
CLUSTER_TITLES = ["user", "job", "priority", "since", "slots", "tasks", "left"]
JOB_TITLES = ["job", "phase", "tasks", "slots busy", "retried"]
#: characters of the name of a user, so that a job is a line of 60 columns
USER_CHARACTERS = 10
#: seconds between two looks
TOP_SECS = 2.0
#: of a line about a problem
MOST_CHARACTERS = 4000


@click.group("oq-workers", cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="oq-runtime")
def main() -> None:
    """Look after the workers of the OpenQuake cluster.

    Exit codes: 0 all is well, 1 a host has not answered or has a problem, 2 wrong configuration.
    """
    processes.open_standard()


def command(name: str, help: str, act: Callable[[Pool], dict[str, Answer]]) -> None:
    """Add a command that acts on all hosts and shows what they say."""

    @main.command(name, help=help)
    @as_json
    def run(as_json: bool) -> None:
        show(act(_pool()), as_json)


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

STOP = "Let no host take new tasks; those under way go on."
command("status", "Show slots, jobs, memory and state of each host.", lambda p: p.ask("status"))
command("start", "Let all hosts take tasks; start over ssh those that are down.", Pool.start)
command("stop", STOP, lambda pool: pool.ask("stop"))
command("drain", STOP, lambda pool: pool.ask("stop"))
command("restart", "Kill the workers and let all hosts take tasks.", Pool.restart)
command(
    "kill",
    "Kill the workers of all jobs, whose tasks are run again; over ssh where no agent answers.",
    Pool.kill,
)


@main.command()
@click.option("--seconds", default=120.0, show_default=True, help="How long at most.")
@click.argument("hosts", nargs=-1)
@as_json
def wait(hosts: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """Wait until every host answers, or each of HOSTS."""
    pool = _pool()
    wanted = hosts or tuple(pool.cluster.hosts)
    if unknown := set(wanted) - set(pool.cluster.hosts):
        raise click.UsageError(f"not in host_cores: {', '.join(sorted(unknown))}")
    try:
        answers = pool.wait(seconds, wanted)
    except NoWorkers as exc:
        tell(exc)
        answers = pool.ask("status", wanted)
        if not as_json:
            sys.exit(EXIT_SILENT)
    show(answers, as_json)


@main.command("jobs")
@as_json
def show_jobs(as_json: bool) -> None:
    """Show the jobs on the nodes: whose, since when, slots busy and granted, tasks, time left."""
    answers = _pool().ask("status")
    found = jobs(answers)
    if as_json:
        click.echo(json.dumps({name: _job_object(job) for name, job in found.items()}))
    elif found:
        print_table(CLUSTER_TITLES, [_job_row(job) for job in found.values()])
    else:
        click.echo("no job has slots of the nodes, or waits for them")
    silent = unreachable(answers)
    for line in grouped((host, answer.reason) for host, answer in silent):
        tell(line)
    if silent:
        sys.exit(EXIT_SILENT)


def _job_object(job: Job) -> dict[str, object]:
    since = datetime.fromtimestamp(job.since_s).astimezone()
    row = {field.name: getattr(job, field.name) for field in fields(job)}
    return {**row, "since": since.isoformat(timespec="seconds"), "since_s": round(job.since_s, 1)}


def _job_row(job: Job) -> list[str]:
    return [
        clean(job.user, USER_CHARACTERS),
        job.number,
        job.priority,
        job.since,
        f"{job.busy}/{job.slots}",
        f"{job.done}/{job.total}",
        _left(job.left_s),
    ]


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return duration(math.ceil(seconds)) if seconds else "overdue"


@main.command("make-urgent-key")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def make_urgent_key(file: Path) -> None:
    """Make a key for urgent jobs: its secret half goes to FILE, what is to be set is printed."""
    public, secret = security.new_pair()
    try:
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            stream.write(f"{secret}\n")
    except OSError as exc:
        tell(f"{file}: {exc.strerror}")
        sys.exit(EXIT_INPUT)
    click.echo(f"urgent_key = {public}\nurgent_key_file = {file.resolve()}")


@main.command()
def top() -> None:
    """Show the hosts, and your jobs of this machine, until Ctrl-C; once into a file or a pipe."""
    try:
        cluster = Config.from_sections(read()).cluster
        pool = Pool(cluster) if cluster else None
    except OqRuntimeError as exc:
        tell(exc)
        sys.exit(EXIT_INPUT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    console = screen(sys.stdout)
    renewed = console.is_terminal and not console.is_dumb_terminal
    while True:
        hosts = [_row(*item) for item in pool.ask("status").items()] if pool else []
        own = sessions.rows()
        if renewed:
            console.clear()
        if hosts:
            print_table(HOST_TITLES, hosts)
        if own:
            print_table(JOB_TITLES, own)
        else:
            click.echo("no job of yours runs on this machine through oq-run")
        if not renewed:
            return
        time.sleep(TOP_SECS)


@main.command()
@as_json
def debug(as_json: bool) -> None:
    """Run a task on every slot, kill a worker, and look for a file of the master on each host."""
    pool = _pool()
    os.environ["OQ_DISTRIBUTE"] = "zmq"
    import oq_runtime.activate  # noqa: F401  before the engine is imported
    from oq_runtime.cluster.debug import Host, examine

    report = examine(pool)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        rows = {address: host.as_dict() for address, host in report.hosts.items()}
        titles = list(Host().as_dict())
        print_table(
            ["host", *titles],
            [[address, *(_text(row[title]) for title in titles)] for address, row in rows.items()],
        )
        if report.survived:
            attempt, host = report.survived
            click.echo(f"a worker died on purpose: attempt {attempt} came through on {host}")
    for problem in report.problems:
        tell(problem)
    if report.problems:
        sys.exit(EXIT_SILENT)


def _pool() -> Pool:
    try:
        cluster = Config.from_sections(read()).cluster
        if cluster is None:
            raise ConfigError(
                "no cluster is configured: set [distribution] oq_distribute = zmq and the "
                "workers' addresses in [zworkers] host_cores of openquake.cfg"
            )
        return Pool(cluster)
    except OqRuntimeError as exc:
        tell(exc)
        sys.exit(EXIT_INPUT)


def tell(problem: object) -> None:
    """Print a line about a problem on stderr."""
    click.echo(f"oq-workers: {clean(str(problem), MOST_CHARACTERS)}", err=True)


def show(answers: dict[str, Answer], as_json: bool) -> None:
    """Print what the hosts say; exit with EXIT_SILENT when one says nothing."""
    if as_json:
        click.echo(json.dumps({host: _object(answer) for host, answer in answers.items()}))
    else:
        print_table(HOST_TITLES, [_row(host, answer) for host, answer in answers.items()])
    if unreachable(answers):
        sys.exit(EXIT_SILENT)


def _object(answer: Answer) -> object:
    match answer:
        case Unreachable(reason):
            return {"state": "unreachable", "reason": reason}
        case Killed():
            return {"state": "killed"}
    row = msgspec.to_builtins(answer, enc_hook=str)
    return {name: row[name] for name in type(answer).__annotations__}


def _row(host: str, answer: Answer) -> list[str]:
    match answer:
        case Unreachable(reason):
            return [host, "-", "-", "-", "-", f"unreachable: {reason}", "-"]
        case Killed():
            return [host, "-", "-", "-", "-", "killed over ssh", "-"]
    troubles = {
        "wait for a device or a file server": answer.waiting,
        "killed, but not gone": answer.stuck,
        "not started yet": answer.unstarted,
    }
    state = "; ".join([answer.state, *(f"{n} {what}" for what, n in troubles.items() if n)])
    return [
        host,
        f"{answer.busy}/{answer.slots}",
        ", ".join(answer.jobs) or "-",
        f"{answer.memory:.0%}",
        answer.engine,
        state,
        "-" if answer.beat_age_s is None else f"{answer.beat_age_s:.1f} s",
    ]


def _text(value: object) -> str:
    return "-" if value in (None, "") else str(value)


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    """Print a table for a person; what the cells say may be the words of others."""
    console = screen(sys.stdout)
    if not console.is_terminal:
        console.width = WIDE_COLUMNS
    narrow = console.width < NARROW_COLUMNS
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if narrow else (0, 1))
    for title in titles:
        table.add_column(title)
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))  # a reason may have [brackets]
    console.print(table, highlight=False)


if __name__ == "__main__":
    main()
