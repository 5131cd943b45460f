"""The page about a job: figures are those of the datastore, hostile words stay words, one line
for what cannot be."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import h5py
import numpy
import pytest
from click.testing import CliRunner

from oq_runtime import processes
from oq_runtime.commands import report
from oq_runtime.commands.checks import BadInput
from oq_runtime.commands.run import check_report
from oq_runtime.core.ledger import ROW, Outcome
from oq_runtime.engine import kept
from oq_runtime.errors import InputError
from oq_runtime.report import draw, output
from oq_runtime.wire.protocol import Attempts, Share
from tests.reports import Page

HOSTILE = "<img src=x onerror=alert(1)>\"'&$\\frac{_</script>\x1b[2J\u202e"
LEVELS = [0.01, 0.1, 1.0]
#: of three sites; the second one has the greatest hazard
CURVES = numpy.array([[0.5, 0.1, 0.01], [0.9, 0.4, 0.05], [0.3, 0.2, 0.001]])
MAP = numpy.array([0.11, 0.33, 0.22])


def row(**fields: Any) -> bytes:
    """An attempt of 2 s on the first slot."""
    start = fields.pop("start", 1.0)
    made = {
        "task": 0, "func": 0, "attempt": 1, "node": 0, "slot": 0, "outcome": Outcome.COMMITTED,
        "reason": 0, "weight": 1.0, "submitted_s": start, "assigned_s": start, "started_s": start,
        "ended_s": start + 2, "granted_s": start + 2, "over_s": start + 2, "cpu_s": 2.0,
        "queued_s": 0.0, "faults": 0, "peak_bytes": 5 * 10**8, "in_bytes": 10**6,
        "out_bytes": 10**7,
    } | fields  # fmt: skip
    return ROW.pack(*made.values())


def datastore(path: Path, words: str, *, results: bool = True) -> Path:
    """What a job leaves; with ``words`` wherever a job has some of its own."""
    params = {
        "description": words,
        "calculation_mode": "classical",
        "hazard_imtls": {"PGA": LEVELS},
        "poes": [0.1],
        "investigation_time": 50.0,
        "inputs": {"job_ini": f"/nowhere/{words}"},
    }
    with h5py.File(path, "w") as file:
        file.attrs.update({"engine_version": "3.26.2", "date": "2026-11-29T10:00:00"})
        file["oqparam"] = json.dumps(params)
        file["oqparam"].attrs["__pyclass__"] = "openquake.commonlib.oqvalidation.OqParam"
        rows = [row(task=n, start=1.0 + 2 * n) for n in range(3)]
        rows += [row(task=3, outcome=Outcome.DIED, reason=1, slot=-1)]
        rows += [row(task=3, attempt=2, start=3.0, slot=1, func=1, ended_s=9.0, over_s=9.0)]
        found = Attempts(
            job="", rows=b"".join(rows), more=False, functions=["classical", words],
            nodes=[words], reasons=["", words], shares=[Share(0.0, 0, 2, 0)],
        )  # fmt: skip
        facts = {"format": 1, "version": "0.1.0", "state": "complete", "began": 1.8e9}
        kept.write(file, [found], 0.0, facts | {"seconds": 10.0, "replayed": 0})
        if not results:
            return path
        sites = file.create_group("sitecol")
        sites.attrs["__pyclass__"] = "openquake.hazardlib.site.SiteCollection"
        sites.attrs["__pdcolumns__"] = "sids lon lat depth"
        sites["sids"] = numpy.arange(3, dtype=numpy.uint32)
        sites["lon"], sites["lat"] = [179.5, -179.5, 179.0], [10.0, 11.0, 12.0]
        sites["depth"] = numpy.zeros(3)
        file["hcurves-stats"] = CURVES[:, None, None, :]
        file["hmaps-stats"] = MAP[:, None, None, None]
        tree = [(words.encode(), b"b1", b"sourceModel", words.encode(), 1.0)]
        kinds = [(name, h5py.string_dtype()) for name in ("branchset", "branch", "utype", "uvalue")]
        file["full_lt/source_model_lt"] = numpy.array(tree, [*kinds, ("weight", "f8")])
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a job that says hostile things wherever it can say something."""
    from oq_runtime.report.page import made

    path = datastore(tmp_path_factory.mktemp("d") / "calc_7.hdf5", HOSTILE)
    return Page(made(path, error=HOSTILE))


