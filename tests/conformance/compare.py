"""Compare the datastores of two runs of the same job.

Covers every dataset and attribute of the HDF5 file: names, shapes, types and values; integers and
strings must be equal, floats must agree within RTOL. Tables (groups with ``__pdcolumns__``) are
compared as sets of rows, because the engine appends their rows in the order in which tasks end.
The only values left out are those in IGNORED and the ``slice_by_*`` positions of table rows. The
names of datasets must agree also when their values are ignored, but for the group OURS. Not
covered: logs, exports and the job database.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

RTOL = 1e-5  # two reference runs differ by up to 1e-6: float32 sums in the order of arrival
ATOL = 1e-12  # 1e-6 and 0 were enough between two reference runs of 33 jobs

#: what the runtime keeps beside the engine's tables, which the reference lacks
OURS = "oq_runtime"
# regular expression for "dataset", "dataset.field", "table/column" or "group@attribute" -> reason
IGNORED = {
    r"performance_data": "time and memory per operation",
    r"task_info": "duration, memory and received bytes per task",
    r"task_sent": "bytes sent per task; the pickles hold paths and job ids",
    r"starmap_info": "statistics of the task durations",
    r"/@date": "start of the job",
    r"/@checksum32": "of the job file and all parameters, the job id of the parent among them; the"
    " parameters are compared one by one (oqparam)",
    r"/@gmf_bytes": "memory of the tasks' data frames; two runs of the process pool differ in it",
    r"source_info\.calc_time": "seconds spent per source",
    r"source_model_read_times\.rtime": "seconds spent reading",
    r"source_data/ctimes": "seconds spent per source",
    r"source_data/taskno": "number of the task which did the source",
    r"_csm(/.*)?": "zlib pickles of the sources with the seconds spent (src.dt), hence any bytes",
    r"oqparam\.hdf5path": "path of the datastore with the job id",
    r"oqparam\.export_dir": "where exports go, which oq-run decides for each call",
    r"oqparam\.parentdir": "path of the folder with the parent's datastore",
    r"oqparam\.hazard_calculation_id": "job id of the parent",
    r"(ruptimes|gmf_data/rup_info)\.time": "seconds spent per rupture",
    r"(ruptimes|gmf_data/rup_info)\.task_no": "number of the task which did the rupture",
    r"(filtered_)?ruptures\.geom_id": "row in rupgeoms, which depends on the order in which tasks"
    " end; the geometries are compared in the order of the ruptures",
}
# arrays which tasks extend as they end, so their rows are compared sorted like those of a table
UNORDERED = re.compile(
    "ruptimes|gmf_data/(rup_info|sigma_epsilon)|relevant_events|median_spectrum_disagg/grp[0-9]+"
)
# float sums in the order in which tasks end, cut to integers (the terms are in source_data/nctxs)
TRUNCATED = ("source_info.num_ctxs", "source_info.est_ctxs")
_IGNORED = re.compile("|".join(IGNORED))


def ignored(name: str) -> bool:
    return _IGNORED.fullmatch(name) is not None


def compare(ref: Path, other: Path) -> list[str]:
    """The differences between two datastores; an empty list means equal results."""
    with h5py.File(ref, "r") as one, h5py.File(other, "r") as two:
        return _group("", one, two)


def _group(path: str, one: h5py.Group, two: h5py.Group) -> list[str]:
    diffs = _attributes(path or "/", one, two)
    diffs += _names(path or "/", one, two)
    table = _table_columns(one)
    if table:
        diffs += _table(path, one, two, table)
    for name in sorted((set(one) & set(two)) - {*table, OURS}):
        child = f"{path}/{name}" if path else name
        if ignored(child) or (table and name.startswith("slice_by_")):
            continue  # slice_by_*: where the rows lie, which is compared by sorting them
        a, b = one[name], two[name]
        if isinstance(a, h5py.Group) and isinstance(b, h5py.Group):
            diffs += _group(child, a, b)
        elif isinstance(a, h5py.Dataset) and isinstance(b, h5py.Dataset):
            diffs += _attributes(child, a, b)
            diffs += _dataset(child, a, b, one, two)
        else:
            diffs.append(f"{child}: a group on one side only")
    return diffs


def _names(path: str, one: h5py.Group, two: h5py.Group) -> list[str]:
    where = "" if path == "/" else f"{path}/"
    return [
        f"{where}{name}: only in the {'reference' if name in one else 'other'}"
        for name in sorted((set(one) ^ set(two)) - {OURS})
    ]


def _attributes(path: str, one: h5py.HLObject, two: h5py.HLObject) -> list[str]:
    diffs = []
    for name in sorted(set(one.attrs) | set(two.attrs)):
        label = f"{path}@{name}"
        if ignored(label):
            continue
        if name not in one.attrs or name not in two.attrs:
            diffs.append(f"{label}: on one side only")
        else:
            diffs += _values(label, np.asarray(one.attrs[name]), np.asarray(two.attrs[name]))
    return diffs


def _table_columns(group: h5py.Group) -> list[str]:
    columns = group.attrs.get("__pdcolumns__", "")
    if isinstance(columns, bytes):
        columns = columns.decode()
    return [name for name in columns.split() if isinstance(group.get(name), h5py.Dataset)]


def _table(path: str, one: h5py.Group, two: h5py.Group, columns: list[str]) -> list[str]:
    columns = [name for name in columns if name in two and not ignored(f"{path}/{name}")]
    left = {name: one[name][()] for name in columns}
    right = {name: two[name][()] for name in columns}
    shapes = {name: (left[name].shape, right[name].shape) for name in columns}
    wrong = [f"{path}/{name}: shapes {a} and {b}" for name, (a, b) in shapes.items() if a != b]
    if wrong:
        return wrong
    if len({len(column) for column in left.values()}) == 1:
        left, right = _sorted_rows(left), _sorted_rows(right)
    return [diff for name in columns for diff in _values(f"{path}/{name}", left[name], right[name])]


def _sorted_rows(table: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Sort the rows by the exact columns first, so that rounding cannot reorder them."""
    exact, floats = [], []
    for column in table.values():
        if column.dtype.kind == "O":
            exact.append(np.array([_plain(value) for value in column.tolist()]))
        elif column.dtype.kind == "f" and column.ndim == 1:
            floats.append(column)
        elif column.ndim == 1:
            exact.append(column)
    keys = exact + floats
    if not keys:
        return table
    order = np.lexsort(keys[::-1])
    return {name: column[order] for name, column in table.items()}


