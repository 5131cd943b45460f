"""The engine's log on the screen: which of its messages a person is shown.

A message is shown whole, or with its first lines. Left out are tables and tracebacks, which the log
in the job database has, what the display and the summary say better, and what the engine prints
beside its log.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from oq_runtime.text import CONTINUED, clean

#: characters of a line that are shown, and lines of a message
LINE_CHARACTERS, MOST_LINES = 2000, 20
PERCENT = re.compile(r" \d+% \[\d+ submitted, \d+ queued\]$")
#: what says nothing, or what the summary says: ``exported hcurves: ['...', ...]``
NOTHING = re.compile(r"\[[^]]*\]\s*(exported \S+: .*)?")
#: what begins a line that is values alone, such as the bytes received of each kind
VALUES = ("{", "[")
#: of a table
ROW = re.compile(r"\s*[|+]|.* \| ")


class EngineLog:
    """The engine's log, line by line as it comes.

    :param show: is given each line that is to be shown
    :param percents: show the engine's own progress, because there is no other
    """

    def __init__(self, show: Callable[[str], None], *, percents: bool) -> None:
        self.show, self.percents = show, percents
        self.message: list[str] = []  # which may turn out to be a table
        self.traceback = False  # in the middle of one

    def take(self, raw: bytes) -> None:
        """Take the next line, without its end."""
        line = raw.decode(errors="replace")
        if line.startswith("["):
            self.release()
            if not NOTHING.fullmatch(line) and (self.percents or not PERCENT.search(line)):
                self.message = [line]
        elif line.startswith(CONTINUED) and self.message:
            line = line.removeprefix(CONTINUED)
            self.traceback = line.startswith("Traceback (") or (
                self.traceback and line.startswith(" ")
            )
            if ROW.match(line):
                self.message = []  # its first row would say nothing alone
            elif line.strip() and not line.startswith(VALUES) and not self.traceback:
                self.message.append(line)

    def release(self) -> None:
        """Show what has come of the last message."""
        for line in self.message[:MOST_LINES]:
            self.show(clean(line, LINE_CHARACTERS))
        if len(self.message) > MOST_LINES:
            self.show(f"... and {len(self.message) - MOST_LINES} lines, which the log has")
        self.message, self.traceback = [], False