def test_what_a_job_says_is_no_markup(page: Page) -> None:
    shown = "".join(page.words)
    assert "<img src=x onerror=alert(1)>" in shown and "\x1b" not in shown
    assert not [tag for tag, found in page.tags if tag == "script" or "onerror" in found]
    assert not [found for tag, found in page.tags if tag == "img" and found["src"] == "x"]


def test_the_page_asks_for_nothing(page: Page) -> None:
    own = ("#", "data:image/")
    named = [found[key] for _, found in page.tags for key in ("src", "href") if key in found]
    asked = [address for address in named if not str(address).startswith(own)]
    assert asked == []
    [policy] = [found["content"] for _, found in page.tags if "http-equiv" in found]
    assert policy and policy.startswith("default-src 'none'; img-src data:")


def test_every_picture_is_whole(page: Page) -> None:
    for source in page.pictures():
        kind, _, body = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(body)).tag.endswith("}svg")
    assert [figure.output for figure in page.figures] == [
        "hcurves",
        "hmaps",
        "slot time",
        "timeline",
        "memory",
        "bytes",
    ]


def test_figures_are_those_of_the_datastore(page: Page) -> None:
    """The site with the greatest hazard comes first, in curves and in maps."""
    order = [1, 0, 2]
    for level, poes in zip(LEVELS, CURVES[order].T, strict=True):
        assert [f"{level:g}", *(f"{poe:.5E}" for poe in poes)] in page.rows
    for site, lon in ((1, "-179.50000"), (2, "179.00000"), (0, "179.50000")):
        assert [str(site), lon, f"{10.0 + site:.5f}", f"{MAP[site]:.5E}"] in page.rows


def test_where_the_time_went(page: Page) -> None:
    """20 slot seconds, of which 6 + 6 were computed and 2 were lost with a worker."""
    assert ["computed", "12.0", "60.0 %"] in page.rows
    assert ["attempts that did not count", "2.0", "10.0 %"] in page.rows
    shown = "".join(page.words)
    assert "slot efficiency 60 %" in shown
    faults = [one for one in page.rows if one[:2] == ["1", "died"]]
    assert len(faults) == 1 and faults[0][2].startswith("<img src=x")
    assert any(one[0] == "results received" and one[1] == "40.0 MB" for one in page.rows)


def test_a_job_without_results_has_a_page(tmp_path: Path) -> None:
    from oq_runtime.report.page import made

    path = datastore(tmp_path / "calc_8.hdf5", "stopped", results=False)
    with h5py.File(path, "r+") as file:
        file[kept.GROUP].attrs["state"] = "failed"
    shown = "".join(Page(made(path, error="out of luck")).words)
    assert "The job is failed: this is what there is of it." in shown and "out of luck" in shown
    assert "There is no result that this page can draw." in shown


def test_an_output_that_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    from oq_runtime.report.page import made

    path = datastore(tmp_path / "calc_8.hdf5", "half")
    with h5py.File(path, "r+") as file:
        del file["hcurves-stats"]
        file["hcurves-stats"] = [HOSTILE]
    found = Page(made(path))
    assert "hazard curves could not be drawn" in "".join(found.words)
    assert "hmaps" in [figure.output for figure in found.figures]


