"""The pure core of a node's slots: leases, workers, and which worker runs which attempt.

``Slots.handle(event, now)`` returns effects for the shell (``agent``). No process or socket here.
An attempt is known from the moment that it waits for a worker until that one is free again; the
rest of its life is in ``attempts``.
A worker belongs to one lease and runs one task at a time, so that blame for its death is exact.
One that was killed keeps its slot until its process is gone, which may never be: the kernel does
not kill what waits for a device, or for a file server that is away. After a while such a slot is
no part of any share, so that no broker gives tasks to it.

Several leases share the slots by weighted max-min fairness: none gets more than it wants while
another has less than its part, which follows its priority (WEIGHTS); what cannot be divided is held
in turns, by the lease that has been served least for its weight. So each lease that wants slots has
some in the end, however urgent the others are and however many of them come. A share that shrinks
stops nothing of the same priority that runs; for a lease of a higher one that is below its share,
attempts of leases that are above theirs are interrupted, those first that lose least time. An
attempt that was interrupted often enough is ``firm``, and runs to its end.

An attempt that must be alone waits until no other runs on the node, whoever's it is, and holds all
others back until it has ended; it is not interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.priority import Priority

#: what a lease counts for where several want slots
WEIGHTS = {Priority.URGENT: 16, Priority.NORMAL: 4, Priority.LOW: 1}
#: turns by which a lease may have been served more than another and still comes before it: an
#: urgent one has its slots at once, also where another is in the middle of its turn
AHEAD_TURNS = {Priority.URGENT: 2, Priority.NORMAL: 1, Priority.LOW: 0}
#: seconds that a slot which cannot be divided stays with a lease: each change costs the start of a
#: worker, up to 4 s of computing
TURN_S = 30.0
#: seconds between two kills for lack of memory: that of the first must be free before the second
KILL_INTERVAL_S = 2.0
#: bytes by which a worker may grow over what it had at its start before it is replaced
GROWTH_BYTES = 1 << 30
#: seconds after which a killed worker that is still there is worth a word, and one that has not
#: started, for which the engine has to be imported: 4 s, or 50 where many processes do so
STUCK_SECS, STARTING_SECS = 5.0, 60.0


class WorkerState(Enum):
    """What a worker does; the value is for people."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    ENDING = "was killed"


@dataclass(slots=True)
class Worker:
    """A worker process, as far as its slot is concerned.

    ``since_s``: since when it is there, has its task, or was killed; ``told``: that it does not
    start, or end; ``started``: it had, at last, a process.
    """

    id: int
    job: str
    state: WorkerState = WorkerState.STARTING
    task: int = -1
    attempt: int = -1
    alone: bool = False
    firm: bool = False
    since_s: float = 0.0
    start_bytes: int = 0
    told: bool = False
    started: bool = False


@dataclass(slots=True)
class Lease:
    """What a job has of the node.

    ``slots``: its share; ``wanted``: live tasks of the job, -1: not told.

    ``served_s``: seconds of a slot that it has had, divided by its weight.
    """

    job: str
    slots: int
    heard_s: float
    priority: Priority = Priority.NORMAL
    wanted: int = -1
    served_s: float = 0.0
    pending: deque[TaskGiven] = field(default_factory=deque)

    @property
    def weight(self) -> int:
        return WEIGHTS[self.priority]


# ---- events


@dataclass(frozen=True, slots=True)
class LeaseAsked:
    """A broker wants a share of the slots."""

    job: str
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class Heard:
    """A sign of life of the job's broker, which may say how many tasks it has."""

    job: str
    wanted: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryUsed:
    """What is in use of the memory of this node (or of its cgroup), and by each worker."""

    used_bytes: int
    limit_bytes: int
    workers: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """An administrator wants no new attempts on this node, or has them again."""

    on: bool = True


@dataclass(frozen=True, slots=True)
class Released:
    """A broker gives its lease back, or has lost it."""

    job: str
    reason: str = "released"


@dataclass(frozen=True, slots=True)
class TaskGiven:
    """An attempt waits for a worker; ``alone``: no other may run on this node beside it.

    ``firm``: it is not to be interrupted for a job of higher priority.
    """

    job: str
    task: int
    attempt: int
    alone: bool = False
    firm: bool = False


