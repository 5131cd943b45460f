"""The core of the agent: leases, workers and which attempt runs where."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oq_runtime.node import (
    FENCE_AFTER_S,
    AbortAsked,
    DropAttempt,
    Effect,
    Event,
    GrantLease,
    Heard,
    Kill,
    LeaseAsked,
    LeaseEnded,
    Node,
    Released,
    ReportDeath,
    RunOn,
    Spawn,
    TaskGiven,
    Tick,
    WorkerEnded,
    WorkerGone,
    WorkerReady,
    WorkerState,
)


def leased(slots: int = 2, *, ready: bool = True) -> Node:
    """An agent with one lease of all its slots; its workers are 1 up to ``slots``."""
    node = Node(slots)
    node.handle(LeaseAsked("j", -1), 0.0)
    if ready:
        for worker in range(1, slots + 1):
            node.handle(WorkerReady(worker), 0.0)
    return node


def states(node: Node) -> list[str]:
    return [w.state.value for w in node.workers.values()]


@pytest.mark.parametrize(("asked", "granted"), [(-1, 3), (1, 1), (2, 2), (3, 3), (99, 3), (0, 0)])
def test_lease_grants_and_spawns(asked: int, granted: int) -> None:
    effects = Node(3).handle(LeaseAsked("j", asked), 0.0)
    assert effects == [GrantLease("j", granted)] + [Spawn(i + 1, "j") for i in range(granted)]


def test_lease_that_is_asked_again_spawns_no_more() -> None:
    node = leased(2)
    assert node.handle(LeaseAsked("j", -1), 1.0) == [GrantLease("j", 2)]


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
    assert node.handle(WorkerEnded(2), 0.0) == [RunOn(2, "j", 3, 1)]
    assert node.handle(WorkerEnded(1), 0.0) == [RunOn(1, "j", 4, 1)]
    assert node.handle(WorkerEnded(1), 0.0) == []
    assert states(node) == ["idle", "busy"]


def test_task_without_a_lease_is_dropped() -> None:
    assert Node(1).handle(TaskGiven("j", 1, 2), 0.0) == [DropAttempt("j", 1, 2)]


def test_worker_that_dies_busy_is_reported_and_replaced() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    assert node.handle(WorkerGone(1, "signal 9"), 0.0) == [
        DropAttempt("j", 1, 1),
        ReportDeath("j", 1, 1, "signal 9", True),
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
        DropAttempt("j", 1, 1),
        ReportDeath("j", 1, 1, "worker could not start: exit 1", False),
        Spawn(2, "j"),
    ]
    # each death in the start takes one task, so that it ends
    assert node.handle(WorkerGone(2, "exit 1"), 0.0) == [
        DropAttempt("j", 2, 1),
        ReportDeath("j", 2, 1, "worker could not start: exit 1", False),
    ]
    assert node.workers == {}


def test_unknown_worker_changes_nothing() -> None:
    node = leased(1)
    for event in (WorkerReady(9), WorkerEnded(9), WorkerGone(9, "signal 9")):
        assert node.handle(event, 0.0) == []
    assert states(node) == ["idle"]


def test_abort_of_a_running_attempt_kills_and_blames_nobody() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    effects = node.handle(AbortAsked("j", 1, 1), 0.0)
    assert effects == [DropAttempt("j", 1, 1), Kill(1), Spawn(2, "j")]
    assert node.handle(WorkerGone(1, "signal 9"), 0.0) == []
    assert node.handle(WorkerReady(2), 0.0) == [RunOn(2, "j", 2, 1)]


def test_abort_of_a_waiting_attempt() -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    node.handle(TaskGiven("j", 2, 1), 0.0)
    assert node.handle(AbortAsked("j", 2, 1), 0.0) == [DropAttempt("j", 2, 1)]
    assert node.handle(WorkerEnded(1), 0.0) == []


@pytest.mark.parametrize(("job", "task", "attempt"), [("j", 1, 2), ("j", 2, 1), ("k", 1, 1)])
def test_abort_of_another_attempt_kills_nothing(job: str, task: int, attempt: int) -> None:
    node = leased(1)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    effects = node.handle(AbortAsked(job, task, attempt), 0.0)
    assert effects == [DropAttempt(job, task, attempt)]
    assert node.busy == 1


@pytest.mark.parametrize(("silent_s", "fenced"), [(FENCE_AFTER_S, False), (30.1, True)])
def test_silent_broker_is_fenced(silent_s: float, fenced: bool) -> None:
    node = leased(2)
    node.handle(TaskGiven("j", 1, 1), 0.0)
    effects = node.handle(Tick(), silent_s)
    ended = LeaseEnded("j", "broker silent for 30 s")
    assert effects == ([Kill(1), Kill(2), ended] if fenced else [])
    assert node.handle(TaskGiven("j", 2, 1), silent_s) == (
        [DropAttempt("j", 2, 1)] if fenced else [RunOn(2, "j", 2, 1)]
    )
    if fenced:
        assert node.handle(WorkerGone(1, "signal 9"), silent_s) == []
        assert node.workers == {} and node.leases == {}


def test_heard_broker_is_not_fenced() -> None:
    node = leased(1)
    node.handle(LeaseAsked("k", 1), 0.0)
    node.handle(Heard("j"), 20.0)
    effects = node.handle(Tick(), 40.0)
    assert effects == [Kill(2), LeaseEnded("k", "broker silent for 40 s")]
    assert list(node.leases) == ["j"]


def test_release_ends_the_lease_once() -> None:
    node = leased(1)
    assert node.handle(Released("j"), 0.0) == [Kill(1), LeaseEnded("j", "released")]
    assert node.handle(Released("j"), 0.0) == []


JOBS = st.sampled_from(["j", "k"])
SMALL = st.integers(0, 5)
WORKERS = st.integers(1, 12)
EVENTS: st.SearchStrategy[Any] = st.one_of(
    st.builds(LeaseAsked, JOBS, st.integers(-1, 4)),
    st.builds(Heard, JOBS),
    st.builds(Released, JOBS),
    st.builds(TaskGiven, JOBS, SMALL, SMALL),
    st.builds(TaskGiven, JOBS, SMALL, SMALL),
    st.builds(AbortAsked, JOBS, SMALL, SMALL),
    st.builds(WorkerReady, WORKERS),
    st.builds(WorkerEnded, WORKERS),
    st.builds(WorkerGone, WORKERS, st.just("signal 9")),
    st.just(Tick()),
)


@settings(max_examples=300)
@given(st.integers(1, 3), st.lists(st.tuples(EVENTS, st.sampled_from([0.0, 1.0, 16.0]))))
def test_random_events(slots: int, events: list[tuple[Event, float]]) -> None:
    """Workers of a lease never exceed its slots, nor does a worker get a second task."""
    node, now = Node(slots), 0.0
    alive: dict[int, str] = {}  # the processes, as the shell sees them
    running: dict[int, tuple[int, int]] = {}
    for event, seconds in events:
        now += seconds
        match event:
            case WorkerReady(worker) if worker in running:
                continue  # a worker is ready once, when it has started
            case WorkerGone(worker):
                alive.pop(worker, None)
                running.pop(worker, None)
            case WorkerEnded(worker):
                running.pop(worker, None)
        effects: list[Effect] = node.handle(event, now)
        for effect in effects:
            match effect:
                case Spawn(worker, job):
                    assert worker not in alive and job in node.leases
                    alive[worker] = job
                case Kill(worker):
                    del alive[worker]
                    running.pop(worker, None)
                case RunOn(worker, job, task, attempt):
                    assert alive[worker] == job, "a worker belongs to one lease"
                    assert worker not in running, "one task per worker"
                    running[worker] = task, attempt
        assert alive == {w.id: w.job for w in node.workers.values()}
        assert set(alive.values()) <= set(node.leases)
        assert node.busy == len(running)
        for job, lease in node.leases.items():
            own = [w for w in node.workers.values() if w.job == job]
            assert len(own) <= lease.slots <= slots
            idle = any(w.state is WorkerState.IDLE for w in own)
            aborted = isinstance(event, AbortAsked)
            assert aborted or not (idle and lease.pending), "work waits beside an idle worker"
            assert not lease.pending or own or not lease.slots, "work waits and no worker comes"