WRONG = ["began", "seconds", "attempts", "nodes", "oqparam", "group", "list", "deep", "class"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_datastore_that_is_damaged(tmp_path: Path, wrong: str) -> None:
    path = datastore(tmp_path / "calc_8.hdf5", "x", results=False)
    with h5py.File(path, "r+") as file:
        group = file[kept.GROUP]
        if wrong in group.attrs:
            group.attrs[wrong] = HOSTILE
        elif wrong == "group":
            del file[kept.GROUP]
            file[kept.GROUP] = numpy.zeros(3)
        elif wrong in ("list", "deep"):
            file["oqparam"][()] = "[]" if wrong == "list" else "[" * 100_000
        elif wrong == "class":
            file["oqparam"].attrs["__pyclass__"] = "os.system"
        else:
            name = wrong if wrong in file else f"{kept.GROUP}/{wrong}"
            del file[name]
            file[name] = numpy.zeros(3)
    done = CliRunner().invoke(report.main, [str(path), str(tmp_path / "x.html")])
    assert done.exit_code == 2 and done.stderr.startswith(f"oq-report: {path}")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "x.html").exists()


# ---- where it is written


def test_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    text = f"<!doctype html>{output.MARK.decode()}"
    output.write(file, text)
    output.write(file, text + "2")
    assert file.read_text() == text + "2" and os.listdir(tmp_path) == ["report.html"]
    file.write_text("something of mine")
    with pytest.raises(InputError, match="is there already, and is no report"):
        output.write(file, text)
    assert file.read_text() == "something of mine"


def test_places_that_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(InputError, match=r"pipe\.html is there already"):
        output.check_place(tmp_path / "pipe.html")
    with pytest.raises(InputError, match="is a directory"):
        output.check_place(tmp_path)
    for nowhere in ("/nowhere/at/all.html", "/proc/report.html"):
        with pytest.raises(InputError, match="where you may write"):
            output.check_place(Path(nowhere))


def test_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Path("/data/calc_12.hdf5")
    assert output.place(store, None) == tmp_path / "report_12.html"
    assert output.place(store, tmp_path) == tmp_path / "report_12.html"
    assert output.place(store, Path("x.html")) == tmp_path / "x.html"


