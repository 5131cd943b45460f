"""A terminal with a shell in it (tmux): what people see, and a record of it: ``build/screens``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
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
            fits = partial(self._fits, width, table)
            assert wait_for(fits, REDRAW_S), self.screen()
            SCREENS.mkdir(parents=True, exist_ok=True)
            shown = "\n".join(line.rstrip() for line in self.screen().splitlines())
            (SCREENS / f"{name}-{width}.txt").write_text(f"{shown}\n")

    def _fits(self, columns: int, table: bool) -> bool:
        lines = [line.rstrip() for line in self("capture-pane", "-p", "-J").splitlines()]
        return all(
            # where an older, longer line was folded, tmux joins rows that fill the new width
            re.match(r"\S.*?\S {2,}\S", line[at : at + columns])
            for line in lines
            if len(line) > columns and (table or IN_COLUMNS.search(line))
            for at in range(0, len(line), columns)
        )
