"""docs/protocol.md shows the transition table and the message kinds that the code has.

``python -m tests.unit.test_docs`` writes the diagram anew.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path

from oq_runtime.core.scheduler import FINAL, TRANSITIONS, State
from oq_runtime.wire import protocol

PAGE = Path(__file__).parents[2] / "docs/protocol.md"
BLOCK = re.compile(r"```mermaid\n.*?```", re.DOTALL)


def diagram() -> str:
    """The table as a state diagram in the language of mermaid."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.QUEUED.name}: submitted"]
    for state, transitions in TRANSITIONS.items():
        lines += [f"    {state.name} --> {to.name}: {name}" for name, to in transitions.items()]
    lines += [f"    {state.name} --> [*]" for state in State if state in FINAL]
    return "\n".join([*lines, "```"])


def test_diagram_is_that_of_the_table() -> None:
    assert BLOCK.findall(PAGE.read_text()) == [diagram()]


def test_every_message_is_described() -> None:
    text = PAGE.read_text()
    kinds = [kind.__name__ for kind in typing.get_args(protocol.AnyMessage)]
    assert [kind for kind in kinds if f"`{kind}`" not in text] == []


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: diagram(), PAGE.read_text()))
