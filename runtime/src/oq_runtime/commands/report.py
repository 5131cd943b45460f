"""``oq-report``: a page about a job, whoever has run it, and how.

It is a process of its own for ``oq-run --report``, too: it imports the engine, and reads files that
may be damaged.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

import click

from oq_runtime import config, processes
from oq_runtime.commands import checks
from oq_runtime.commands.printing import Command
from oq_runtime.engine import jobtable
from oq_runtime.errors import InputError, OqRuntimeError
from oq_runtime.report import output
from oq_runtime.text import clean

EXIT_INPUT = 2
STDOUT = Path("-")
#: of a line about a problem
MOST_CHARACTERS = 1000


@click.command(
    "oq-report",
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True},
)
@click.argument("job", metavar="ID")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--error", default="", hidden=True)  # why it failed, as oq-run knows it
@click.version_option(package_name="oq-runtime")
def main(job: str, file: Path | None, error: str) -> None:
    """Write a page about job ID (-1: the last one), or about a datastore (calc_ID.hdf5).

    It goes to FILE (-: stdout), or to report_ID.html in this directory: one file with all that is
    in it. Exit codes: 0 it is written, 2 it could not be (1: on stdout).
    """
    processes.open_standard()
    try:
        processes.check_user()
        checks.check_here()
        path, state = find(job)
        target = None
        if file != STDOUT:
            target = output.place(path, checks.expanded(str(file)) if file else None)
            output.check_place(target)
        from oq_runtime.report import page  # not wanted by the others: matplotlib

        with contextlib.redirect_stdout(sys.stderr):  # which the engine may print to
            text = page.made(path, state, error)
        if target:
            output.write(target, text)
        else:
            click.echo(text.encode(), nl=False)
    except (OqRuntimeError, checks.BadInput) as exc:
        click.echo(f"oq-report: {clean(str(exc), MOST_CHARACTERS)}", err=True)
        sys.exit(EXIT_INPUT)
    if target:
        click.echo(os.fsencode(target))  # as it is, for whoever reads it: it need not be UTF-8


def find(job: str) -> tuple[Path, str]:
    """Return the datastore that is meant, and the state of its job as the job table has it.

    :raises InputError: where it is not there, or not to be read
    """
    sections = config.read()
    table = jobtable.Outside.configured(sections)
    state, owner = "", ""
    if job.endswith(".hdf5"):
        path = checks.expanded(job).absolute()
    elif not re.fullmatch("-?[0-9]{1,18}", job):
        raise InputError(f"{clean(job)} is no number of a job; oq engine --lhc lists them")
    else:
        from oq_runtime.report import words  # h5py

        try:
            path = words.find(checks.data_directory(sections), int(job))
        except InputError:  # it may be of another user
            if int(job) < 0 or (found := table.find(int(job))) is None:
                raise
            owner, state, path = found
    if not owner and (number := re.fullmatch(r"calc_(\d+)", path.stem)):
        with contextlib.suppress(jobtable.DatabaseError):  # the datastore is enough
            found = table.find(int(number[1]))
            if found and found[2] == path:  # and not one of another database
                owner, state, _ = found
    if state in jobtable.UNFINISHED:
        raise InputError(f"{path.stem} is {state}; wait for its end (oq-run --watch)")
    jobtable.check_datastore(path, f"job {job}" + (f" of {owner}" if owner else ""))
    return path, state


if __name__ == "__main__":
    main()
