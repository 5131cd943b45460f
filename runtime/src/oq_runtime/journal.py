"""What a daemon says on stderr: one line per event worth reading; what repeats is counted.

The service manager adds time and name.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

#: seconds in which lines about the same thing are written once
PAUSE_SECS = 60.0


@dataclass(slots=True)
class Topic:
    """What may repeat: when it was written last, and what has come since then."""

    written_s: float
    text: str
    more: int = 0


class Journal:
    """
    :param write: takes one line
    :param clock: seconds, monotonic
    """

    def __init__(
        self,
        write: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.write = write
        self.clock = clock
        self.topics: dict[str, Topic] = {}

    def say(self, text: str) -> None:
        """Write a line."""
        self.write(text)

    def repeat(self, topic: str, text: str) -> None:
        """Write a line unless there was one on the topic in the last minute; then count it.

        :param topic: what counts as the same thing; each is kept for a minute
        """
        known = self.topics.get(topic)
        if known is None:
            self.topics[topic] = Topic(self.clock(), text)
            self.write(text)
        else:
            known.text = text
            known.more += 1

    def flush(self) -> None:
        """Write what was counted of topics whose minute is over; call it now and then."""
        now = self.clock()
        for topic, known in list(self.topics.items()):
            if now - known.written_s < PAUSE_SECS:
                continue
            if known.more:
                self.write(f"{known.text} ({known.more} more in {now - known.written_s:.0f} s)")
                known.written_s, known.more = now, 0
            else:
                del self.topics[topic]
