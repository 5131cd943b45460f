"""The engine's Starmap, over whatever the configuration says: our runtime, zmq or processpool.

With ``BENCH_JOURNAL`` what is submitted and consumed is kept in a journal in that directory, as
``oq-run`` does; a journal that ends before the row does is no figure of a row with a journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openquake.baselib import parallel

from benchmarks.drivers import Rows, serve

#: bytes that it may take: more than all rows bring
BUDGET_BYTES = 20 << 30


def run(func: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
    # of a generator the engine submits all at once, of a list only so many as there are workers
    return iter(parallel.Starmap(func, (call for call in calls)))


class Journaled(Rows):
    """Rows with a journal."""

    def __init__(self, directory: Path) -> None:
        from oq_runtime.engine.history import History
        from oq_runtime.files.journal import Writer

        super().__init__(run)
        self.writer = Writer(directory, {}, budget_bytes=BUDGET_BYTES)
        History.begin(History(self.writer, None, print))

    def timed(
        self, func: Callable[..., Any], calls: list[tuple[Any, ...]]
    ) -> tuple[float, list[Any]]:
        found = super().timed(func, calls)
        if self.writer.stopped:
            raise RuntimeError(f"the journal has ended: {self.writer.stopped}")
        return found


def main() -> None:
    directory = os.environ.get("BENCH_JOURNAL")
    for _ in serve(Journaled(Path(directory)) if directory else Rows(run)):
        pass
    parallel.Starmap.shutdown()


if __name__ == "__main__":  # the processpool spawns, and imports this module again
    main()
