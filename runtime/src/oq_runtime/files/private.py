"""Directories of this user alone: the only place that makes them, proves them and removes them.

In a directory of everybody (temporary files, shared memory) somebody else may have made any name
that he can guess. So a name is either one that nobody can guess, made now, or it is looked at: a
directory, of this user, mode 0700. The link MEMORY in such a directory names the one in shared
memory that belongs to it, so that whoever comes after a killed process finds what that has left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

from oq_runtime.errors import ConfigError
from oq_runtime.files import places, spares

SHARED_MEMORY = Path("/dev/shm")
#: the link in a directory to the one in shared memory that belongs to it
MEMORY = "memory"
#: there is no shared memory for this user, or it is full: everything goes to the disk
NO_MEMORY = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip
REMEDY = "set TMPDIR to another directory"
#: seconds after which nobody is still at work in a directory that was not finished
STALE_SECS = 3600.0


def make(parent: Path, prefix: str) -> Path:
    """Make a directory with a new name in ``parent`` and return its path.

    Raises ConfigError when it cannot be made, or others could exchange it.
    """
    try:
        _check_above(parent)
        # mkdtemp alone would fall back to another directory without a word
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as exc:
        raise places.refusal(parent, exc, REMEDY) from exc


def own(path: Path, remedy: str = REMEDY) -> Path:
    """Make the directory ``path``, or prove that the one that is there is ours; return the path.

    :param remedy: what may be done where that cannot be

    Raises ConfigError when it is not, or cannot be made, or others could exchange it.
    """
    try:
        _check_above(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise places.refusal(path, exc, remedy) from exc
    if not is_own(path):
        raise ConfigError(f"{path} is not a directory of this user alone; remove it or {remedy}")
    return path


def is_own(path: Path) -> bool:
    """Whether there is a directory of this user that nobody else may enter; a link is none."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not stat.S_IMODE(found.st_mode) & 0o077
    )


def memory_name(directory: Path) -> Path:
    """Return a path in shared memory, for ``directory``, that nobody can know beforehand."""
    return SHARED_MEMORY / f"{directory.name}-{secrets.token_hex(8)}"


def add_memory(directory: Path, memory: Path, *, stays: bool = True) -> None:
    """Make ``memory`` (see ``memory_name``) and note in our ``directory`` that it belongs there.

    Where shared memory has no room, or there is none, it is not made, and the disk has to do.

    :param stays: whether nobody removes it while it is in use, see ``logind``; else it is not made
    Raises ConfigError when it cannot be made for another reason, or others could exchange it.
    """
    (directory / MEMORY).symlink_to(memory)  # first: what is not noted would be left for ever
    if not stays:
        return
    try:
        _check_above(memory.parent)
        memory.mkdir(mode=0o700)
        (memory / spares.FOLDER).mkdir(mode=0o700)
    except OSError as exc:
        if exc.errno not in NO_MEMORY:
            raise ConfigError(f"{memory}: {exc.strerror}; remove it") from exc
        remove_memory(directory, memory)


def memory_of(directory: Path) -> Path:
    """Return the directory in shared memory that belongs to one of ours; it need not be there.

    Raises ConfigError when that is not noted.
    """
    try:
        return Path(os.readlink(directory / MEMORY))
    except OSError as exc:
        raise ConfigError(f"{directory / MEMORY}: {exc.strerror}; start the job again") from exc


def remove(directory: Path, memory: Path | None = None) -> None:
    """Remove a directory and the one in shared memory that belongs to it, as far as they are ours.

    :param memory: for who knows it; the note may have been removed with old temporary files
    """
    remove_memory(directory, memory)
    if is_own(directory):
        shutil.rmtree(directory, ignore_errors=True)


def remove_stale(directory: Path) -> None:
    """Remove a directory of ours in which nothing was made for long: its process was killed."""
    with contextlib.suppress(OSError):  # somebody else removes it
        if time.time() - directory.lstat().st_mtime > STALE_SECS:
            remove(directory)


def remove_memory(directory: Path, memory: Path | None = None) -> None:
    """Remove what belongs to a directory in shared memory, as far as it is ours."""
    try:
        memory = memory or memory_of(directory)
    except ConfigError:
        return
    if memory.parent == SHARED_MEMORY and is_own(memory):
        shutil.rmtree(memory, ignore_errors=True)


def _check_above(parent: Path) -> None:
    """Raise ConfigError when others may rename what is in a directory, or in one above it.

    They may where they can write, unless there is the sticky bit, or one further up that they
    cannot enter. A group that is the user's own counts as the user. For root so may the owner, for
    an ordinary user he counts as an administrator. Raises OSError when one of them is not there.
    """
    exchangeable = ""
    real = Path(os.path.realpath(parent))
    for above in (real, *real.parents):
        found = above.stat()
        others = stat.S_IWOTH | (stat.S_IWGRP if found.st_gid != os.getegid() else 0)
        if found.st_mode & others and not found.st_mode & stat.S_ISVTX:
            exchangeable = (
                f"{above}: others may exchange what this user has there; chmod +t {above}"
            )
        if found.st_uid and not os.geteuid():
            exchangeable = f"{above} is not root's; run this as user {found.st_uid}"
        if not found.st_mode & (stat.S_IXOTH | stat.S_IXGRP):
            exchangeable = ""
    if exchangeable:
        raise ConfigError(f"{exchangeable}, or {REMEDY}")
