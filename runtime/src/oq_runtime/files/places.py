"""Directories that a user has named, or the settings: made where they are not there, or refused.

Each check raises ConfigError with one line: what is wrong, where, and what to do.
"""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from oq_runtime.errors import ConfigError

#: what can be done about that of the results
OTHER_DATADIR = "set OQ_DATADIR to another directory"
#: by errno, what can be done besides taking another place
REMEDIES = {
    errno.ENOSPC: "free space or ",
    errno.EDQUOT: "free some of your quota or ",
    errno.EEXIST: "it is a file: move it away or ",
    errno.ENOTDIR: "a file is in its way: move that away or ",
}


def make(folder: Path, otherwise: str) -> None:
    """Make a directory where there is none.

    :param otherwise: what can be done where it cannot be
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise refusal(folder, exc, otherwise) from exc


def room(folder: Path, otherwise: str) -> None:
    """Make a directory where there is none, and try to write there."""
    make(folder, otherwise)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"oq-run" * 1000)
    except OSError as exc:
        raise refusal(folder, exc, otherwise) from exc


def refusal(folder: Path, exc: OSError, otherwise: str) -> ConfigError:
    """Return the line about a directory with which that has happened.

    :param otherwise: what can always be done
    """
    remedy = REMEDIES.get(exc.errno or 0, "")
    if exc.errno in (errno.EACCES, errno.EPERM):
        remedy = f"ask {owner(folder)} to let you write there, or "
    return ConfigError(f"{folder}: {exc.strerror}; {remedy}{otherwise}")


def owner(path: Path) -> str:
    """Return who owns a path, or the first directory above it that there is."""
    try:  # above it there may be one that this user cannot look into
        while not path.exists() and path != path.parent:
            path = path.parent
        return f"{path.owner()}, who owns {path},"
    except (KeyError, OSError):
        return f"the owner of {path}"
