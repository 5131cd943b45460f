"""Whether a job can go on from the results of an earlier run: what must be the same in both.

Versions, parameters and the bytes of all inputs, each by a name for people. The digests of tasks
would tell most differences as well (``history``), but only as that of a task. A job may also begin
with the results of another, complete one: its parameters may differ, and then the results count
until one of those is looked at (``reads``). Not covered: the journal itself (``files.journal``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from oq_runtime.engine import messages, versions
from oq_runtime.engine.canonical import digest
from oq_runtime.engine.jobtable import JobTable
from oq_runtime.engine.reads import ALL
from oq_runtime.errors import InputError, JournalError
from oq_runtime.files.journal import Consumed, Reader, Used

#: packages whose version may change what the engine submits, or what a result is
PACKAGES = (
    "oq-runtime", "numpy", "scipy", "pandas", "h5py", "numba", "llvmlite", "shapely", "pyproj",
    "geopandas", "pyogrio", "fiona", "h3", "alpha_shapes", "networkx", "scikit-learn",
    "onnxruntime",
)  # fmt: skip
#: parameters by which the engine may fetch an input over the network, and marks of values that do
FETCHED = {"shakemap_id": ("",), "shakemap_uri": ("usgs_id", "http:", "https:", "ftp:")}
#: parameters that change neither tasks nor results, or are looked at in another way
OTHERS = ("inputs", "base_path", "exports", "export_dir", "hazard_calculation_id")
#: how what must be the same of parameters and inputs is called
PARAMETER, INPUT = "the parameter", "the input"
#: variables of the engine, by how they begin, that say where something is or who computes it; the
#: others, such as OQ_SAMPLE_SITES, may change results
PLACES = (
    "OQ_CONFIG_FILE", "OQ_DATABASE", "OQ_DATADIR", "OQ_DISTRIBUTE", "OQ_NUM_CORES", "OQ_RUNTIME_",
)  # fmt: skip
#: sections of openquake.cfg that may do so too, and what in them only ends jobs or is a place
SECTIONS = ("memory", "performance", "directory")
NO_MATTER = ("limit", "soft_mem_limit", "hard_mem_limit", "shared_dir", "custom_tmp")
#: folders of the engine that no job reads
NO_CODE = {"__pycache__", "tests", "qa_tests_data"}
#: bytes of a file that are read at a time
PIECE_BYTES = 8 << 20
#: how a hazard is named that the engine calculates within the job
JOB_FILES = (".ini", ".zip")


def facts(params: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be the same beside the inputs: for each its name, and its value.

    :param params: of the engine
    """
    from openquake.baselib import config

    found = {
        "the engine's version": versions.installed(),
        "the engine's files": _code(),
        "the version of Python": platform.python_version(),
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", ""),
    }
    for name, value in os.environ.items():
        if name.startswith("OQ_") and not name.startswith(PLACES):
            found[f"the variable {name}"] = value
    for section in SECTIONS:
        for name in config.get(section, {}).keys() - set(NO_MATTER):
            found[f"[{section}] {name} of openquake.cfg"] = str(config[section][name])
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"the version of {name}"] = importlib.metadata.version(name)
    for name in sorted(params.keys() - set(OTHERS)):
        found[f"{PARAMETER} {name}"] = str(params[name])
    return found


def digests(files: Iterable[Path]) -> dict[str, str]:
    """Return what must be the same of the input files, as they are just now."""
    return {f"{INPUT} {real}": _digest(real) for real in map(Path.resolve, files)}


def inputs(params: Mapping[str, Any], oqparam: Any) -> list[Path]:
    """Return the input files of a job, those that others name included.

    :param oqparam: as the engine has made it of the parameters; None where it could not
    """
    from openquake.hazardlib import gsim_lt

    found = [Path(name) for name in messages.files(params["inputs"])]
    with contextlib.suppress(Exception):  # a broken one: the engine says so in its own time
        named = gsim_lt.rel_paths(params.get("gsim", ""))  # no input as the engine has it
        found += [Path(params["base_path"], name) for name in named]
    if oqparam is not None:
        found += [Path(name) for name in oqparam._input_files]
    return [path for path in found if os.path.isfile(path)]


def check_sources(params: Mapping[str, Any]) -> None:
    """Raise JournalError for an input that may be another one when it is fetched again."""
    for name, marks in FETCHED.items():
        if (value := params.get(name)) and any(mark in str(value) for mark in marks):
            raise JournalError(f"{name} is fetched over the network, and may change there")


