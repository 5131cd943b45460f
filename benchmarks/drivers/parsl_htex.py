"""Parsl's HighThroughputExecutor with CURVE: one manager with two worker processes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from typing import Any

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

from benchmarks.drivers import Rows, serve


def main() -> None:
    executor = HighThroughputExecutor(
        label="htex",
        address="127.0.0.1",
        encrypted=True,
        max_workers_per_node=int(sys.argv[1]),
        cores_per_worker=1e-6,
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )
    with tempfile.TemporaryDirectory() as directory:
        config = Config(executors=[executor], run_dir=directory, strategy="none", usage_tracking=0)
        with parsl.load(config) as kernel:

            def run(func: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
                app = parsl.python_app(func, data_flow_kernel=kernel)
                for future in as_completed([app(*call) for call in calls]):
                    yield future.result()

            for _ in serve(Rows(run)):
                pass


if __name__ == "__main__":
    main()
