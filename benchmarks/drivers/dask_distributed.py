"""dask.distributed: two worker processes with one thread each.

``--scatter``: the common argument of row c is scattered to all workers beforehand, inside the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from distributed import Client, LocalCluster, as_completed

from benchmarks.drivers import Rows, serve


def main() -> None:
    slots, scatter = int(sys.argv[1]), "--scatter" in sys.argv
    cluster = LocalCluster(
        n_workers=slots, threads_per_worker=1, processes=True, dashboard_address=None
    )
    client = Client(cluster)

    def run(func: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
        columns = [list(column) for column in zip(*calls, strict=True)]
        if scatter and isinstance(columns[0][0], np.ndarray):
            columns[0] = [client.scatter(columns[0][0], broadcast=True)] * len(calls)
        futures = client.map(func, *columns, pure=False)
        for _, result in as_completed(futures, with_results=True):
            yield result

    for _ in serve(Rows(run)):
        pass
    client.close()
    cluster.close()


if __name__ == "__main__":
    main()
