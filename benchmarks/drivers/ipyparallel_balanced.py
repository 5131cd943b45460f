"""ipyparallel: two engines behind a load-balanced view."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import ipyparallel

from benchmarks.drivers import Rows, serve


def main() -> None:
    with ipyparallel.Cluster(n=int(sys.argv[1]), controller_ip="127.0.0.1") as client:
        view = client.load_balanced_view()

        def run(func: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
            columns = zip(*calls, strict=True)
            yield from view.map_async(func, *columns, chunksize=1, ordered=False)

        for _ in serve(Rows(run)):
            pass


if __name__ == "__main__":
    main()
