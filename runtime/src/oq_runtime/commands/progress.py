"""What the user sees while jobs run: a frame at the foot of a terminal, else plain lines.

The frame has a line per phase and one for the whole. It is drawn by hand: a display that hides the
cursor leaves it hidden at Ctrl-Z, and one that counts the rows back to its top miscounts them when
the terminal has become narrower: some terminals fold what was drawn, some cut it, and a program
hears of a new width only after its output has gone by it. So a line that is too long is cut, never
folded, and the cursor rests at the top of the frame, a place that terminals keep. The price is that
a shell prompts there, too, when the program is killed.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import zmq
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from oq_runtime.text import clean
from oq_runtime.wire import protocol, transport

#: columns of the bar on a narrow terminal and on others, and which one is narrow
BAR_COLUMNS, WIDE_BAR_COLUMNS, NARROW_COLUMNS = 10, 24, 80
#: columns for the name of a phase
NAME_COLUMNS = 18
#: what is done besides tasks
AT_WORK = "the engine is at work"
#: where the time that was left has passed
OVERDUE = "longer than expected"
#: clears from the cursor to the end of the line, or of the screen (EL and ED, ECMA-48 8.3.41, 39)
CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"
#: a line that is too long is cut, or folded (DECAWM, VT100)
CUT, FOLD = "\x1b[?7l", "\x1b[?7h"


class StatusReader:
    """Asks the broker of a session for its counters, without ever waiting for it."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = transport.dealer(self.context, f"ipc://{directory}/engine")
        self.asked = False

    def poll(self) -> protocol.Status | None:
        """Return the newest answer, if one has come, and ask again."""
        status = None
        while frames := transport.receive(self.socket):
            message = protocol.decode(frames[0])
            if isinstance(message, protocol.Status):
                status, self.asked = message, False
        if not self.asked:
            transport.send(self.socket, protocol.StatusQuery())
            self.asked = True
        return status

    def last(self, limit_s: float) -> protocol.Status | None:
        """Ask once more, and wait for the answer, so long at most."""
        status = self.poll()
        for _ in range(2):  # the first one may be on its way since before
            if self.socket.poll(int(limit_s * 1000)):
                status = self.poll() or status
        return status

    def close(self) -> None:
        self.context.destroy(linger=0)


