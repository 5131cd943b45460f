"""Run on the master: one function of tests/local/tasks through the engine's Starmap, no database.

    driver.py FUNCTION ARGUMENTS    (JSON: one list per task)

The word "shared" stands for one array of ones, the same object for all tasks, "own" for another
array for each of them.
PRIORITY, in the environment, is that of the job; KEPT a file for what became of its attempts, as a
datastore has it. Prints one JSON object: the sums of the results,
when the tasks were handed over, and how many attempts were lost or interrupted; or the error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time

import h5py
import numpy
import tasks  # type: ignore[import-not-found]  # on the path of the cluster
from openquake.baselib import config, parallel
from openquake.baselib.general import AccumDict

from oq_runtime.config import SESSION_VARIABLE, Config
from oq_runtime.engine import kept
from oq_runtime.priority import Priority
from oq_runtime.session import launch
from oq_runtime.session.client import Session

#: float64 values of the shared array: 8 MB
SHARED = 1_000_000


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    function, shared = getattr(tasks, sys.argv[1]), numpy.ones(SHARED)
    arguments = json.loads(sys.argv[2])
    for number, row in enumerate(arguments):
        arrays = {"shared": shared, "own": numpy.full(SHARED, float(number))}
        row[:] = [arrays.get(value, value) if isinstance(value, str) else value for value in row]
    try:
        priority = Priority(os.environ.get("PRIORITY", "normal"))
        directory = launch.start(Config.from_sections(config), os.getpid(), priority)
        os.environ[SESSION_VARIABLE] = str(directory)
        session = Session.current()
        path = os.environ.get("KEPT")
        if path:
            session.call_it("calculation 1")
        began, began_s = time.time(), time.monotonic()
        value = parallel.Starmap(function, arguments).reduce(acc=AccumDict())
        sums = {
            name: getattr(found, "sum", lambda found=found: found)()
            for name, found in value.items()
        }
        if path:
            facts = dict(format=1, state="complete", seconds=time.monotonic() - began_s, replayed=0)
            with h5py.File(path, "w") as file:
                kept.write(file, session.attempts("calculation 1"), began_s, facts)
        phases = session.state().phases
        counts = {
            name: sum(getattr(phase, name) for phase in phases) for name in ("retries", "preempted")
        }
        print(json.dumps({"value": sums, "began": began, **counts}))
    except Exception as exc:
        print(json.dumps({"error": type(exc).__name__, "text": str(exc)}))


if __name__ == "__main__":
    main()
