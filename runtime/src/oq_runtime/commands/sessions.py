"""The jobs of this user that run on this machine, found from another terminal.

Each ``oq-run`` notes its jobs in the directory of its session, which ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from oq_runtime.commands.checks import BadInput
from oq_runtime.commands.progress import Display, StatusReader
from oq_runtime.engine import jobtable
from oq_runtime.files import private
from oq_runtime.session import launch

#: the file with a JSON object per job
JOBS = "jobs"
#: seconds between two looks at a job
LOOK_SECS = 0.5


@dataclass(frozen=True, slots=True)
class Running:
    """A job with the directory of its session, and where its job table is."""

    job: int
    directory: Path
    database: str


def note(directory: Path, job: int, database: str) -> None:
    """Note a job of a session."""
    with (directory / JOBS).open("a") as file:
        file.write(json.dumps({"job": job, "database": database}) + "\n")


def running() -> list[Running]:
    """Return the jobs whose sessions have their directory in TMPDIR, the latest one last."""
    found = []
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    for directory in temporary.glob(f"{launch.PREFIX}*"):
        if private.is_own(directory):
            with contextlib.suppress(OSError, ValueError):
                rows = map(json.loads, (directory / JOBS).read_text().splitlines())
                found += [Running(row["job"], directory, row["database"]) for row in rows]
    return sorted(found, key=lambda one: one.job)


def rows() -> list[list[str]]:
    """Return for each running job its number, phase, tasks, busy slots and repeated attempts."""
    found = []
    for one in running():
        reader = StatusReader(one.directory)
        status = reader.last(LOOK_SECS)
        reader.close()
        if status is None:  # it ends just now
            continue
        name = tasks = "-"
        if status.phases:
            name = status.phases[-1].name
            done, total = (sum(getattr(p, key) for p in status.phases) for key in ("done", "total"))
            tasks = f"{done}/{total}"
        retries = sum(phase.retries for phase in status.phases)
        busy, slots = (sum(getattr(n, key) for n in status.nodes) for key in ("busy", "slots"))
        found.append([str(one.job), name, tasks, f"{busy}/{slots}", str(retries)])
    return found


def watch(number: int | None, console: Console) -> tuple[int, str]:
    """Show a job until its end; return its number and status.

    :param number: None: the latest one
    :raises BadInput: where no such job runs
    """
    found = [one for one in running() if number in (None, one.job)]
    if not found:
        which = "there is no job" if number is None else f"job {number} is none"
        raise BadInput(
            f"--watch: {which} of yours that oq-run runs on this machine with this TMPDIR; "
            "oq engine --lhc lists all of them"
        )
    one = found[-1]
    table = jobtable.Outside(one.database)
    display = Display(console, quiet=False)
    with contextlib.suppress(OSError):  # it ends just now
        display.began_s -= time.time() - (one.directory / JOBS).stat().st_ctime
    display.enter("the engine is at work", f"job {one.job}")
    status = StatusReader(one.directory)
    try:
        state: str | None = jobtable.Status.EXECUTING
        there = True
        while state in jobtable.UNFINISHED and there:
            display.show(status.poll())
            there = one.directory.exists()
            with contextlib.suppress(jobtable.DatabaseError):  # it is locked just now
                state = table.status(one.job)
            time.sleep(LOOK_SECS)
    finally:
        display.close()
        status.close()
    return one.job, str(state)
