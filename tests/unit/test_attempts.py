"""The core of an attempt's life on a node: its table, what is forgotten, fetches without answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oq_runtime.core import attempts, slots
from oq_runtime.core.attempts import (
    FINAL,
    MOST_ASKS,
    STARTED_SECS,
    TRANSITIONS,
    AbortAsked,
    Attempts,
    BlobCame,
    BlobRefused,
    Done,
    DropBlob,
    Effect,
    Event,
    Failed,
    Fetch,
    Forget,
    Given,
    Granted,
    JobEnded,
    Sent,
    State,
    TellDied,
    TellPreempted,
    TellStarted,
    Tick,
    Upload,
)
from oq_runtime.core.limits import DEFAULTS
from oq_runtime.core.slots import RunOn, Slots, TaskGiven, TaskTaken
from oq_runtime.errors import TransitionError
from oq_runtime.priority import Priority

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32
ONE = ("j", 1, 1)
SILENT_S = DEFAULTS.lost_s + 1


class Checked(Attempts):
    """Attempts that look at themselves after each event."""

    def handle(self, event: Event, now: float = 0.0) -> list[Effect]:
        effects = super().handle(event, now)
        self.check_invariants()
        return effects


def at(state: State) -> Checked:
    """One attempt in a state, the only one that there is."""
    core = Checked()
    core.handle(Given(*ONE, ((A, 10),)))
    way: list[Event] = [BlobCame("j", A), RunOn(1, *ONE), Done(*ONE, True), Granted(*ONE)]
    while core.attempts[ONE].state is not state:
        core.handle(way.pop(0))
    return core


EVENTS: dict[str, Event] = {
    "run": RunOn(1, *ONE),
    "spool": Done(*ONE, True),
    "end": Done(*ONE),
    "upload": Granted(*ONE),
    "sent": Sent(*ONE),
    "die": slots.Died(*ONE, "why"),
    "fail": Failed(*ONE, "why"),
    "drop": AbortAsked(*ONE),
    "interrupt": slots.Preempted(*ONE, "k"),
}
S = State
#: what becomes of an attempt in each state; an event that is not named is refused
OUTCOMES: dict[State, dict[str, State]] = {
    S.FETCHING: {"die": S.FAILED, "fail": S.FAILED, "drop": S.DROPPED},
    S.PENDING: {"run": S.RUNNING, "die": S.FAILED, "fail": S.FAILED, "drop": S.DROPPED},
    S.RUNNING: {
        "spool": S.SPOOLED, "end": S.ENDED, "die": S.FAILED, "fail": S.FAILED, "drop": S.DROPPED
    },
    S.SPOOLED: {"upload": S.UPLOADING, "die": S.FAILED, "fail": S.FAILED, "drop": S.DROPPED},
    S.UPLOADING: {"sent": S.ENDED, "die": S.FAILED, "fail": S.FAILED, "drop": S.DROPPED},
}  # fmt: skip


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("state", OUTCOMES)
def test_every_event_in_every_state(state: State, name: str) -> None:
    core = at(state)
    attempt = core.attempts[ONE]
    to = S.DROPPED if name == "interrupt" else OUTCOMES[state].get(name)
    if to is None:
        with pytest.raises(TransitionError):
            core.handle(EVENTS[name])
        assert core.attempts == {ONE: attempt} and attempt.state is state
        core.check_invariants()
        return
    effects = core.handle(EVENTS[name])
    assert attempt.state is to
    assert (ONE in core.attempts) == (to not in FINAL) == (Forget(*ONE) not in effects)
    told = [effect for effect in effects if isinstance(effect, TellDied)]
    assert told == ([TellDied(*ONE, "why")] if to is State.FAILED else [])
    assert (TellPreempted(*ONE, "k") in effects) == (name == "interrupt")
    assert (TaskTaken(*ONE) in effects) == (
        name == "drop" and state in (State.PENDING, State.RUNNING)
    )
    if to in FINAL:
        assert core.handle(EVENTS[name]) == [], "it is gone"


def test_the_table_knows_every_state() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(not TRANSITIONS[state] for state in FINAL)


def test_the_life_of_an_attempt() -> None:
    core = Checked()
    assert core.handle(Given(*ONE, ((A, 10), (B, 5), (A, 10)), True, 20)) == [
        Fetch("j", A, 10),
        Fetch("j", B, 5),
    ]
    assert core.handle(BlobCame("j", A)) == []
    assert core.handle(BlobCame("j", B)) == [TaskGiven(*ONE, alone=True)]
    assert core.handle(RunOn(1, *ONE)) == []
    assert core.handle(Done(*ONE, True)) == []
    assert core.handle(Granted(*ONE)) == [Upload(*ONE)]
    assert core.handle(Sent(*ONE)) == [Forget(*ONE)]
    assert not core.attempts and {name[1] for name in core.blobs} == {A, B}


def test_a_blob_is_fetched_once_and_kept() -> None:
    core = Checked()
    assert core.handle(Given("j", 1, 1, ((A, 10),))) == [Fetch("j", A, 10)]
    assert core.handle(Given("j", 2, 1, ((A, 10),))) == []
    assert core.handle(Given("k", 1, 1, ((A, 10),))) == [Fetch("k", A, 10)], "each job its own"
    assert core.handle(BlobCame("j", A)) == [TaskGiven("j", 1, 1), TaskGiven("j", 2, 1)]
    assert core.handle(BlobCame("j", A)) == [], "once more changes nothing"
    assert core.handle(Given("j", 3, 1, ((A, 10),))) == [TaskGiven("j", 3, 1)]


def test_an_attempt_that_is_given_twice_is_refused() -> None:
    core = at(State.FETCHING)
    with pytest.raises(TransitionError, match="given twice"):
        core.handle(Given(*ONE))
    core.check_invariants()


def test_what_nobody_needs_makes_room_the_least_used_first() -> None:
    core = Checked()
    for task, digest in enumerate((A, B, C)):
        core.handle(Given("j", task, 1, ((digest, 10),), free_bytes=100))
        core.handle(BlobCame("j", digest))
        if digest is not C:
            core.handle(AbortAsked("j", task, 1))
    core.handle(Given("j", 7, 1, ((A, 10),)))  # used again
    core.handle(AbortAsked("j", 7, 1))
    new = b"n" * 32
    assert core.handle(Given("j", 8, 1, ((new, 15),), free_bytes=5)) == [
        DropBlob("j", B),
        Fetch("j", new, 15),
    ]
    bigger = b"b" * 32
    effects = core.handle(Given("j", 9, 1, ((bigger, 99),)))
    assert effects == [DropBlob("j", A), Fetch("j", bigger, 99)], "C is needed"


def test_what_only_an_aborted_attempt_waited_for_is_asked_for_anew() -> None:
    # a fetch that its broker ignores, since it wants nothing of it any more
    core = Checked()
    core.handle(Given("j", 1, 1, ((A, 10),)))
    assert core.handle(AbortAsked("j", 1, 1)) == [DropBlob("j", A), Forget("j", 1, 1)]
    assert core.handle(Given("j", 2, 1, ((A, 10),))) == [Fetch("j", A, 10)]


def test_a_fetch_without_answer_is_repeated_and_then_fails() -> None:
    core, now = Checked(), 0.0
    core.handle(Given("j", 1, 1, ((A, 10),)), now)
    core.handle(Given("j", 2, 1, ((A, 10),)), now)
    assert core.handle(Tick(), DEFAULTS.lost_s) == []
    for _ in range(MOST_ASKS - 1):
        now += SILENT_S
        assert core.handle(Tick(), now) == [Fetch("j", A, 10)]
    effects = core.handle(Tick(), now + SILENT_S)
    died = [effect for effect in effects if isinstance(effect, TellDied)]
    assert [(one.task, one.no_room) for one in died] == [(1, False), (2, False)]
    assert "10 bytes was asked for twice and did not come" in died[0].reason
    assert DropBlob("j", A) in effects and not core.attempts and not core.blobs


def test_two_fetches_without_answer_fail_their_attempt_once() -> None:
    core = Checked()
    core.handle(Given("j", 1, 1, ((A, 10), (B, 10))))
    for asks in range(1, MOST_ASKS):
        assert core.handle(Tick(), asks * SILENT_S) == [Fetch("j", A, 10), Fetch("j", B, 10)]
    effects = core.handle(Tick(), MOST_ASKS * SILENT_S)
    assert len([effect for effect in effects if isinstance(effect, TellDied)]) == 1
    assert not core.blobs


def test_a_fetch_that_goes_on_is_not_repeated() -> None:
    core = Checked()
    core.handle(Given("j", 1, 1, ((A, 10), (B, 10))), 0.0)
    for n in range(1, 10):
        assert core.handle(Tick(frozenset("j")), n * SILENT_S) == []
    assert core.handle(Tick(frozenset("k")), 10 * SILENT_S + 1) == [
        Fetch("j", A, 10),
        Fetch("j", B, 10),
    ]


def test_a_fetch_that_is_passed_over_is_repeated_at_once() -> None:
    core = Checked()
    for task, digest in enumerate((A, B)):
        core.handle(Given("j", task, 1, ((digest, 10),)))
    assert core.handle(BlobCame("j", B)) == [Fetch("j", A, 10), TaskGiven("j", 1, 1)]
    core.handle(Given("j", 2, 1, ((C, 10),)))
    effects = core.handle(BlobCame("j", C))
    assert isinstance(effects[0], TellDied) and effects[0].task == 0, "asked for often enough"


def test_no_room_for_a_blob_fails_those_that_wait_for_it() -> None:
    core = Checked()
    core.handle(Given("j", 1, 1, ((A, 10), (B, 10))))
    core.handle(Given("j", 2, 1, ((B, 10),)))
    effects = core.handle(BlobRefused("j", A, "No space left"))
    assert effects == [
        TellDied("j", 1, 1, "no room for its arguments: No space left", no_room=True),
        DropBlob("j", A),
        Forget("j", 1, 1),
    ]
    assert core.handle(BlobCame("j", B)) == [TaskGiven("j", 2, 1)]
    assert core.handle(BlobRefused("j", A, "late")) == []


def test_a_start_is_told_once_and_only_of_what_runs_for_a_while() -> None:
    core = Checked()
    for task in (1, 2, 3):
        core.handle(Given("j", task, 1))
        core.handle(RunOn(task, "j", task, 1), task / 10)
    assert core.due_s == 0.1 + STARTED_SECS
    core.handle(Done("j", 1, 1))
    assert core.due_s == 0.2 + STARTED_SECS
    assert core.handle(Tick(), core.due_s - 0.01) == []
    assert core.handle(Tick(), core.due_s) == [TellStarted("j", 2, 1)]
    assert core.handle(Tick(), 9.0) == [TellStarted("j", 3, 1)]
    assert core.due_s == float("inf") and core.handle(Tick(), 10.0) == []


def test_the_end_of_a_job_leaves_nothing_of_it() -> None:
    core = at(State.RUNNING)
    core.handle(Given("j", 2, 1, ((B, 10),)))
    core.handle(Given("k", 1, 1, ((B, 10),)))
    assert core.handle(JobEnded("j")) == []
    assert [*core.attempts] == [("k", 1, 1)] and [*core.blobs] == [("k", B)] == [
        (job, digest) for job, found in core.fetches.items() for digest in found.asked
    ]
    assert not core.untold


# ---- both cores, as the agent has them


class Both:
    """Attempts and slots, each told what the other decides; the workers are not there."""

    def __init__(self, number: int) -> None:
        self.attempts, self.slots = Attempts(), Slots(number)
        self.now = 0.0
        self.told: list[Effect | slots.Effect] = []

    def handle(self, event: Event | slots.Event) -> None:
        waiting: list[Event | slots.Event] = [event]
        while waiting:
            one = waiting.pop(0)
            effects: Any
            if isinstance(one, attempts.Event):
                effects = self.attempts.handle(one, self.now)
            else:
                effects = self.slots.handle(one, self.now)
            for effect in effects:
                match effect:
                    case slots.LeaseEnded(job):
                        waiting.append(JobEnded(job))
                    case (
                        slots.RunOn() | slots.Died() | slots.Preempted() | TaskGiven() | TaskTaken()
                    ):
                        waiting.append(effect)
                    case _:
                        self.told.append(effect)
        self.check()

    def check(self) -> None:
        self.attempts.check_invariants()
        self.slots.check_invariants()
        waiting = {
            (given.job, given.task, given.attempt)
            for lease in self.slots.leases.values()
            for given in lease.pending
        }
        running = {
            (worker.job, worker.task, worker.attempt)
            for worker in self.slots.workers.values()
            if worker.state is slots.WorkerState.BUSY
        }
        of = {
            state: {key for key, one in self.attempts.attempts.items() if one.state is state}
            for state in State
        }
        assert of[State.PENDING] == waiting and of[State.RUNNING] == running
        self.check_work(len(running))

    def check_work(self, running: int) -> None:
        """No task waits beside an idle worker, unless one has to be alone; some worker comes."""
        leases, workers = self.slots.leases.values(), self.slots.workers.values()
        alone = any(lease.pending and lease.pending[0].alone for lease in leases)
        alone = alone or any(w.alone and w.state is slots.WorkerState.BUSY for w in workers)
        for lease in leases:
            idle = any(w.job == lease.job and w.state is slots.WorkerState.IDLE for w in workers)
            held_back = running and (alone or self.slots.short)
            full = len(workers) - sum(w.state is slots.WorkerState.IDLE for w in workers)
            assert not (lease.pending and idle) or held_back or full >= self.slots.slots
        assert workers or not any(lease.pending for lease in leases), "no worker comes"


JOBS = st.sampled_from(["j", "k"])
SMALL = st.integers(1, 4)
WORKERS = st.integers(1, 12)
BLOBS = st.lists(st.sampled_from([(A, 10), (B, 20), (C, 30)]), max_size=3).map(tuple)
RANDOM: st.SearchStrategy[Any] = st.one_of(
    st.builds(slots.LeaseAsked, JOBS, st.sampled_from([*Priority])),
    st.builds(slots.Heard, JOBS, st.integers(0, 4) | st.none()),
    st.builds(slots.MemoryUsed, st.sampled_from([50, 85, 95]), st.just(100)),
    st.builds(slots.Released, JOBS),
    st.builds(slots.WorkerReady, WORKERS),
    st.builds(slots.WorkerGone, WORKERS, st.just("signal 9"), st.booleans()),
    st.builds(slots.WorkerRefused, WORKERS, st.just("no process")),
    st.just(slots.Tick()),
    *[st.builds(Given, JOBS, SMALL, SMALL, BLOBS, st.booleans(), st.sampled_from([0, 35]))] * 3,
    *[st.builds(BlobCame, JOBS, st.sampled_from([A, B, C]))] * 2,
    st.builds(BlobRefused, JOBS, st.sampled_from([A, B, C]), st.just("full")),
    st.builds(Granted, JOBS, SMALL, SMALL),
    st.builds(Sent, JOBS, SMALL, SMALL),
    st.builds(AbortAsked, JOBS, SMALL, SMALL),
    st.builds(Tick, st.sampled_from([frozenset[str](), frozenset("j")])),
    # what the worker of this number says of the attempt that it has
    *[st.tuples(WORKERS, st.sampled_from(["in file", "small", "no room"]))] * 3,
)


@settings(max_examples=300)
@given(st.integers(1, 3), st.lists(st.tuples(RANDOM, st.sampled_from([0.0, 0.3, 16.0]))))
def test_random_events_leave_both_in_agreement(
    number: int, events: list[tuple[Any, float]]
) -> None:
    both = Both(number)
    for event, seconds in events:
        both.now += seconds
        match event:
            case Given(job) if job not in both.slots.leases:
                continue  # the agent takes tasks of leases alone
            case Sent(job, task, attempt):
                found = both.attempts.attempts.get((job, task, attempt))
                if found is None or found.state is not State.UPLOADING:
                    continue  # said by the agent itself
            case (int(worker), how):
                has = both.slots.workers.get(worker)
                if has is None or has.state is not slots.WorkerState.BUSY:
                    continue
                key = has.job, has.task, has.attempt
                both.handle(
                    Failed(*key, how, no_room=True) if how == "no room"
                    else Done(*key, how == "in file")
                )  # fmt: skip
                event = slots.WorkerFree(worker)
        try:
            both.handle(event)
        except TransitionError:
            both.check()
    for job in "jk":
        both.handle(slots.Released(job))
    assert not both.attempts.attempts and not both.attempts.blobs and not both.attempts.fetches
