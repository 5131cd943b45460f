"""The log of a daemon, on stderr: ``logging``, a line per event, and what repeats is counted.

A record with a topic (``extra=about("handshake")``) is written once a minute per topic; then one
line says how many more there were. The service manager adds time and name to what it reads; in a
file they stand in front.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TextIO, get_args

from oq_runtime.text import clean, clean_lines

#: seconds in which lines about the same thing are written once
PAUSE_SECS = 60.0
#: topics that are told apart in a minute; strangers must not fill the memory with new ones
MOST_TOPICS = 1000
#: from which on records are written
Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)
#: characters of a line
MOST_CHARACTERS = 4000
#: priorities of sd-daemon(3), for the journal
PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


def about(topic: str) -> dict[str, str]:
    """Return the ``extra`` of a record that may repeat.

    :param topic: what counts as the same thing
    """
    return {"topic": topic}


@dataclass(slots=True)
class Topic:
    """What may repeat: when it was written last, the newest record, and how many since then."""

    written_s: float
    record: logging.LogRecord
    more: int = 0


class Formatter(logging.Formatter):
    """A line that holds nothing but what can be printed.

    :param journal: whether the journal reads it, which wants a priority instead of the time
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(message)s")
        self.journal = journal

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = clean(record.message, MOST_CHARACTERS)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        lines = clean_lines(super().format(record), MOST_CHARACTERS)
        if not self.journal:
            return lines
        priority = PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in lines.split("\n"))


class Handler(logging.StreamHandler[TextIO]):
    """Writes records to a stream, of each topic one in PAUSE_SECS.

    :param stream: of text
    :param clock: seconds, monotonic
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self.clock = clock
        self.topics: dict[str, Topic] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return False
        topic = getattr(record, "topic", None)
        if topic is None:
            return True
        if known := self.topics.get(topic):
            known.record, known.more = record, known.more + 1
            return False
        if len(self.topics) >= MOST_TOPICS:
            return False
        self.topics[topic] = Topic(self.clock(), record)
        return True

    def recount(self) -> None:
        """Write what was counted of topics whose minute is over."""
        now = self.clock()
        for topic, known in list(self.topics.items()):
            if now - known.written_s < PAUSE_SECS:
                continue
            if known.more:
                text = known.record.getMessage()
                known.record.msg = f"{text} ({known.more} more in {now - known.written_s:.0f} s)"
                known.record.args = ()
                self.emit(known.record)
                known.written_s, known.more = now, 0
            else:
                del self.topics[topic]


def start(level: Level = "info") -> None:
    """Send what this process logs to stderr.

    :param level: one of LEVELS, from which on records are written
    """
    handler = Handler(sys.stderr)
    handler.setFormatter(Formatter(journal="JOURNAL_STREAM" in os.environ))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level.upper())


def recount() -> None:
    """Write what was counted of topics whose minute is over; to be called now and then."""
    for handler in logging.root.handlers:
        if isinstance(handler, Handler):
            handler.recount()
