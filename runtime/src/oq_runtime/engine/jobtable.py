"""The engine's job table: the only place that knows it.

Jobs whose engine process is gone are mended here, and jobs of the past are found.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil

from oq_runtime.errors import InputError

#: jobs of a process, by host and pid, that it says are under way
EXECUTING_HERE = "SELECT id FROM job WHERE host=?x AND pid=?x AND status='executing'"
#: jobs of a host (its name is the parameter) that say of themselves that they are under way
RUNNING_HERE = (
    "SELECT id, pid FROM job WHERE host=?x AND pid > 0 "
    "AND status IN ('created', 'submitted', 'executing')"
)


def end_jobs(status: str) -> None:
    """Give the jobs of this process that are not calculating yet their last status.

    The engine has told the database that they are executing, and only tells it their end once they
    calculate. Other jobs would wait for them for ever.
    """
    from openquake.commonlib import logs

    for row in logs.dbcmd(EXECUTING_HERE, socket.gethostname(), os.getpid()):
        logs.dbcmd("finish", row.id, status)


def mend(logs: Any) -> None:
    """Set to ``failed`` the jobs of this host whose engine process is gone.

    The engine would wait for them for ever before it starts the next job.
    """
    for row in logs.dbcmd(RUNNING_HERE, socket.gethostname()):
        if not psutil.pid_exists(row.pid):
            logs.dbcmd("finish", row.id, "failed")


def parent_job(logs: Any, wanted: int | str | None) -> int | str | None:
    """Return the job that ``--hc`` names; raises InputError where there is none."""
    if wanted is None or not str(wanted).lstrip("-").isdigit():
        return wanted
    import getpass

    number = int(wanted)
    job = logs.dbcmd("get_job", number, getpass.getuser() if number < 0 else None)
    if job is None:
        raise InputError(f"--hc {number}: there is no such job; list them with oq engine --lhc")
    return int(job.id)