@pytest.mark.parametrize(
    "name, files, words",
    [
        ("job.ini", [], "write --report behind the job files"),
        ("x.html", ["h.ini", "r.ini"], "give a directory"),
        ("/nowhere/x.html", ["h.ini"], "where you may write"),
    ],
)
def test_reports_that_oq_run_refuses(name: str, files: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        check_report(name, None, files, False)


# ---- which job


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Results and a job table, with a job of somebody else and one that runs."""
    database = tmp_path / "db.sqlite3"
    (tmp_path / "openquake.cfg").write_text(f"[dbserver]\nhost = 127.0.0.1\nfile = {database}\n")
    monkeypatch.setenv("OQ_CONFIG_FILE", str(tmp_path / "openquake.cfg"))
    monkeypatch.setenv("OQ_DATADIR", str(tmp_path / "oqdata"))
    monkeypatch.delenv("OQ_DATABASE", raising=False)
    (tmp_path / "oqdata").mkdir()
    with contextlib.closing(sqlite3.connect(database)) as table, table:
        table.execute("CREATE TABLE job (id INTEGER, user_name, status, ds_calc_dir)")
        table.executemany(
            "INSERT INTO job VALUES (?, ?, ?, ?)",
            [
                (3, "anna", "complete", str(tmp_path / "anna" / "calc_3")),
                (4, "anna", "executing", str(tmp_path / "anna" / "calc_4")),
                (5, "anna", "deleted", str(tmp_path / "anna" / "calc_5")),
                (6, "me", "failed", str(tmp_path / "oqdata" / "calc_6")),
            ],
        )
    datastore(tmp_path / "oqdata" / "calc_6.hdf5", "mine", results=False)
    yield tmp_path


@pytest.mark.parametrize(
    "job, words",
    [
        ("3", "job 3 of anna: its datastore {home}/anna/calc_3.hdf5 is not there any more"),
        ("4", "calc_4 is executing; wait for its end (oq-run --watch)"),
        ("5", "job 5: {home}/oqdata/calc_5.hdf5: No such file or directory; oq engine --lhc"),
        ("-2", "job -2: {home}/oqdata has 1 job"),
        ("many", "many is no number of a job; oq engine --lhc lists them"),
        ("x.hdf5", "job x.hdf5: its datastore {home}/x.hdf5 is not there any more"),
        ("pipe.hdf5", "job pipe.hdf5: its datastore {home}/pipe.hdf5 is no file"),
        ("~nosuch/x.hdf5", "~nosuch/x.hdf5: there is no such user"),
        ("6 ~nosuch/x.html", "~nosuch/x.html: there is no such user"),
        ("db.hdf5", "job db.hdf5: its datastore {home}/db.hdf5 is damaged; run that job again"),
    ],
)
def test_one_line(home: Path, monkeypatch: pytest.MonkeyPatch, job: str, words: str) -> None:
    monkeypatch.chdir(home)
    os.mkfifo(home / "pipe.hdf5")
    (home / "db.hdf5").write_bytes(struct.pack("100d", *range(100)))
    done = CliRunner().invoke(report.main, job.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"oq-report: {words.format(home=home)}")
    assert done.stderr.count("\n") == 1


def test_a_job_of_another_user_that_may_not_be_read(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "anna").mkdir()
    datastore(home / "anna" / "calc_3.hdf5", "hers")

    def refuse(path: Path, name: str) -> None:  # the tests may run as root
        raise InputError(f"{name}: {path}: Permission denied; its owner must let you read it")

    monkeypatch.setattr("oq_runtime.engine.jobtable.check_datastore", refuse)
    done = CliRunner().invoke(report.main, ["3"])
    assert done.exit_code == 2 and done.stderr.startswith("oq-report: job 3 of anna: ")


def test_the_state_is_that_of_the_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    with h5py.File(home / "oqdata" / "calc_6.hdf5", "r+") as file:
        del file[kept.GROUP]
    done = CliRunner().invoke(report.main, ["-1"])
    assert done.output == f"{home}/report_6.html\n"
    shown = "".join(Page((home / "report_6.html").read_text()).words)
    assert "The job is failed" in shown and "none: the engine ran it alone" in shown


@pytest.mark.slow
def test_to_stdout(home: Path) -> None:
    """What the engine prints meanwhile is no part of the page."""
    command = [*processes.python("oq_runtime.commands.report"), "6", "-"]
    done = subprocess.run(command, cwd=home, capture_output=True, check=True)
    assert done.stdout.startswith(b"<!doctype html>") and done.stdout.endswith(b"</html>\n")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=home, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"oq-report: stdout: No space left on device\n"
    assert not list(home.glob("*.html"))


def test_no_matplotlib(home: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; sys.argv = ['oq-report', '6']\n"
    code += "from oq_runtime.commands.report import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "need matplotlib, and it cannot be loaded" in done.stderr
    assert done.stderr.count("\n") == 1 and not (home / "report_6.html").exists()


# ---- pictures


@pytest.mark.parametrize("lanes", [2, 40, 300])
def test_lanes_fit_on_a_page(lanes: int) -> None:
    spans = [draw.Span(n, 0.0, 1.0, n % 3) for n in range(lanes)]
    names = [f"{HOSTILE} {n}" for n in range(lanes)]
    picture = base64.b64decode(draw.lanes(names, spans, ["a", HOSTILE, "b"], 1.0).partition(",")[2])
    height = re.search(r'height="([\d.]+)pt"', picture.decode())
    assert height and float(height[1]) <= 8 * 72


def test_curves_of_nothing_are_drawn() -> None:
    for values in ([0.0, 0.0], [numpy.nan, numpy.inf]):
        found = draw.curves([draw.Curve("", [1.0, 2.0], values)], "x", "y")
        assert found.startswith("data:image/svg+xml")
