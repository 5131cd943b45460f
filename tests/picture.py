"""Draw ``docs/run.svg``, the picture of a run in the README, from a real one.

``python -m tests.picture`` runs the example of ``make demo`` in a terminal (tmux), and draws what
is on it when half of the main phase is done. The engine's own log is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from html import escape
from pathlib import Path

from tests.terminal import Terminal

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "run.svg"
COLUMNS = 100
#: pixels of a character, of a line, and around all of them
WIDE, HIGH, MARGIN = 8.4, 20, 16
#: by the number of its escape sequence: what the frame is coloured with
COLOURS = {"32": "#5fd787"}
STYLE = "font:14px ui-monospace,Menlo,Consolas,monospace;white-space:pre;fill:#d0d0d0"
PIECE = re.compile(r"\x1b\[([\d;]*)m|([^\x1b]+)")


def drawn(screen: str) -> str:
    """Return what is on a screen, with its escape sequences for colours, as a picture (SVG)."""
    lines = screen.splitlines()
    size = (round(COLUMNS * WIDE + 2 * MARGIN), len(lines) * HIGH + 2 * MARGIN)
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" role="img">',
        "<title>oq-run, half way</title>",
        f'<rect width="{size[0]}" height="{size[1]}" rx="8" fill="#1c1c1c"/>',
    ]
    colour = ""
    for number, line in enumerate(lines):
        column, pieces = 0, []
        for code, text in PIECE.findall(line):
            if not text:
                colour = COLOURS.get(code, "")
                continue
            fill = f' style="fill:{colour}"' if colour else ""
            at = f"{MARGIN + column * WIDE:.1f}"
            long = f"{len(text) * WIDE:.1f}"
            pieces.append(f'<tspan x="{at}" textLength="{long}"{fill}>{escape(text)}</tspan>')
            column += len(text)
        y = MARGIN + (number + 0.75) * HIGH
        found.append(f'<text y="{y:.1f}" style="{STYLE}">{"".join(pieces)}</text>')
    return "\n".join([*found, "</svg>", ""])


def half_way(screen: str) -> bool:
    found = re.search(
        r"^classical +(\d+)/(\d+) tasks .*\n(?:.*\n)*job .* left", screen, re.MULTILINE
    )
    return found is not None and 2 * int(found[1]) >= int(found[2])


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        (folder / "openquake.cfg").write_text(
            f"[dbserver]\nhost = 127.0.0.1\nfile = {folder}/db.sqlite3\n"
        )
        shutil.copytree(ROOT / "examples" / "hazard_classical", folder / "hazard_classical")
        env = os.environ | {
            "CI": "true",
            "OQ_CONFIG_FILE": f"{folder}/openquake.cfg",
            "OQ_DATADIR": home,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        terminal = Terminal(env, folder, COLUMNS)
        try:
            terminal.type(f"cd {folder}/hazard_classical; clear")
            terminal.until(lambda screen: screen == "$")
            terminal.type("oq-run -l error job.ini")
            terminal.until(half_way, 900)
            PICTURE.write_text(drawn(terminal.colours().rstrip("\n")))
        finally:
            terminal("kill-server")
    print(PICTURE)


if __name__ == "__main__":
    main()
