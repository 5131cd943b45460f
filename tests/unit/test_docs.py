"""The documents show what the code has: the wire and its states, the settings.

``python -m tests.unit.test_docs`` writes the diagram and the table anew.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from oq_runtime.core import attempts, scheduler
from oq_runtime.session import peer
from oq_runtime.settings import KEYS, Key
from oq_runtime.wire import protocol

DOCS = Path(__file__).parents[2] / "docs"
PAGE, SETTINGS = DOCS / "protocol.md", DOCS / "configuration.md"
BLOCK = re.compile(r"```mermaid\n.*?```", re.DOTALL)
TABLE = re.compile(r"^\| key \| default \|.*?\n(?=\n|\Z)", re.DOTALL | re.MULTILINE)


def diagram(begins: str, table: Mapping[Any, Mapping[Any, Any]], final: Collection[Any]) -> str:
    """A table as a state diagram in the language of mermaid; the first state is where it begins."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(table)).name}{begins}"]
    for state, transitions in table.items():
        for event, to in transitions.items():
            name = event.name.lower() if isinstance(event, Enum) else event
            lines.append(f"    {state.name} --> {to.name}: {name}")
    lines += [f"    {state.name} --> [*]" for state in table if state in final]
    return "\n".join([*lines, "```"])


def diagrams() -> list[str]:
    return [
        diagram("", peer.TRANSITIONS, {peer.State.GONE}),
        diagram(": submitted", scheduler.TRANSITIONS, scheduler.FINAL),
        diagram(": given", attempts.TRANSITIONS, attempts.FINAL),
    ]


def test_diagrams_are_those_of_the_tables() -> None:
    assert BLOCK.findall(PAGE.read_text()) == diagrams()


def test_every_message_is_described() -> None:
    text = PAGE.read_text()
    kinds = [kind.__name__ for kind in typing.get_args(protocol.AnyMessage)]
    assert [kind for kind in kinds if f"`{kind}`" not in text] == []


def settings() -> str:
    """The keys of [oq_runtime] as a table."""
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key in KEYS.values():
        assert key.meta.description
        meaning = key.meta.description.replace("|", "\\|")
        lines.append(f"| `{key.name}` | {_default(key)} | {key.allowed} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    if key.kind is bool:
        return "`on`" if key.default else "`off`"
    text = ", ".join(key.default) if key.several else f"{key.default}".removesuffix(".0")
    return f"`{text}`" if text else ""


def test_settings_are_those_that_are_read() -> None:
    assert TABLE.findall(SETTINGS.read_text()) == [settings()]


if __name__ == "__main__":
    made = iter(diagrams())
    PAGE.write_text(BLOCK.sub(lambda _: next(made), PAGE.read_text()))
    SETTINGS.write_text(TABLE.sub(lambda _: settings(), SETTINGS.read_text()))
