"""The digest of a task's arguments, the same in two runs of one calculation.

Some objects differ between two runs without meaning anything to a task: the engine's monitors with
their clocks, and open files. Fixed marks stand in their places. What a mark is missing for makes
two digests differ, which costs a task that is computed again, never a result that is wrong; so
marks are for objects that are the task's surroundings and never its input. Parameters are compared
apart (``resume``, ``reads``), so an ``OqParam`` has a mark too.

Strings count by their characters. A pickle would also tell which of them are one object, and Python
makes them one where another job of the process has had the same; and a model of ground motion
remembers in which directory, made by chance, the files of its datastore lay for a moment.
"""

from __future__ import annotations

import functools
import io
import pickle
from typing import Any

import numpy
import xxhash

from oq_runtime.engine.reading import BELOW
from oq_runtime.engine.reads import CARRIED

#: classes of which every object is as good as another, by module and name
SURROUNDINGS = frozenset(
    {
        ("openquake.baselib.performance", "Monitor"),
        ("openquake.commonlib.datastore", "DataStore"),
        ("openquake.baselib.hdf5", "File"),
        ("h5py._hl.files", "File"),
        ("openquake.commonlib.oqvalidation", "OqParam"),
    }
)
#: classes with attributes that are left out: parameters, which are compared apart, and the names
#: of the datastores, this job's or its parents', that a task reads
PARTS: dict[tuple[str, str], frozenset[str]] = {
    ("openquake.hazardlib.contexts", "ContextMaker"): CARRIED,
    ("openquake.calculators.getters", "MapGetter"): frozenset({"filenames"}),
}


#: the class of trees, which hold addresses of their process, and follow from their points
TREE = ("scipy.spatial._ckdtree", "cKDTree")


def mark(name: str, *_: object) -> None:
    """Stand in a pickle for an object of the surroundings; never called."""


class Canonical(pickle.Pickler):
    """A pickler with marks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.texts: dict[str, str] = {}

    def persistent_id(self, obj: Any) -> str | None:
        if obj.__class__ is not str:
            return None
        text = obj.rpartition(BELOW)[2]
        return self.texts.setdefault(text, text)

    def reducer_override(self, obj: Any) -> Any:
        # numpy's own generator, begun by chance in each process, which every scipy distribution has
        if obj is numpy.random.mtrand._rand:
            return mark, ("RandomState",)
        if _is_tree(cls := obj.__class__):
            return mark, (cls.__qualname__, obj.leafsize), (obj.data, obj.boxsize)
        if left_out := _left_out(cls):
            state = {name: value for name, value in vars(obj).items() if name not in left_out}
            return mark, (cls.__qualname__,), state
        return (mark, (name,)) if (name := _surroundings(cls)) else NotImplemented


@functools.cache
def _is_tree(cls: type) -> bool:
    """Whether objects of a class are trees of points."""
    return any((one.__module__, one.__qualname__) == TREE for one in cls.__mro__)


@functools.cache
def _surroundings(cls: type) -> str:
    """Return the name of what stands for objects of a class, if anything does."""
    for one in cls.__mro__:
        if (one.__module__, one.__qualname__) in SURROUNDINGS:
            return one.__qualname__
    return ""


@functools.cache
def _left_out(cls: type) -> frozenset[str]:
    """Return the attributes that are left out of objects of a class."""
    for one in cls.__mro__:
        if found := PARTS.get((one.__module__, one.__qualname__)):
            return found
    return frozenset()


def digest(obj: Any) -> bytes:
    """Return the XXH3-128 of an object in canonical form.

    Raises what ``pickle.dumps`` raises.
    """
    hashed = xxhash.xxh3_128()
    if frames := getattr(obj, "frames", None):  # pickled before, in a worker: the same bytes again
        for frame in frames:
            hashed.update(frame)
        return hashed.digest()
    stream = io.BytesIO()
    apart: list[memoryview] = []
    Canonical(stream, 5, buffer_callback=lambda b: apart.append(b.raw())).dump(obj)
    for view in (stream.getbuffer(), *apart):
        hashed.update(view)
    return hashed.digest()
