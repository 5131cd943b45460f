"""How long the tasks of a phase still take, from the counters of the phase alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Pace:
    """When a phase ends, about.

    :param began_s: when its first task was submitted (s, of a clock that does not jump)

    ``took_s``: seconds from then to its last task that has ended, or to now while there are others.
    """

    began_s: float
    total: int = 0
    done: int = 0
    took_s: float = 0.0
    ends_s: float | None = None

    def advance(self, total: int, done: int, running: int, now: float) -> None:
        """Take the counters of the phase.

        Its end is reckoned anew when tasks have ended, where one that runs counts as half done, and
        is not put off, unless there are more tasks than before or it has passed.
        """
        if done < total or done != self.done:
            self.took_s = now - self.began_s
        if total != self.total:
            self.ends_s = None
        if done and (done, total) != (self.done, self.total):
            worth = done + running / 2
            ends_s = now + self.took_s * max(0.0, total - worth) / worth
            if self.ends_s is not None and self.ends_s > now:
                ends_s = min(ends_s, self.ends_s)
            self.ends_s = ends_s
        self.done, self.total = done, total

    def left_s(self, now: float) -> float | None:
        """Return the seconds to its end, 0 where it is overdue, and None where it is not known."""
        if self.ends_s is None or self.done == self.total:
            return None
        return max(0.0, self.ends_s - now)
