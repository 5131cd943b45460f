"""How much of a complete job's results holds for another one.

Not covered: what counts as looking at a parameter (``contract/test_reads``), whole jobs
(``local/test_resume``).
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import pytest
from openquake import baselib
from openquake.baselib import config

from oq_runtime.engine import resume
from oq_runtime.engine.history import History
from oq_runtime.engine.reads import Collector
from oq_runtime.errors import InputError, JournalError
from oq_runtime.files.journal import (
    Consumed,
    Event,
    Reader,
    Slots,
    Submitted,
    Used,
    Writer,
    segments,
)

MUTATIONS = 500
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
        "job": 7,
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


def test_what_a_task_has_looked_at_is_not_known(tmp_path: Path, reader: Reader) -> None:
    """The journal was full just then, or is damaged there."""
    for least, events in ((4, EVENTS[:6]), (4, EVENTS[:5]), (5, EVENTS[:7]), (8, EVENTS[:8])):
        writer = Writer(tmp_path / "k", reader.head, budget_bytes=1 << 30)
        for event in events:
            writer.put(event)
        writer.close()
        other = Reader(tmp_path / "k")
        assert resume.usable(other, FACTS, JOB, VALUES | {"description": "4"}) == least
        assert resume.usable(other, FACTS, JOB, VALUES) == len(events)


def test_no_damage_makes_more_of_it_hold(tmp_path: Path, reader: Reader) -> None:
    """A flipped byte, a torn tail: never more than of the whole journal."""
    [segment] = segments(reader.directory)
    whole, rng = segment.read_bytes(), random.Random(1)
    changes = [{}, {"quantiles": "4"}, {"poes": "4"}, {"iml": "4"}, {"description": "4"}]
    bounds = [resume.usable(reader, FACTS, JOB, VALUES | change) for change in changes]
    for _ in range(MUTATIONS):
        data = bytearray(whole)
        if rng.random() < 0.8:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        segment.write_bytes(data)
        damaged = Reader(reader.directory)
        for change, bound in zip(changes, bounds, strict=True):
            assert resume.usable(damaged, FACTS, JOB, VALUES | change) <= bound
        damaged.close()


def test_a_task_that_has_looked_at_nothing(tmp_path: Path) -> None:
    """That is known of it, too, and so its result holds."""
    writer = Writer(tmp_path / "k", {}, budget_bytes=1 << 30)
    history = History(writer, None, print, Collector("job"))
    history.maps[7] = 0
    history.ended(7, 3, SimpleNamespace(duration=1.0))
    history.close()
    assert [record.event for record in Reader(tmp_path / "k").records] == [Used((), 0, 3)]


def test_all_are_looked_at(tmp_path: Path, reader: Reader) -> None:
    writer = Writer(tmp_path / "k", reader.head, budget_bytes=1 << 30)
    for event in (*EVENTS[:3], Used(("*",)), *EVENTS[3:]):
        writer.put(event)
    writer.close()
    other = Reader(tmp_path / "k")
    assert resume.usable(other, FACTS, JOB, VALUES | {"description": "4"}) == 3
    assert resume.usable(other, FACTS, JOB, VALUES) == len(EVENTS) + 1


def test_what_the_engine_takes_from_its_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    then = resume.facts({})
    monkeypatch.setenv("OQ_SAMPLE_SITES", ".1")
    monkeypatch.setenv("OQ_DATADIR", "/elsewhere")
    monkeypatch.setitem(config.performance, "pointsource_distance", "50")
    monkeypatch.setitem(config.directory, "mosaic_dir", "/models")
    monkeypatch.setitem(config.directory, "custom_tmp", "/elsewhere")
    assert resume.differences(then, resume.facts({})) == [
        "[directory] mosaic_dir of openquake.cfg",
        "[performance] pointsource_distance of openquake.cfg",
        "the variable OQ_SAMPLE_SITES",
    ]


def test_an_engine_that_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by who develops a ground motion model; not what it has compiled."""
    model = tmp_path / "hazardlib/model.py"
    for name in ("baselib", "hazardlib/__pycache__"):
        (tmp_path / name).mkdir(parents=True)
    model.write_text("1")
    monkeypatch.setattr(baselib, "__file__", str(tmp_path / "baselib/__init__.py"))
    then = resume.facts({})
    (tmp_path / "hazardlib/__pycache__/model.pyc").touch()
    assert resume.facts({}) == then
    model.write_text("10")
    assert resume.differences(then, resume.facts({})) == ["the engine's files"]