def of_parent(table: JobTable, parent: int | str | None, base_path: str) -> dict[str, str]:
    """Return what must be the same of the job that another one starts from, and those before.

    :param parent: its number, or the path of its results; None: there is none
    :param base_path: of the job file, for a path in it

    Raises JournalError where that cannot be told.
    """
    from openquake.baselib import hdf5
    from openquake.commonlib import datastore

    if parent and not str(parent).isdigit() and str(parent).endswith(JOB_FILES):
        # a calculation within this job, whose inputs and parameters the engine keeps for itself
        raise JournalError(f"it calculates the hazard of {parent} itself; run that first, for --hc")
    found: dict[str, str] = {}
    while parent and (name := f"the results of job {parent}") not in found:
        job = table.job(int(parent)) if str(parent).isdigit() else None
        path = Path(job.path) if job else Path(base_path, str(parent))
        try:
            stat = path.stat()
            found[name] = f"{stat.st_size} bytes of {stat.st_mtime_ns}"
            with hdf5.File(path, "r") as file:  # what it has not, the engine takes from its own
                of_that = datastore.read_hc_id(file)
            known = isinstance(of_that, int) or (
                isinstance(of_that, str) and Path(of_that).exists()
            )
            parent = of_that if known else None
        except OSError as exc:
            raise JournalError(f"{name}, {path}: {exc.strerror or exc}") from exc
    return found


def stamps(files: Iterable[Path]) -> dict[str, str]:
    """Return when the input files were touched last, if only to be as they were before."""
    found = {}
    for path in files:
        try:
            stat = path.stat()
            text = f"{stat.st_ino} {stat.st_size} {stat.st_ctime_ns}"
        except OSError as exc:
            text = f"cannot be read: {exc.strerror}"
        found[f"{INPUT} {path}"] = text
    return found


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


def values(oqparam: Any) -> dict[str, str]:
    """Return a digest of the value of each parameter, as the engine has made them."""
    found = {name: value for name, value in vars(oqparam).items() if name not in OTHERS}
    # the job file itself has nothing else
    found["inputs"] = {k: v for k, v in oqparam.inputs.items() if k != "job_ini"}
    return {name: digest(value).hex() for name, value in found.items()}


def usable(reader: Reader, facts: Mapping[str, str], job_file: str, now: Mapping[str, str]) -> int:
    """Return how many events of a complete job's journal hold for a job with other parameters.

    A result does not where the journal lacks what its task has looked at: it may have ended there.

    :param facts: what must be the same, see ``facts``, ``digests`` and ``of_parent``
    :param job_file: of the job
    :param now: the ``values`` of its parameters
    """

    def others(found: Mapping[str, str], file: str) -> dict[str, str]:
        own = f"{INPUT} {Path(file).resolve()}"
        return {k: v for k, v in found.items() if not k.startswith(PARAMETER) and k != own}

    head = reader.head
    if others(head["facts"], head["spec"]["files"][0]) != others(facts, job_file):
        return 0
    changed = set(differences(head["values"], now))
    if not changed:
        return len(reader.records)
    changed.add(ALL)
    at: dict[tuple[int, int], int] = {}  # results of which it is not known yet
    for number, record in enumerate(reader.records):
        event = record.event
        if isinstance(event, Consumed):
            at[event.map, event.task] = number
        elif isinstance(event, Used):
            if changed.intersection(event.names):
                return min([number, *at.values()])
            at.pop((event.map, event.task), None)
    return min([len(reader.records), *at.values()])


def _code() -> str:
    """Return a digest of the engine's files, by their times: who develops a model edits one.

    And of those of the packages that the engine imports as its own, of OQ_IMPORT_PATH.
    """
    from openquake import baselib

    hashed = xxhash.xxh3_128()
    roots = [os.path.dirname(os.path.dirname(baselib.__file__))]
    for package in filter(None, os.environ.get("OQ_IMPORT_PATH", "").split(":")):
        with contextlib.suppress(ImportError, ValueError):  # the engine says so
            spec = importlib.util.find_spec(package)
            roots += (spec and spec.submodule_search_locations) or []
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - NO_CODE)
            for path in (os.path.join(folder, name) for name in sorted(names)):
                found = os.lstat(path)
                line = f"{path[len(root) :]} {found.st_size} {found.st_mtime_ns}\n"
                hashed.update(os.fsencode(line))
    return hashed.hexdigest()


def _digest(path: Path) -> str:
    try:
        found = os.stat(path)
        # a file that has not changed since is not read again
        return _read(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError as exc:  # the engine says so when it needs the file
        return f"cannot be read: {exc.strerror}"


@functools.cache
def _read(path: Path, *_: int) -> str:
    hashed = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            hashed.update(piece)
    return hashed.hexdigest()
