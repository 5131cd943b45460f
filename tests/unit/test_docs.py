"""The documents show what the code has: the wire, its states, the settings; their links lead on.

``python -m tests.unit.test_docs`` writes the diagram and the table anew.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import typing
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import click

from oq_runtime.commands import journal, report, run, workers
from oq_runtime.core import attempts, scheduler
from oq_runtime.session import peer
from oq_runtime.settings import KEYS, Key
from oq_runtime.wire import protocol

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE, SETTINGS = DOCS / "protocol.md", DOCS / "configuration.md"
BLOCK = re.compile(r"```mermaid\n.*?```", re.DOTALL)
#: of a link to a file of this repository
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
PROGRAMS: dict[str, click.Command] = {
    "oq-run": run.main, "oq-report": report.main, "oq-journal": journal.main,
    "oq-workers": workers.main,
}  # fmt: skip
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
    assert f"\nVersion {protocol.PROTOCOL_VERSION}. " in text


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


def pages() -> list[Path]:
    """Every page in the language of Markdown that is ours."""
    folders = ("benchmarks", "docs", "molecule", "playbooks", "roles", "runtime", "tests")
    found = [page for folder in folders for page in (ROOT / folder).rglob("*.md")]
    return [*ROOT.glob("*.md"), *found]


def anchors(page: Path) -> set[str]:
    """What a link may name behind the # of a page: its headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    dead = []
    for page in pages():
        for target in LINK.findall(page.read_text()):
            path, _, anchor = target.partition("#")
            to = (page.parent / path).resolve() if path else page
            if not to.exists() or (anchor and anchor not in anchors(to)):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


def said() -> Iterator[tuple[str, list[str]]]:
    """Each command on a page of ours, in a line of its own or within one, and where."""
    for page in pages():
        text = page.read_text()
        for line in re.findall(r"^    (.+)$", text, re.MULTILINE) + re.findall("`(.+?)`", text):
            words = re.sub(r"(^|\s)#.*|[\[\]]|\.\.\.", "", line).split()
            if words[:1] == ["sudo"]:
                del words[0]
            if words:
                yield f"{page.relative_to(ROOT)}: {line}", [Path(words[0]).name, *words[1:]]


def test_commands_and_their_options_are_there() -> None:
    wrong = []
    for where, (program, *words) in said():
        if program in PROGRAMS:
            main = PROGRAMS[program]
            named = words.pop(0) if words and not words[0].startswith("-") else ""
            found = [main]
            if isinstance(main, click.Group) and named:
                found = [main.commands[one] for one in named.split("|") if one in main.commands]
            known = {name for one in found for option in one.params for name in option.opts}
            options = {word for word in words if re.match("--?[a-z]", word)} - {"--help", "-h"}
            wrong += [where] * (not found or not options <= known)
    assert not wrong, "\n".join(wrong)


def test_targets_of_make_and_their_variables_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w. -]+):(?!=)", makefile, re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    wrong = []
    for where, (program, *words) in said():
        if program == "make":
            values = [word.partition("=")[0] for word in words if "=" in word]
            wrong += [where for name in values if f"$({name})" not in makefile]
            names = [word for word in words if re.fullmatch(r"[a-z][\w.-]+|\.[\w.-]+", word)]
            wrong += [where for name in names if name not in targets]
    assert not wrong, "\n".join(wrong)


def test_playbooks_and_their_variables_are_there() -> None:
    code = [path for way in ("*.yml", "*.j2") for path in ROOT.glob(f"*/**/{way}")]
    variables = set(re.findall(r"openquake_\w+", "".join(path.read_text() for path in code)))
    books = {path.stem for path in ROOT.glob("playbooks/*.yml")} | {"site"}
    wrong = []
    for page in pages():
        text = page.read_text()
        named = set(re.findall(r"(?:playbooks/|openquake_cluster\.)([a-z_]+)(?:\.yml|\b)", text))
        wrong += [f"{page.relative_to(ROOT)}: {name}" for name in named - books - {"README"}]
        for name in set(re.findall(r"\bopenquake_[a-z_0-9]+", text)) - variables:
            wrong.append(f"{page.relative_to(ROOT)}: {name}")
    assert not wrong, "\n".join(wrong)


def test_make_clean_keeps_results(tmp_path: Path) -> None:
    """Those of ``make demo``, as its page and the help say."""
    for name in ("build/oqdata", "build/docs", "runtime", "tests"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    for _ in range(2):
        subprocess.run(["make", "clean"], cwd=tmp_path, check=True)
        assert [path.name for path in tmp_path.glob("build/**/*")] == ["oqdata", "file"]


def test_every_page_is_in_the_index() -> None:
    index = set(LINK.findall((DOCS / "README.md").read_text()))
    assert {page.name for page in DOCS.glob("*.md")} - index == {"README.md"}


if __name__ == "__main__":
    made = iter(diagrams())
    PAGE.write_text(BLOCK.sub(lambda _: next(made), PAGE.read_text()))
    SETTINGS.write_text(TABLE.sub(lambda _: settings(), SETTINGS.read_text()))
