"""The log of a daemon: each event once, repeated ones counted, nothing but printable characters."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from oq_runtime.logs import MOST_TOPICS, PAUSE_SECS, Formatter, Handler, about


class Hand:
    """A clock that is set by hand, and the lines that were written."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.handler = Handler(self.stream, lambda: self.now)
        self.log = logging.Logger("test")
        self.log.addHandler(self.handler)

    def lines(self) -> list[str]:
        """Return what has been written since the last time."""
        found = self.stream.getvalue().splitlines()
        self.stream.seek(0)
        self.stream.truncate()
        return found

    def pass_s(self, seconds: float) -> list[str]:
        """Let time pass and return the new lines."""
        self.now += seconds
        self.handler.recount()
        return self.lines()


def test_each_event_is_a_line() -> None:
    hand = Hand()
    hand.log.info("a")
    hand.log.info("a")
    assert hand.lines() == ["a", "a"]


def test_what_repeats_is_written_once_and_then_counted() -> None:
    hand = Hand()
    for number in range(1000):
        hand.log.warning("refused a connection %d", number, extra=about("refused"))
    assert hand.lines() == ["refused a connection 0"]
    assert hand.pass_s(PAUSE_SECS - 1) == []
    assert hand.pass_s(1) == ["refused a connection 999 (999 more in 60 s)"]
    hand.log.warning("refused a connection %d", 1000, extra=about("refused"))
    assert hand.pass_s(PAUSE_SECS) == ["refused a connection 1000 (1 more in 60 s)"]


def test_topics_are_counted_apart_and_forgotten() -> None:
    hand = Hand()
    hand.log.info("a", extra=about("one"))
    hand.log.info("b", extra=about("two"))
    assert hand.lines() == ["a", "b"]
    assert hand.pass_s(PAUSE_SECS) == [] and hand.handler.topics == {}
    hand.log.info("a", extra=about("one"))
    assert hand.lines() == ["a"], "after a quiet minute it is news again"


def test_strangers_do_not_fill_the_memory_with_topics() -> None:
    hand = Hand()
    for number in range(3 * MOST_TOPICS):
        hand.log.info("x", extra=about(f"{number}"))
    assert len(hand.handler.topics) == MOST_TOPICS


@pytest.mark.parametrize("journal", [False, True])
def test_a_record_cannot_forge_a_line(journal: bool) -> None:
    record = logging.makeLogRecord(
        {"msg": "lease of %s", "args": ("bob\x1b[2K\r\u202eup",), "levelno": logging.WARNING}
    )
    text = Formatter(journal=journal).format(record)
    assert text.isprintable()
    assert text.startswith("<4>") is journal


def test_a_traceback_keeps_its_lines() -> None:
    script = (
        "import logging; from oq_runtime import logs; logs.start()\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.getLogger('oq_runtime.x').exception('bad')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert lines[0].endswith("ERROR bad") and lines[-1].startswith("ZeroDivisionError"), lines
