"""The pure core of the agent: leases, worker slots, and which worker runs which attempt.

``Node.handle(event, now)`` returns effects for the shell (``agent``). No process or socket here.
A worker belongs to one lease and runs one task at a time, so that blame for its death is exact.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

#: seconds without a beat from a broker after which its lease is fenced: workers killed
FENCE_AFTER_S = 30.0


class WorkerState(Enum):
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass(slots=True)
class Worker:
    id: int
    job: str
    state: WorkerState = WorkerState.STARTING
    task: int = -1
    attempt: int = -1


@dataclass(slots=True)
class Lease:
    job: str
    slots: int
    heard_s: float
    pending: deque[tuple[int, int]] = field(default_factory=deque)


# ---- events


@dataclass(frozen=True, slots=True)
class LeaseAsked:
    job: str
    slots: int


@dataclass(frozen=True, slots=True)
class Heard:
    job: str


@dataclass(frozen=True, slots=True)
class Released:
    job: str


@dataclass(frozen=True, slots=True)
class TaskGiven:
    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class AbortAsked:
    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    worker: int


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    worker: int


@dataclass(frozen=True, slots=True)
class WorkerGone:
    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = (
    LeaseAsked | Heard | Released | TaskGiven | AbortAsked | WorkerReady | WorkerEnded | WorkerGone
    | Tick
)  # fmt: skip


# ---- effects


@dataclass(frozen=True, slots=True)
class GrantLease:
    job: str
    slots: int


@dataclass(frozen=True, slots=True)
class Spawn:
    worker: int
    job: str


@dataclass(frozen=True, slots=True)
class RunOn:
    worker: int
    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Kill:
    worker: int


@dataclass(frozen=True, slots=True)
class ReportDeath:
    job: str
    task: int
    attempt: int
    reason: str
    started: bool


@dataclass(frozen=True, slots=True)
class DropAttempt:
    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    job: str
    reason: str


Effect = GrantLease | Spawn | RunOn | Kill | ReportDeath | DropAttempt | LeaseEnded


class Node:
    """State of one agent.

    :param slots: worker processes that may run at a time
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.leases: dict[str, Lease] = {}
        self.workers: dict[int, Worker] = {}
        self.spawned = 0

    @property
    def busy(self) -> int:
        return sum(w.state is WorkerState.BUSY for w in self.workers.values())

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, monotonic); return what is to be done."""
        effects: list[Effect] = []
        match event:
            case LeaseAsked(job, slots):
                granted = self.slots if slots < 0 else min(slots, self.slots)
                lease = self.leases.setdefault(job, Lease(job, granted, now))
                effects.append(GrantLease(job, lease.slots))
                for _ in range(lease.slots - len(self._of(job))):
                    self._spawn(lease, effects)
            case Heard(job):
                if job in self.leases:
                    self.leases[job].heard_s = now
            case Released(job):
                self._end(job, "released", effects)
            case TaskGiven(job, task, attempt):
                if job in self.leases:
                    self.leases[job].pending.append((task, attempt))
                    self._fill(self.leases[job], effects)
                else:
                    effects.append(DropAttempt(job, task, attempt))
            case AbortAsked(job, task, attempt):
                self._abort(job, task, attempt, effects)
            case WorkerReady(worker) | WorkerEnded(worker):
                found = self.workers.get(worker)
                again = isinstance(event, WorkerReady) and found and found.task >= 0
                if found and not again:
                    found.state, found.task, found.attempt = WorkerState.IDLE, -1, -1
                    self._fill(self.leases[found.job], effects)
            case WorkerGone(worker, reason):
                self._gone(worker, reason, effects)
            case Tick():
                for lease in list(self.leases.values()):
                    if now - lease.heard_s > FENCE_AFTER_S:
                        silent = f"broker silent for {now - lease.heard_s:.0f} s"
                        self._end(lease.job, silent, effects)
        return effects

    def _of(self, job: str) -> list[Worker]:
        return [w for w in self.workers.values() if w.job == job]

    def _spawn(self, lease: Lease, effects: list[Effect]) -> None:
        self.spawned += 1
        self.workers[self.spawned] = Worker(self.spawned, lease.job)
        effects.append(Spawn(self.spawned, lease.job))

    def _fill(self, lease: Lease, effects: list[Effect]) -> None:
        own = self._of(lease.job)
        for worker in own:
            if lease.pending and worker.state is WorkerState.IDLE:
                worker.task, worker.attempt = lease.pending.popleft()
                worker.state = WorkerState.BUSY
                effects.append(RunOn(worker.id, lease.job, worker.task, worker.attempt))
        starting = sum(w.state is WorkerState.STARTING for w in own)
        for _ in range(min(len(lease.pending) - starting, lease.slots - len(own))):
            self._spawn(lease, effects)

    def _gone(self, worker_id: int, reason: str, effects: list[Effect]) -> None:
        worker = self.workers.pop(worker_id, None)
        if worker is None or worker.job not in self.leases:
            return
        lease = self.leases[worker.job]
        if worker.state is WorkerState.BUSY:
            effects.append(DropAttempt(lease.job, worker.task, worker.attempt))
            effects.append(ReportDeath(lease.job, worker.task, worker.attempt, reason, True))
        elif worker.state is WorkerState.STARTING and lease.pending:
            # workers that cannot start must not be spawned for ever: charge a waiting task
            task, attempt = lease.pending.popleft()
            effects.append(DropAttempt(lease.job, task, attempt))
            text = f"worker could not start: {reason}"
            effects.append(ReportDeath(lease.job, task, attempt, text, False))
        if worker.state is not WorkerState.STARTING:
            self._spawn(lease, effects)
        self._fill(lease, effects)

    def _abort(self, job: str, task: int, attempt: int, effects: list[Effect]) -> None:
        effects.append(DropAttempt(job, task, attempt))
        lease = self.leases.get(job)
        if lease and (task, attempt) in lease.pending:
            lease.pending.remove((task, attempt))
        for worker in self._of(job):
            if (worker.task, worker.attempt) == (task, attempt):
                effects.append(Kill(worker.id))
                # its death is wanted and charged to nobody
                worker.state, worker.task, worker.attempt = WorkerState.IDLE, -1, -1
                del self.workers[worker.id]
                if lease:
                    self._spawn(lease, effects)

    def _end(self, job: str, reason: str, effects: list[Effect]) -> None:
        if self.leases.pop(job, None) is None:
            return
        for worker in self._of(job):
            del self.workers[worker.id]
            effects.append(Kill(worker.id))
        effects.append(LeaseEnded(job, reason))
