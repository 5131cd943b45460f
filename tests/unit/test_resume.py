"""How much of a complete job's results holds for another one.

Not covered: what counts as looking at a parameter (``contract/test_reads``), whole jobs
(``local/test_resume``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from openquake.baselib import config

from oq_runtime.engine import resume
from oq_runtime.files.journal import Consumed, Event, Reader, Slots, Submitted, Used, Writer

JOB, OTHER = "/jobs/job.ini", "/jobs/other.ini"
FACTS = {
    "the engine's version": "3.26.2",
    "the parameter poes": "0.1",
    "the input /jobs/sources.xml": "01",
}
VALUES = {"poes": "1", "sites": "2", "description": "3"}
EVENTS: list[Event] = [
    Used(("sites",)),
    Slots(2),
    Submitted(0, 0, "f", b"0"),
    Submitted(0, 1, "f", b"1"),
    Consumed(0, 1),
    Consumed(0, 0),
    Used(("quantiles",), 0, 1),
    Used(("poes", "mean"), 0, 0),
    Used(("iml",)),
    Submitted(1, 0, "g", b"2"),
]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    head = {
        "spec": {"files": [JOB]},
        "facts": FACTS | {f"the input {JOB}": "02"},
        "values": VALUES,
    }
    writer = Writer(tmp_path / "j", head, budget_bytes=1 << 30)
    for event in EVENTS:
        writer.put(event)
    writer.close()
    return Reader(tmp_path / "j")


@pytest.mark.parametrize(
    "change, events",
    [
        ({}, len(EVENTS)),
        ({"description": "4"}, len(EVENTS)),
        ({"new": "4"}, len(EVENTS)),
        ({"sites": "4"}, 0),
        ({"quantiles": "4"}, 4),  # the task that has looked at it is not given
        ({"poes": "4"}, 5),
        ({"iml": "4", "description": "4"}, 8),
        ({"iml": "4", "mean": "4"}, 5),
    ],
)
def test_until_somebody_looks_at_what_differs(
    reader: Reader, change: dict[str, str], events: int
) -> None:
    facts = FACTS | {"the parameter poes": "0.2", f"the input {OTHER}": "03"}
    assert resume.usable(reader, facts, OTHER, VALUES | change) == events


def test_one_that_has_it_no_more(reader: Reader) -> None:
    assert resume.usable(reader, FACTS, JOB, {k: v for k, v in VALUES.items() if k != "poes"}) == 5


def test_all_are_looked_at(tmp_path: Path, reader: Reader) -> None:
    writer = Writer(tmp_path / "k", reader.head, budget_bytes=1 << 30)
    for event in (*EVENTS[:3], Used(("*",)), *EVENTS[3:]):
        writer.put(event)
    writer.close()
    other = Reader(tmp_path / "k")
    assert resume.usable(other, FACTS, JOB, VALUES | {"description": "4"}) == 3
    assert resume.usable(other, FACTS, JOB, VALUES) == len(EVENTS) + 1


def test_what_the_engine_takes_from_its_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    then = resume.facts({}, [])
    monkeypatch.setenv("OQ_SAMPLE_SITES", ".1")
    monkeypatch.setenv("OQ_DATADIR", "/elsewhere")
    monkeypatch.setitem(config.performance, "pointsource_distance", "50")
    assert resume.differences(then, resume.facts({}, [])) == [
        "[performance] pointsource_distance of openquake.cfg",
        "the variable OQ_SAMPLE_SITES",
    ]


@pytest.mark.parametrize(
    "facts",
    [
        FACTS | {"the engine's version": "3.25.1"},
        FACTS | {"the input /jobs/sources.xml": "04"},
        FACTS | {"the input /jobs/more.xml": "05"},
        FACTS | {"the results of job 3": "100 bytes of 7"},
    ],
)
def test_what_must_be_the_same(reader: Reader, facts: dict[str, str]) -> None:
    assert resume.usable(reader, facts, JOB, VALUES) == 0
