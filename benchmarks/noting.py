"""``make bench-noting``: what it costs to note and keep what becomes of each task.

    python -m benchmarks.noting [TASKS]

The code of worker and broker, in a loop over TASKS tasks (20,000), each committed at its first
attempt; medians of seven rounds:

- ``worker``, ``broker``: µs of a task, for the meter, and for the ledger with all events that it
  is shown of a task;
- ``part``: of a task of 10 ms, in per cent;
- ``keep``: s for the group of the datastore at the end, and its ``size`` in bytes a task.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import msgspec

from oq_runtime.core import scheduler as core
from oq_runtime.core.ledger import Ledger, Task
from oq_runtime.engine import kept
from oq_runtime.node.meter import Meter
from oq_runtime.wire import protocol

TASKS, ROUNDS = 20_000, 7
JOB, NODE = "calculation 1", "192.0.2.2"
#: of which the part is told, in seconds
SHORT_TASK_S = 0.01


def measured(tasks: int) -> None:
    """What a worker does for each task."""
    meter = Meter()
    for slot in range(tasks):
        meter.start()
        meter.read(slot)


def events(tasks: int) -> list[list[core.Event | core.Effect]]:
    """Of each task what the ledger is shown, in its order."""
    return [
        [
            core.Submitted(task, 0, 0), core.Assign(NODE, task, 1),
            core.AttemptEnded(NODE, task, 1, 1000), core.GrantUpload(NODE, task, 1),
            core.Uploaded(NODE, task, 1, True), core.Commit(NODE, task, 1), core.Consumed(task),
        ]
        for task in range(tasks)
    ]  # fmt: skip


def noted(shown: list[list[core.Event | core.Effect]]) -> Ledger:
    """What a broker does for each task."""
    ledger = Ledger()
    took = msgspec.structs.asdict(Meter().read(0))
    for task, of in enumerate(shown):
        ledger.submitted(task, Task(JOB, 0, task, 1.0, 1000, time.monotonic()))
        for number, event in enumerate(of):
            if number == 2:
                ledger.measured(task, 1, time.monotonic(), **took)
            ledger.take(event, time.monotonic())
    return ledger


def timed(work: Callable[[], object]) -> float:
    """Median of the seconds that it takes."""
    seconds = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)


def main(tasks: int) -> None:
    shown = events(tasks)
    worker_s = timed(lambda: measured(tasks)) / tasks
    broker_s = timed(lambda: noted(shown)) / tasks
    ledger = noted(shown)
    rows = bytes(ledger.rows[JOB])
    found = [protocol.Attempts(rows, False, ["a"], list(ledger.nodes), list(ledger.reasons), [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calc_1.hdf5")

        def keep() -> None:
            with h5py.File(path, "w") as file:
                kept.write(file, found, 0.0, {"format": kept.FORMAT})

        keep_s = timed(keep)
        size = path.stat().st_size / tasks
    part = (worker_s + broker_s) / SHORT_TASK_S
    print(f"worker={worker_s * 1e6:.1f} broker={broker_s * 1e6:.1f} part={part:.2%} "
          f"keep={keep_s:.3f} size={size:.0f}")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else TASKS)
