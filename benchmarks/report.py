"""Figures of several rounds as medians: a table on screen, a JSON file, a plot per row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import ZMQ, Row, Target

#: part of a ratio by which it differs from one run to the next, on a machine with other work
NOISE = 0.25


@dataclass
class Figures:
    """All rounds of one row.

    ``values`` and ``failures`` have an entry for each system that was tried.
    """

    row: Row
    values: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def add(self, system: str, value: float) -> None:
        self.values.setdefault(system, []).append(value)

    def fail(self, system: str, reason: str) -> None:
        self.values.setdefault(system, [])
        self.failures.setdefault(system, []).append(reason)

    def median(self, system: str) -> float | None:
        values = self.values.get(system)
        return statistics.median(values) if values else None

    def ratio(self, system: str, to: str) -> float | None:
        """Median over median; None where one of them is missing."""
        mine, other = self.median(system), self.median(to)
        return mine / other if mine is not None and other else None

    def verdict(self, target: Target) -> tuple[str, bool | None]:
        """The target in words, and whether it is met; None when that was not measured."""
        sign = "≥" if self.row.more_is_better else "≤"
        text = f"{sign} {target.factor:g} " + (f"× {target.of}" if target.of else self.row.unit)
        mine = self.median(self.row.ours)
        reach = self.median(target.of) if target.of else 1.0
        if mine is None or reach is None:
            return text, None
        limit = target.factor * reach
        return text, mine >= limit if self.row.more_is_better else mine <= limit

    def objects(self, measured: datetime) -> list[dict[str, Any]]:
        """One object per system, for the JSON file."""
        found = []
        for system, values in self.values.items():
            targets = self.row.targets if system == self.row.ours else ()
            verdicts = [self.verdict(target) for target in targets]
            found.append(
                {
                    "row": self.row.name,
                    "system": system,
                    "median": self.median(system),
                    "min": min(values, default=None),
                    "max": max(values, default=None),
                    "unit": self.row.unit,
                    "ratio_to_engine_zmq": self.ratio(system, ZMQ),
                    "rounds": len(values),
                    "failures": self.failures.get(system, []),
                    "targets": [{"target": text, "met": met} for text, met in verdicts],
                    "measured": measured.isoformat(timespec="seconds"),
                }
            )
        return found


def table(figures: Figures) -> Table:
    row = figures.row
    view = Table(title=f"{row.name}: {row.title} ({row.unit})", title_justify="left")
    view.add_column("system")
    for name in ("median", "min", "max", f"× {ZMQ}", "rounds"):
        view.add_column(name, justify="right")
    view.add_column("")
    for system, values in figures.values.items():
        numbers = (figures.median(system), min(values, default=None), max(values, default=None))
        ratio = figures.ratio(system, ZMQ)
        note = figures.failures.get(system, [""])[-1][:80]
        cells = [*map(_number, numbers), "-" if ratio is None else f"{ratio:.2f}"]
        view.add_row(system, *cells, str(len(values)), note)
    return view


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(console: Console, all_figures: Sequence[Figures]) -> None:
    """Print a table per row, and under it which targets are met."""
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "not measured"}
    for figures in all_figures:
        console.print(table(figures))
        for text, met in map(figures.verdict, figures.row.targets):
            console.print(f"  {figures.row.ours} {text}: {words[met]}", highlight=False)


def ratios(all_figures: Sequence[Figures]) -> dict[str, float]:
    """By row our median over that of the first system it is to be compared with.

    Most of what differs between machines is in both of them.
    """
    found = {}
    for figures in all_figures:
        others = [target.of for target in figures.row.targets if target.of]
        if others and (ratio := figures.ratio(figures.row.ours, others[0])) is not None:
            found[figures.row.name] = round(ratio, 3)
    return found


def fallen(all_figures: Sequence[Figures], released: dict[str, float]) -> list[str]:
    """Say which rows are worse than at the last release, by more than ``NOISE``.

    :param released: what ``ratios`` has returned then
    """
    lines = []
    measured = ratios(all_figures)
    for figures in all_figures:
        name, better = figures.row.name, figures.row.more_is_better
        if name not in released or name not in measured:
            continue
        now, then = measured[name], released[name]
        if now < then * (1 - NOISE) if better else now > then * (1 + NOISE):
            lines.append(
                f"row {name} fell: {now:.2f} x the other system, {then:.2f} at the release"
            )
    return lines


def write(path: Path, all_figures: Sequence[Figures]) -> None:
    """Write the objects of these rows; those of other rows, from earlier runs, stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {figures.row.name for figures in all_figures}
    old = json.loads(path.read_text()) if path.exists() else []
    objects = [item for item in old if item["row"] not in new]
    measured = datetime.now()
    for figures in all_figures:
        objects += figures.objects(measured)
    path.write_text(json.dumps(objects, indent=1, ensure_ascii=False) + "\n")


def plot(directory: Path, figures: Figures) -> Path:
    """Draw the medians as bars, with the lowest and the highest value; return the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    row = figures.row
    systems = [system for system, values in figures.values.items() if values][::-1]
    medians = [statistics.median(figures.values[system]) for system in systems]
    spread = [
        [median - min(figures.values[s]) for s, median in zip(systems, medians, strict=True)],
        [max(figures.values[s]) - median for s, median in zip(systems, medians, strict=True)],
    ]
    colours = ["tab:blue" if system.startswith("oq-runtime") else "tab:gray" for system in systems]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.4 * len(systems)), layout="constrained")
    axes.barh(systems, medians, xerr=spread, color=colours, ecolor="black", capsize=3)
    absolute = [target.factor for target in row.targets if not target.of]
    for limit in absolute:
        axes.axvline(limit, color="tab:red", linestyle="--", linewidth=1)
    rounds = max(len(figures.values[system]) for system in systems)
    better = "more" if row.more_is_better else "less"
    axes.set_xlabel(f"{row.unit} ({better} is better; median, lowest and highest of {rounds})")
    axes.set_title(row.title, loc="left", fontsize="medium")
    path = directory / f"bench-{row.name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