@dataclass(frozen=True, slots=True)
class TaskTaken:
    """An attempt that waits or runs is not wanted any more."""

    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has started; ``nbytes``: the memory that it has for itself."""

    worker: int
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerFree:
    """The worker has done its task, and now holds so much memory; ``last``: it is gone, too."""

    worker: int
    nbytes: int = 0
    last: bool = False


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """The process has ended; ``oom``: killed by the kernel for lack of memory, as ``reason`` says.

    ``nbytes`` is the most memory that it had.
    """

    worker: int
    reason: str
    oom: bool = False
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerRefused:
    """No process could be made for the worker."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    LeaseAsked | Heard | MemoryUsed | DrainAsked | Released | TaskGiven | TaskTaken | WorkerReady
    | WorkerFree | WorkerGone | WorkerRefused | Tick
)  # fmt: skip


# ---- effects


@dataclass(frozen=True, slots=True)
class GrantLease:
    """Tell the broker how many slots it has from now on."""

    job: str
    slots: int


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a worker for a job."""

    worker: int
    job: str


@dataclass(frozen=True, slots=True)
class RunOn:
    """Give a worker an attempt."""

    worker: int
    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a worker, whose end is still to come."""

    worker: int


@dataclass(frozen=True, slots=True)
class Died:
    """The worker of an attempt has ended before it was done, or none could be started for it."""

    job: str
    task: int
    attempt: int
    reason: str
    oom: bool = False


