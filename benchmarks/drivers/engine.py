"""The engine's Starmap, over whatever the configuration says: our runtime, zmq or processpool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from openquake.baselib import parallel

from benchmarks.drivers import Rows, serve


def run(func: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
    # of a generator the engine submits all at once, of a list only so many as there are workers
    return iter(parallel.Starmap(func, (call for call in calls)))


def main() -> None:
    for _ in serve(Rows(run)):
        pass
    parallel.Starmap.shutdown()


if __name__ == "__main__":  # the processpool spawns, and imports this module again
    main()
