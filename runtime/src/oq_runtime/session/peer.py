"""An agent as the broker knows it: what has become of the calls to it, and when to call again.

Pure: no socket, clock or chance. All that a call can come to is in TRANSITIONS; a pair that it does
not know raises TransitionError and changes nothing. Not covered: the connections (``peers``).
"""

from __future__ import annotations

import math
from enum import Enum

from oq_runtime.core.limits import Limits
from oq_runtime.errors import TransitionError
from oq_runtime.wire.protocol import NodeState

#: seconds between two calls of an agent that does not answer, at first, and how they grow
CALL_SECS, GROWTH = 0.05, 1.5


class State(Enum):
    """How far a broker is with an agent; the value is for people."""

    RESTING = "between two calls"
    SHUN = "between two calls, after a refusal"
    CALLED = "called"
    ASKED = "asked for a lease"
    LEASED = "has granted a lease"
    GONE = "gone for good"


#: no connection, until the next call; an answer is waited for
RESTS, ANSWERS = (State.RESTING, State.SHUN), (State.CALLED, State.ASKED)


class Event(Enum):
    """What may become of a call or a lease; the value is for people."""

    DUE = "the time is up"
    WELCOMED = "it has said who it is"
    LEASED = "it has granted a lease, and its way for results is open"
    LOST = "the connection, or what was to come over it, is lost"
    REFUSED = "it does not take this job, or must not"
    ENDED = "its process has ended, and there will be no other"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.RESTING: {
        Event.DUE: State.CALLED,
        Event.REFUSED: State.SHUN,
        Event.ENDED: State.GONE,
    },
    State.SHUN: {
        Event.DUE: State.CALLED,
        Event.REFUSED: State.SHUN,
        Event.ENDED: State.GONE,
    },
    State.CALLED: {
        Event.WELCOMED: State.ASKED,
        Event.DUE: State.RESTING,
        Event.LOST: State.RESTING,
        Event.REFUSED: State.SHUN,
        Event.ENDED: State.GONE,
    },
    State.ASKED: {
        Event.LEASED: State.LEASED,
        Event.DUE: State.SHUN,
        Event.LOST: State.RESTING,
        Event.REFUSED: State.SHUN,
        Event.ENDED: State.GONE,
    },
    State.LEASED: {
        Event.LOST: State.RESTING,
        Event.REFUSED: State.SHUN,
        Event.ENDED: State.GONE,
    },
    State.GONE: {},
}
#: what others are told, in states that do not leave it as it was
TOLD = {
    State.RESTING: NodeState.CALLING,
    State.SHUN: NodeState.REFUSED,
    State.LEASED: NodeState.LEASED,
    State.GONE: NodeState.REFUSED,
}


class Peer:
    """The calls to one agent.

    :param limits: of silence: ``beat_s`` is the longest rest after calls that were not answered,
        ``suspect_s`` that after refusals, and how long an answer may take
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.state = State.RESTING
        self.told = NodeState.CALLING
        self.reason = "no answer yet"
        self.due_s = now  # of the next DUE
        self.rest_s = 0.0  # the last one

    @property
    def open(self) -> bool:
        """Whether there is a connection, or one is being made."""
        return self.state in (*ANSWERS, State.LEASED)

    def take(self, event: Event, now: float, reason: str = "") -> None:
        """Change the state at time ``now`` (s, monotonic).

        :param reason: in words, for people: why there is no lease
        :raises TransitionError: for an event that the state does not allow
        """
        if (state := TRANSITIONS[self.state].get(event)) is None:
            raise TransitionError(f"{event.name} of an agent that is {self.state.value}")
        self.state = state
        self.told = TOLD.get(state, self.told)
        if reason or state is State.LEASED:
            self.reason = reason
        match state:
            case State.RESTING:
                self._rest(CALL_SECS, self.limits.beat_s, now)
            case State.SHUN:
                self._rest(self.limits.beat_s, self.limits.suspect_s, now)
            case State.CALLED | State.ASKED:
                self.due_s = now + self.limits.suspect_s
            case State.LEASED | State.GONE:
                self.rest_s, self.due_s = 0.0, math.inf

    def leave_out(self, now: float, seconds: float, reason: str) -> None:
        """Rest for so many seconds; the connection has ended."""
        self.take(Event.REFUSED, now, reason)
        self.due_s = now + seconds

    def _rest(self, first_s: float, most_s: float, now: float) -> None:
        self.rest_s = min(max(first_s, self.rest_s * GROWTH), most_s)
        self.due_s = now + self.rest_s
