"""Run a list of jobs in one engine process and keep their datastores.

The process imports the engine once and runs one job after the other, which makes the whole
corpus bearable; the driver (``__main__``) starts a fresh process when one dies or hangs. In mode
``processpool`` the engine's own pool is kept between the jobs; in mode ``zmq`` everything goes
through the runtime. With ``--journals`` each job leaves a journal there, and with ``--replay`` it
goes on from it. Not covered here: choosing jobs (``corpus``) and comparing (``compare``).

Reads a JSON list of ``[key, path of the job file, key of the parent job or null]`` from stdin and
prints one JSON object per finished job on the file descriptor given by ``--report-fd``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]


#: bytes that a journal may take
BUDGET_BYTES = 4 << 30


def begin(job: Any, directory: Path, replay: bool, told: list[str]) -> Any:
    """Return the history of a job, with the parameters that are looked at.

    :param job: the engine's context
    :param directory: of its journal
    :param told: gets what the user is told
    """
    from openquake.commonlib import readinput

    from oq_runtime.engine import reads, resume
    from oq_runtime.engine.history import History
    from oq_runtime.files.journal import Reader, Writer, claim

    before = Reader(directory) if replay else None
    # of a copy: the engine changes what it is given
    head = {"values": resume.values(readinput.get_oqparam(copy.deepcopy(job.params)))}
    claimed = claim(directory) if replay else None
    writer = Writer(directory, head, budget_bytes=BUDGET_BYTES, claimed=claimed)
    history = History(writer, before, told.append, reads.begin())
    History.begin(history)
    return history


def run_all(
    mode: str,
    out: Path,
    cases: list[tuple[str, str, str | None]],
    report: Report,
    journals: Path | None = None,
    replay: bool = False,
) -> None:
    from openquake.baselib import parallel, performance  # noqa: F401
    from openquake.commonlib import logs
    from openquake.engine import engine

    if mode == "processpool":
        shutdown = parallel.Starmap.shutdown
        parallel.Starmap.shutdown = classmethod(lambda cls: None)
    if not logs.dbcmd("SELECT name FROM sqlite_master WHERE name='job'"):
        logs.dbcmd("upgrade_db")
    ids: dict[str, int] = {}
    for key, path, parent in cases:
        started = time.monotonic()
        target = out / f"{key}.hdf5"
        log_file = out / f"{key}.log"
        row: dict[str, Any] = {"key": key, "state": "complete", "error": ""}
        report({"key": key, "state": "started"})
        parallel.Starmap.expected_outputs = 0
        try:
            [job] = engine.create_jobs(
                [path], "warn", str(log_file), hc_id=ids[parent] if parent else None
            )
            job.params["exports"] = ""
            ids[key] = job.calc_id
            told: list[str] = []
            history = begin(job, journals / key, replay, told) if journals else None
            try:
                engine.run_jobs([job])
            finally:
                if history is not None:
                    history.close()
                    row |= {"replayed": history.replayed, "results": history.results}
                    row |= {"told": told, "stopped": history.writer.stopped}
            datastore = Path(logs.get_datadir()) / f"calc_{job.calc_id}.hdf5"
            shutil.copyfile(datastore, target)
        except Exception as exc:  # any failure of a job is the result to report
            row["state"] = "failed"
            row["error"] = f"{type(exc).__name__}: {str(exc).strip().splitlines()[-1:]}"
        row["seconds"] = round(time.monotonic() - started, 2)
        report(row)
    if mode == "processpool":
        shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=("processpool", "zmq"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--journals", type=Path)
    parser.add_argument("--replay", action="store_true")
    args = parser.parse_args()
    os.environ["OQ_DISTRIBUTE"] = args.mode
    args.out.mkdir(parents=True, exist_ok=True)
    with os.fdopen(args.report_fd, "w") as stream:

        def report(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row) + "\n")
            stream.flush()

        run_all(args.mode, args.out, json.load(sys.stdin), report, args.journals, args.replay)


if __name__ == "__main__":
    main()
