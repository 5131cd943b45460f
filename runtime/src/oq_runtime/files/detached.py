"""Which jobs ran detached when their ``oq-run`` was killed: a note in the journal of each.

The note is made when such a job begins, and removed when its ``oq-run`` has come to an end of any
kind. What is left was ended with the machine, or by a kill, and may go on without its user.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from oq_runtime.files import journal, private

NOTE = "detached.json"
#: times that a job goes on by itself; then what ends it again and again is the job
MOST_TIMES = 3


@dataclass(frozen=True, slots=True)
class Detached:
    """How a detached job goes on by itself.

    :param options: of the command line, with which it goes on
    :param times: that it has gone on
    """

    options: tuple[str, ...]
    times: int = 0


def note(directory: Path, options: tuple[str, ...]) -> None:
    """Note a job that begins, or goes on.

    :param directory: of its journal
    """
    before = read(directory)
    times = before.times + 1 if before else 0
    journal.write_atomically(directory / NOTE, json.dumps([options, times]).encode())


def read(directory: Path) -> Detached | None:
    """Return what is noted in a journal of this user, if anything is."""
    if private.is_own(directory):
        with contextlib.suppress(OSError, ValueError, TypeError):
            with journal.regular(directory / NOTE) as file:
                options, times = json.loads(file.read())
            return Detached(tuple(map(str, options)), int(times))
    return None


def forget(directory: Path) -> None:
    """Remove the note, if there is one."""
    if private.is_own(directory):
        (directory / NOTE).unlink(missing_ok=True)
