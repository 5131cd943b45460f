"""Words of others, made fit for a person to see.

What comes from the wire, a job file or the database may hold terminal escapes, line ends, or marks
that turn the direction of writing; shown raw they would forge rows of a table or lines of a log.
"""

from __future__ import annotations

#: characters of a name or a reason that are shown
MOST_CHARACTERS = 500


def clean(words: str, most: int = MOST_CHARACTERS) -> str:
    """Return the words on one line, at most so many characters, what cannot be printed escaped."""
    shown = words[:most]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else _escaped(c) for c in shown)
    if len(words) > most or len(shown) > most:
        shown = shown[: most - 1] + "…"
    return shown


def clean_lines(words: str, most: int = MOST_CHARACTERS) -> str:
    """Return the same with line ends kept: for a text of several lines, each bounded."""
    return "\n".join(clean(line, most) for line in words.splitlines())


def _escaped(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape").decode()
