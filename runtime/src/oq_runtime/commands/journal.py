"""``oq-journal``: what is kept of jobs, so that they can go on or others begin with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import click

from oq_runtime import config, processes
from oq_runtime.commands import checks
from oq_runtime.commands.printing import Group
from oq_runtime.errors import ConfigError, JournalError
from oq_runtime.files import detached, journal
from oq_runtime.files.journal import Consumed, Reader
from oq_runtime.text import clean

EXIT_DAMAGED, EXIT_INPUT = 1, 2
#: a job does not go on; its oq-run has said why
EXIT_STAYS = 1


@click.group("oq-journal", cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="oq-runtime")
def main() -> None:
    """Look after the journals of jobs that did not complete; oq-run --resume ID goes on with one.

    Exit codes: 0 all is well, 1 a journal is damaged or a job does not go on, 2 there is no
    such journal.
    """
    processes.open_standard()


def leave(text: object, code: int) -> NoReturn:
    """End the command with one line."""
    click.echo(f"oq-journal: {clean(str(text))}", err=True)
    sys.exit(code)


def datadir() -> Path:
    """Return where the results of this user are."""
    try:
        processes.check_user()
        return checks.data_directory(config.read())
    except ConfigError as exc:
        leave(exc, EXIT_INPUT)


def directory_of(number: str) -> Path:
    """Return the directory of a journal, or end the command when there is none."""
    where = datadir()
    try:
        return journal.directory_of(where, journal.find(where, number))
    except JournalError as exc:
        leave(exc, EXIT_INPUT)


@main.command()
def show() -> None:
    """List the journals of this user: job, results, size, whether it runs, files."""
    for number in journal.everything(where := datadir()):
        directory = journal.directory_of(where, number)
        try:
            reader = Reader(directory)
            files = " ".join(map(str, reader.head.get("spec", {}).get("files", ())))
            what = f"{reader.results} results, {journal.size(directory) / 1e6:.1f} MB, "
            state = "is complete" if journal.is_complete(directory) else "can go on"
            what += f"{'runs' if journal.claimed(directory) else state}, {clean(files)}"
        except JournalError as exc:
            what = clean(str(exc))
        click.echo(f"job {number}: {what}")


@main.command()
@click.argument("number", metavar="ID")
def verify(number: str) -> None:
    """Read a journal whole, and say how much of it is good."""
    try:
        reader = Reader(directory_of(number))
    except JournalError as exc:
        leave(exc, EXIT_DAMAGED)
    good, wrong = 0, reader.torn
    for record in reader.records:
        try:
            reader.body(record)
        except JournalError as exc:
            wrong = str(exc)
            break
        good += isinstance(record.event, Consumed)
    end = f"; damaged from there on: {clean(wrong)}" if wrong else ""
    click.echo(f"job {number}: {good} results are good{end}")
    sys.exit(EXIT_DAMAGED if wrong else 0)


@main.command()
def resume() -> None:
    """Go on with all detached jobs whose oq-run was killed, or ended with this machine.

    Each is detached again, with the options of then; one that has gone on three times by itself
    is left to its user.
    """
    code = 0
    for number in journal.numbers(where := datadir()):
        directory = journal.directory_of(where, number)
        if (noted := detached.read(directory)) is None:
            continue
        try:
            if journal.claimed(directory):
                continue
        except JournalError as exc:
            click.echo(f"job {number}: {clean(str(exc))}")
            code = EXIT_STAYS
            continue
        if noted.times >= detached.MOST_TIMES:
            click.echo(
                f"job {number} has gone on {noted.times} times and was ended each time; "
                f"oq-run --resume {number} tries again"
            )
            continue
        words = ("--detach", f"--resume={number}", *noted.options)
        if subprocess.run(processes.python("oq_runtime.commands.run", *words)).returncode:
            code = EXIT_STAYS
    sys.exit(code)


@main.command()
@click.argument("numbers", nargs=-1, metavar="[ID ...]")
@click.option("--all", "everything", is_flag=True, help="All journals of jobs that do not run.")
def prune(numbers: tuple[str, ...], everything: bool) -> None:
    """Remove journals of jobs that are not to go on."""
    if bool(numbers) == everything:
        leave("give the numbers of jobs, or --all alone", EXIT_INPUT)
    for directory in map(directory_of, numbers or map(str, journal.everything(datadir()))):
        if journal.remove(directory):
            click.echo(f"removed {directory}")
        else:
            click.echo(f"{directory} stays: its job runs, or it cannot be removed")


if __name__ == "__main__":
    main()
