"""The core of the agent: leases, workers and which attempt runs where."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest

from oq_runtime.core.limits import Limits
from oq_runtime.core.slots import (
    GROWTH_BYTES,
    STARTING_SECS,
    STUCK_SECS,
    TURN_S,
    Died,
    DrainAsked,
    Effect,
    Event,
    Fewer,
    GrantLease,
    Heard,
    Kill,
    LeaseAsked,
    LeaseEnded,
    MemoryUsed,
    Released,
    RunOn,
    Slots,
    Slow,
    Spawn,
    Stuck,
    TaskGiven,
    TaskTaken,
    Tick,
    Worker,
    WorkerFree,
    WorkerGone,
    WorkerReady,
    WorkerRefused,
    WorkerState,
)

#: the worker that was killed has ended
GONE_1 = WorkerGone(1, "killed by SIGKILL")


def leased(slots: int = 2, *, ready: bool = True) -> Slots:
    """An agent with one lease of all its slots; its workers are 1 up to ``slots``."""
    node = Slots(slots)
    node.handle(LeaseAsked("j"), 0.0)
    if ready:
        for worker in range(1, slots + 1):
            node.handle(WorkerReady(worker), 0.0)
    return node


def busy(node: Slots) -> list[Worker]:
    return [w for w in node.workers.values() if w.state is WorkerState.BUSY]


def states(node: Slots) -> list[str]:
    return [w.state.value for w in node.workers.values()]


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_lease_grants_and_spawns(slots: int) -> None:
    effects = Slots(slots).handle(LeaseAsked("j"), 0.0)
    assert effects == [GrantLease("j", slots)] + [Spawn(i + 1, "j") for i in range(slots)]


def test_lease_that_is_asked_again_starts_anew() -> None:
    # its broker has lost what went before, so nothing of it may go on
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    assert node.handle(LeaseAsked("j"), 1.0) == [
        Kill(1),
        LeaseEnded("j", "asked for again"),
        GrantLease("j", 1),
    ]
    assert node.handle(WorkerFree(1), 1.0) == []
    assert node.handle(GONE_1, 1.0) == [Spawn(2, "j")]


def grants(effects: list[Effect]) -> dict[str, int]:
    return {e.job: e.slots for e in effects if isinstance(e, GrantLease)}


def shares(node: Slots) -> dict[str, int]:
    return {job: lease.slots for job, lease in node.leases.items()}


def test_what_is_told_of_workers_and_brokers() -> None:
    node = leased(2, ready=False)
    node.handle(WorkerReady(1), 1.0)
    node.handle(LeaseAsked("k"), 3.0)
    assert (node.ready, node.beat_age_s(10.0)) == (1, 10.0)
    for job in "jk":
        node.handle(Released(job), 10.0)
    assert (node.ready, node.beat_age_s(10.0)) == (0, None)


def test_two_leases_get_half_each() -> None:
    node = Slots(4)
    assert grants(node.handle(LeaseAsked("j"), 0.0)) == {"j": 4}
    assert grants(node.handle(LeaseAsked("k"), 0.0)) == {"j": 2, "k": 2}
    assert grants(node.handle(Released("j"), 1.0)) == {"k": 4}


def test_what_one_lease_does_not_want_goes_to_the_other() -> None:
    node = Slots(4)
    node.handle(LeaseAsked("j"), 0.0)
    node.handle(LeaseAsked("k"), 0.0)
    assert grants(node.handle(Heard("j", 1), 0.0)) == {"j": 1, "k": 3}
    assert grants(node.handle(Heard("j", 0), 0.0)) == {"j": 0, "k": 4}
    assert grants(node.handle(Heard("j", 99), 0.0)) == {"j": 2, "k": 2}


def test_a_single_slot_alternates_between_leases() -> None:
    node = Slots(1)
    for job in "jk":
        node.handle(LeaseAsked(job), 0.0)
    node.handle(WorkerReady(1), 0.0)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    assert shares(node) == {"j": 1, "k": 0}
    node.handle(Tick(), 0.0)
    for job in "jk":
        node.handle(Heard(job), TURN_S - 5)
    node.handle(Tick(), TURN_S - 1)
    assert shares(node) == {"j": 1, "k": 0}, "each turn costs the start of a worker"
    node.handle(Tick(), TURN_S)
    assert shares(node) == {"j": 0, "k": 1}
    node.handle(TaskGiven("j", 2, 1), TURN_S)
    assert node.handle(TaskGiven("k", 7, 1), TURN_S) == [], "the slot is busy"
    effects = node.handle(WorkerFree(1), TURN_S + 1)
    assert effects == [Kill(1)], "k is below its share and comes before j"
    assert node.handle(GONE_1, TURN_S + 1) == [Spawn(2, "k")]
    assert node.handle(WorkerReady(2), TURN_S + 1) == [RunOn(2, "k", 7, 1)]


def test_a_late_lease_does_not_make_up_for_what_it_has_missed() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    for s in range(101):
        node.handle(Heard("j"), TURN_S * s)
        node.handle(Tick(), TURN_S * s)
    node.handle(LeaseAsked("k"), TURN_S * 100)
    assert node.leases["k"].served_s == node.leases["j"].served_s


def test_a_share_that_shrinks_stops_nothing() -> None:
    node = leased(2)
    for task in (1, 2):
        node.handle(TaskGiven("j", task, 1), 0.0)
    effects = node.handle(LeaseAsked("k"), 0.0)
    assert effects == [GrantLease("j", 1), GrantLease("k", 1)]
    node.handle(TaskGiven("k", 9, 1), 0.0)
    assert node.busy == 2
    assert node.handle(WorkerFree(1), 1.0) == [Kill(1)]
    assert node.handle(GONE_1, 1.0) == [Spawn(3, "k")]


def memory(part: float, **workers: int) -> MemoryUsed:
    """A look at 10 GiB of memory; ``w1=3`` is a worker that holds 3 GiB."""
    held = {int(name[1:]): size << 30 for name, size in workers.items()}
    return MemoryUsed(round(part * (10 << 30)), 10 << 30, held)


def test_memory_ladder() -> None:
    node = leased(2)
    assert node.handle(memory(0.95), 0.0) == [] and not node.closed, "nothing of ours to stop"
    node.handle(memory(0.5), 0.0)
    node.handle(TaskGiven("j", 1, 1), 1.0)
    node.handle(TaskGiven("j", 2, 1), 2.0)
    assert node.handle(memory(0.85), 3.0) == [] and node.closed
    killed = node.handle(memory(0.91, w1=1, w2=7), 4.0)
    assert killed[0] == Kill(2), "the newest goes"
    reason = (
        "killed to free memory: its worker had 7.00 GiB, 9.10 GiB of 10.00 GiB were in use, "
        "the limit is 90%"
    )
    assert killed[1] == Died("j", 2, 1, reason, oom=True)
    assert node.handle(memory(0.95), 5.0) == [], "one kill at a time"
    assert node.handle(memory(0.95), 6.0)[0] == Kill(1)
    assert not node.closed, "an empty node takes a task, or the job would wait for ever"


def test_kill_by_the_kernel_has_the_figures() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(memory(0.8), 0.0)
    effects = node.handle(WorkerGone(1, "killed by the kernel", oom=True, nbytes=8 << 30), 1.0)
    reason = "killed by the kernel: its worker had 8.00 GiB, 8.00 GiB of 10.00 GiB were in use"
    assert effects[0] == Died("j", 1, 1, reason, oom=True)


def test_kill_by_the_kernel_in_the_start() -> None:
    node = leased(1, ready=False)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    effects = node.handle(WorkerGone(1, "signal 9", oom=True), 0.0)
    assert isinstance(effects[0], Died) and effects[0].oom
    assert effects[0].reason.startswith("worker could not start: ")


def test_growth_is_of_living_workers_beyond_their_start() -> None:
    node = leased(2)
    assert node.grown({1: 5, 2: 7}) == 12, "both began with nothing"
    node.handle(Released("j", "over"), 0.0)
    assert node.grown({1: 5, 2: 7}) == 0, (
        "killed ones do not count, what they share is still in use"
    )


def test_alone_waits_for_an_empty_node_and_keeps_it() -> None:
    node = leased(2)
    node.handle(LeaseAsked("k"), 0.0)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    assert node.handle(TaskGiven("k", 9, 2, True), 0.0) == [], "another job's task is under way"
    assert node.handle(TaskGiven("j", 2, 1), 0.0) == [], "no new one beside it"
    effects = node.handle(WorkerFree(1), 1.0)
    assert effects == [Kill(2)], "the one that has been idle for longest"
    assert node.handle(WorkerGone(2, ""), 1.0) == [Spawn(3, "k")]
    assert node.handle(WorkerReady(3), 2.0) == [Kill(1), RunOn(3, "k", 9, 2)], "idle memory as well"
    assert node.handle(GONE_1, 2.0) == [], "nor another one beside it"
    assert node.handle(WorkerFree(3), 3.0) == [Spawn(4, "j")]
    assert node.handle(WorkerReady(4), 4.0) == [RunOn(4, "j", 2, 1)]


def test_alone_kills_no_worker_twice() -> None:
    node = leased(2)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    assert node.handle(TaskTaken("j", 1, 1), 0.0) == [Kill(1)]
    assert node.handle(TaskGiven("j", 2, 2, True), 0.0) == [RunOn(2, "j", 2, 2)]
    node.check_invariants()


def test_alone_behind_another_waits_though_workers_are_idle() -> None:
    node = leased(3)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(MemoryUsed(85, 100), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    assert node.handle(TaskGiven("j", 3, 2, True), 0.0) == []
    started = [one for one in node.handle(MemoryUsed(10, 100), 1.0) if isinstance(one, RunOn)]
    assert [one.task for one in started] == [2]
    node.check_invariants()


def test_a_killed_worker_for_which_there_never_was_a_process() -> None:
    node = leased(1, ready=False)
    assert Kill(1) in node.handle(Released("j", "done"), 0.0)
    assert node.handle(WorkerRefused(1, "too many processes"), 1.0) == []
    assert not node.workers
    node.check_invariants()


def test_alone_that_is_aborted_holds_nothing_back() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 2, True), 0.0)
    node.handle(TaskTaken("j", 2, 2), 0.0)
    node.handle(TaskGiven("j", 3, 1), 0.0)
    assert node.handle(WorkerFree(1), 0.0) == [RunOn(1, "j", 3, 1)]


@pytest.mark.parametrize(("grown", "replaced"), [(GROWTH_BYTES, False), (GROWTH_BYTES + 1, True)])
def test_worker_that_has_grown_is_replaced(grown: int, replaced: bool) -> None:
    node = leased(1, ready=False)
    node.handle(WorkerReady(1, 1000), 0.0)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    effects = node.handle(WorkerFree(1, 1000 + grown), 0.0)
    assert effects == ([Kill(1)] if replaced else [])
    assert not replaced or node.handle(GONE_1, 0.0) == [Spawn(2, "j")]


def test_task_timeout() -> None:
    node = Slots(1, Limits(task_timeout_s=10))
    node.handle(LeaseAsked("j"), 0.0)
    node.handle(WorkerReady(1), 0.0)
    node.handle(TaskGiven("j", 1, 1), 1.0)
    node.handle(Heard("j"), 11.0)
    assert node.handle(Tick(), 11.0) == []
    effects = node.handle(Tick(), 12.0)
    assert effects[0] == Kill(1)
    assert isinstance(effects[1], Died) and "task_timeout" in effects[1].reason


def test_drain_closes_the_node() -> None:
    node = leased(1)
    node.handle(DrainAsked(), 0.0)
    assert node.closed


def test_task_waits_for_a_starting_worker() -> None:
    node = leased(1, ready=False)
    assert node.handle(TaskGiven("j", 7, 1), 0.0) == []
    assert node.handle(WorkerReady(1), 0.0) == [RunOn(1, "j", 7, 1)]
    assert node.busy == 1


def test_one_task_per_worker_in_order_of_arrival() -> None:
    node = leased(2)
    assert node.handle(TaskGiven("j", 1, 1), 0.0) == [RunOn(1, "j", 1, 1)]
    assert node.handle(TaskGiven("j", 2, 1), 0.0) == [RunOn(2, "j", 2, 1)]
    assert node.handle(TaskGiven("j", 3, 1), 0.0) == []
    assert node.handle(TaskGiven("j", 4, 1), 0.0) == []
    assert node.handle(WorkerFree(2), 0.0) == [RunOn(2, "j", 3, 1)]
    assert node.handle(WorkerFree(1), 0.0) == [RunOn(1, "j", 4, 1)]
    assert node.handle(WorkerFree(1), 0.0) == []
    assert states(node) == ["idle", "busy"]


def test_worker_that_dies_busy_is_reported_and_replaced() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    assert node.handle(WorkerGone(1, "signal 9"), 0.0) == [
        Died("j", 1, 1, "signal 9"),
        Spawn(2, "j"),
    ]
    assert node.handle(WorkerReady(2), 0.0) == [RunOn(2, "j", 2, 1)]


def test_worker_that_dies_idle_is_replaced_without_blame() -> None:
    assert leased(1).handle(WorkerGone(1, "signal 9"), 0.0) == [Spawn(2, "j")]


def test_worker_that_dies_starting_is_not_replaced_without_work() -> None:
    node = leased(1, ready=False)
    assert node.handle(WorkerGone(1, "exit 1"), 0.0) == []
    assert node.workers == {}
    assert node.handle(TaskGiven("j", 1, 1), 0.0) == [Spawn(2, "j")]


def test_worker_that_dies_starting_charges_a_waiting_task() -> None:
    node = leased(1, ready=False)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    assert node.handle(WorkerGone(1, "exit 1"), 0.0) == [
        Died("j", 1, 1, "worker could not start: exit 1"),
        Spawn(2, "j"),
    ]
    # each death in the start takes one task, so that it ends
    assert node.handle(WorkerGone(2, "exit 1"), 0.0) == [
        Died("j", 2, 1, "worker could not start: exit 1"),
    ]
    assert node.workers == {}


def test_unknown_worker_changes_nothing() -> None:
    node = leased(1)
    for event in (WorkerReady(9), WorkerFree(9), WorkerGone(9, "signal 9")):
        assert node.handle(event, 0.0) == []
    assert states(node) == ["idle"]


def test_abort_of_a_running_attempt_kills_and_blames_nobody() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    effects = node.handle(TaskTaken("j", 1, 1), 0.0)
    assert effects == [Kill(1)]
    assert node.handle(WorkerGone(1, "signal 9"), 0.0) == [Spawn(2, "j")]
    assert node.handle(WorkerReady(2), 0.0) == [RunOn(2, "j", 2, 1)]


def test_abort_of_a_waiting_attempt() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    assert node.handle(TaskTaken("j", 2, 1), 0.0) == []
    assert node.handle(WorkerFree(1), 0.0) == []


@pytest.mark.parametrize(("task", "attempt"), [(1, 2), (2, 1)])
def test_abort_of_another_attempt_kills_nothing(task: int, attempt: int) -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    assert node.handle(TaskTaken("j", task, attempt), 0.0) == []
    assert node.busy == 1


@pytest.mark.parametrize(("silent_s", "fenced"), [(28.0, False), (28.1, True)])
def test_silent_broker_is_fenced(silent_s: float, fenced: bool) -> None:
    node = leased(2)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    effects = node.handle(Tick(), silent_s)
    ended = LeaseEnded("j", "broker silent for 28 s")
    assert effects == ([Kill(1), Kill(2), ended] if fenced else [])
    if fenced:
        for worker in (1, 2):
            assert node.handle(WorkerGone(worker, "signal 9"), silent_s) == []
        assert node.workers == {} and node.leases == {}


def test_heard_broker_is_not_fenced() -> None:
    node = leased(1)
    node.handle(LeaseAsked("k"), 0.0)
    node.handle(Heard("j"), 20.0)
    assert node.handle(Tick(), 40.0)[0] == LeaseEnded("k", "broker silent for 40 s")
    assert list(node.leases) == ["j"]


def test_release_ends_the_lease_once() -> None:
    node = leased(1)
    assert node.handle(Released("j"), 0.0) == [Kill(1), LeaseEnded("j", "released")]
    assert node.handle(Released("j"), 0.0) == []


def test_waiting_tasks_wait_on_while_memory_is_short() -> None:
    node = Slots(2)
    node.handle(LeaseAsked("j"), 0.0)
    for worker in (1, 2):
        node.handle(WorkerReady(worker), 0.0)
    for task in range(4):
        node.handle(TaskGiven("j", task, 1), 0.0)
    node.handle(MemoryUsed(85, 100), 1.0)
    assert node.handle(WorkerFree(1), 1.0) == [], "another one runs, whose end may help"
    assert node.handle(WorkerFree(2), 1.0) == [RunOn(1, "j", 2, 1)], "one at a time"
    assert node.handle(MemoryUsed(50, 100), 1.0) == [RunOn(2, "j", 3, 1)]


def test_a_worker_whose_end_is_known_gets_no_other_task() -> None:
    node = Slots(1)
    node.handle(LeaseAsked("j"), 0.0)
    node.handle(WorkerReady(1), 0.0)
    for task in range(2):
        node.handle(TaskGiven("j", task, 1), 0.0)
    assert node.handle(WorkerFree(1, 0, True), 1.0) == [Kill(1)]
    assert node.handle(WorkerGone(1, "killed by SIGKILL"), 1.0) == [Spawn(2, "j")]
    assert node.handle(WorkerReady(2), 2.0) == [RunOn(2, "j", 1, 1)]


def steps(node: Slots, events: Sequence[Event]) -> int:
    """Return how many lines of Python a node needs for these events."""
    count = 0

    def step(*_: Any) -> Any:
        nonlocal count
        count += 1
        return step

    before = sys.gettrace()  # of coverage
    sys.settrace(step)
    try:
        for event in events:
            node.handle(event, 1.0)
    finally:
        sys.settrace(before)
    return count


def test_a_task_costs_the_same_on_a_large_node() -> None:
    counts = set()
    for slots in (3, 200):
        node = leased(slots)
        for task in range(2 * slots):
            node.handle(TaskGiven("j", task, 1), 0.0)
        assert len(busy(node)) == slots
        counts.add(steps(node, [WorkerFree(1), TaskGiven("j", 2 * slots, 1), Heard("j")]))
        node.check_invariants()
    assert len(counts) == 1, counts


# ---- workers for which there is no process


def test_a_node_goes_on_with_the_workers_that_it_may_have() -> None:
    node = leased(3, ready=False)
    node.handle(WorkerReady(1), 0.0)
    for task in range(4):
        node.handle(TaskGiven("j", task, 1), 0.0)
    assert node.handle(WorkerRefused(3, "no"), 0.0) == [Fewer(2, "no"), GrantLease("j", 2)]
    assert node.handle(WorkerRefused(2, "no"), 0.0) == [Fewer(1, "no"), GrantLease("j", 1)]
    assert node.handle(WorkerFree(1), 0.0) == [RunOn(1, "j", 1, 1)], "nobody is to blame"
    assert node.handle(GONE_1, 0.0)[-1] == Spawn(4, "j")
    node.handle(Released("j"), 0.0)
    node.handle(WorkerGone(4, ""), 0.0)
    assert node.handle(LeaseAsked("k"), 0.0)[0] == GrantLease("k", 3), "another job, another try"


def test_without_any_worker_the_waiting_tasks_fail_one_by_one() -> None:
    node = leased(1, ready=False)
    assert node.handle(WorkerRefused(1, "no"), 0.0) == [], "no task, no respawn"
    assert node.handle(TaskGiven("j", 1, 1), 0.0) == [Spawn(2, "j")]
    assert node.handle(WorkerRefused(2, "no"), 0.0) == [Died("j", 1, 1, "no")]
    assert node.handle(WorkerRefused(9, "of nobody"), 0.0) == []


# ---- workers that were killed and do not end


def test_a_slot_is_not_given_away_while_a_killed_worker_lives() -> None:
    node = leased(2)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    assert node.handle(TaskTaken("j", 1, 1), 0.0) == [Kill(1)]
    assert node.handle(TaskGiven("j", 2, 1), 0.0) == [RunOn(2, "j", 2, 1)]
    for task in (3, 4):
        assert node.handle(TaskGiven("j", task, 1), 0.0) == []
    assert node.handle(Released("j"), 1.0)[0] == Kill(2)
    assert node.handle(LeaseAsked("k"), 1.0) == [GrantLease("k", 2)], "both are still there"
    assert node.handle(WorkerGone(2, ""), 1.0) == [Spawn(3, "k")]
    assert node.handle(GONE_1, 99.0) == [Spawn(4, "k")]


def test_a_worker_that_does_not_end_is_told_once() -> None:
    node = leased(1)
    node.handle(Released("j"), 1.0)
    assert node.handle(Tick(), 1.0 + STUCK_SECS) == [] and node.stuck == 0
    assert node.handle(Tick(), 2.0 + STUCK_SECS) == [Stuck(1, 1.0 + STUCK_SECS)]
    assert node.handle(Tick(), 3.0 + STUCK_SECS) == [] and node.stuck == 1
    assert node.handle(GONE_1, 9.0) == [] and node.stuck == 0


def test_a_slot_whose_worker_does_not_end_is_no_part_of_a_share() -> None:
    node = leased(2)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    assert node.handle(TaskTaken("j", 1, 1), 0.0) == [Kill(1)]
    told = node.handle(Tick(), STUCK_SECS + 1)
    assert told == [Stuck(1, STUCK_SECS + 1), GrantLease("j", 1)]
    assert GrantLease("k", 0) in node.handle(LeaseAsked("k"), STUCK_SECS + 1), "in turns"
    node.handle(Released("k"), STUCK_SECS + 2)
    assert node.handle(GONE_1, 99.0) == [GrantLease("j", 2), Spawn(3, "j")]


def test_a_worker_that_does_not_start_is_told_once() -> None:
    node = Slots(1)
    node.handle(LeaseAsked("j"), 0.0)
    assert node.handle(Heard("j"), STARTING_SECS) == node.handle(Tick(), STARTING_SECS) == []
    node.handle(Heard("j"), STARTING_SECS + 1)
    assert node.handle(Tick(), STARTING_SECS + 1) == [Slow(1, STARTING_SECS + 1)]
    assert node.handle(Tick(), STARTING_SECS + 2) == [] and node.unstarted == 1
    node.handle(WorkerReady(1), STARTING_SECS + 3)
    assert node.unstarted == node.stuck == 0
    node.handle(Released("j"), STARTING_SECS + 3)
    assert node.handle(Tick(), STARTING_SECS + 4) == [] and node.stuck == 0


def test_a_worker_that_was_killed_before_it_was_made_has_time() -> None:
    """The fork server may still import the engine; and what it cannot make is gone as well."""
    node = Slots(2)
    node.handle(LeaseAsked("j"), 0.0)
    node.handle(Released("j"), 1.0)
    node.handle(LeaseAsked("k"), 2.0)
    for now in range(3, int(STARTING_SECS)):
        node.handle(Heard("k"), now)
        assert node.handle(Tick(), now) == [], "it is not stuck"
    later = STARTING_SECS + 2
    node.handle(Heard("k"), later)
    assert GrantLease("k", 0) in node.handle(Tick(), later)
    assert GrantLease("k", 1) in node.handle(WorkerRefused(1, "no process"), later)
    assert GrantLease("k", 2) in node.handle(WorkerRefused(2, "no process"), later)


def test_a_worker_that_does_not_end_is_none_to_do_with() -> None:
    """Where no process can be had, the node does with those that work, not with that one."""
    node = leased(2)
    for task in (1, 2):
        node.handle(TaskGiven("j", task, 1), 0.0)
    node.handle(TaskTaken("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 3, 1), 0.0)
    assert Spawn(3, "j") in node.handle(WorkerGone(2, ""), 0.0)
    [died] = node.handle(WorkerRefused(3, "no process"), 0.0)[:1]
    assert isinstance(died, Died) and node.slots == 2


def test_slots_come_back_where_the_last_one_hangs() -> None:
    node = leased(2)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    node.handle(WorkerGone(2, ""), 0.0)
    node.handle(TaskGiven("j", 3, 1), 0.0)
    node.handle(WorkerRefused(3, "no process"), 0.0)
    assert node.slots == 1
    node.handle(TaskTaken("j", 1, 1), 1.0)
    node.handle(Heard("j"), STUCK_SECS + 2)
    told = node.handle(Tick(), STUCK_SECS + 2)
    assert Stuck(1, STUCK_SECS + 1) in told
    told += node.handle(Tick(), STUCK_SECS + 3)
    assert node.slots == 2 and any(isinstance(effect, Spawn) for effect in told)


def test_room_is_made_once_for_each_task() -> None:
    node = leased(3)
    node.handle(LeaseAsked("k"), 0.0)
    assert node.handle(TaskGiven("k", 1, 1), 0.0) == [Kill(1)]
    assert node.handle(Heard("k"), 0.0) == [], "its slot is on its way"
    node.handle(Tick(), 1.0)
    node.handle(Heard("k"), STUCK_SECS + 1)
    node.handle(Heard("j"), STUCK_SECS + 1)
    told = node.handle(Tick(), STUCK_SECS + 2)
    assert told == [Stuck(1, STUCK_SECS + 2), GrantLease("j", 1), Kill(2)]
    assert node.handle(WorkerGone(2, ""), STUCK_SECS + 2) == [Spawn(4, "k")]
