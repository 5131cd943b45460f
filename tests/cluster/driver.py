"""Run on the master: one function of tests/local/tasks through the engine's Starmap, no database.

    driver.py FUNCTION ARGUMENTS    (JSON: one list per task)

Prints one JSON object: the sums of the results, and how many attempts were lost; or the error.
"""

from __future__ import annotations

import json
import logging
import sys

import tasks
from openquake.baselib import parallel
from openquake.baselib.general import AccumDict

from oq_runtime import protocol
from oq_runtime.adapter import Session


def retries() -> int:
    session = Session.current()
    session.send(protocol.StatusQuery())
    while True:
        for message in session.receive():
            if isinstance(message, protocol.Status):
                return sum(phase.retries for phase in message.phases)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    function, arguments = getattr(tasks, sys.argv[1]), json.loads(sys.argv[2])
    try:
        value = parallel.Starmap(function, arguments).reduce(acc=AccumDict())
        sums = {
            name: getattr(found, "sum", lambda found=found: found)()
            for name, found in value.items()
        }
        print(json.dumps({"value": sums, "retries": retries()}))
    except Exception as exc:
        print(json.dumps({"error": type(exc).__name__, "text": str(exc)}))


if __name__ == "__main__":
    main()
