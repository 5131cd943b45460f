"""The jobs on the nodes of the cluster, put together from what each node knows of its leases."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from oq_runtime.cluster.pool import Answer
from oq_runtime.priority import Priority
from oq_runtime.text import MOST_NAMES, clean, counted
from oq_runtime.wire.protocol import AgentStatus, LeaseStatus


@dataclass(frozen=True, slots=True)
class Job:
    """A job that has leases.

    :param user: whose it is, and ``title`` which, in the words of its broker
    :param since_s: when the first of its leases began (seconds since the epoch)
    :param slots: its shares of all nodes, of which ``busy`` are at work
    :param done: tasks that have ended, of the ``total`` that there are so far
    :param left_s: about what the rest takes, None where that is not known
    """

    user: str
    title: str
    priority: Priority
    since_s: float
    slots: int
    busy: int
    done: int
    total: int
    left_s: float | None

    @property
    def number(self) -> str:
        """Return the number of the calculation, or other words of its broker."""
        return self.title.removeprefix("calculation ")

    @property
    def since(self) -> str:
        """Return when it began: the time of day, or the date."""
        since = datetime.fromtimestamp(self.since_s)
        today = since.date() == datetime.now().date()
        return f"{since:%H:%M}" if today else f"{since:%m-%d}"


def jobs(answers: Mapping[str, Answer]) -> dict[str, Job]:
    """Return the jobs by the names of their sessions, the oldest first."""
    leases: dict[str, list[LeaseStatus]] = {}
    for answer in answers.values():
        for lease in answer.leases if isinstance(answer, AgentStatus) else ():
            leases.setdefault(lease.name, []).append(lease)
    found = {name: _together(several) for name, several in leases.items()}
    return dict(sorted(found.items(), key=lambda item: item[1].since_s))


def at_work(found: Iterable[Job]) -> str:
    """Say which jobs have workers at work, those with most of them first."""
    busy = sorted((job for job in found if job.busy), key=lambda job: -job.busy)
    named = [
        f"job {clean(job.number)} of {clean(job.user)} ({job.priority}, since {job.since}) on "
        f"{counted(job.busy, 'slot')}"
        for job in busy[:MOST_NAMES]
    ]
    more = [f"{len(busy) - MOST_NAMES} more"] if len(busy) > MOST_NAMES else []
    return ", ".join(named + more)


def _together(leases: list[LeaseStatus]) -> Job:
    latest = max(leases, key=lambda one: (one.done, one.total))  # has heard the broker last
    return Job(
        user=latest.user,
        title=latest.title or latest.name,
        priority=latest.priority,
        since_s=time.time() - max(one.age_s for one in leases),
        slots=sum(one.slots for one in leases),
        busy=sum(one.busy for one in leases),
        done=latest.done,
        total=latest.total,
        left_s=latest.left_s,
    )
