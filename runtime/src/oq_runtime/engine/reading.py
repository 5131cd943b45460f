"""What others have written is read as data: a datastore reaches into no other file.

HDF5 lets what is in a file lie in any other one, and the engine writes the data files of a logic
tree, which a datastore has in it, under whatever names they have there, and reads them again.
Whoever reads results of others, or what was uploaded, would read and write files of his own for
them.

Not covered: the sources of a calculation. They are pickles, and so programs, which the engine opens
where a job starts from it; ``open_no_pickles`` is for processes that only look.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import h5py

#: classes that open pickles when they are read from a file, in 3.23
PICKLED = {"CompositeSourceModel", "SourceGroup"}
#: directories below each other in which the data files lie for a moment; so many times their names
#: may lead upwards
LEVELS = 16
#: how the names of these directories go on below the one that is made by chance
BELOW = "/d" * LEVELS + "/"


def install_hdf5(_: Any = None) -> None:
    """Let h5py open nothing that lies in another file than the one that it is looked for in."""
    for name in ("__getitem__", "get"):
        theirs = getattr(h5py.Group, name)
        if not is_ours(theirs):
            setattr(h5py.Group, name, _checked(theirs))


def _checked(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def get(self: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        found = theirs(self, name, *args, **kwargs)
        if isinstance(found, h5py.HLObject) and is_elsewhere(self, found):
            raise OSError(f"{name} of {self.file.filename} lies in another file, which is not read")
        return found

    return get


def is_ours(function: Any) -> bool:
    """Whether a function has been replaced in this process."""
    return bool(function.__module__ == __name__)


def is_elsewhere(group: h5py.Group, found: Any) -> bool:
    """Whether an object of a group, or what it holds, is in another file than the group."""
    if isinstance(found, h5py.Dataset):
        made = found.id.get_create_plist()
        if made.get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
            return True
    # h5o.get_info would walk through the chunks of a dataset, and has failed beside a write
    return bool(h5py.h5f.get_name(found.id) != h5py.h5f.get_name(group.id))


def install_gsim_lt(gsim_lt: Any) -> None:
    """Let the data files of a logic tree be written below a directory of their own alone.

    :param gsim_lt: the module ``openquake.hazardlib.gsim_lt``
    """
    engine_fromh5 = gsim_lt.GsimLogicTree.__fromh5__
    if is_ours(engine_fromh5):
        return

    def fromh5(self: Any, array: Any, attributes: Mapping[str, Any]) -> None:
        engine_fromh5(self, array, {name: attributes[name] for name in filter(stays, attributes)})

    gsim_lt.GsimLogicTree.__fromh5__ = fromh5
    # what the engine uses of these modules there
    gsim_lt.tempfile = SimpleNamespace(mkdtemp=make)
    gsim_lt.shutil = SimpleNamespace(rmtree=remove)


def stays(name: str) -> bool:
    """Whether an attribute is to be taken: no data file, or one below the directory of ``make``."""
    path = PurePosixPath(name.partition(":")[2])
    # an absolute one is read from where it is
    return not path.is_absolute() and path.parts.count("..") <= LEVELS


def make() -> str:
    """Return a new directory that is as deep below one of ours as names may lead upwards."""
    place = Path(tempfile.mkdtemp() + BELOW)
    place.mkdir(parents=True)
    return str(place)


def remove(place: str) -> None:
    """Remove what ``make`` has made."""
    shutil.rmtree(Path(place).parents[LEVELS - 1])


def open_no_pickles(hdf5: Any) -> None:
    """Let this process make none of the objects that are pickles.

    :param hdf5: the module ``openquake.baselib.hdf5``
    """
    engine_dotname2cls = hdf5.dotname2cls
    if is_ours(engine_dotname2cls):
        return

    def dotname2cls(name: str) -> Any:
        found = engine_dotname2cls(name)
        if PICKLED & {one.__name__ for one in getattr(found, "__mro__", ())}:
            raise ValueError(f"{name} is read by jobs alone")
        return found

    hdf5.dotname2cls = dotname2cls
