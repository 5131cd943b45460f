"""Files of shared memory that are used again: new pages cost more than the copy into them.

8 MB take 3.9 ms in a new file and 0.75 ms in a used one. A file that has had its one reader stays
in the folder FOLDER beside it, for whoever opens the next one there: this process or another one
of the session. On the disk, where there is no such folder, a file is gone with its reader.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import deque
from pathlib import Path
from typing import Any

from oq_runtime.descriptors import patiently
from oq_runtime.wire import payload

#: folder of the spare files in a directory that has such, and what they may hold together; every
#: process may have as much on loan
FOLDER, MOST_BYTES = "spare", 64 << 20
#: a file of that name itself, never one that a link leads to
AS_IT_IS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def open_file(path: Path) -> int:
    """Return the descriptor of a file to be written from its beginning.

    It may be a spare one: what it has beyond the last byte that is written is for the caller to cut
    off. Raises OSError; then there is no file.
    """
    flags = AS_IT_IS | os.O_CREAT | os.O_EXCL
    with contextlib.suppress(OSError):  # no spare files here
        for spare in (path.parent / FOLDER).iterdir():
            with contextlib.suppress(FileNotFoundError):  # somebody else has taken it
                spare.rename(path)
                flags = AS_IT_IS
                break
    try:
        return patiently(lambda: os.open(path, flags, 0o600))
    except OSError:
        if flags == AS_IT_IS:
            path.unlink(missing_ok=True)
        raise


def consume(path: Path, *, kept: bool = False) -> memoryview:
    """Map a file of which this process is the last reader; what is written there nobody sees.

    :param kept: whether another mapping of it is still read: it does not become a spare one

    The file is gone from then on, or becomes a spare one when nothing refers to the mapping any
    more, see ``give_back``. Raises OSError when it is not there.
    """
    forks = _Forks.count
    view = payload.map_file(path, private=kept)
    give_back()
    lent_bytes = sum(nbytes for _, nbytes, _ in _lent.values())
    if not kept and (path.parent / FOLDER).is_dir() and lent_bytes + len(view) <= MOST_BYTES:
        _lent[weakref.ref(view.obj, _returned.append)] = path, len(view), forks
    else:
        path.unlink()
    return view


def give_back() -> None:
    """Make spare ones of the consumed files whose mapping has gone, while there are not enough."""
    while _returned:
        path, nbytes, forks = _lent.pop(_returned.popleft())
        with contextlib.suppress(OSError):  # gone with its directory, or a spare one was just taken
            spares = path.parent / FOLDER
            spare_bytes = sum(spare.stat().st_size for spare in spares.iterdir())
            if forks == _Forks.count and spare_bytes + nbytes <= MOST_BYTES:
                path.rename(spares / path.name)
                continue
        path.unlink(missing_ok=True)


def clear(directory: Path) -> None:
    """Delete the spare files of a directory: memory that nobody is going to use soon."""
    give_back()
    with contextlib.suppress(OSError):  # none here
        for spare in (directory / FOLDER).iterdir():
            spare.unlink(missing_ok=True)


class _Forks:
    """How often this process has forked: a child has the mappings of its parent."""

    count = 0

    @classmethod
    def one_more(cls) -> None:
        cls.count += 1


os.register_at_fork(before=_Forks.one_more)
#: mappings of files that are to be spare ones: path, bytes, forks before it
_lent: dict[weakref.ref[Any], tuple[Path, int, int]] = {}
#: those that have gone. Filled at any moment and in any thread, so not by Python code, in which the
#: exception of a signal handler would get lost
_returned: deque[weakref.ref[Any]] = deque()
