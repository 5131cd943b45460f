"""Whether a job can go on from the results of an earlier run: what must be the same in both.

Versions, parameters and the bytes of all inputs, each by a name for people. The digests of tasks
would tell most differences as well (``history``), but only as that of a task. Not covered: the
journal itself (``files.journal``).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from oq_runtime.engine import messages, versions
from oq_runtime.engine.jobtable import JobTable
from oq_runtime.errors import InputError
from oq_runtime.files.journal import Reader

#: packages whose version may change what the engine submits, or what a result is
PACKAGES = ("oq-runtime", "numpy", "scipy", "pandas", "h5py", "numba", "shapely")
#: parameters that change neither tasks nor results, or are looked at in another way
OTHERS = ("inputs", "base_path", "exports", "export_dir", "hazard_calculation_id")
#: bytes of a file that are read at a time
PIECE_BYTES = 8 << 20


def facts(params: Mapping[str, Any], files: Iterable[Path]) -> dict[str, str]:
    """Return what must be the same: for each its name, and its value or digest.

    :param params: of the engine
    :param files: all inputs
    """
    found = {
        "the engine's version": versions.installed(),
        "the version of Python": platform.python_version(),
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", ""),
    }
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"the version of {name}"] = importlib.metadata.version(name)
    for name in sorted(params.keys() - set(OTHERS)):
        found[f"the parameter {name}"] = str(params[name])
    for path in sorted(set(files)):
        found[f"the input {path}"] = _digest(path)
    return found


def inputs(params: Mapping[str, Any], oqparam: Any) -> list[Path]:
    """Return the input files of a job, those that others name included.

    :param oqparam: as the engine has made it of the parameters; None where it could not
    """
    from openquake.commonlib import readinput

    found = [Path(name) for name in messages.files(params["inputs"])]
    if oqparam is not None:
        with contextlib.suppress(Exception):  # a broken one: the engine says so in its own time
            found += [Path(name) for name in readinput.get_input_files(oqparam)]
    return [path.resolve() for path in found if os.path.isfile(path)]


def of_parent(table: JobTable, parent: int | str | None) -> dict[str, str]:
    """Return what must be the same of the job that another one starts from.

    :param parent: its number, or the path of its results; None: there is none
    """
    if not parent:
        return {}
    job = table.job(int(parent)) if str(parent).isdigit() else None
    path = Path(job.path if job else str(parent))
    try:
        found = path.stat()
    except OSError as exc:  # the engine says so when it needs the file
        return {f"the results of job {parent}": f"{exc.strerror}"}
    return {f"the results of job {parent}": f"{found.st_size} bytes of {found.st_mtime_ns}"}


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of what is not the same."""
    return [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]


def check(reader: Reader, now: Mapping[str, str]) -> None:
    """Raise InputError when a job cannot go on from a journal, for what has changed since."""
    if changed := differences(reader.head["facts"], now):
        files = " ".join(reader.head["spec"]["files"])
        raise InputError(
            f"--resume {reader.head['job']}: not the same as then: {'; '.join(changed)}; "
            f"run it anew: oq-run {files}"
        )


def _digest(path: Path) -> str:
    hashed = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE_BYTES):
                hashed.update(piece)
    except OSError as exc:  # the engine says so when it needs the file
        return f"cannot be read: {exc.strerror}"
    return hashed.hexdigest()
