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
from oq_runtime.commands.lines import waits_for
from oq_runtime.commands.progress import AT_WORK, Display, StatusReader
from oq_runtime.engine import jobtable
from oq_runtime.files import private
from oq_runtime.session import launch
from oq_runtime.text import clean

#: the file with a JSON object per job
JOBS = "jobs"
#: and the one with what is done besides tasks
STAGE = "stage"
STOPPED = "the display is stopped, the job goes on; fg shows it again"
#: seconds after the end of a session in which the row of its job may still change
SETTLE_SECS = 2.0
#: seconds between two looks at a job
LOOK_SECS = 0.5


@dataclass(frozen=True, slots=True)
class Running:
    """A job with the directory of its session, where its job table is, and whether on a cluster."""

    job: int
    directory: Path
    database: str
    cluster: bool


def note(directory: Path, job: int, database: str, cluster: bool) -> None:
    """Note a job of a session."""
    with (directory / JOBS).open("a") as file:
        row = {"job": job, "database": database, "cluster": cluster}
        file.write(json.dumps(row) + "\n")


def note_stage(directory: Path, stage: str) -> None:
    """Note what a session does besides tasks."""
    (directory / STAGE).write_text(stage)


def _stage(directory: Path) -> str:
    try:
        return clean((directory / STAGE).read_text()) or AT_WORK
    except (OSError, ValueError):  # it ends just now
        return AT_WORK


def running() -> list[Running]:
    """Return the jobs whose sessions have their directory in TMPDIR, the latest one last."""
    found = []
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    for directory in temporary.glob(f"{launch.PREFIX}*"):
        if private.is_own(directory):
            with contextlib.suppress(OSError, ValueError, TypeError):
                rows = map(json.loads, (directory / JOBS).read_text().splitlines())
                found += [Running(directory=directory, **row) for row in rows]
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
        name, tasks = _stage(one.directory), "-"
        if status.phases:
            name = status.phases[-1].name
            done, total = (sum(getattr(p, key) for p in status.phases) for key in ("done", "total"))
            tasks = f"{done}/{total}"
        retries = sum(phase.retries for phase in status.phases)
        busy, slots = (sum(getattr(n, key) for n in status.nodes) for key in ("busy", "slots"))
        found.append([str(one.job), name, tasks, f"{busy}/{slots}", str(retries)])
    return found


def watch(number: int | None, console: Console) -> tuple[int, str | None]:
    """Show a job until its end; return its number and status.

    The status is None of a job that was deleted, and still one of ``jobtable.UNFINISHED`` where the
    ``oq-run`` of the job was killed.

    :param number: None: the latest one
    :raises BadInput: where no such job runs
    """
    found = [one for one in running() if number in (None, one.job)]
    if not found:
        which = "no job of yours runs" if number is None else f"job {number} does not run"
        raise BadInput(
            f"--watch: {which} on this machine by oq-run, or with another TMPDIR; "
            "oq engine --lhc and --lrc list all jobs"
        )
    one = found[-1]
    table = jobtable.Outside(one.database)
    display = Display(console, quiet=False)
    with contextlib.suppress(OSError):  # it ends just now
        display.began_s -= time.time() - (one.directory / JOBS).stat().st_ctime
    display.enter(AT_WORK, f"job {one.job}")
    display.mind_stop(STOPPED)
    status = StatusReader(one.directory)
    state: str | None = jobtable.Status.EXECUTING
    waits, told, since_s, gone_s = "", {""}, time.monotonic(), 0.0
    try:
        while True:
            if not gone_s and not one.directory.exists():
                gone_s = time.monotonic()
            with contextlib.suppress(jobtable.DatabaseError):  # it is locked just now
                state = table.status(one.job)
                settled = gone_s and time.monotonic() - gone_s > SETTLE_SECS
                # one that is aborted has failed until its process has ended, and a little longer
                if settled or state not in (*jobtable.UNFINISHED, jobtable.Status.FAILED):
                    return one.job, state
            display.show(status.poll())
            display.enter(stage := _stage(one.directory))
            what, why = waits_for(display.status, cluster=one.cluster)
            if what != waits:
                waits, since_s = what, time.monotonic()
            waited_s = time.monotonic() - since_s
            display.wait(what, waited_s)
            line = f"waiting: {why}" if why and waited_s > SETTLE_SECS else ""
            if not line and not display.framed and stage.startswith("waiting"):
                line = stage
            if line not in told:
                told.add(line)
                display.print(line)
            time.sleep(LOOK_SECS)
    finally:
        display.close()
        status.close()
