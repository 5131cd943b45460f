"""The page: one file, which asks nothing of the network and runs nothing.

All that a job says of itself is text: the templates escape it. Not covered: where it is written
(``output``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from django.template import Context, Engine

from oq_runtime.engine import jobtable, kept
from oq_runtime.errors import InputError
from oq_runtime.report import results, store, words, work
from oq_runtime.report.store import Store, Table
from oq_runtime.text import clean, duration


def made(path: Path, state: str = "", error: str = "") -> str:
    """Return the page of a datastore.

    :param state: of the job as the job table has it
    :param error: why it failed, where that is known
    :raises InputError: where the datastore cannot be read
    """
    lines = words.explained(path)["lines"]
    try:
        with contextlib.closing(Store(path)) as opened:
            return render(_content(opened, lines, state, error))
    except Exception as exc:  # what is damaged, or made by others, may be so in any way
        what = f"{type(exc).__name__}: {clean(str(exc))}"
        raise InputError(f"{path} is not as a job leaves it: {what}") from exc


def _content(opened: Store, lines: list[str], state: str, error: str) -> dict[str, Any]:
    oq, own = opened.oq, opened.own
    ours = own.getitem(kept.GROUP).attrs if kept.GROUP in own else {}
    number = opened.path.stem.removeprefix("calc_")
    mode = clean(str(getattr(oq, "calculation_mode", "unknown")))
    state = clean(state or str(ours.get("state", "")))
    began_s = store.began_s(opened)
    description = clean(str(getattr(oq, "description", "")))
    facts = [
        ("description", description),
        ("calculation", mode),
        ("state", state),
        ("began", f"{datetime.fromtimestamp(began_s):%Y-%m-%d %H:%M:%S}" if began_s else ""),
        ("took", duration(float(ours["seconds"])) if "seconds" in ours else ""),
        ("engine", clean(str(own.attrs.get("engine_version", "")))),
        ("runtime", clean(str(ours.get("version", ""))) or "none: the engine ran it alone"),
        ("checksum of the input, by the engine", str(own.attrs.get("checksum32", ""))),
        ("datastore", clean(str(opened.path))),
    ]
    if "sitecol" in opened.file:
        facts.append(("sites", str(len(opened.file["sitecol"]))))
    if "assetcol" in opened.file:
        facts.append(("assets", str(len(opened.file.getitem("assetcol/array")))))
    about, problems = [], [clean(error)] if error else []
    if opened.note:
        problems.append(opened.note)
    if state and state not in jobtable.COMPLETE:
        problems.append(f"The job is {state}: this is what there is of it.")
    makers: tuple[tuple[str, Callable[[Store], Table]], ...] = (
        ("Parameters", store.parameters),
        ("Input files", lambda opened: store.inputs(opened, began_s)),
        ("Logic tree: branches", store.branches),
        ("Logic tree: realizations", store.realizations),
    )
    for name, make in makers:
        try:
            table = make(opened)
        except Exception as exc:  # a job that was ended half way has half of it
            problems.append(f"{name}: {type(exc).__name__}: {clean(str(exc))}")
        else:
            if table.rows:
                about.append((f"{name} ({table.total})", table))
    found, missing = results.pictures(opened)
    try:
        pictures, tables = work.pictures(opened)
    except Exception as exc:  # the results are there all the same
        pictures, tables = [], []
        problems.append(f"Where the time went: {type(exc).__name__}: {clean(str(exc))}")
    title = f"Job {number}: {description or mode}"
    return {
        "title": title,
        "problems": problems,
        "facts": [(name, value) for name, value in facts if value],
        "about": about,
        "results": found,
        "missing": missing,
        "lines": [clean(line, words.LINE_CHARACTERS) for line in lines],
        "work": pictures,
        "tables": tables,
    }


def render(content: dict[str, Any]) -> str:
    """Return the page; every text in it is escaped."""
    engine = Engine(dirs=[str(Path(__file__).parent)], autoescape=True)
    # without these two Django looks for settings, which only a site has
    context: Any = Context(content, use_l10n=False, use_tz=False)
    return str(engine.get_template("page.html").render(context))
