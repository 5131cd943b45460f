"""What of the engine's log is shown.

Not covered: that the engine's process marks the lines of a message (``local/test_oq_run``).
"""

from __future__ import annotations

import pytest

from oq_runtime.commands.enginelog import MOST_LINES, EngineLog
from oq_runtime.text import CONTINUED

HEAD = "[2026-11-30 10:00:00 #1 INFO]"


def shown(*lines: str, percents: bool = False) -> list[str]:
    found: list[str] = []
    log = EngineLog(found.append, percents=percents)
    for line in lines:
        log.take(line.replace("~", CONTINUED).encode())
    log.release()
    return found


@pytest.mark.parametrize(
    "lines, left",
    [
        ([f"{HEAD} ** DuplicatedID:", "~a.xml b.xml", "~c.xml"], [0, 1, 2]),
        ([f"{HEAD} Computed RTGM", "~   IMT  ProbMCE", "~0  SA  0.2"], [0, 1, 2]),
        ([f"{HEAD} first", f"{HEAD} second", "~its second line"], [0, 1, 2]),
        ([f"{HEAD} outputs", "~  1 | Hazard Curves", "~  2 | Events", f"{HEAD} next"], [3]),
        ([f"{HEAD} rates", "~+----+----+", "~| a  | b  |", "~and more"], []),
        ([f"{HEAD} lost", "~Traceback (most recent call last):", "~  here", "~ValueError: no"],
         [0, 3]),
        ([f"{HEAD} ", "~  a | b", "~text"], []),
        ([f"{HEAD} Received", "{'printed': 1}", "~of the message"], [0, 2]),
        ([f"{HEAD} Received 2 * 8 KB", "~{'rmap': '8 KB'}"], [0]),
        (["printed before there is a log", "~a line of no message"], []),
        ([f"{HEAD} exported hcurves: ['/tmp/a.csv', '/tmp/b.csv']"], []),
        ([f"{HEAD} exported by hand"], [0]),
    ],
)  # fmt: skip
def test_a_message_is_shown_whole_or_not_at_all(lines: list[str], left: list[int]) -> None:
    assert shown(*lines) == [lines[number].removeprefix("~") for number in left]


@pytest.mark.parametrize("percents", [True, False])
def test_progress_of_the_engine_where_there_is_no_other(percents: bool) -> None:
    line = f"{HEAD}  50% [12 submitted, 0 queued]"
    assert shown(line, percents=percents) == [line] * percents


def test_a_long_message() -> None:
    found = shown(f"{HEAD} many", *(f"~row {number}" for number in range(100)))
    assert len(found) == MOST_LINES + 1
    assert found[-1] == f"... and {101 - MOST_LINES} lines, which the log has"


def test_escapes_of_a_terminal_are_not_obeyed() -> None:
    assert shown(f"{HEAD} a\x1b[2Jb", "~c\x1b[2Jd") == [f"{HEAD} a\\x1b[2Jb", "c\\x1b[2Jd"]
