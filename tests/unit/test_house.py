"""The house: which wing of the package may import which. See docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import oq_runtime

ROOT = Path(oq_runtime.__file__).parent
#: floors from the ground up, each a set of wings; a wing is a package or a module of the top level
FLOORS = (
    {"errors", "priority", "text"},
    {"logs", "descriptors", "logind"},
    {"core", "wire", "processes", "cgroups"},
    {"files", "settings"},
    {"config", "facts", "metrics"},
    {"session", "node"},
    {"cluster"},
    {"engine"},
    {"report"},
    {"activate", "webui"},
    {"commands"},
)
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
#: what the pure wing may use: no I/O, no clock, no chance; msgspec to declare data
PURE = {
    "__future__", "collections", "dataclasses", "enum", "heapq", "json", "statistics", "typing",
    "itertools", "math", "msgspec", "re", "struct",
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        if path.name != "__init__.py" or path.parent != ROOT:
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imported(path: Path) -> Iterator[str]:
    """Yield the full names of the modules that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[str]:
    """Yield the modules of the package that one imports, as ``wing.module``."""
    known = {name for name, _ in modules()}
    for name in imported(path):
        inner = name.removeprefix("oq_runtime.")
        if inner == name:
            continue
        while inner and inner not in known:
            inner = inner.rpartition(".")[0]
        if inner:
            yield inner


def wing(module: str) -> str:
    return module.partition(".")[0]


def test_every_wing_has_a_floor() -> None:
    assert {wing(name) for name, _ in modules()} == set(FLOOR)


def test_imports_point_down() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in ours(path)
        if wing(other) != wing(name) and FLOOR[wing(other)] >= FLOOR[wing(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_inside_a_wing() -> None:
    graph = {name: sorted(set(ours(path))) for name, path in modules()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_core_is_pure() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imported(path)
        if wing(name) == "core"
        and not other.startswith("oq_runtime.")
        and other.partition(".")[0] not in PURE
    ]
    assert not wrong, "\n".join(wrong)


def test_the_documents_show_the_house() -> None:
    text = (Path(__file__).parents[2] / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE)
    shown = {int(floor): set(re.findall(r"`(\w+)`", wings)) for floor, wings in rows}
    assert shown == dict(enumerate(FLOORS))
    known = {name.replace(".", "/") for name, _ in modules()}
    named = set(re.findall(r"`([a-z]+/[a-z]+)`", text))
    assert named and named <= known, named - known


def test_processes_are_started_by_one_function() -> None:
    """It keeps the folder of a job out of what they import."""
    users = [name for name, path in modules() if "sys.executable" in path.read_text()]
    assert users == ["processes"]


def texts(path: Path) -> Iterator[str]:
    """Yield the strings of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_one_module_knows_the_tables_of_the_engine() -> None:
    statement = re.compile(
        r"\s*(SELECT .* FROM|INSERT INTO|UPDATE \w+ SET|DELETE FROM) ", re.DOTALL
    )
    found = {name for name, path in modules() if any(map(statement.match, texts(path)))}
    assert found == {"engine.jobtable"}


def test_public_classes_begin_with_what_they_are() -> None:
    wrong = [
        f"{name}.{node.name}"
        for name, path in modules()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        if not (ast.get_docstring(node) or "-")[0].isalnum()
    ]
    assert not wrong, "\n".join(wrong)


#: where a new directory needs no proof of what is above it, and why; files without a name are safe
TEMPORARY = {
    "files.private": "proves it",
    "engine.archives": "in the session's directory, or in the shared one for all to read",
    "engine.reading": "for files of a datastore, which are read at once, and nothing is run",
    "webui.uploads": "for files of an upload, which are read at once, and nothing is run",
    "engine.jobtable": "for a copy of the job table, which is packed at once, and nothing is run",
    "files.compiling": "in the user's own cache",
    "report.output": "beside what is written, then renamed to it",
    "commands.run": "a log beside the results of the job",
}


def test_private_directories_are_made_in_one_place() -> None:
    makes = re.compile(r"tempfile\.(mk[sd]temp|mktemp|TemporaryDirectory|NamedTemporaryFile)\(")
    found = {name for name, path in modules() if makes.search(path.read_text())}
    assert found == set(TEMPORARY)
