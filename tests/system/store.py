"""What is made once for many runs, and kept outside the clone: kernel, images, packages.

Everything has the version and the digest of what made it in its name; so a change of the recipe
makes another one, and what stands in the store is whole. ``OQ_SYSTEM_CACHE`` names another
directory than ``$XDG_CACHE_HOME/openquake-system-test`` (``~/.cache`` where that is not set).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def directory() -> Path:
    """The directory of all that is kept; it is made if it is not there."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("OQ_SYSTEM_CACHE") or caches / "openquake-system-test")
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def digest(*parts: str | bytes) -> str:
    """A short name for a recipe: 48 bits of the BLAKE2b digest of its parts, each with its length.

    :param parts: texts and contents of files from which something is made
    """
    state = hashlib.blake2b(digest_size=6)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The entry of that name; if there is none, it is made, by one process at a time.

    :param name: with version and digest of what it is made from
    :param make: makes a file or directory at the path that it is given; what a maker that was
        killed has left there is removed before
    """
    path = directory() / name
    if path.exists():
        return path
    with (directory() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(f"{name}.unfinished")
            remove(unfinished)
            make(unfinished)
            unfinished.rename(path)
    return path


def remove(path: Path) -> None:
    """Remove a file or a whole directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