def clock(seconds: float) -> str:
    """Return a time as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def screen(stream: TextIO) -> Console:
    """Return a console that is a terminal where its stream is one.

    FORCE_COLOR, which services that run tests set, makes none of a file or a pipe.
    """
    return Console(file=stream, force_terminal=None if stream.isatty() else False)


def rate(done: int, seconds: float) -> str:
    """Return tasks per second, or seconds per task where that is the larger number."""
    if not done or seconds <= 0:
        return ""
    figure, unit = (seconds / done, "s/task") if seconds > done else (done / seconds, "tasks/s")
    return f"{figure:.{figure < 10:d}f} {unit}"


def left(phases: Iterable[protocol.Phase]) -> str:
    """Say how long the phase that ends last still takes, as far as that is known."""
    times = [phase.left_s for phase in phases if phase.left_s is not None]
    if not times:
        return ""
    return f"about {clock(math.ceil(max(times)))} left" if max(times) else OVERDUE


def fitting(parts: Iterable[str], columns: int) -> str:
    """Join as many of the parts as a line has room for; the first ones count most."""
    line = ""
    for part in filter(None, parts):
        longer = f"{line}  {part}" if line else part
        if cell_len(longer) > columns:
            break
        line = longer
    return line or clean("".join(parts), columns)


class Display:
    """A frame on a terminal; otherwise a line whenever a phase has gained a tenth of its tasks.

    :param console: where to draw, and to print lines
    :param quiet: print lines only
    """

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console = console
        self.quiet = quiet
        self.framed = console.is_terminal and not console.is_dumb_terminal and not quiet
        self.began_s = self.stage_s = time.monotonic()
        self.title = ""
        self.stage = ""  # what is done besides tasks
        self.wants = ""  # what the tasks wait for
        self.taken = 0  # tenths of the results of an earlier run that were taken over
        self.tenths: dict[int, tuple[int, int]] = {}
        self.status = protocol.Status(phases=[], nodes=[])
        self.drawn: list[str] = []  # the lines of the frame that is on the screen

    def enter(self, stage: str, title: str = "") -> None:
        """Say what happens now, and in which job."""
        if (stage, title or self.title) != (self.stage, self.title):
            self.stage, self.stage_s = stage, time.monotonic()
            self.title = title or self.title

    def replay(self, done: int, total: int) -> None:
        """Say how many results of an earlier run were taken over so far, and of how many."""
        if done == total:
            self.enter(AT_WORK)
            return
        self.stage = f"taking over {done}/{total} results"
        if not self.framed and not self.quiet and self.taken != (tenth := done * 10 // total):
            self.taken = tenth
            self.print(
                f"took over {done}/{total} results, {clock(time.monotonic() - self.stage_s)}"
            )

    def wait(self, what: str, seconds: float) -> None:
        """Say what the tasks wait for, and how long already; an empty word: nothing."""
        self.wants = f"waiting for {what} {clock(seconds)}" if what else ""

    def print(self, line: str) -> None:
        """Print a line, above the frame."""
        with self.console.capture() as said:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        # the frame anew, not as it was: the width may be another one by now
        frame = self._frame(time.monotonic()) if self.drawn else []
        self._write(self._away() + said.get(), frame)

    def show(self, status: protocol.Status | None = None) -> None:
        """Draw the counters of the broker; None: it has not answered anew."""
        self.status = status or self.status
        if self.framed:
            # over the one that is there: it would flicker if it were taken away
            self._write("", self._frame(time.monotonic()))
        elif not self.quiet:
            self._tell()

    def clear(self) -> None:
        """Take the frame away."""
        self._write(self._away(), [])

    def mind_stop(self, said: str) -> None:
        """Have nothing half drawn on the screen when Ctrl-Z stops this process.

        :param said: what goes on meanwhile
        """
        if self.framed and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, lambda *_: self._stop(said))

    def _stop(self, said: str) -> None:
        self.clear()
        self.print(said)
        os.kill(os.getpid(), signal.SIGSTOP)

    def close(self) -> None:
        """Leave the phases on the screen, with their times."""
        if self.framed:
            self.clear()
            self.framed = False
            for line in self._frame(time.monotonic())[:-1]:
                self.print(line)

    def _away(self) -> str:
        # whatever ``drawn`` says: Ctrl-Z may come between a frame and the note that it is there
        return f"\r{CLEAR_BELOW}" if self.framed else ""

    def _write(self, text: str, frame: Sequence[str]) -> None:
        """Write a text and a frame below it, in one piece: a kill leaves no terminal that cuts."""
        if frame:
            with self.console.capture() as lines:
                for line in frame:
                    self.console.print(
                        self._styled(line), no_wrap=True, crop=False, highlight=False
                    )
            rows = lines.get().replace("\n", f"{CLEAR_LINE}\n")
            text += f"\r{CUT}{rows}{CLEAR_BELOW}\x1b[{len(frame)}A{FOLD}"
        self.console.file.write(text)
        self.console.file.flush()
        self.drawn = list(frame)

    def _styled(self, line: str) -> Text:
        text = Text(line)
        text.highlight_regex(r"\u2501+", "green")
        return text

    def _frame(self, now: float) -> list[str]:
        columns = self.console.width - 1
        phases = [
            fitting(
                (
                    f"{clean(phase.name, NAME_COLUMNS):<{NAME_COLUMNS}}",
                    f"{f'{phase.done}/{phase.total} tasks':>16}",
                    f"{clock(phase.took_s):>7}",
                    f"{phase.retries} retried" if phase.retries else "",
                    f"{phase.preempted} interrupted" if phase.preempted else "",
                    f"{rate(phase.done, phase.took_s):>12}",
                    f"{phase.received_bytes / 1e6:.1f} MB",
                ),
                columns,
            )
            for phase in self.status.phases
        ]
        room = max(self.console.height - 2, 1)
        return [*phases[-room:], self._whole(now, columns)]

    def _whole(self, now: float, columns: int) -> str:
        done = sum(phase.done for phase in self.status.phases)
        total = sum(phase.total for phase in self.status.phases)
        passed = clock(now - self.began_s)
        if self.wants or done == total:  # else the engine computes by itself
            stage = self.wants or f"{self.stage} {clock(now - self.stage_s)}"
            return fitting((self.title, stage, f"{passed} in all" if total else ""), columns)
        if words := left(self.status.phases):
            passed += f", {words}"
        wide = WIDE_BAR_COLUMNS if columns >= NARROW_COLUMNS else BAR_COLUMNS
        filled = wide * done // total
        full, empty = "\u2501\u2500" if self.console.encoding.startswith("utf") else "#-"
        bar = full * filled + empty * (wide - filled)
        return fitting((self.title, bar, f"{done}/{total} tasks", passed, self._busy()), columns)

    def _busy(self) -> str:
        nodes = self.status.nodes
        return f"{sum(n.busy for n in nodes)}/{sum(n.slots for n in nodes)} slots busy"

    def _tell(self) -> None:
        """Print a line for each phase that has advanced by a tenth."""
        for number, phase in enumerate(self.status.phases):
            step = (phase.done * 10 // max(phase.total, 1), phase.retries)
            if self.tenths.get(number) != step:
                self.tenths[number] = step
                retried = f"{phase.retries} retried" if phase.retries else ""
                parts = (
                    f"{clean(phase.name)}: {phase.done}/{phase.total} tasks",
                    clock(phase.took_s),
                    left([phase]),
                    rate(phase.done, phase.took_s),
                    self._busy(),
                    f"{phase.received_bytes / 1e6:.1f} MB",
                    retried,
                )
                self.print(", ".join(filter(None, parts)))
