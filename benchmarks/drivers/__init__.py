"""One driver per system: a process that has the system at hand and runs rows on demand.

A command is a line of JSON on stdin, ``{"row": NAME, ...parameters}``; the answer is one on stdout,
``{"seconds": S, ...}`` from the first submission to the last result, or ``{"error": TEXT}``. The
results are checked before a time is given. The end of stdin ends the driver.

A driver supplies one function, ``run(func, calls)``: an iterator over the results of
``func(*call)`` for each call, submitted all at once, in any order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks import work

Run = Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterable[Any]]

#: seconds of a task that only waits for the other workers to be up
WARM_UP_S = 0.2


class WrongResult(Exception):
    """The results are not those of the work that was asked for."""


def check(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise WrongResult(f"{name}: {found} instead of {expected}")


class Rows:
    """
    :param run: see the module
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def timed(
        self, func: Callable[..., Any], calls: list[tuple[Any, ...]]
    ) -> tuple[float, list[Any]]:
        """Seconds and results; of an array only its first element, its sum and its length."""
        start = time.perf_counter()
        results = [
            (float(r[0]), r.size, float(r[-1])) if hasattr(r, "size") and r.ndim else r
            for r in self.run(func, calls)
        ]
        return time.perf_counter() - start, results

    def warm_up(self, slots: int) -> dict[str, Any]:
        """Run tasks until every worker has run one."""
        pids: set[int] = set()
        start = time.perf_counter()
        while len(pids) < slots:
            pids.update(self.run(work.whoami, [(n, WARM_UP_S) for n in range(2 * slots)]))
        return {"seconds": time.perf_counter() - start, "pids": sorted(pids)}

    def nothing(self, tasks: int) -> dict[str, Any]:
        seconds, results = self.timed(work.nothing, [(n,) for n in range(tasks)])
        check("results", sorted(results), list(range(tasks)))
        return {"seconds": seconds}

    def result(self, tasks: int) -> dict[str, Any]:
        seconds, results = self.timed(work.array, [(n,) for n in range(tasks)])
        check("arrays", sorted(results), [(n, work.RESULT_FLOATS, n) for n in range(tasks)])
        return {"seconds": seconds}

    def huge(self, floats: int) -> dict[str, Any]:
        """One result of so many floats, beside a small one."""
        start = time.perf_counter()
        found = {}
        for result in self.run(work.ramp, [(0, 1), (1, floats)]):
            found[float(result[0])] = (result.size, float(result[:: work.PAGE_FLOATS].sum()))
        seconds = time.perf_counter() - start
        pages = -(-floats // work.PAGE_FLOATS)
        expected = pages + work.PAGE_FLOATS * pages * (pages - 1) / 2
        check("arrays", found, {0.0: (1, 0.0), 1.0: (floats, expected)})
        return {"seconds": seconds}

    def argument(self, tasks: int) -> dict[str, Any]:
        common = work.argument()
        expected = [work.total(common, n) for n in range(tasks)]
        seconds, results = self.timed(work.total, [(common, n) for n in range(tasks)])
        check("sums", sorted(results), expected)
        return {"seconds": seconds}

    def sleep(self, lengths: list[float]) -> dict[str, Any]:
        seconds, results = self.timed(work.sleep, list(enumerate(lengths)))
        check("results", sorted(results), list(range(len(lengths))))
        return {"seconds": seconds}

    def flood(self, tasks: int, pause_s: float) -> dict[str, Any]:
        """Results for which the consumer is too slow at first: it pauses after the first one."""
        start = time.perf_counter()
        numbers: list[int] = []
        for result in self.run(work.array, [(n,) for n in range(tasks)]):
            if not numbers:
                time.sleep(pause_s)
            numbers.append(int(result[0]))
        check("arrays", sorted(numbers), list(range(tasks)))
        return {"seconds": time.perf_counter() - start}

    def kill(self, tasks: int, length_s: float, victim: int, flag: str) -> dict[str, Any]:
        calls = [(n, length_s, victim, flag) for n in range(tasks)]
        seconds, results = self.timed(work.die_once, calls)
        check("results", sorted(results), list(range(tasks)))
        return {"seconds": seconds}


def serve(rows: Rows) -> Iterator[None]:
    """Answer commands; yields after each, so that the driver may tidy up."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a system prints goes to the log
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(rows, command.pop("row"))(**command)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers)
        yield
