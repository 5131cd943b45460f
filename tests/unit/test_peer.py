"""The calls to one agent: what a call can come to, and when the next one is made."""

from __future__ import annotations

import itertools
import math

import pytest

from oq_runtime.core.limits import DEFAULTS
from oq_runtime.errors import TransitionError
from oq_runtime.session.peer import CALL_SECS, GROWTH, TRANSITIONS, Event, Peer, State
from oq_runtime.wire.protocol import NodeState

#: from RESTING into each state
WAYS: dict[State, list[Event]] = {
    State.RESTING: [],
    State.CALLED: [Event.DUE],
    State.ASKED: [Event.DUE, Event.WELCOMED],
    State.LEASED: [Event.DUE, Event.WELCOMED, Event.LEASED],
    State.SHUN: [Event.DUE, Event.REFUSED],
    State.GONE: [Event.ENDED],
}


def peer(*events: Event, now: float = 0.0) -> Peer:
    found = Peer(DEFAULTS, now)
    for event in events:
        found.take(event, now, "a reason")
    return found


@pytest.mark.parametrize("state", State)
def test_every_state_is_reached_and_knows_its_events_only(state: State) -> None:
    for event in Event:
        found = peer(*WAYS[state])
        assert found.state is state
        before = vars(found).copy()
        if event in TRANSITIONS[state]:
            found.take(event, 1.0)
            assert found.state is TRANSITIONS[state][event]
        else:
            with pytest.raises(TransitionError, match=event.name):
                found.take(event, 1.0)
            assert vars(found) == before


def test_there_is_a_connection_from_the_call_to_the_loss() -> None:
    open_ = {state for state in State if peer(*WAYS[state]).open}
    assert open_ == {State.CALLED, State.ASKED, State.LEASED}


def rests(*round_: Event, times: int) -> list[float]:
    """The seconds between two calls of which each comes to the same."""
    found, rested = peer(), []
    now = 0.0
    for _ in range(times):
        for event in round_:
            now = max(now, found.due_s) if event is Event.DUE else now
            found.take(event, now)
        rested.append(found.due_s - now)
    return rested


def test_calls_without_an_answer_grow_rarer_up_to_a_beat() -> None:
    rested = rests(Event.DUE, Event.LOST, times=50)
    assert rested[0] == pytest.approx(CALL_SECS)
    assert rested == sorted(rested) and rested[-1] == DEFAULTS.beat_s
    assert all(b <= a * GROWTH * 1.001 for a, b in itertools.pairwise(rested))


def test_refused_calls_grow_rarer_than_a_beat() -> None:
    rested = rests(Event.DUE, Event.REFUSED, times=20)
    assert rested[0] == DEFAULTS.beat_s and rested == sorted(rested)
    assert rested[-1] == DEFAULTS.suspect_s


def test_a_day_of_refusals_is_few_calls() -> None:
    assert sum(rests(Event.DUE, Event.REFUSED, times=8000)) > 75_000


def test_after_a_lease_the_next_call_comes_at_once() -> None:
    found = peer(*[Event.DUE, Event.LOST] * 30)
    assert found.due_s > CALL_SECS * 10
    for event in WAYS[State.LEASED]:
        found.take(event, 100.0)
    assert found.due_s == math.inf, "as long as there is a lease nobody calls"
    found.take(Event.LOST, 200.0)
    assert found.due_s == pytest.approx(200.0 + CALL_SECS)


def test_one_that_is_left_out_is_called_again_in_its_time() -> None:
    found = peer(*WAYS[State.LEASED], Event.LOST)
    found.leave_out(100.0, 60.0, "it brings nothing")
    assert (found.told, found.reason) == (NodeState.REFUSED, "it brings nothing")
    assert found.due_s == 160.0
    found.take(Event.DUE, 160.0)
    assert found.state is State.CALLED


@pytest.mark.parametrize("state", [State.CALLED, State.ASKED])
def test_an_answer_may_take_a_limited_time(state: State) -> None:
    found = peer(*WAYS[state], now=5.0)
    assert found.due_s == 5.0 + DEFAULTS.suspect_s
    found.take(Event.DUE, found.due_s, "too late")
    assert not found.open and found.reason == "too late"


def test_what_others_are_told() -> None:
    found = peer()
    assert (found.told, found.reason) == (NodeState.CALLING, "no answer yet")
    for event in (Event.DUE, Event.REFUSED):
        found.take(event, 0.0, "another version")
    assert (found.told, found.reason) == (NodeState.REFUSED, "another version")
    found.take(Event.DUE, 9.0)
    assert (found.told, found.reason) == (NodeState.REFUSED, "another version"), "until it answers"
    for event in (Event.WELCOMED, Event.LEASED):
        found.take(event, 9.0)
    assert (found.told, found.reason) == (NodeState.LEASED, "")
    found.take(Event.LOST, 9.0, "its connection was closed")
    assert (found.told, found.reason) == (NodeState.CALLING, "its connection was closed")
    found.take(Event.ENDED, 9.0, "its agent process ended")
    assert (found.told, found.due_s) == (NodeState.REFUSED, math.inf)
