"""What a process of a session leaves when it crashes: its log, in a directory that outlives both.

The directory lies beside that of the session and has a part of its name, so that whoever misses
the process finds it. The newest few are kept; each start of a session removes the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oq_runtime.errors import ConfigError
from oq_runtime.files import private

log = logging.getLogger(__name__)

#: of the names of the directories, of which so many are kept
PREFIX, KEPT = "oq-crash-", 10
#: last characters of a log that are told
TOLD_CHARACTERS = 8000
#: how lines begin with which Python (also in faulthandler) and libzmq tell of the end of a process
TRACEBACK, FATAL = "Traceback (most recent call last)", ("Fatal Python error", "Assertion failed")


@dataclass(frozen=True, slots=True)
class Crash:
    """The log of a process that has crashed.

    :param path: where it is kept
    :param text: its end
    """

    path: Path
    text: str

    def __str__(self) -> str:
        """Say in one line why, and where the log is."""
        lines = self.text.strip().splitlines()
        fatal = [line for line in lines if line.startswith(FATAL)]
        return f"{(fatal or lines)[-1]}; its log is {self.path}"


@contextlib.contextmanager
def kept(directory: Path, name: str) -> Iterator[None]:
    """Keep the log of this process if it crashes in the block, and end it with exit code 1.

    :param directory: of the session, where stderr is the file ``NAME.log``
    """
    faulthandler.enable()
    try:
        yield
    except Exception:
        log.critical("crashed", exc_info=True)
        keep(directory, name)
        sys.exit(1)


def keep(directory: Path, name: str) -> Crash | None:
    """Copy a log that tells of a crash to where it outlives its session.

    None when it does not tell of one, or there is no room.
    """
    try:
        text = (directory / f"{name}.log").read_text(errors="replace")
        if not any(word in text for word in (TRACEBACK, *FATAL)):
            return None
        path = private.make(directory.parent, f"{PREFIX}{directory.name}-") / f"{name}.log"
        path.write_text(text)
    except (OSError, ConfigError) as exc:
        log.error(f"the log of the {name} could not be kept: {exc}")
        return None
    return Crash(path, text[-TOLD_CHARACTERS:])


def find(directory: Path, name: str) -> Crash | None:
    """Return what a process of a session has left by a crash, which may have had no time to."""
    for path in directory.parent.glob(f"{PREFIX}{directory.name}-*/{name}.log"):
        if private.is_own(path.parent):
            return Crash(path, path.read_text(errors="replace")[-TOLD_CHARACTERS:])
    return keep(directory, name) if directory.exists() else None


def prune(temporary: Path) -> None:
    """Remove all but the newest of this user in a directory for temporary files."""
    found = [path for path in temporary.glob(f"{PREFIX}*") if private.is_own(path)]
    found.sort(key=lambda path: path.lstat().st_mtime)
    for path in found[:-KEPT]:
        private.remove(path)