def test_a_package_that_the_engine_imports_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "of_ours"
    own.mkdir()
    for name in ("__init__.py", "model.py"):
        (own / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OQ_IMPORT_PATH", f"{own.name}:not_there")
    before = resume.facts({})
    assert resume.facts({}) == before
    (own / "model.py").write_text("x = 1")
    assert resume.differences(before, resume.facts({})) == ["the engine's files"]


def test_parents(tmp_path: Path) -> None:
    """Beside the job file, where the engine looks; and none that cannot be looked at."""
    table: Any = SimpleNamespace(job=lambda number: None)
    h5py.File(tmp_path / "haz.hdf5", "w").close()
    before = resume.of_parent(table, "haz.hdf5", str(tmp_path))
    with (tmp_path / "haz.hdf5").open("ab") as file:
        file.write(b"2")
    assert resume.differences(before, resume.of_parent(table, "haz.hdf5", str(tmp_path)))
    assert resume.of_parent(table, None, str(tmp_path)) == {}
    for name in ("haz.ini", "none.hdf5"):
        (tmp_path / name).write_text("1")
    refused = {"haz.ini": "calculates the hazard", "-1": "No such", "9": "No such"}
    for parent, said in (refused | {"none.hdf5": "signature"}).items():
        with pytest.raises(JournalError, match=said):
            resume.of_parent(table, parent, str(tmp_path))


@pytest.mark.parametrize(
    "name, value, fetched",
    [
        ("shakemap_id", "usp000fjta", True),
        ("shakemap_uri", "{'kind': 'usgs_id', 'id': 'usp000fjta'}", True),
        ("shakemap_uri", "{'kind': 'usgs_xml', 'grid_url': 'https://example.org/grid.xml'}", True),
        ("shakemap_uri", "{'kind': 'usgs_xml', 'grid_url': 'file://grid.xml'}", False),
        ("shakemap_uri", "{'kind': 'file_npy', 'fname': 'a.npy'}", False),
        ("description", "see https://example.org", False),
    ],
)
def test_what_is_fetched_may_be_another_one(name: str, value: str, fetched: bool) -> None:
    refused = pytest.raises(JournalError, match=f"{name} is fetched over the network")
    with refused if fetched else contextlib.nullcontext():
        resume.check_sources({name: value})


def test_files(tmp_path: Path) -> None:
    """Also the table of a ground motion model of the job file; their bytes, and where links go."""
    job, table, other = (tmp_path / name for name in ("job.ini", "table.hdf5", "other.hdf5"))
    for path in (job, table, other):
        path.write_bytes(b"1")
    params = {"inputs": {"job_ini": str(job)}, "base_path": str(tmp_path)}
    params["gsim"] = '[GMPETable]\ngmpe_table = "link.hdf5"'
    link = tmp_path / "link.hdf5"
    link.symlink_to(table)
    files = resume.inputs(params, None)
    assert files == [job, link]
    then = resume.digests(files)
    job.touch()
    assert resume.digests(files) == then
    job.write_bytes(b"2")
    assert resume.differences(then, resume.digests(files)) == [f"the input {job}"]
    job.write_bytes(b"1")
    link.unlink()
    link.symlink_to(other)
    names = [f"the input {path}" for path in (other, table)]
    assert resume.differences(then, resume.digests(files)) == names
    link.unlink()
    assert "cannot be read" in resume.digests(files)[f"the input {link}"]


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
    """Else the job neither begins with it nor goes on from it, and what differs is named."""
    assert resume.usable(reader, facts, JOB, VALUES) == 0
    then = reader.head["facts"]
    [name] = resume.differences(FACTS, facts)
    with pytest.raises(InputError, match=f"--resume 7: not the same as then: {name}; run it anew"):
        resume.check(reader, then | facts)
