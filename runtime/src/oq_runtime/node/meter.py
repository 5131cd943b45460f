"""What a task takes of its node, as the kernel counts it for the worker; about 20 µs a task.

Sources: getrusage(2), proc(5) on ``clear_refs``, and Documentation/scheduler/sched-stats.rst of
Linux on ``schedstat``.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time

from oq_runtime.cgroups import PROC
from oq_runtime.wire.protocol import MOST_FAULTS, Usage

#: what is written to ``clear_refs`` for the peak of memory to begin anew
PEAK = b"5"


class Meter:
    """Of this process; where the kernel does not count something, that is 0."""

    def __init__(self) -> None:
        self._waits = self._open("schedstat", os.O_RDONLY)
        self._peak = self._open("clear_refs", os.O_WRONLY)
        self.start()

    @staticmethod
    def _open(name: str, flags: int) -> int:
        with contextlib.suppress(OSError):
            return os.open(PROC / "self" / name, flags | os.O_CLOEXEC)
        return -1

    def start(self) -> None:
        """Begin with a task."""
        if self._peak >= 0:
            with contextlib.suppress(OSError):
                os.write(self._peak, PEAK)
        self._before = self._read()

    def read(self, slot: int) -> Usage:
        """Return what the task has taken until now.

        :param slot: of the node
        """
        used, now, queued_s = self._read()
        before, then, queued_before_s = self._before
        cpu_s = used.ru_utime - before.ru_utime + used.ru_stime - before.ru_stime
        faults = min(used.ru_majflt - before.ru_majflt, MOST_FAULTS)
        queued_s -= queued_before_s
        return Usage(slot, now - then, cpu_s, queued_s, faults, used.ru_maxrss * 1024)

    def _read(self) -> tuple[resource.struct_rusage, float, float]:
        """Return what was used, the time, and the time of waiting for a CPU (s)."""
        queued_s = 0.0
        if self._waits >= 0:
            with contextlib.suppress(OSError, ValueError, IndexError):
                queued_s = int(os.pread(self._waits, 64, 0).split()[1]) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF), time.monotonic(), queued_s
