"""How jobs of several priorities share the slots of a node: who gets them, and who is interrupted.

The core alone; the time of whole jobs passes in ``Farm``, which plays the brokers and the workers.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from oq_runtime.core.limits import Limits
from oq_runtime.core.scheduler import MAX_PREEMPTIONS
from oq_runtime.core.slots import (
    TURN_S,
    WEIGHTS,
    Died,
    Effect,
    GrantLease,
    Heard,
    Kill,
    LeaseAsked,
    MemoryUsed,
    Preempted,
    Released,
    RunOn,
    Slots,
    Spawn,
    TaskGiven,
    Tick,
    WorkerFree,
    WorkerGone,
    WorkerReady,
    WorkerState,
)
from oq_runtime.priority import Priority

LOW, NORMAL, URGENT = Priority.LOW, Priority.NORMAL, Priority.URGENT
#: seconds between two looks of an agent, here
STEP_S = 1.0


def full(slots: int, priority: Priority = NORMAL, **how: bool) -> Slots:
    """A node on which a job runs a task on every slot, begun one second after the other."""
    node = Slots(slots)
    node.handle(LeaseAsked("j", priority), 0.0)
    for number in range(1, slots + 1):
        node.handle(WorkerReady(number), 0.0)
        node.handle(TaskGiven("j", number, 1, **how), float(number))
    assert node.busy == slots
    return node


def arrive(node: Slots, priority: Priority, tasks: int, now: float = 20.0) -> list[Effect]:
    """A second job asks for a lease, and gives its tasks as soon as it has one."""
    effects = node.handle(LeaseAsked("u", priority), now)
    node.handle(Heard("j", 99), now)
    effects += node.handle(Heard("u", tasks), now)
    for task in range(tasks):
        effects += node.handle(TaskGiven("u", 100 + task, 1), now)
    node.check_invariants()
    return effects


def interrupted(effects: list[Effect]) -> list[int]:
    return [effect.task for effect in effects if isinstance(effect, Preempted)]


def test_an_urgent_job_gets_slots_at_once_of_what_has_run_shortest() -> None:
    node = full(5)
    effects = arrive(node, URGENT, 3)
    assert interrupted(effects) == [5, 4, 3], "the newest first: it loses least"
    assert Preempted("j", 5, 1, by="u") in effects and Kill(5) in effects
    assert not [effect for effect in effects if isinstance(effect, Died)], "no failure of the task"
    assert {job: lease.slots for job, lease in node.leases.items()} == {"j": 2, "u": 3}
    assert node.handle(WorkerGone(5, ""), 20.1) == [Spawn(6, "u")]
    assert node.handle(WorkerReady(6), 20.2) == [RunOn(6, "u", 100, 1)]
    assert interrupted(node.handle(Tick(), 20.5)) == [], "the other slots are on their way"


def test_no_more_than_its_part_is_taken() -> None:
    node = full(10)
    assert len(interrupted(arrive(node, URGENT, 99))) == 8, "16 of 20 parts"
    node = full(10, LOW)
    assert len(interrupted(arrive(node, NORMAL, 99))) == 8, "4 of 5 parts"


def test_equals_and_lower_ones_wait_for_the_end_of_a_task() -> None:
    for priority in (NORMAL, LOW):
        assert interrupted(arrive(full(4), priority, 99)) == []
    assert interrupted(arrive(full(4, URGENT), NORMAL, 99)) == []


def test_what_is_firm_or_alone_is_not_interrupted() -> None:
    assert interrupted(arrive(full(3, firm=True), URGENT, 99)) == []
    assert interrupted(arrive(full(1, alone=True), URGENT, 99)) == []


def test_a_free_slot_is_used_before_anything_is_interrupted() -> None:
    node = full(4)
    node.handle(WorkerFree(1), 19.0)
    assert interrupted(arrive(node, URGENT, 2)) == [4]


def test_memory_that_is_short_is_freed_by_an_interruption() -> None:
    node = full(2)
    node.handle(MemoryUsed(85, 100), 19.0)
    assert interrupted(arrive(node, URGENT, 1)) == [2]


# ---- in the course of time


@dataclass
class Job:
    """A job of so many tasks, which take so long each; ``interrupted``: how often, by task."""

    priority: Priority
    tasks: int
    seconds: float
    waiting: deque[int] = field(default_factory=deque)
    attempts: Counter[int] = field(default_factory=Counter)
    interrupted: Counter[int] = field(default_factory=Counter)
    done: int = 0

    def __post_init__(self) -> None:
        self.waiting.extend(range(self.tasks))


class Farm:
    """A node in time, with the brokers of its jobs; workers start and end at once."""

    def __init__(self, slots: int, *, checked: bool = False) -> None:
        self.node = Slots(slots, Limits(lost_s=1e6))
        self.checked = checked
        self.now = 0.0
        self.jobs: dict[str, Job] = {}
        self.given: Counter[str] = Counter()  # attempts at the node
        self.ends: dict[int, float] = {}  # worker -> when its attempt ends
        self.served: Counter[str] = Counter()

    def come(self, name: str, job: Job) -> None:
        self.jobs[name] = job
        self._take(LeaseAsked(name, job.priority))

    def step(self) -> None:
        """Let a look of the agent pass."""
        self.now += STEP_S
        self._take(Tick())
        for worker, end_s in list(self.ends.items()):
            if end_s <= self.now:
                found = self.node.workers[worker]
                self.jobs[found.job].done += 1
                self.given[found.job] -= 1
                del self.ends[worker]
                self._take(WorkerFree(worker))
        for name, job in list(self.jobs.items()):
            if job.done == job.tasks:
                del self.jobs[name]
                self._take(Released(name))
            else:
                self._take(Heard(name, len(job.waiting) + self.given[name]))
        for name in self.jobs:
            self._give(name)
        for one in self.node.workers.values():
            self.served[one.job] += one.state is WorkerState.BUSY

    def _give(self, name: str) -> None:
        job = self.jobs[name]
        while job.waiting and self.given[name] < self.node.leases[name].slots:
            task = job.waiting.popleft()
            job.attempts[task] += 1
            self.given[name] += 1
            firm = job.interrupted[task] >= MAX_PREEMPTIONS
            self._take(TaskGiven(name, task, job.attempts[task], firm=firm))

    def _take(self, event: object) -> None:
        effects = self.node.handle(event, self.now)  # type: ignore[arg-type]
        if self.checked:
            self.node.check_invariants()
        for effect in effects:
            match effect:
                case Spawn(worker):
                    self._take(WorkerReady(worker))
                case Kill(worker):
                    self.ends.pop(worker, None)
                    self._take(WorkerGone(worker, ""))
                case RunOn(worker, name):
                    self.ends[worker] = self.now + self.jobs[name].seconds
                case Preempted(name, task, _, by):
                    assert WEIGHTS[self.jobs[by].priority] > WEIGHTS[self.jobs[name].priority]
                    self.jobs[name].interrupted[task] += 1
                    self.jobs[name].waiting.appendleft(task)
                    self.given[name] -= 1
                case GrantLease(name) if name in self.jobs:
                    self._give(name)


jobs = st.builds(
    Job,
    priority=st.sampled_from([*Priority]),
    tasks=st.integers(1, 12),
    seconds=st.sampled_from([1.0, 3.0, 20.0, 90.0]),
)
arrivals = st.lists(st.tuples(st.floats(0.0, 120.0), jobs), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(slots=st.integers(1, 5), come=arrivals)
def test_no_slot_is_lost_and_every_job_ends(slots: int, come: list[tuple[float, Job]]) -> None:
    farm, expected = Farm(slots, checked=True), sorted(enumerate(come), key=lambda item: item[1][0])
    work_s = sum(job.tasks * job.seconds for _, job in come)
    # an interruption costs at most the whole attempt, and steps are not divided
    limit_s = 120.0 + sum(job.tasks * (job.seconds + STEP_S) for _, job in come) * 3
    while farm.jobs or expected:
        while expected and expected[0][1][0] <= farm.now:
            number, (_, job) = expected.pop(0)
            farm.come(f"job{number}", job)
        farm.step()
        wanted = sum(len(job.waiting) + farm.given[name] for name, job in farm.jobs.items())
        assert farm.node.busy == min(slots, wanted), "a slot is empty though there are tasks"
        assert farm.now < limit_s, f"{work_s:g} s of work have not ended"
    assert all(max(job.interrupted.values(), default=0) <= MAX_PREEMPTIONS for _, job in come)
    assert all(job.done == job.tasks for _, job in come)


@settings(max_examples=10, deadline=None)
@given(
    slots=st.integers(1, 3),
    low=st.sampled_from([(1, 40.0), (3, 5.0), (1, 300.0)]),
    seconds=st.sampled_from([2.0, 15.0, 400.0]),
    tasks=st.integers(1, 6),
)
def test_a_low_job_ends_though_urgent_ones_come_for_ever(
    slots: int, low: tuple[int, float], seconds: float, tasks: int
) -> None:
    farm = Farm(slots)
    farm.come("low", Job(LOW, *low))
    for number in range(20_000):
        if not any(name != "low" and len(job.waiting) > 2 for name, job in farm.jobs.items()):
            farm.come(f"urgent{number}", Job(URGENT, tasks + 3 * slots, seconds))
        farm.step()
        if "low" not in farm.jobs:
            break
    assert "low" not in farm.jobs, f"it has nothing after {farm.now:.0f} s"


def test_in_the_long_run_each_has_its_part() -> None:
    for slots in (1, 3):
        farm = Farm(slots)
        for priority in Priority:
            farm.come(priority, Job(priority, 100_000, 5.0))
        for second in range(14_000):
            if second == 4000:  # until then the urgent one is ahead by some turns
                farm.served.clear()
            farm.step()
        whole = sum(farm.served.values())
        for priority, weight in WEIGHTS.items():
            part = farm.served[priority] / whole
            assert abs(part - weight / 21) < 0.04, f"{priority} has {part:.1%} of {slots} slots"


def test_who_wanted_nothing_has_saved_nothing() -> None:
    farm = Farm(1)
    farm.come("idle", Job(NORMAL, 2, 1.0))
    farm.come("busy", Job(NORMAL, 100_000, 1.0))
    for _ in range(40):
        farm.step()
    assert "idle" not in farm.jobs
    farm.come("idle", Job(NORMAL, 100_000, 1.0))
    farm.jobs["idle"].waiting.clear()  # it prepares its tasks, for hours
    for _ in range(5000):
        farm.step()
    farm.jobs["idle"].waiting.extend(range(1000))
    farm.served.clear()
    for _ in range(round(20 * TURN_S / STEP_S)):
        farm.step()
    assert 0.4 < farm.served["idle"] / sum(farm.served.values()) < 0.6
