"""``oq abort`` and ``oq engine --dc``: end the process that the job table names, and no other.

The engine's own takes the first process of the host that calls itself ``oq-job-N``, which may run
job N of another database, and calls the job aborted while its process still runs.
"""

from __future__ import annotations

import functools
import os
import select
import shutil
import signal
from pathlib import Path
from typing import Any

from oq_runtime import processes
from oq_runtime.engine.jobtable import UNFINISHED, Job, JobTable, Status, lives, user_name
from oq_runtime.files import journal, private
from oq_runtime.text import clean

#: seconds that an engine process has to end after an interrupt
END_SECS = 10.0


def install_abort(abort: Any) -> None:
    """Replace what ``oq abort`` does.

    :param abort: the module ``openquake.commands.abort``
    """

    @functools.wraps(abort.main)  # its attributes and annotations make the command line
    def main(job_id: list[int]) -> None:
        for number in job_id:
            print(end(JobTable.of_engine(), number))

    abort.main = main


def install_delete(command: Any) -> None:
    """Have ``oq engine --dc`` end no job that it may not delete, and leave nothing to go on from.

    :param command: the module ``openquake.commands.engine``
    """
    engine_abort, engine_delete = command.abort, command.del_calculation

    def abort(numbers: list[int]) -> None:  # called when the user has confirmed
        table = JobTable.of_engine()
        for number in numbers:
            # at first: its oq-run would say at its end that it can go on
            forget(table.job(number))
        engine_abort(numbers)

    def del_calculation(job_id: int, confirmed: bool = False) -> None:
        job = JobTable.of_engine().job(job_id)
        if job is not None and job.user != user_name():  # the engine would find out after the abort
            print(f"Job {job.id} belongs to {clean(job.user)}; only they can delete it")
            return
        try:
            engine_delete(job_id, confirmed)
        except OSError as exc:  # the row is gone
            gone = isinstance(exc, FileNotFoundError)  # 3.23 takes for granted that it is there
            print(f"Removed {job_id}" if gone else f"{exc.filename} is left: {exc.strerror}")

    command.abort, command.del_calculation = abort, del_calculation


def forget(job: Job | None) -> None:
    """Remove the journal of a job, also of one that runs: no other job will have its number."""
    if job is not None:
        directory = journal.directory_of(Path(job.path).parent, job.id)
        if private.is_own(directory):
            shutil.rmtree(directory, ignore_errors=True)


def end(table: JobTable, number: int) -> str:
    """End a job and return what has become of it.

    :param number: as the engine's commands take it: -1 is the last job
    """
    job = table.job(number)
    if job is None:
        return f"There is no job {number}"
    if job.status not in UNFINISHED:
        return f"Job {job.id} is {job.status}"
    if job.host not in ("", table.host):
        return f"Job {job.id} runs on {clean(job.host)}; abort it there"
    descriptor = processes.pidfd(job.pid) if job.pid else None
    if descriptor is None or not lives(job):
        table.finish(job.id, Status.FAILED)
        return f"Unable to find a process for job {job.id}, setting it as failed"
    try:
        signal.pidfd_send_signal(descriptor, 0)  # is it ours?
        if job.status == Status.SUBMITTED and (before := ahead(table, job)):
            table.finish(job.id, Status.ABORTED)
            return f"Job {job.id} aborted before its turn; job {before} goes on"
        signal.pidfd_send_signal(descriptor, signal.SIGINT)
        table.call("set_status", job.id, Status.ABORTED.value)
        end = select.poll()
        end.register(descriptor, select.POLLIN)
        if not end.poll(END_SECS * 1000):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            end.poll(END_SECS * 1000)
    except PermissionError:
        return f"Job {job.id} belongs to {clean(job.user)}; only they or root can abort it"
    except ProcessLookupError:
        pass  # it has ended meanwhile
    finally:
        os.close(descriptor)
    table.finish(job.id, Status.ABORTED)  # the engine writes "failed" on its way out
    return f"Job {job.id} aborted"


def ahead(table: JobTable, job: Job) -> int | None:
    """Return the job of the same ``oq-run`` that has its turn before another one's, if any."""
    found = [one.id for one in table.unfinished() if one.pid == job.pid and one.id < job.id]
    return min(found, default=None)
