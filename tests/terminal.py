"""A terminal with a shell in it (tmux): what people see, and a record of it: ``build/screens``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.leftovers import wait_for

SCREENS = Path(__file__).parents[1] / "build" / "screens"
#: the widths at which screens are recorded
COLUMNS = (120, 60)
ROWS = 40
needs_tmux = pytest.mark.skipif(
    not shutil.which("tmux"), reason="no tmux (Debian: apt-get install tmux)"
)
#: seconds until the first line of a command must be there
FIRST_LINE_S = 1.0
#: seconds in which a program draws anew what it shows
REDRAW_S = 30.0
#: behind a command that has ended, not stopped
ENDED = re.compile(r"^exit (?!147)(\d+)", re.MULTILINE)
#: behind a frame of ``oq-run``, and before what ``oq-workers top`` shows anew
DRAWN = re.compile(rb"\x1b\[(\?7h|2J)")
#: the first words of a line of a frame
IN_FRAME = re.compile(r"(?:(\w+) +\d+/\d+ tasks |(job) \d+  )")
#: the last words of a line of a frame, alone in a row
REST = re.compile(r"\s*(\d+\.\d MB|(\d+/\d+ )?slots busy|busy)")
#: in a line of columns, as those of frames and tables are; a sentence is folded by the terminal
IN_COLUMNS = re.compile(r"\S {2,}\S")


class Terminal:
    """
    :param env: of the shell
    :param folder: for the socket of tmux
    :param prefix: of the command that is the shell
    """

    def __init__(
        self, env: dict[str, str], folder: Path, columns: int, prefix: Sequence[str] = ()
    ) -> None:
        self.socket = folder / f"tmux{columns}"
        self.written = folder / f"written{columns}"
        self.env = {name: value for name, value in env.items() if name not in ("COLUMNS", "TMUX")}
        size = ("-x", str(columns), "-y", str(ROWS))
        shell = " ".join([*prefix, "env PS1='$ ' sh -i"])
        self("-f", "/dev/null", "new-session", "-d", *size, shell)
        assert wait_for(lambda: "$" in self.screen())

    def __call__(self, *command: str) -> str:
        return subprocess.run(
            ["tmux", "-S", str(self.socket), *command],
            env=self.env,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    @property
    def columns(self) -> int:
        return int(self("display-message", "-p", "#{window_width}"))

    def screen(self) -> str:
        return self("capture-pane", "-p").rstrip("\n")

    def history(self) -> str:
        return self("capture-pane", "-p", "-J", "-S", "-").rstrip("\n")

    def colours(self) -> str:
        return self("capture-pane", "-p", "-e", "-S", "-")

    def type(self, text: str) -> None:
        self("send-keys", "-l", text)
        self("send-keys", "Enter")

    def resize(self, columns: int) -> None:
        self("resize-window", "-x", str(columns))

    def run(self, *args: object, before: str = "", after: str = "", module: str = "run") -> None:
        """Type an ``oq-run`` with a line behind it that says that it has ended.

        :param module: of another command
        """
        if ENDED.search(self.screen()):
            self.type("clear")
            assert wait_for(lambda: not ENDED.search(self.screen()))
        words = " ".join(map(str, args))
        command = f"{sys.executable} -m oq_runtime.commands.{module} {words} {after}"
        self.type(f"clear; {before} {command}; echo exit $?")

    def start(self, *args: object, before: str = "", after: str = "") -> None:
        """The same, of a job: the first line is there within a second, by its processor time.

        What the machine has to do besides is no matter of the program's.
        """
        self.run(*args, before=before, after=after)
        assert wait_for(lambda: re.search("^running ", self.screen(), re.MULTILINE), 60)
        shell = psutil.Process(int(self("display-message", "-p", "#{pane_pid}")))
        used_s = [
            sum(process.cpu_times()[:2])
            for process in shell.children()
            if "oq_runtime.commands.run" in process.cmdline()
        ]
        assert used_s and max(used_s) < FIRST_LINE_S, used_s

    def until(self, condition: Callable[[str], object], timeout: float = 200.0) -> str:
        """Return the screen when it is as wanted; fails at the end of the job."""
        last = ""

        def look() -> bool:
            nonlocal last
            last = self.screen()
            return bool(condition(last)) or bool(ENDED.search(last))

        assert wait_for(look, timeout), last
        assert condition(last), last
        return last

    def record(self, name: str, *columns: int, table: bool = False) -> None:
        """Keep what is on the screen, at these widths or the one that it has.

        :param table: no line is a sentence, which the terminal may fold
        """
        for width in columns or (self.columns,):
            if columns:
                self.resize(width)
                self._drawn_anew(width)
            shown = ""

            def is_tidy(width: int = width) -> bool:
                nonlocal shown
                shown = self._tidy(width, table)
                return bool(shown)

            assert wait_for(is_tidy, REDRAW_S), self.screen()
            SCREENS.mkdir(parents=True, exist_ok=True)
            (SCREENS / f"{name}-{width}.txt").write_text(f"{shown}\n")

    def _drawn_anew(self, columns: int) -> None:
        """Wait until a program that goes on has drawn at this width what it shows."""
        tty = self("display-message", "-p", "#{pane_tty}").strip()

        def is_heard() -> bool:  # tmux tells a second change with a delay
            descriptor = os.open(tty, os.O_RDONLY | os.O_NOCTTY)
            try:
                return os.get_terminal_size(descriptor).columns == columns
            finally:
                os.close(descriptor)

        def is_drawn() -> bool:  # the first one may have been begun before
            drawn = DRAWN.findall(self.written.read_bytes())
            return len(drawn) > 1 or bool(ENDED.search(self.screen()))

        assert wait_for(is_heard)
        self.written.write_bytes(b"")
        self("pipe-pane", f"exec cat >>{self.written}")
        assert wait_for(is_drawn, REDRAW_S), self.screen()
        self("pipe-pane")

    def _tidy(self, columns: int, table: bool) -> str:
        """Return what is on the screen; nothing where that is torn, or not drawn to its end.

        :param table: no line is a sentence
        """
        both = self("capture-pane", "-p", ";", "capture-pane", "-p", "-J").splitlines()
        rows, lines = [[row.rstrip() for row in part] for part in (both[:ROWS], both[ROWS:])]
        torn = len(names := in_frame(rows)) > len(set(names)) or any(map(REST.fullmatch, rows))
        fits = all(
            # where an older, longer line was folded, tmux joins rows that fill the new width
            re.match(r"\S.*?\S {2,}\S", line[at : at + columns])
            for line in lines
            if len(line) > columns and (table or IN_COLUMNS.search(line))
            for at in range(0, len(line), columns)
        )
        return "\n".join(rows).rstrip("\n") if fits and not torn else ""


def in_frame(rows: Sequence[str]) -> list[str]:
    """Return the first word of each row that is one of a frame: a phase, or ``job``."""
    return ["".join(found.groups("")) for row in rows if (found := IN_FRAME.match(row))]
