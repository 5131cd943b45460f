"""Words of others: on one line, bounded, printable, whatever they hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.text import MOST_NAMES, clean, clean_lines, grouped


@given(st.text(max_size=300), st.integers(1, 100))
def test_always_printable_and_bounded(words: str, most: int) -> None:
    shown = clean(words, most)
    assert shown.isprintable()
    assert len(shown) <= most
    assert clean(shown, most) == shown


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=100))
def test_what_can_be_printed_stays(words: str) -> None:
    assert clean(words) == words


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\tc", "a b c"),
        ("up\u202eno", "up\\u202eno"),
        ("x" * 600, "x" * 499 + "…"),
        ("Frédéric 地震", "Frédéric 地震"),
    ],
)
def test_examples(words: str, shown: str) -> None:
    assert clean(words) == shown


def test_lines_are_kept_where_they_are_wanted() -> None:
    assert clean_lines("a\x07\nb") == "a\\x07\nb"


def test_who_shares_a_reason_shares_a_line() -> None:
    pairs = [(f"n{number}", "no answer") for number in range(2000)]
    pairs.insert(1, ("old", "another version"))
    some = ", ".join(f"n{number}" for number in range(MOST_NAMES))
    assert grouped(pairs) == [
        f"{some} and {2000 - MOST_NAMES} more: no answer",
        "old: another version",
    ]
    assert grouped(pairs[:3]) == ["n0, n1: no answer", "old: another version"]
    assert grouped([]) == []