@dataclass(frozen=True, slots=True)
class Preempted:
    """An attempt was interrupted for the job ``by``, whose priority is higher."""

    job: str
    task: int
    attempt: int
    by: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """The worker was killed so many seconds ago and is still there."""

    worker: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Slow:
    """The worker was to be started so many seconds ago and is not ready."""

    worker: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fewer:
    """The node goes on with so many slots, since it may have no more processes."""

    slots: int
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Forget all that is held for a job."""

    job: str
    reason: str


Effect = GrantLease | Spawn | RunOn | Kill | Died | Preempted | Stuck | Slow | Fewer | LeaseEnded


class Slots:
    """The slots of one agent.

    :param slots: worker processes that may run a task at a time
    :param limits: of silence, of memory and of the time of a task
    """

    def __init__(self, slots: int, limits: Limits = DEFAULTS) -> None:
        self.slots = self.configured = slots  # fewer while this node cannot have more workers
        self.limits = limits
        self.leases: dict[str, Lease] = {}
        self.workers: dict[int, Worker] = {}
        # the same by their states: a task costs as much on a node of 2 slots as on one of 200
        self.those: dict[WorkerState, dict[int, Worker]] = {state: {} for state in WorkerState}
        self.spawned = 0
        self.draining = False
        self.memory = MemoryUsed(0, 1)
        self.killed_s = -KILL_INTERVAL_S
        self.ticked_s: float | None = None
        self.served_s = 0.0  # what leases that have all had their part would have been served

    @property
    def stuck(self) -> int:
        """Workers that were killed and do not end."""
        return sum(w.told for w in self.those[WorkerState.ENDING].values())

    @property
    def unstarted(self) -> int:
        """Workers that should have started long ago."""
        return sum(w.told for w in self.those[WorkerState.STARTING].values())

    @property
    def usable(self) -> int:
        """Slots that leases can have."""
        return self.slots - self.stuck

    @property
    def busy(self) -> int:
        return len(self.those[WorkerState.BUSY])

    @property
    def alone(self) -> bool:
        """Whether a task runs beside which no other may."""
        return self.busy == 1 and next(iter(self.those[WorkerState.BUSY].values())).alone

    def running(self, job: str) -> int:
        """Return how many attempts of a job run."""
        return sum(w.job == job for w in self.those[WorkerState.BUSY].values())

    @property
    def closed(self) -> bool:
        """Whether no new task should come: draining, or short of memory with tasks under way."""
        return self.draining or self.short

    @property
    def short(self) -> bool:
        """Whether memory is short, and there are tasks whose end may change that."""
        return self.memory_percent > self.limits.memory_soft_percent and self.busy > 0

    @property
    def ready(self) -> int:
        """Workers that have started."""
        return len(self.those[WorkerState.IDLE]) + self.busy

    def beat_age_s(self, now: float) -> float | None:
        """Return the longest silence of a broker, None without a lease."""
        return max((now - lease.heard_s for lease in self.leases.values()), default=None)

    @property
    def memory_percent(self) -> float:
        """How much of the memory is in use."""
        return 100 * self.memory.used_bytes / self.memory.limit_bytes

    def grown(self, workers: Mapping[int, int]) -> int:
        """Return the bytes that workers hold beyond those of their start.

        :param workers: worker -> bytes that it holds
        """
        found = [(self.workers.get(w), held) for w, held in workers.items()]
        return sum(
            max(0, held - worker.start_bytes)
            for worker, held in found
            if worker is not None and worker.state is not WorkerState.ENDING
        )

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, monotonic); return what is to be done."""
        effects: list[Effect] = []
        vacant = False  # a slot, for reasons that leave leases with fewer workers than their shares
        match event:
            case LeaseAsked(job, priority):
                self._end(job, "asked for again", now, effects)
                if not self.leases:
                    self.slots = self.configured  # another job, another try
                # as if it had been here before: else it would hold what is left for hours
                self.leases[job] = Lease(job, -1, now, priority, served_s=self.served_s)
                self._share(effects)
                vacant = True
            case Heard(job, wanted):
                if job in self.leases:
                    self.leases[job].heard_s = now
                    if wanted is not None and wanted != self.leases[job].wanted:
                        self.leases[job].wanted = wanted
                        self._share(effects)
            case MemoryUsed():
                self.memory = event
                full = self.memory_percent > self.limits.memory_hard_percent
                if full and now - self.killed_s >= KILL_INTERVAL_S:
                    self._kill_newest(now, effects)
            case DrainAsked(on):
                self.draining = on
            case Released(job, reason):
                self._end(job, reason, now, effects)
            case TaskGiven(job):
                self.leases[job].pending.append(event)
            case TaskTaken(job, task, attempt):
                self._take_back(job, task, attempt, now, effects)
            case WorkerReady(worker, nbytes):
                if (found := self.workers.get(worker)) and found.state is WorkerState.STARTING:
                    found.start_bytes, found.told, found.started = nbytes, False, True
                    self._change(found, WorkerState.IDLE)
            case WorkerFree(worker, nbytes, last):
                if (found := self.workers.get(worker)) and found.state is WorkerState.BUSY:
                    found.task = found.attempt = -1
                    self._change(found, WorkerState.IDLE)
                    if last or nbytes - found.start_bytes > GROWTH_BYTES:
                        self._kill(found, now, effects)
            case WorkerGone():
                vacant = self._gone(event, effects)
            case WorkerRefused(worker, reason):
                self._refused(worker, reason, effects)
            case Tick():
                self._tick(now, effects)
        self._fill(now, effects)
        if vacant:
            self._staff(now, effects)
        return effects

    def _of(self, job: str) -> list[Worker]:
        """The workers of a lease, without those that were killed."""
        return [
            w for w in self.workers.values() if w.job == job and w.state is not WorkerState.ENDING
        ]

    def _change(self, worker: Worker, state: WorkerState) -> None:
        self.those[worker.state].pop(worker.id, None)
        worker.state = state
        self.those[state][worker.id] = worker

    def _ended(self, worker: int) -> Worker | None:
        """Forget a worker, and return it; None when it is not known."""
        if found := self.workers.pop(worker, None):
            del self.those[found.state][worker]
        return found

    def _spawn(self, lease: Lease, now: float, effects: list[Effect]) -> None:
        self.spawned += 1
        new = self.workers[self.spawned] = Worker(self.spawned, lease.job, since_s=now)
        self._change(new, WorkerState.STARTING)
        effects.append(Spawn(self.spawned, lease.job))

    def _staff(self, now: float, effects: list[Effect]) -> None:
        """Start the workers that leases lack of their shares, as far as slots are empty."""
        if self.alone:
            return
        for lease in self.leases.values():
            missing = lease.slots - len(self._of(lease.job))
            for _ in range(min(missing, self.slots - len(self.workers))):
                self._spawn(lease, now, effects)

    def _kill(self, worker: Worker, now: float, effects: list[Effect]) -> None:
        """Kill a worker whose death is wanted and charged to nobody."""
        self._change(worker, WorkerState.ENDING)
        worker.since_s, worker.task, worker.attempt, worker.told = now, -1, -1, False
        effects.append(Kill(worker.id))

    def _share(self, effects: list[Effect]) -> None:
        """Divide the slots among the leases and tell those whose share has changed."""
        alone, usable = len(self.leases) == 1, self.usable
        wants = {
            job: usable if alone or lease.wanted < 0 else min(lease.wanted, usable)
            for job, lease in self.leases.items()
        }
        shares = divided(usable, wants, {j: one.weight for j, one in self.leases.items()})
        hungry = [job for job in wants if shares[job] < wants[job]]
        hungry.sort(key=self._turns)
        for job in hungry[: usable - sum(shares.values())]:
            shares[job] += 1
        for job, share in shares.items():
            if share != self.leases[job].slots:
                self.leases[job].slots = share
                effects.append(GrantLease(job, share))

    def _turns(self, job: str) -> int:
        """How many turns the lease has been served, less those that it may be ahead."""
        lease = self.leases[job]
        # the shortest turn is one of the least weight that is here
        turn_s = TURN_S * self.slots / min(one.weight for one in self.leases.values())
        return int(lease.served_s / turn_s) - AHEAD_TURNS[lease.priority]

    def _fill(self, now: float, effects: list[Effect]) -> None:
        """Give waiting tasks to idle workers, and start workers where they are missing."""
        leases = [lease for lease in self.leases.values() if lease.pending]
        if leases and len(self.leases) > 1:
            self._interrupt(leases, now, effects)
        ending = self.those[WorkerState.ENDING]
        free = self.slots - self.busy - len(ending)
        if not leases or free <= 0 or self.short:
            return
        if len(leases) > 1:  # the one that is furthest below its share comes first
            leases.sort(key=lambda one: self.running(one.job) - one.slots)
        alone = [one for one in leases if one.pending[0].alone]
        if alone or self.alone:
            if self.busy:
                return
            leases, free = alone[:1], 1
        for lease in leases:
            for worker in [*self.those[WorkerState.IDLE].values()]:
                if free > 0 and lease.pending and worker.job == lease.job and not self.short:
                    if lease.pending[0].alone and self.busy:
                        break
                    self._start(worker, lease, now, effects)
                    free -= 1
            starting = sum(w.job == lease.job for w in self.those[WorkerState.STARTING].values())
            coming = starting + len(ending) - self.stuck
            for _ in range(min(len(lease.pending) - coming, free - starting)):
                if len(self.workers) < self.slots:
                    self._spawn(lease, now, effects)
                elif not self._make_room(lease, now, effects):
                    break

    def _start(self, worker: Worker, lease: Lease, now: float, effects: list[Effect]) -> None:
        given = lease.pending.popleft()
        worker.task, worker.attempt = given.task, given.attempt
        worker.alone, worker.firm = given.alone, given.firm
        worker.since_s = now
        self._change(worker, WorkerState.BUSY)
        if worker.alone:
            for other in [w for w in self.workers.values() if w is not worker]:
                if other.state is not WorkerState.ENDING:
                    self._kill(other, now, effects)  # idle ones hold memory as well
        effects.append(RunOn(worker.id, lease.job, worker.task, worker.attempt))

    def _interrupt(self, leases: list[Lease], now: float, effects: list[Effect]) -> None:
        """Make room for leases that are below their shares, from lighter ones above theirs."""
        lightest = min(lease.weight for lease in self.leases.values())
        heavy = [lease for lease in leases if lease.weight > lightest]
        if not heavy:
            return
        heavy.sort(key=lambda lease: -lease.weight)
        starting = len(self.those[WorkerState.STARTING])
        coming = self.slots - self.busy - starting - self.stuck  # slots that are empty, or will be
        for lease in heavy:
            workers = self._of(lease.job)
            lacks = lease.slots - sum(w.state is not WorkerState.IDLE for w in workers)
            waiting = len(lease.pending) - sum(w.state is WorkerState.STARTING for w in workers)
            coming -= max(0, min(lacks, waiting))
            while coming < 0 and (worker := self._cheapest(lease.weight)):
                preempted = Preempted(worker.job, worker.task, worker.attempt, lease.job)
                self._kill(worker, now, effects)
                effects.append(preempted)
                coming += 1
            coming = max(0, coming)

    def _cheapest(self, weight: int) -> Worker | None:
        """Return the busy worker of a lighter lease above its share that has its task shortest."""
        above = {
            one.job
            for one in self.leases.values()
            if one.weight < weight and self.running(one.job) > one.slots
        }
        busy = self.those[WorkerState.BUSY].values()
        found = [w for w in busy if w.job in above and not (w.alone or w.firm)]
        return max(found, key=lambda w: (w.since_s, w.id), default=None)

    def _make_room(self, lease: Lease, now: float, effects: list[Effect]) -> bool:
        """End an idle worker of another lease, whose slot is then empty; False if there is none."""
        for worker in self.those[WorkerState.IDLE].values():
            if worker.job != lease.job:
                self._kill(worker, now, effects)
                return True
        return False

    def _tick(self, now: float, effects: list[Effect]) -> None:
        seconds = now - self.ticked_s if self.ticked_s is not None else 0.0
        self.ticked_s = now
        self._serve(seconds)
        if self.stuck and not self.usable and self.slots < self.configured:
            self.slots = self.configured  # those that no process was had for, before they hang
            self._share(effects)
        for lease in list(self.leases.values()):
            # a beat early: at the latest lost_s after a cut its slots are to be free
            if now - lease.heard_s > self.limits.lost_s - self.limits.beat_s:
                silence = f"broker silent for {now - lease.heard_s:.0f} s"
                self._end(lease.job, silence, now, effects)
        if len(self.leases) > 1:
            self._share(effects)
        for worker in list(self.workers.values()):
            limit = self.limits.task_timeout_s
            if limit and worker.state is WorkerState.BUSY and now - worker.since_s > limit:
                reason = f"killed after {now - worker.since_s:.0f} s, task_timeout_s is {limit:g} s"
                self._kill_busy(worker, reason, now, effects)
            state, seconds = worker.state, now - worker.since_s
            # its fork server, which may import the engine, kills one that it has not made yet
            late = seconds > (STUCK_SECS if worker.started else STARTING_SECS)
            if state is WorkerState.ENDING and not worker.told and late:
                worker.told = True
                effects.append(Stuck(worker.id, seconds))
                self._share(effects)
            if state is WorkerState.STARTING and not worker.told and seconds > STARTING_SECS:
                worker.told = True
                effects.append(Slow(worker.id, seconds))

    def _serve(self, seconds: float) -> None:
        """Note what the leases have had of the slots."""
        served = {lease.job: self.running(lease.job) for lease in self.leases.values()}
        weight = sum(one.weight for one in self.leases.values() if one.wanted or served[one.job])
        if weight:
            self.served_s += seconds * sum(served.values()) / weight
        for lease in self.leases.values():
            lease.served_s += seconds * served[lease.job] / lease.weight
            if not lease.wanted:  # who wants nothing does not save up for later
                lease.served_s = max(lease.served_s, self.served_s)

    def _kill_newest(self, now: float, effects: list[Effect]) -> None:
        busy = self.those[WorkerState.BUSY]
        if not busy:
            return
        self.killed_s = now
        newest = max(busy.values(), key=lambda w: (w.since_s, w.id))
        figures = self._figures(self.memory.workers.get(newest.id, 0))
        limit = self.limits.memory_hard_percent
        reason = f"killed to free memory: {figures}, the limit is {limit:g}%"
        self._kill_busy(newest, reason, now, effects, oom=True)

    def _figures(self, worker_bytes: int) -> str:
        used, limit = gib(self.memory.used_bytes), gib(self.memory.limit_bytes)
        return f"its worker had {gib(worker_bytes)}, {used} of {limit} were in use"

    def _kill_busy(
        self, worker: Worker, reason: str, now: float, effects: list[Effect], *, oom: bool = False
    ) -> None:
        died = Died(worker.job, worker.task, worker.attempt, reason, oom)
        self._kill(worker, now, effects)
        effects.append(died)

    def _gone(self, gone: WorkerGone, effects: list[Effect]) -> bool:
        """Take note of an end; return whether others may follow on that slot without a task."""
        worker = self._ended(gone.worker)
        if worker is None:
            return False
        if worker.state is WorkerState.ENDING:
            if worker.told:
                self._share(effects)
            return True
        lease = self.leases[worker.job]
        reason = gone.reason
        if gone.oom:
            reason += f": {self._figures(gone.nbytes)}"
        if worker.state is WorkerState.BUSY:
            effects.append(Died(lease.job, worker.task, worker.attempt, reason, gone.oom))
        elif worker.state is WorkerState.STARTING and lease.pending:
            self._charge(lease, f"worker could not start: {reason}", effects, oom=gone.oom)
        return worker.state is not WorkerState.STARTING

    def _charge(
        self, lease: Lease, reason: str, effects: list[Effect], *, oom: bool = False
    ) -> None:
        """Blame a waiting task: workers that cannot start must not be spawned for ever."""
        given = lease.pending.popleft()
        effects.append(Died(lease.job, given.task, given.attempt, reason, oom))

    def _refused(self, worker: int, reason: str, effects: list[Effect]) -> None:
        """Do with the workers that there are; without any, the task that waits has to fail."""
        found = self._ended(worker)
        if found is None:
            return
        if found.state is WorkerState.ENDING:
            if found.told:
                self._share(effects)
        elif len(self.workers) > len(self.those[WorkerState.ENDING]):
            self.slots = len(self.workers)
            effects.append(Fewer(self.slots, reason))
            self._share(effects)
        elif self.leases[found.job].pending:
            self._charge(self.leases[found.job], reason, effects)

    def _take_back(
        self, job: str, task: int, attempt: int, now: float, effects: list[Effect]
    ) -> None:
        lease = self.leases[job]
        for given in lease.pending:
            if (given.task, given.attempt) == (task, attempt):
                lease.pending.remove(given)
                return
        for worker in self._of(job):
            if (worker.task, worker.attempt) == (task, attempt):
                self._kill(worker, now, effects)

    def _end(self, job: str, reason: str, now: float, effects: list[Effect]) -> None:
        if self.leases.pop(job, None) is None:
            return
        for worker in self._of(job):
            self._kill(worker, now, effects)
        effects.append(LeaseEnded(job, reason))
        self._share(effects)

    def check_invariants(self) -> None:
        """Raise AssertionError when the state contradicts itself; called by the tests."""
        assert len(self.workers) <= self.slots, self.workers
        assert sum(lease.slots for lease in self.leases.values()) <= self.usable, self.leases
        for state, those in self.those.items():
            assert those == {w: one for w, one in self.workers.items() if one.state is state}, state
        running = []
        for number, worker in self.workers.items():
            assert number == worker.id <= self.spawned, worker
            assert worker.job in self.leases or worker.state is WorkerState.ENDING, worker
            assert (worker.state is WorkerState.BUSY) == (worker.task >= 0), worker
            if worker.task >= 0:
                running.append((worker.job, worker.task, worker.attempt))
        assert len(running) == len(set(running)), "an attempt runs twice"
        if any(w.alone for w in self.those[WorkerState.BUSY].values()):
            assert self.alone, "not alone"
        for job, lease in self.leases.items():
            assert job == lease.job and all(given.job == job for given in lease.pending), lease
            waiting = [(job, given.task, given.attempt) for given in lease.pending]
            assert len(waiting) == len(set(waiting)) and not {*waiting} & {*running}, lease


def divided(slots: int, wants: Mapping[str, int], weights: Mapping[str, int]) -> dict[str, int]:
    """Divide slots by weight, whole ones only; what cannot be divided is left.

    :param wants: how many each may get at most
    :param weights: of each
    """
    shares: dict[str, int] = {}
    hungry = dict(wants)
    while hungry:
        weight = sum(weights[job] for job in hungry)
        sated = [job for job, want in hungry.items() if want * weight <= slots * weights[job]]
        if not sated:
            return shares | {job: slots * weights[job] // weight for job in hungry}
        for job in sated:
            shares[job] = hungry.pop(job)
            slots -= shares[job]
    return shares


def gib(nbytes: int) -> str:
    """Return a number of bytes in GiB, for a message."""
    return f"{nbytes / (1 << 30):.2f} GiB"
