"""The journal: each event once, repeated ones counted."""

from __future__ import annotations

from oq_runtime.journal import PAUSE_SECS, Journal


class Hand:
    """A clock that is set by hand, and the lines that were written."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.journal = Journal(self.lines.append, lambda: self.now)

    def pass_s(self, seconds: float) -> list[str]:
        """Let time pass and return the new lines."""
        self.now += seconds
        self.lines.clear()
        self.journal.flush()
        return self.lines


def test_each_event_is_a_line() -> None:
    hand = Hand()
    hand.journal.say("a")
    hand.journal.say("a")
    assert hand.lines == ["a", "a"]


def test_what_repeats_is_written_once_and_then_counted() -> None:
    hand = Hand()
    for number in range(1000):
        hand.journal.repeat("refused", f"refused a connection {number}")
    assert hand.lines == ["refused a connection 0"]
    assert hand.pass_s(PAUSE_SECS - 1) == []
    assert hand.pass_s(1) == ["refused a connection 999 (999 more in 60 s)"]
    hand.journal.repeat("refused", "refused a connection 1000")
    assert hand.pass_s(PAUSE_SECS) == ["refused a connection 1000 (1 more in 60 s)"]


def test_topics_are_counted_apart_and_forgotten() -> None:
    hand = Hand()
    hand.journal.repeat("one", "a")
    hand.journal.repeat("two", "b")
    assert hand.lines == ["a", "b"]
    assert hand.pass_s(PAUSE_SECS) == [] and hand.journal.topics == {}
    hand.journal.repeat("one", "a")
    assert hand.lines == ["a"], "after a quiet minute it is news again"
