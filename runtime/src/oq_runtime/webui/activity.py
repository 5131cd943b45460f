"""The page ``engine/activity``: what the nodes do, jobs under way, and jobs that have ended.

A job is shown to whom the engine's list of calculations shows it. The nodes are asked at most every
ASK_SECS, however many people look.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from django.shortcuts import render
from django.views.decorators.http import require_GET
from openquake.commonlib import logs
from openquake.server import utils

from oq_runtime import config
from oq_runtime.cluster.pool import Answer, Killed, Pool, Unreachable
from oq_runtime.config import Cluster, Config
from oq_runtime.engine.jobtable import UNFINISHED, JobTable, seconds
from oq_runtime.errors import OqRuntimeError
from oq_runtime.node import memory
from oq_runtime.text import clean, duration
from oq_runtime.webui.access import Refused, check_results
from oq_runtime.wire.protocol import AgentState

#: seconds for which an answer of the nodes is shown
ASK_SECS = 2.0
#: jobs under way on the page, those that have ended, and lines of the log of one under way in which
#: its progress is looked for
MOST_JOBS, MOST_ENDED, LINES = 50, 20, 200
#: the engine's lines on the tasks of a function, see ``Starmap.log_percent``
PERCENT = re.compile(r"(\S+) +(\d+)% \[")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node, in words. ``well``: it takes tasks."""

    name: str
    busy: str = "-"
    jobs: str = "-"
    memory: str = "-"
    state: str = ""
    well: bool = False


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job, in words. ``report``: the user of the request can have it."""

    number: int
    user: str
    mode: str
    description: str
    since: str
    status: str
    progress: str
    report: bool


class Nodes:
    """What the nodes of the cluster say of themselves, or this machine of itself."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: Pool | None = None
        self.until_s = 0.0
        self.rows: list[NodeRow] = []

    def look(self) -> list[NodeRow]:
        """Return a row per node; raises ConfigError where they cannot be asked."""
        with self.lock:
            if time.monotonic() >= self.until_s:
                found = Config.from_sections(config.read())
                if found.cluster is None:
                    self.rows = [this_machine(found.cores)]
                else:
                    answers = self._pool(found.cluster).ask("status")
                    self.rows = [node_row(host, answer) for host, answer in answers.items()]
                self.until_s = time.monotonic() + ASK_SECS
            return self.rows

    def _pool(self, cluster: Cluster) -> Pool:
        if self.pool is None or self.pool.cluster != cluster:
            self.pool = Pool(cluster)  # which takes a while, for the keys
        return self.pool


nodes = Nodes()


def this_machine(cores: int) -> NodeRow:
    load, used = os.getloadavg()[0], memory.usage()
    return NodeRow(
        name=socket.gethostname(),
        busy=f"{load:.1f} of {cores} cores",
        memory=f"{used.used_bytes / used.limit_bytes:.0%}",
        state="this machine",
        well=True,
    )


def node_row(host: str, answer: Answer) -> NodeRow:
    match answer:
        case Unreachable(reason):
            return NodeRow(host, state=clean(reason))
        case Killed():
            return NodeRow(host, state="killed")
    return NodeRow(
        name=host,
        busy=f"{answer.busy} of {answer.slots} slots",
        jobs=str(len(answer.jobs)),
        memory=f"{answer.memory:.0%}",
        state=answer.state,
        well=answer.state is AgentState.UP,
    )


def job_rows(request: Any, *, running: bool) -> list[JobRow]:
    """Return the jobs that the user of a request may see: those under way, or that have ended."""
    users, everybody = utils.get_valid_users(request), utils.is_superuser(request)
    limit = MOST_JOBS if running else MOST_ENDED
    calculations = logs.dbcmd(
        "get_calcs", {"is_running": f"{running:d}", "limit": limit}, users, not everybody
    )
    found = []
    for row in calculations:
        # the same places in all engine series
        number, user, status, mode, is_running, description, *_, start = row[:11]
        if bool(is_running) != running or (status in UNFINISHED and not running):
            continue  # 3.23 lists what is shared in any case
        far, began = progress(number) if running else "", since(seconds(start))
        report = not running and (everybody or user in users) and has_results(number)
        found.append(JobRow(number, user, mode, description, began, status, far, report))
    return found


def has_results(number: int) -> bool:
    """Whether a calculation has results that this site may read."""
    try:
        check_results(number)
    except Refused:
        return False
    job = JobTable.of_engine().job(number)
    return job is not None and os.path.exists(job.path)


def since(started_s: float) -> str:
    return duration(max(0.0, time.time() - started_s)) if started_s else "-"


def progress(number: int) -> str:
    """Return how far a job says in its log that it is, or else the last line of that."""
    lines = JobTable.of_engine().last_lines(number, LINES)
    found = next(filter(None, map(PERCENT.search, lines)), None)
    if found and found[2] != "100":
        return f"{clean(found[1], 50)}: {found[2]} %"
    return clean(lines[0], 100) if lines else "-"


@require_GET  # type: ignore[untyped-decorator]
def activity(request: Any) -> Any:
    """The page."""
    rows, problem = [], ""
    try:
        rows = nodes.look()
    except OqRuntimeError as exc:
        problem = "The nodes cannot be asked"
        problem += f": {exc}" if utils.is_superuser(request) else "; tell an administrator."
    jobs, ended = (job_rows(request, running=running) for running in (True, False))
    content = {"nodes": rows, "problem": problem, "jobs": jobs, "ended": ended}
    return render(request, "oq_runtime/activity.html", content)
