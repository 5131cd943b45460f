"""The datastore of a job, read through the engine, and what it says of the job: its input.

The engine opens with a job the one that it started from, and finds it in the job database. Where
that is gone, what is in the job's own file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from oq_runtime.engine import kept, messages, reading
from oq_runtime.files import compiling
from oq_runtime.text import clean, counted, nbytes

#: rows of a table, and characters of a value
MOST_ROWS, VALUE_CHARACTERS = 60, 300
#: parameters that the engine has noted for itself, or that are told elsewhere
OWN = {
    "inputs",
    "hdf5path",
    "base_path",
    "description",
    "calculation_mode",
    "mags_by_trt",
    "exports",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts; ``total``: how many there are, of which not all may be shown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: int = 0

    @property
    def left_out(self) -> str:
        """Say how many rows are not shown."""
        rest = self.total - len(self.rows)
        return f"and {counted(rest, 'row')} more" if rest > 0 else ""


class Store:
    """A datastore that is open.

    ``file``: the engine's, with what the job started from; ``own``: without that; ``oq``: the
    parameters, as the engine's object.
    """

    def __init__(self, path: Path) -> None:
        os.environ["OQ_DISTRIBUTE"] = "no"  # nothing is computed here
        with compiling.once():
            from openquake.baselib import hdf5
            from openquake.commonlib import datastore
            from openquake.hazardlib import gsim_lt
        reading.install_hdf5(hdf5)
        reading.install_gsim_lt(gsim_lt)
        reading.open_no_pickles(hdf5)
        self.path = path
        self.note = ""
        try:
            self.file: Any = datastore.read(str(path))
            self.own: Any = self.file.hdf5
        except Exception as exc:  # of its parent, or of the job database: its own file can be read
            self.note = f"what the job started from cannot be read ({clean(f'{exc}')})"
            self.file = self.own = hdf5.File(str(path), "r")
        self.oq: Any = self.file["oqparam"] if "oqparam" in self.own else None

    def close(self) -> None:
        self.file.close()


def parameters(store: Store) -> Table:
    """Return the parameters as the job had them."""
    given = json.loads(store.own.getitem("oqparam")[()]) if store.oq is not None else {}
    rows = [
        (
            clean(name),
            clean(value if isinstance(value, str) else json.dumps(value), VALUE_CHARACTERS),
        )
        for name, value in sorted(given.items())
        if name not in OWN and value not in ("", None, [], {})
    ]
    return Table(("parameter", "value"), rows, len(rows))


def inputs(store: Store, began_s: float) -> Table:
    """Return the files that the job has read, as they are now, with their checksums (SHA-256).

    :param began_s: when the job began, in seconds since 1970; a file may be newer
    """
    rows = []
    for name in _names(store.oq):
        try:
            checksum, size, changed_s = _digest(name)
        except OSError as exc:
            rows.append((clean(name), "-", f"{exc.strerror or exc}"))
        else:
            newer = "; changed after the job had begun" if began_s and changed_s > began_s else ""
            rows.append((clean(name), nbytes(size), checksum + newer))
    return Table(("file", "size", "SHA-256"), rows[:MOST_ROWS], len(rows))


def _names(oq: Any) -> list[str]:
    from openquake.commonlib import readinput

    if oq is None:
        return []
    named = sorted(set(messages.files(oq.inputs)))
    try:
        if not messages.no_file(named):  # the engine would wait for what comes out of a pipe
            return [str(name) for name in readinput.get_input_files(oq)]
    except Exception:  # files that name others are gone, or changed
        pass
    return named


def _digest(name: str) -> tuple[str, int, float]:
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK)  # a pipe has no reader to wait for
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "is no file")
        return hashlib.file_digest(file, "sha256").hexdigest(), found.st_size, found.st_mtime


def began_s(store: Store) -> float:
    """Return when the job began, in seconds since 1970; 0 where nobody knows."""
    if kept.GROUP in store.own:
        return float(store.own.getitem(kept.GROUP).attrs["began"])
    try:
        return datetime.fromisoformat(str(store.own.attrs["date"])).timestamp()
    except (KeyError, ValueError):
        return 0.0


def branches(store: Store) -> Table:
    """Return the branches of both logic trees, with their weights."""
    rows = []
    for name, fields in (
        ("source_model_lt", ("branchset", "branch", "utype", "uvalue", "weight")),
        ("gsim_lt", ("trt", "branch", None, "uncertainty", "weight")),
    ):
        if f"full_lt/{name}" not in store.file:
            continue
        for row in store.file.getitem(f"full_lt/{name}")[:]:
            what = [_text(row[field]) if field else "gmpe" for field in fields[:-1]]
            rows.append((*what, f"{float(row['weight']):g}"))
    head = ("branch set", "branch", "uncertainty", "value", "weight")
    return Table(head, rows[:MOST_ROWS], len(rows))


def realizations(store: Store) -> Table:
    """Return the paths through the logic trees."""
    from openquake.calculators.extract import extract

    found = extract(store.file, "realizations").array
    rows = [
        (str(row["rlz_id"]), _text(row["branch_path"]), f"{float(row['weight']):g}")
        for row in found[:MOST_ROWS]
    ]
    return Table(("realization", "path", "weight"), rows, len(found))


def _text(value: Any) -> str:
    words = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return clean(words.strip(), VALUE_CHARACTERS)
