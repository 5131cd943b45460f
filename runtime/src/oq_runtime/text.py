"""Words of others, made fit for a person to see.

What comes from the wire, a job file or the database may hold terminal escapes, line ends, or marks
that turn the direction of writing; shown raw they would forge rows of a table or lines of a log.
"""

from __future__ import annotations

from collections.abc import Iterable

#: names in a line
MOST_NAMES = 5
#: characters of a name or a reason that are shown
MOST_CHARACTERS = 500
#: the engine's process begins with it each line of a message of its log but the first
CONTINUED = "\x1e"


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


def duration(seconds: float) -> str:
    """Return a time in its two greatest units: 7.3 s, 4 min 10 s, 3 h 12 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def nbytes(number: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def counted(number: int, noun: str) -> str:
    """Return a number with what it counts."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def grouped(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line per reason with those that have it, of which at most MOST_NAMES are named.

    :param reasons: pairs of a name and its reason
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons:
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        rest = len(names) - MOST_NAMES
        last = f" and {rest} more" if rest > 0 else ""
        lines.append(f"{', '.join(names[:MOST_NAMES])}{last}: {reason}")
    return lines


def _escaped(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape").decode()
