"""The engine process of ``oq-run``: create the jobs, run them, say what became of them.

Reads a JSON specification on stdin (the options of ``cli``) and writes one JSON object per line to
the descriptor ``--report-fd``: ``created`` (job id), ``finished`` (the summary of a job), ``input``
(one line on what is wrong with the input) or ``failed`` (one line on why a job stopped). Tracebacks
go to the engine's log, which is in the job database.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import logging
import os
import re
import resource
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from oq_runtime import processes
from oq_runtime.engine.hook import activate
from oq_runtime.engine.jobtable import mend, parent_job
from oq_runtime.errors import InputError, UnsupportedEngine

#: seconds that the files of a job have to close
CLOSE_SECS = 20
FULL = os.strerror(errno.ENOSPC)
NOT_THERE = f"{os.strerror(errno.ENOENT)}|{os.strerror(errno.EACCES)}"


def first_line(exc: BaseException) -> str:
    """Return the telling line of an exception: the last one, which follows the engine's frames.

    A full disk comes first: HDF5 raises other errors while it cleans up after one.
    """
    if isinstance(exc, InputError):
        return str(exc)
    link: BaseException | None = exc
    while link is not None:
        if FULL in str(link):
            where = re.search(r"filename = '([^']+)'|: '([^']+)'$", str(link))
            name = f" on the device of {where.group(1) or where.group(2)}" if where else ""
            return f"{FULL}{name}; free space or set OQ_DATADIR to another directory"
        link = link.__cause__ or link.__context__
    lines = [line.strip() for line in str(exc).strip().splitlines() if line.strip()]
    name = type(exc).__name__
    return f"{name}: {lines[-1]}" if lines else name


def unseen(exc: BaseException, shared_dir: str) -> str:
    """Say which file a worker did not find or could not read although it is here, if that is so."""
    found = re.search(rf"({NOT_THERE}): '([^'\n]+)'", str(exc))
    # what this process did not find itself has a number, which the engine leaves out for workers
    if found is None or getattr(exc, "errno", None) or not os.access(found.group(2), os.R_OK):
        return ""
    reason, path = found.groups()
    remedy = f"keep the files of the job in shared_dir ({shared_dir or 'not set in openquake.cfg'})"
    if shared_dir and Path(path).resolve().is_relative_to(Path(shared_dir).resolve()):
        remedy = "let the user of the workers read it"
    return f"{path} is on this machine, but a worker says: {reason}; {remedy}"


class Ignored(logging.Handler):
    """Collects the names of the parameters that the engine does not know and only warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.fullmatch(r"The parameter '(.+)' is unknown, ignoring", record.getMessage()):
            self.names.append(found.group(1))

    def __enter__(self) -> Ignored:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def unknown(names: list[str], known: Iterable[str]) -> str:
    """Say which parameters are unknown, each with the nearest known name where there is one."""
    choices = [name for name in known if not name.startswith(("_", "is_valid_"))]
    told = []
    for name in sorted(names):
        near = difflib.get_close_matches(name, choices, 1)
        told.append(f"{name} (did you mean {near[0]}?)" if near else name)
    plural = "s" if len(told) > 1 else ""
    return f"unknown parameter{plural} {', '.join(told)}; correct or remove"


def summary(logs: Any, job_id: int, seconds: float) -> dict[str, Any]:
    """Read the figures of a finished job from the database and its datastore."""
    import h5py

    path = Path(logs.dbcmd("get_job", job_id).ds_calc_dir + ".hdf5")
    tasks, busy_s = 0, 0.0
    with h5py.File(path, "r") as file:
        if "task_info" in file:
            info = file["task_info"][:]
            tasks, busy_s = len(info), float(info["duration"].sum())
    lines = logs.dbcmd("list_outputs", job_id, True)
    outputs = []
    for line in lines:
        number, _, name = line.partition("|")
        if number.strip().isdigit():
            outputs.append({"id": int(number), "name": name.strip()})
    return {
        "job": job_id,
        "state": logs.dbcmd("get_job", job_id).status,
        "seconds": round(seconds, 2),
        "tasks": tasks,
        "busy_seconds": round(busy_s, 2),
        "datastore": str(path),
        "bytes": path.stat().st_size,
        "outputs": outputs,
    }


