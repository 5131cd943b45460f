"""The engine's own records on finished tasks, written for many tasks at once."""

from __future__ import annotations

import ast
import time
from typing import Any

import numpy

#: seconds between two writings of the engine's records on finished tasks
RECORDS_SECS = 1.0


class Records:
    """The engine's rows on finished tasks, written for many tasks at once.

    The engine writes them after each task, which takes about 4 ms whatever their number.

    :param h5: the file where they go
    """

    def __init__(self, parallel: Any, h5: Any) -> None:
        self.parallel = parallel
        self.h5 = h5
        self.tasks: list[tuple[Any, ...]] = []
        self.performance: list[Any] = []
        self.next_s = time.monotonic() + RECORDS_SECS

    def add(self, result: Any, name: str, sent: Any) -> None:
        """Take the last result of a task; ``sent``: bytes sent so far per function and argument."""
        mon = result.mon
        self.tasks.append((name, mon.task_no, mon.weight, mon.duration, len(result.pik), 0.0))
        self.performance.append(mon.get_data())
        if time.monotonic() > self.next_s:
            self.write(sent)

    def write(self, sent: Any) -> None:
        """Write what there is; nothing when the file is open for reading only, or closed."""
        self.next_s = time.monotonic() + RECORDS_SECS
        if not self.tasks or not self.h5 or getattr(self.h5, "mode", "r") == "r":
            return
        from openquake.baselib import hdf5, performance

        rows = numpy.array(self.tasks, performance.task_info_dt)
        rows["mem_gb"][-1] = self.parallel.memory_gb()
        hdf5.extend(self.h5["task_info"], rows)
        hdf5.extend(self.h5["performance_data"], numpy.concatenate(self.performance))
        text = self.h5["task_sent"][()]
        total = ast.literal_eval(text.decode() if isinstance(text, bytes) else text)
        total.update(sent)
        del self.h5["task_sent"]
        self.h5["task_sent"] = str(total)
        for name in ("task_info", "performance_data"):
            self.h5[name].flush()  # for readers, as the engine does it
        self.tasks, self.performance = [], []
