"""Pictures of where the time of a job went, from what is kept of its attempts (``engine.kept``).

Of a job that the engine ran alone nobody knows when and where a task ran: there are the engine's
own tables instead. Not covered: the words (``words``), and what is a cause (``core.explain``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy

from oq_runtime.core import explain
from oq_runtime.core.explain import Attempt, Job, Use
from oq_runtime.core.ledger import FAULTS, Outcome
from oq_runtime.engine import kept
from oq_runtime.report import draw
from oq_runtime.report.draw import Curve, Span
from oq_runtime.report.results import Picture
from oq_runtime.report.store import Store, Table
from oq_runtime.text import clean, duration, nbytes

#: lanes that are told apart; with more slots there is one for each node, shaded
MOST_LANES, SHADES = 128, 200
#: functions and nodes with a colour of their own; rows of a table
MOST_KINDS, MOST_ROWS = 5, 12
#: an attempt is slow that took so many times the median of its function
SLOW = 2.0
FAILED, OTHERS = "did not count", "other functions"


def pictures(store: Store) -> tuple[list[Picture], list[tuple[str, Table]]]:
    """Return pictures, and tables with their titles."""
    job = kept.read(store.own)
    if job is None:
        return [], [("Longest operations of the engine", _operations(store))]
    if not job.attempts:
        return [], []
    found = [_division(job), _timeline(job), _memory(job), _bytes(job)]
    tables = [
        ("Functions", _functions(job)),
        ("Nodes", _nodes(job)),
        ("Stragglers: attempts that took twice the median of their function", _stragglers(job)),
        ("Faults and other attempts that did not count", _faults(job)),
        ("Longest operations of the engine", _operations(store)),
    ]
    return found, [(title, table) for title, table in tables if table.rows]


def _division(job: Job) -> Picture:
    division = explain.divide(job)
    parts = [(str(use), division.part(use)) for use in Use]
    rows = [
        (str(use), f"{division.uses[use]:.1f}", f"{100 * division.part(use):.1f} %") for use in Use
    ]
    return Picture(
        "slot time",
        f"Slot time: {duration(division.total_s)}",
        draw.shares(parts),
        Table(("use", "slot seconds", "part"), rows, len(rows)),
    )


def _timeline(job: Job) -> Picture:
    title = f"Tasks over time: {len(job.attempts)} attempts"
    ran = [one for one in job.attempts if one.ended_s > one.started_s]
    busiest = [func for func, _ in Counter(one.func for one in ran).most_common(MOST_KINDS)]
    lanes = sorted({(one.node, one.slot) for one in ran})
    table = Table(
        ("function", "attempts", "first began (s)", "last ended (s)"),
        [
            (
                clean(func),
                str(len(of := [one for one in ran if one.func == func])),
                f"{min(one.started_s for one in of):.2f}",
                f"{max(one.ended_s for one in of):.2f}",
            )
            for func in busiest
        ],
    )
    if len(lanes) > MOST_LANES:
        return Picture("timeline", f"{title}; busy slots of each node", _shaded(job, ran), table)
    number = {lane: n for n, lane in enumerate(lanes)}
    kinds = [*busiest, OTHERS, FAILED]
    spans = [
        Span(
            number[one.node, one.slot],
            one.started_s,
            one.ended_s,
            len(kinds) - 1
            if not one.counts
            else busiest.index(one.func)
            if one.func in busiest
            else len(kinds) - 2,
        )
        for one in ran
    ]
    names = [f"{node} {slot if slot >= 0 else '?'}" for node, slot in lanes]
    image = draw.lanes(names, spans, kinds, job.seconds)
    return Picture("timeline", f"{title}; node and slot", image, table)


def _shaded(job: Job, ran: Sequence[Attempt]) -> str:
    """Draw how many slots of each node were busy, where there are too many for a lane each."""
    nodes = {name: n for n, name in enumerate(sorted({one.node for one in ran}))}
    edges = numpy.linspace(0, job.seconds, SHADES + 1)
    busy_s = numpy.zeros((len(nodes), SHADES))
    for one in ran:
        overlap = numpy.minimum(edges[1:], one.ended_s) - numpy.maximum(edges[:-1], one.started_s)
        busy_s[nodes[one.node]] += numpy.maximum(0, overlap)
    busy = busy_s / numpy.diff(edges)
    rows = numpy.arange(len(nodes) + 1)
    return draw.cells(("time (s)", edges), ("node", rows), busy, "busy slots")


def _memory(job: Job) -> Picture:
    """The most that tasks held which ran at a time, for each node."""
    by_node: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for one in job.attempts:
        if one.peak_bytes:
            by_node[one.node] += [(one.started_s, one.peak_bytes), (one.ended_s, -one.peak_bytes)]
    drawn, rows = [], []
    found = sorted(by_node.items(), key=lambda item: item[0])
    for number, (node, changes) in enumerate(found):
        changes.sort()
        held = numpy.cumsum([by for _, by in changes])
        rows.append((clean(node), nbytes(float(held.max()))))
        if number < len(draw.COLOURS):
            times = [at_s for at_s, _ in changes]
            drawn.append(Curve(node, [0, *times], [0, *(held / 1e9).tolist()], number))
    return Picture(
        "memory",
        "Memory of the tasks over time, with what they share",
        draw.steps(drawn, "time (s)", "memory (GB)"),
        Table(("node", "at most"), rows[:MOST_ROWS], len(rows)),
    )


def _bytes(job: Job) -> Picture:
    count = [one for one in job.attempts if one.counts]
    drawn = []
    for number, (name, moment, size) in enumerate(
        [("results received", "over_s", "out_bytes"), ("arguments given", "assigned_s", "in_bytes")]
    ):
        order = sorted(count, key=lambda one: getattr(one, moment))
        total = numpy.cumsum([0, *(getattr(one, size) for one in order)]) / 1e6
        times = [0.0, *(getattr(one, moment) for one in order)]
        drawn.append(Curve(name, times, total.tolist(), number, number > 0))
    rows = [(one.label, nbytes(1e6 * float(one.y[-1]))) for one in drawn]
    return Picture(
        "bytes",
        "Arguments and results over time, in sum",
        draw.steps(drawn, "time (s)", "megabytes"),
        Table(("what", "in all"), rows, len(rows)),
    )


def _functions(job: Job) -> Table:
    by_func: dict[str, list[Attempt]] = defaultdict(list)
    for one in job.attempts:
        if one.counts:
            by_func[one.func].append(one)
    rows = [
        (
            clean(func),
            str(len(of)),
            f"{sum(one.ran_s for one in of):.1f}",
            f"{median(one.ran_s for one in of):.3f}",
            f"{max(one.ran_s for one in of):.3f}",
            nbytes(sum(one.in_bytes for one in of)),
            nbytes(sum(one.out_bytes for one in of)),
            nbytes(max(one.peak_bytes for one in of)),
        )
        for func, of in sorted(by_func.items(), key=lambda item: -sum(x.ran_s for x in item[1]))
    ]
    head = ("function", "tasks", "all (s)", "median (s)", "longest (s)", "arguments", "results",
            "memory at most")  # fmt: skip
    return Table(head, rows[:MOST_ROWS], len(rows))


def _nodes(job: Job) -> Table:
    slots: dict[str, int] = defaultdict(int)
    for share in job.shares:
        slots[share.node] = max(slots[share.node], share.slots)
    rows = []
    for node, most in sorted(slots.items()):
        of = [one for one in job.attempts if one.node == node]
        reasons = [one.reason for one in job.shares if one.node == node and one.reason]
        rows.append(
            (
                clean(node), str(most), str(sum(one.counts for one in of)),
                f"{sum(one.ran_s for one in of if one.counts):.1f}",
                nbytes(sum(one.out_bytes for one in of if one.counts)),
                clean(reasons[-1]) if reasons else "",
            )
        )  # fmt: skip
    head = ("node", "slots", "tasks", "computed (s)", "results", "gone because")
    return Table(head, rows[:MOST_ROWS], len(rows))


def _stragglers(job: Job) -> Table:
    usual: dict[str, list[float]] = defaultdict(list)
    for one in job.attempts:
        if one.counts:
            usual[one.func].append(one.ran_s)
    medians = {func: median(ran) for func, ran in usual.items()}
    found = [
        one
        for one in job.attempts
        if one.counts
        and len(usual[one.func]) >= explain.ALIKE
        and one.ran_s >= max(SLOW * medians[one.func], job.seconds / 100)
    ]
    found.sort(key=lambda one: -one.ran_s)
    rows = [
        (
            f"#{one.task}", clean(one.func), clean(one.node), f"{one.started_s:.2f}",
            f"{one.ran_s:.2f}", f"{one.ran_s / medians[one.func]:.1f}", f"{one.weight:.4g}",
        )
        for one in found[:MOST_ROWS]
    ]  # fmt: skip
    head = ("task", "function", "node", "began (s)", "took (s)", "times the median", "weight")
    return Table(head, rows, len(found))


def _faults(job: Job) -> Table:
    found: Counter[tuple[Outcome, str, str]] = Counter(
        (one.outcome, one.reason, one.node) for one in job.attempts if not one.counts
    )
    order = sorted(found.items(), key=lambda item: (item[0][0] not in FAULTS, -item[1]))
    rows = [
        (str(count), outcome.name.lower().replace("_", " "), clean(reason), clean(node))
        for (outcome, reason, node), count in order
    ]
    return Table(("attempts", "outcome", "reason", "node"), rows[:MOST_ROWS], len(rows))


def _operations(store: Store) -> Table:
    """Return what took longest by the engine's own account, in all processes together."""
    if "performance_data" not in store.own:
        return Table((), ())
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    found: Any = store.own.getitem("performance_data")[:]
    for row in found:
        of = sums[row["operation"].decode(errors="replace")]
        of[0] += float(row["time_sec"])
        of[1] = max(of[1], float(row["memory_mb"]))
        of[2] += float(row["counts"])
    rows = [
        (clean(name), f"{of[0]:.2f}", f"{of[1]:.1f}", f"{of[2]:.0f}")
        for name, of in sorted(sums.items(), key=lambda item: -item[1][0])
    ]
    head = ("operation", "time (s)", "memory (MB)", "counts")
    return Table(head, rows[:MOST_ROWS], len(rows))