def run(spec: dict[str, Any], report: Any) -> int:
    try:
        from openquake.baselib import config
        from openquake.commonlib import logs
        from openquake.commonlib.oqvalidation import OqParam
        from openquake.engine import engine
    except UnsupportedEngine as exc:
        raise InputError(str(exc)) from exc

    datadir = Path(logs.get_datadir())
    database = Path(os.path.expanduser(config.dbserver.file))
    dbhost = os.environ.get("OQ_DATABASE", config.dbserver.host)
    local = dbhost == "127.0.0.1"
    for folder in (datadir, database.parent) if local else (datadir,):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"oq-run" * 1000)
        except OSError as exc:
            raise InputError(
                f"{folder}: {exc.strerror}; free space or set OQ_DATADIR to another directory"
            ) from exc
    try:
        if local and not database.exists():
            logs.dbcmd("upgrade_db")
            # it logs, which gives the root logger a handler, and the engine then sets no level
            logging.getLogger().handlers.clear()
        mend(logs)
        parent = parent_job(logs, spec["hc"])
    except sqlite3.Error as exc:
        raise InputError(f"the job database {database}: {exc}; repair or move it away") from exc
    try:
        jobs = engine.create_jobs(spec["files"], spec["log_level"], spec["log_file"], hc_id=parent)
    except Exception as exc:
        raise InputError(f"{', '.join(spec['files'])}: {first_line(exc)}") from exc
    for job in jobs:
        job.params.update(spec["params"])
        job.params["exports"] = spec["exports"]
        if spec["export_dir"]:
            job.params["export_dir"] = spec["export_dir"]
        where = str(database) if local else f"tcp://{dbhost}:{config.dbserver.port}"
        report({"kind": "created", "job": job.calc_id, "database": where})
    for job in jobs:
        # a second stage takes from the first, which has not run yet, what it lacks itself
        lacking = job is not jobs[0] and not parent
        try:
            with Ignored() as ignored, contextlib.suppress(*[Exception] if lacking else []):
                job.get_oqparam()
            if ignored.names:
                raise InputError(unknown(ignored.names, dir(OqParam)))
        except (Exception, SystemExit) as exc:
            for created in jobs:
                logs.dbcmd("finish", created.calc_id, "failed")
            raise InputError(f"{job.params['inputs']['job_ini']}: {first_line(exc)}") from exc
    started = time.monotonic()
    try:
        engine.run_jobs(jobs, precalc=len(jobs) > 1 and not parent)
    except KeyboardInterrupt:
        return 130
    except SystemExit:
        return 130
    except Exception as exc:
        traceback.print_exc(file=sys.stderr)
        error = unseen(exc, config.directory.shared_dir) or first_line(exc)
        report({"kind": "failed", "job": jobs[-1].calc_id, "error": error})
        return 1
    for job in jobs:
        figures = summary(logs, job.calc_id, time.monotonic() - started)
        report({"kind": "finished", **figures})
    return 0


def main() -> None:
    activate()  # before the engine's parallel module is loaded
    processes.die_with_parent()
    if os.getppid() != int(sys.argv[2]):
        sys.exit("oq-run has ended")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    spec = json.load(sys.stdin)
    with os.fdopen(int(sys.argv[1]), "w") as stream:

        def report(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row) + "\n")
            stream.flush()

        try:
            code = run(spec, report)
        except InputError as exc:
            report({"kind": "input", "error": str(exc)})
            code = 2
        except KeyboardInterrupt:
            code = 130
        except Exception as exc:
            traceback.print_exc(file=sys.stderr)
            report({"kind": "failed", "job": None, "error": first_line(exc)})
            code = 1
        # from here on nothing can change the outcome, nor the interpreter's own end be safer
        report({"kind": "end", "code": code})
        close_files()
    os._exit(code)


def close_files() -> None:
    """Close the HDF5 files that a job has left open, or nobody could open them again.

    HDF5 may crash in it after a full disk, and a file system may keep it waiting; so the outcome
    of the job must have been reported before.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(CLOSE_SECS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if h5py := sys.modules.get("h5py"):
        for identifier in h5py.h5f.get_obj_ids(types=h5py.h5f.OBJ_FILE):
            with contextlib.suppress(Exception):
                h5py.File(identifier).close()


if __name__ == "__main__":
    main()
