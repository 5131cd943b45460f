"""What a job waits for before it begins: the jobs before it, and memory.

The jobs of a host run one after the other, in the order of their numbers.
That is ``serialize_jobs`` of openquake.cfg, which the engine's own pools need: a second job would
start as many processes again, or end those of the first. The agents of a cluster share their slots
between jobs, so that a job whose tasks go there waits for no other.

The engine looks every 15 s whether the jobs before have ended, waits for ever for one whose process
is gone, and does not say for whom it waits where nobody reads its standard output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import psutil

from oq_runtime.config import Config
from oq_runtime.engine.jobtable import Job, JobTable, Status
from oq_runtime.text import clean

#: seconds between two looks at the jobs before, and at the memory
LOOK_SECS = 1.0
#: of the memory of the machine, from which on the engine begins no job
MOST_MEMORY_PERCENT = 80


def install_queue(engine: Any, tell: Callable[[str], None] = print) -> None:
    """Replace the engine's waiting for the jobs before.

    :param engine: the module ``openquake.engine.engine``
    :param tell: shows a line to the user
    """

    def poll_queue(job_id: int, poll_time: float = LOOK_SECS) -> None:
        from openquake.baselib import config

        if Config.from_sections(config).cluster is None:
            wait(JobTable.of_engine(), job_id, config.distribution.serialize_jobs, tell)

    engine.poll_queue = poll_queue


def wait(table: JobTable, number: int, at_a_time: int, tell: Callable[[str], None]) -> None:
    """Wait until a job may run.

    :param at_a_time: jobs of a host that may run at a time; 0: any number
    :param tell: is given a line when the wait begins, and when it is for other jobs than before
    """
    told = ""
    while before := ahead(table, number, at_a_time):
        if not told:
            table.own(number, Status.SUBMITTED)
        if told != (line := waiting(before)):
            tell(told := line)
        time.sleep(LOOK_SECS)


def wait_for_memory(table: JobTable, number: int, tell: Callable[[str], None]) -> None:
    """Wait until the machine has the free memory without which the engine begins no job.

    The engine would look itself (``run_calc`` in ``openquake/engine/engine.py``), and say so to
    those alone who have the level info of its log.
    """
    told = False
    while (used := psutil.virtual_memory().percent) >= MOST_MEMORY_PERCENT:
        if not told:
            table.own(number, Status.SUBMITTED)
            tell(
                f"waiting: {used:.0f} % of this machine's memory is in use, the engine begins a "
                f"job below {MOST_MEMORY_PERCENT} %: end what is not needed (ps --sort=-rss aux)"
            )
            told = True
        time.sleep(LOOK_SECS)


def ahead(table: JobTable, number: int, at_a_time: int) -> list[Job]:
    """Return the jobs that have to end before a job may run; those that are gone are mended."""
    if not at_a_time:
        return []
    table.mend()
    active = (Status.SUBMITTED, Status.EXECUTING)
    return [
        job
        for job in table.unfinished()
        if job.pid and job.status in active and job.id < number - (at_a_time - 1)
    ]


def waiting(jobs: Sequence[Job]) -> str:
    """Say for whose jobs one waits, since when they run, and what to do about it."""
    names = [f"job {job.id} of {clean(job.user)} ({job.status}{since(job)})" for job in jobs]
    return (
        f"waiting for {', '.join(names)}; the jobs of this host run one after the other: raise "
        "serialize_jobs in [distribution] of openquake.cfg to run more at a time, or end one with "
        f"oq abort {jobs[0].id}"
    )


def since(job: Job) -> str:
    """Return since when a job runs, in the time of the user."""
    if not job.started_s:
        return ""
    return f" since {datetime.fromtimestamp(job.started_s):%Y-%m-%d %H:%M}"
