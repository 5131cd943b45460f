"""What the long lanes wait for is what is said: roles, playbooks and the runtime have each text.

These lanes are run seldom, and a message that has changed would fail them after most of an hour.
"""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import yaml

from tests.provisioning.roles import ROOT
from tests.system.test_verify import ROUNDS

SAYERS = [*(ROOT / "roles").rglob("*"), *(ROOT / "playbooks").rglob("*")]
SAYERS += (ROOT / "runtime/src").rglob("*.py")
FILLED_IN = re.compile(r"\{\{.*?\}\}|%\w")


def words(text: str) -> list[str]:
    """Of a text, with ``*`` for what is filled in."""
    found = FILLED_IN.sub("*", " ".join(text.split())).split()
    return [word for word in (word.strip("'\"`()[]{},;:~!") for word in found) if word]


def scalars(node: Any) -> Iterator[str]:
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, (dict, list)):
            yield from scalars(value)
        elif isinstance(value, str):
            yield value


def literal(node: ast.expr) -> str:
    """A string of a program, or nothing."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or "{{ it }}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def said() -> list[list[str]]:
    texts = [os.strerror(number) for number in errno.errorcode]
    for path in SAYERS:
        if path.suffix == ".yml":
            texts += scalars(yaml.safe_load(path.read_text()) or {})
        elif path.suffix == ".py":
            nodes = ast.walk(ast.parse(path.read_text()))
            texts += [literal(node) for node in nodes if isinstance(node, ast.expr)]
    return [words(text) for text in texts]


def has(text: list[str], wanted: list[str]) -> bool:
    """Does a text have these words, one after the other?

    What is filled in is one word, and of the others there must be as many.
    """
    for at in range(len(text) - len(wanted) + 1):
        pairs = [*zip(wanted, text[at:], strict=False)]
        fits = all(word == "*" or fnmatchcase(word, have) for word, have in pairs)
        if fits and 2 * sum("*" not in have for _, have in pairs) >= len(wanted):
            return True
    return False


def waited_for() -> set[str]:
    """In ``molecule`` what a playbook must have said; in ``tests/system`` what must be in text."""
    found = {text for round in ROUNDS.values() for it in round for text in (it.says, it.remedy)}
    for path in (ROOT / "molecule").rglob("*.yml"):
        found |= {*re.findall(r"^\s+(?:message|hint): \"?(.*?)\"?$", path.read_text(), re.M)}
    for path in (ROOT / "tests/system").glob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        asked = [
            it for it in nodes if isinstance(it, ast.Compare) and isinstance(it.ops[0], ast.In)
        ]
        # the pages of a browser are the engine's
        found |= {literal(it.left) for it in asked if "browser" not in ast.unparse(it)}
    return {text for text in found if len(words(text)) > 2}


def test_each_text_is_said() -> None:
    wanted, texts = waited_for(), said()
    assert len(wanted) > 15, wanted
    assert [text for text in wanted if not any(has(it, words(text)) for it in texts)] == []
