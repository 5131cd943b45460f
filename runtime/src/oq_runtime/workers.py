"""``oq-workers``: what the nodes of the cluster are doing, and telling them to stop or go on."""

from __future__ import annotations

import json
import sys

import click
import msgspec
from rich.console import Console
from rich.table import Table

from oq_runtime.config import Config, read
from oq_runtime.errors import ConfigError, NoWorkers, OqRuntimeError
from oq_runtime.pool import Action, Pool
from oq_runtime.protocol import AgentStatus

EXIT_SILENT, EXIT_INPUT = 1, 2
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="oq-runtime")
def main() -> None:
    """Look after the workers of the OpenQuake cluster.

    Exit codes: 0 all hosts have answered, 1 one has not, 2 wrong configuration.
    """


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
        click.echo(f"oq-workers: {exc}", err=True)
        sys.exit(EXIT_INPUT)


def _tell(action: Action, as_json: bool) -> None:
    answers = _pool().ask(action)
    if as_json:
        rows = {host: _row(answer) for host, answer in answers.items()}
        click.echo(json.dumps(rows))
    else:
        show(answers)
    if any(isinstance(answer, str) for answer in answers.values()):
        sys.exit(EXIT_SILENT)


def _row(answer: AgentStatus | str) -> object:
    if isinstance(answer, str):
        return {"state": "unreachable", "reason": answer}
    row = msgspec.to_builtins(answer)
    return {name: row[name] for name in AgentStatus.__annotations__}


def show(answers: dict[str, AgentStatus | str]) -> None:
    """Print the answers as a table."""
    table = Table(box=None)
    for title in ("host", "slots", "memory", "engine", "state", "jobs"):
        table.add_column(title)
    for host, answer in answers.items():
        if isinstance(answer, str):
            table.add_row(host, "", "", "", "unreachable", answer)
        else:
            slots = f"{answer.busy}/{answer.slots}"
            jobs = ", ".join(answer.jobs)
            table.add_row(host, slots, f"{answer.memory:.0%}", answer.engine, answer.state, jobs)
    Console(soft_wrap=True).print(table)


@main.command()
@as_json
def status(as_json: bool) -> None:
    """Show slots, memory, jobs and state of each host."""
    _tell("status", as_json)


@main.command()
@as_json
def start(as_json: bool) -> None:
    """Let stopped hosts take tasks again."""
    _tell("start", as_json)


@main.command()
@as_json
def stop(as_json: bool) -> None:
    """Let no host take new tasks; those under way go on."""
    _tell("stop", as_json)


main.add_command(stop, "drain")


@main.command()
@as_json
def kill(as_json: bool) -> None:
    """Kill the worker processes of all jobs; their tasks are run again."""
    _tell("kill", as_json)


@main.command()
@as_json
def restart(as_json: bool) -> None:
    """Kill the worker processes and let the hosts take tasks again."""
    _pool().ask("kill")
    _tell("start", as_json)


@main.command()
@click.option("--seconds", default=120.0, show_default=True, help="How long at most.")
def wait(seconds: float) -> None:
    """Wait until every host answers."""
    try:
        _pool().wait(seconds)
    except NoWorkers as exc:
        click.echo(f"oq-workers: {exc}", err=True)
        sys.exit(EXIT_SILENT)


if __name__ == "__main__":
    main()
