"""How long the tasks of a phase still take, from the counters of the phase alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Pace:
    """When a phase ends, about.

    :param at_s: when its counters were looked at last (s, of a clock that does not jump)

    ``took_s``: how long it had tasks that ran (s).
    """

    at_s: float
    total: int = 0
    done: int = 0
    running: int = 0
    took_s: float = 0.0
    ends_s: float | None = None

    def advance(self, total: int, done: int, running: int, now: float) -> None:
        """Take the counters of the phase.

        Its end is reckoned anew when tasks have ended, where one that runs counts as half done, and
        is not put off, unless there are more tasks than before or it has passed.
        """
        if self.running or done != self.done:
            self.took_s += now - self.at_s
        if total != self.total:
            self.ends_s = None
        if done and (done, total) != (self.done, self.total):
            worth = done + min(running, total - done) / 2  # some may run twice
            ends_s = now + self.took_s * (total - worth) / worth
            if self.ends_s is not None and self.ends_s > now:
                ends_s = min(ends_s, self.ends_s)
            self.ends_s = ends_s
        self.at_s, self.total, self.done, self.running = now, total, done, running

    def left_s(self, now: float) -> float | None:
        """Return the seconds to its end, 0 where it is overdue, and None where it is not known."""
        if self.ends_s is None or self.done == self.total:
            return None
        return max(0.0, self.ends_s - now)
