"""Which rows of the benchmarks are said to have fallen since the last release."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks.rows import IPC, PROCESSPOOL, TCP, ZMQ, Row, Target


def rows(more: float, less: float) -> list[report.Figures]:
    """Three rows with these medians over those of the other system; the last one has none."""
    rate = Row("rate", "", "tasks/s", (Target(10), Target(2, ZMQ)))
    delay = Row("delay", "", "s", (Target(1, PROCESSPOOL),), more_is_better=False, ours=IPC)
    alone = Row("alone", "", "s", (Target(1),))
    return [
        report.Figures(rate, {TCP: [more * 8, more * 9, more * 4], ZMQ: [8.0]}),
        report.Figures(delay, {IPC: [less * 2], PROCESSPOOL: [2.0]}),
        report.Figures(alone, {TCP: [1.0]}),
    ]


@pytest.mark.parametrize(
    "more, less, names",
    [
        (6.0, 0.5, []),
        (5.0, 0.6, []),  # as much as two runs differ
        (9.0, 0.1, []),
        (4.0, 0.5, ["rate"]),
        (6.0, 0.7, ["delay"]),
    ],
)
def test_rows_that_fell_are_named(more: float, less: float, names: list[str]) -> None:
    released = report.ratios(rows(6.0, 0.5))
    assert released == {"rate": 6.0, "delay": 0.5}
    lines = report.fallen(rows(more, less), released)
    assert [line.split()[1] for line in lines] == names


def test_rows_that_were_not_measured_are_not_named() -> None:
    nothing = [report.Figures(one.row, {TCP: []}) for one in rows(1.0, 1.0)]
    assert report.fallen(nothing, {"rate": 6.0, "other": 1.0}) == []
