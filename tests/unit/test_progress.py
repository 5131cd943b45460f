"""The figures of the display: times, rates, what is left, and lines that fit."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from oq_runtime.commands.progress import (
    AT_WORK,
    CUT,
    FOLD,
    OVERDUE,
    Display,
    clock,
    fitting,
    left,
    rate,
)
from oq_runtime.wire.protocol import Node, NodeState, Phase, Status

NODE = Node(host="n1", slots=4, busy=3, state=NodeState.LEASED)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    "done, seconds, text",
    [
        (0, 5, ""),
        (10, 0, ""),
        (10, 100, "10 s/task"),
        (10, 10, "1.0 tasks/s"),
        (120, 10, "12 tasks/s"),
    ],
)
def test_rate(done: int, seconds: float, text: str) -> None:
    assert rate(done, seconds) == text


def test_left() -> None:
    """What is left of a phase is said until it has passed; the phase that ends last counts."""
    first, last, unknown = (
        Phase(name="f", left_s=9.0),
        Phase(name="g", left_s=61.0),
        Phase(name="h"),
    )
    assert left([first, last, unknown]) == "about 1:01 left"
    assert left([Phase(name="f", left_s=0.3)]) == "about 0:01 left"
    assert left([Phase(name="f", left_s=0.0), unknown]) == OVERDUE
    assert left([unknown]) == ""


def test_fitting() -> None:
    assert fitting(("one", "", "two", "three"), 8) == "one  two"
    assert fitting(("much too long",), 5) == "much…"


@pytest.mark.parametrize("columns", [20, 60, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_frame(columns: int, encoding: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=True, width=columns, height=10, no_color=True)
    display = Display(console, quiet=False)
    display.enter("the engine is at work", "job 7")
    display.show(Status(phases=[], nodes=[NODE]))
    display.show(
        Status(phases=[Phase(name="classical", total=40, done=20, running=3)] * 20, nodes=[NODE])
    )
    assert len(display.drawn) == 9
    assert all(len(line) < columns for line in display.drawn)
    if columns > 20:
        full, empty = "━─" if encoding == "utf-8" else "#-"
        assert re.match(rf"job 7  {full}+{empty}+  400/800 tasks  0:00", display.drawn[-1])
        assert re.match(r"classical +20/40 tasks +0:00", display.drawn[0])
    display.close()
    file.flush()


def test_a_kill_leaves_no_terminal_that_cuts() -> None:
    """It is told to and to fold again in the same piece; what stays at the end may be folded."""
    pieces: list[str] = []

    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.extend([text] if text else [])
            return len(text)

    display = Display(Console(file=Pieces(), force_terminal=True, width=80), quiet=False)
    display.show(Status(phases=[Phase(name="classical", total=40)], nodes=[NODE]))
    display.print("a line")
    assert len(pieces) == 2
    assert all(piece.count(CUT) == 1 and piece.endswith(FOLD) for piece in pieces)
    pieces.clear()
    display.close()
    assert CUT not in "".join(pieces)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_replay(terminal: bool) -> None:
    """Its figures stand where the engine's work stands, or are a line for each tenth."""
    file = io.StringIO()
    display = Display(Console(file=file, force_terminal=terminal, width=80), quiet=False)
    display.enter(AT_WORK, "job 7")
    for done in range(1, 41):
        display.replay(done, 40)
        display.show()
        if terminal and done < 40:
            assert display.drawn == [f"job 7  taking over {done}/40 results 0:00"]
    lines = re.findall(r"took over (\d+)/40 results, 0:00", file.getvalue())
    assert lines == ([] if terminal else [str(done) for done in range(4, 40, 4)])
    assert display.stage == AT_WORK