def _plain(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _dataset(
    path: str, a: h5py.Dataset, b: h5py.Dataset, one: h5py.Group, two: h5py.Group
) -> list[str]:
    if a.shape != b.shape:
        return [f"{path}: shapes {a.shape} and {b.shape}"]
    if a.shape is None:
        return []
    left, right = a[()], b[()]
    if path == "oqparam":
        return _oqparam(left, right)
    if path.startswith("input/"):  # gzip, whose header has the time of the compression
        same = gzip.decompress(left.tobytes()) == gzip.decompress(right.tobytes())
        return [] if same else [f"{path}: the input files differ"]
    if path == "rupgeoms" and "ruptures" in one and "ruptures" in two:
        left, right = left[one["ruptures"]["geom_id"]], right[two["ruptures"]["geom_id"]]
    if UNORDERED.fullmatch(path) and left.dtype.names:
        if left.dtype != right.dtype:
            return [f"{path}: types {left.dtype} and {right.dtype}"]
        p, q = _sorted_rows(_fields(path, left)), _sorted_rows(_fields(path, right))
        return [diff for name in p for diff in _values(f"{path}.{name}", p[name], q[name])]
    if UNORDERED.fullmatch(path) and left.ndim == 1:
        left, right = np.sort(left), np.sort(right)
    return _values(path, np.asarray(left), np.asarray(right))


def _fields(path: str, array: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {n: array[n] for n in array.dtype.names or () if not ignored(f"{path}.{n}")}


def _oqparam(left: bytes, right: bytes) -> list[str]:
    one, two = json.loads(left), json.loads(right)
    return [
        f"oqparam.{name}: {one.get(name)!r} and {two.get(name)!r}"
        for name in sorted(set(one) | set(two))
        if not ignored(f"oqparam.{name}") and one.get(name) != two.get(name)
    ]


def _values(path: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> list[str]:
    if a.shape != b.shape:
        return [f"{path}: shapes {a.shape} and {b.shape}"]
    if a.dtype != b.dtype and not (a.dtype.kind == b.dtype.kind and a.dtype.kind in "OUS"):
        return [f"{path}: types {a.dtype} and {b.dtype}"]
    if a.dtype.names:
        return [
            diff
            for name in a.dtype.names
            if not ignored(f"{path}.{name}")
            for diff in _values(f"{path}.{name}", a[name], b[name])
        ]
    if a.dtype.kind == "O":
        for i, (x, y) in enumerate(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)):
            if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
                if diffs := _values(f"{path}[{i}]", x, y):
                    return diffs
            elif x != y:
                return [f"{path}[{i}]: {_short(x)} and {_short(y)}"]
        return []
    if a.dtype.kind in "fc":
        equal = np.isclose(b, a, rtol=RTOL, atol=ATOL, equal_nan=True)
    elif path in TRUNCATED:
        equal = np.abs(a.astype(np.int64) - b.astype(np.int64)) <= 1
    elif a.dtype.kind == "V":
        equal = np.array([x.tobytes() == y.tobytes() for x, y in zip(a.flat, b.flat, strict=True)])
    else:
        equal = a == b
    if np.all(equal):
        return []
    first = np.flatnonzero(~np.ravel(equal))[0]
    count = np.size(equal) - np.count_nonzero(equal)
    x, y = a.ravel()[first], b.ravel()[first]
    return [f"{path}: {count} of {a.size} values, first {_short(x)} and {_short(y)}"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
