"""The reports of twelve jobs of the engine's corpus, one for each calculation mode.

    python -m tests.reports [--browser] [DIRECTORY [JOB ...]]

Each job is run by ``oq-run --report --exports csv``, and the figures below its pictures are
compared with the files that the engine has exported. In a browser, where there is one, every
picture must be drawn, and nothing be asked for, and a telephone has room for the page; a screenshot
of each page is kept in the directory.
Exit code 1 when a figure differs, or an output that a mode has is not in its report; 77 when
``--browser`` asks for a browser and there is none, with the reason in one line.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from tests.conformance.corpus import corpus_dir
from tests.system.browser import Browser

#: job -> the outputs that its report must show
JOBS = {
    "classical/case_18/job": "hcurves hmaps uhs",
    "disagg/case_1/job": "disagg",
    "event_based/case_16/job": "ruptures avg_gmf",
    "scenario/case_21/job": "avg_gmf",
    "classical_risk/case_1/job": "avg_losses loss_curves",
    "classical_bcr/case_2/job": "bcr",
    "classical_damage/case_1/job_continuous": "damages",
    "event_based_risk/reinsurance_1/job": "aggcurves avg_losses",
    "event_based_damage/case_14/job": "aggcurves damages",
    "scenario_risk/case_8/job": "avg_losses",
    "scenario_damage/case_12/job": "avg_gmf damages",
    "multi_risk/case_1/job_2": "agg_risk",
}
CANNOT_RUN = 77
#: of the browser, in pixels
SCREEN = (1280, 1024)
#: the exports have six digits
CLOSE = 2e-5
#: what a browser says of the pictures of a page, and of all that it asked for
SEEN = """
const images = [...document.images];
return Promise.allSettled(images.map(one => one.decode())).then(all => ({
    pictures: images.length,
    drawn: all.filter((one, n) => one.status == "fulfilled" && images[n].naturalWidth > 300).length,
    outputs: [...document.querySelectorAll("figure")].map(one => one.dataset.output),
    asked: performance.getEntriesByType("resource").map(one => one.name)
        .filter(name => !name.startsWith("data:")),
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
}));
"""


@dataclass
class Figure:
    """A picture of a page: its output and title, the head and the rows of its figures."""

    output: str
    title: str = ""
    rows: list[list[str]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What is behind the name of the output."""
        return self.output.partition(" ")[2]


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, words, rows of tables, figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.figures: list[Figure] = []
        self.inside: Figure | None = None
        self.within = ""  # the tag whose text comes
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within = tag
        if tag == "figure":
            self.inside = Figure(str(dict(attrs)["data-output"]))
            self.figures.append(self.inside)
        elif tag == "tr":
            self.rows.append([])
            if self.inside:
                self.inside.rows.append(self.rows[-1])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.within = ""
        if tag == "figure":
            self.inside = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.within == "figcaption" and self.inside:
            self.inside.title += data
        elif self.within in ("td", "th"):
            self.rows[-1][-1] += data

    def pictures(self) -> list[str]:
        return [str(found["src"]) for tag, found in self.tags if tag == "img"]


# ---- the figures of a picture, and those that the engine has exported

Pairs = Iterator[tuple[str, str]]
Row = dict[str, str]


def exported(folder: Path, pattern: str) -> list[Row]:
    """The rows of the one exported file that a pattern finds.

    :raises FileNotFoundError: where the engine does not export it in this mode
    """
    paths = list(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(pattern)
    [path] = paths
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def at(rows: list[Row], lon: str, lat: str) -> Row:
    """The row of a place."""
    there = float(lon), float(lat)
    return min(rows, key=lambda row: math.dist(there, (float(row["lon"]), float(row["lat"]))))


def same(one: str, other: str) -> bool:
    """Whether two figures are the same, of which one may have fewer digits."""
    return math.isclose(float(one), float(other), rel_tol=1e-4)


def hcurves(figure: Figure, folder: Path) -> Pairs:
    imt = figure.title.removeprefix("Hazard curves, ")
    head, *rows = figure.rows
    for column, label in enumerate(head[1:], 1):
        found = re.fullmatch(r"([\w.-]+), site (\d+)(?: \((.*)°, (.*)°\))?", label)
        assert found, label
        curves = exported(folder, f"hazard_curve-{found[1]}-{imt}_*.csv")
        curve = at(curves, found[3], found[4]) if found[3] else curves[int(found[2])]
        poes = [value for name, value in curve.items() if name.startswith("poe-")]
        yield from zip([row[column] for row in rows], poes, strict=True)


def hmaps(figure: Figure, folder: Path) -> Pairs:
    found = re.fullmatch(r"Hazard map, (\S+) (\S+), probability (\S+)", figure.title)
    assert found
    rows = exported(folder, f"hazard_map-{found[1]}_*.csv")
    names = [name for name in rows[0] if name.startswith(f"{found[2]}-")]
    [name] = [name for name in names if same(name.removeprefix(f"{found[2]}-"), found[3])]
    for _, lon, lat, value in figure.rows[1:]:
        yield value, at(rows, lon, lat)[name]


def uhs(figure: Figure, folder: Path) -> Pairs:
    found = re.fullmatch(r"Uniform hazard spectra, (\S+), site \d+ \((.*)°, (.*)°\)", figure.title)
    assert found
    row = at(exported(folder, f"hazard_uhs-{found[1]}_*.csv"), found[2], found[3])
    values = [value for name, value in row.items() if "~" in name]
    shown = [row[column] for column in range(1, len(figure.rows[0])) for row in figure.rows[1:]]
    yield from zip(shown, values, strict=True)


#: columns of realizations
RLZS = [f"rlz{number}" for number in range(100)]


def disagg(figure: Figure, folder: Path) -> Pairs:
    found = re.search(r", ([\w. -]+), (\S+), site 0, probability (\S+)$", figure.title)
    assert found
    of_rlz = found[1] == "first realization"
    rows = [
        row
        for row in exported(folder, f"{figure.kind}{'' if of_rlz else f'-{found[1]}'}-0_*.csv")
        if row["imt"] == found[2] and same(row["poe"], found[3])
    ]
    parts = figure.kind.lower().split("_")
    for *bins, value in figure.rows[1:]:
        [row] = [
            row
            for row in rows
            if all(same(row[part], middle) for part, middle in zip(parts, bins, strict=True))
        ]
        yield value, next(row[name] for name in row if name in (found[1], *RLZS))


def ruptures(figure: Figure, folder: Path) -> Pairs:
    rows = {row["rup_id"]: row for row in exported(folder, "ruptures_*.csv")}
    for number, _, _, magnitude, events in figure.rows[1:]:
        yield magnitude, rows[number]["mag"]
        yield events, rows[number]["multiplicity"]


def avg_gmf(figure: Figure, folder: Path) -> Pairs:
    imt = figure.title.rpartition(", ")[2]
    rows = exported(folder, "avg_gmf_*.csv")
    for _, lon, lat, value in figure.rows[1:]:
        row = at(rows, lon, lat)
        # places without any are not exported
        there = abs(float(row["lon"]) - float(lon)) + abs(float(row["lat"]) - float(lat)) < 1e-4
        yield value, (row.get(imt) or row[f"gmv_{imt}"]) if there else "0"


def avg_losses(figure: Figure, folder: Path) -> Pairs:
    rows = exported(folder, "avg_losses-*_*.csv")
    yield from of_assets(figure, rows, figure.kind)


def of_assets(figure: Figure, rows: list[Row], name: str) -> Pairs:
    by_id = {row["asset_id"]: row for row in rows}
    for asset, _, _, value in figure.rows[1:]:
        if asset == "all":
            yield value, str(math.fsum(float(row[name]) for row in rows))
        else:
            yield value, by_id[asset][name]


def bcr(figure: Figure, folder: Path) -> Pairs:
    what = figure.title.rpartition(", ")[2]
    yield from of_assets(figure, exported(folder, f"bcr-{what}_*.csv"), "bcr")


def aggcurves(figure: Figure, folder: Path) -> Pairs:
    rows = [row for row in exported(folder, "aggcurves-_*.csv") if row["loss_type"] == figure.kind]
    by_period = {float(row["return_period"]): row for row in rows}
    for period, value, *_ in figure.rows[1:]:
        yield value, by_period[float(period)]["loss_value"]


def loss_curves(figure: Figure, folder: Path) -> Pairs:
    found = re.fullmatch(r"Loss curve of asset (\S+), (\S+), (\S+)", figure.title)
    assert found
    rows = [
        row
        for row in exported(folder, f"loss_curves-{found[3]}_*.csv")
        if row["asset_id"] == found[1] and row["loss_type"] == found[2]
    ]
    for (loss, poe), row in zip(figure.rows[1:], rows, strict=True):
        yield loss, row["loss_value"]
        yield poe, row["poe"]


def damages(figure: Figure, folder: Path) -> Pairs:
    """Their sums; the engine exports those of many events as a table of its own."""
    if figure.title.endswith((" year", " years")):
        rows = exported(folder, "aggrisk-_*.csv")
        [total] = [row for row in rows if row["loss_type"] == figure.kind]
        for state, value in figure.rows[1:]:
            yield value, total[state]
        return
    rows = exported(folder, "*damages-*_*.csv")
    for state, value in figure.rows[1:]:
        yield value, str(math.fsum(float(row[f"{figure.kind}-{state}"]) for row in rows))


def agg_risk(figure: Figure, folder: Path) -> Pairs:
    rows = {row["peril"]: row for row in exported(folder, "agg_risk*.csv")}
    for peril, value in figure.rows[1:]:
        yield value, rows[peril][figure.kind]


CHECKS: dict[str, Callable[[Figure, Path], Pairs]] = {
    check.__name__: check
    for check in (hcurves, hmaps, uhs, disagg, ruptures, avg_gmf, avg_losses, bcr, aggcurves,
                  loss_curves, damages, agg_risk)
}  # fmt: skip


def differing(figure: Figure, folder: Path) -> tuple[int, list[str]]:
    """How many figures were compared, and those that differ."""
    pairs = list(CHECKS[figure.output.partition(" ")[0]](figure, folder))
    wrong = [
        f"{figure.title}: {shown} and not {there}"
        for shown, there in pairs
        if not math.isclose(float(shown), float(there), rel_tol=CLOSE, abs_tol=1e-30)
        # the engine has none for the assets of which it knows nothing
        and not (math.isnan(float(shown)) and math.isnan(float(there)))
    ]
    return len(pairs), wrong


# ---- the run


def report_of(job: str, out: Path) -> tuple[Path, Path]:
    """Run a job; return its report, and the folder of its exports."""
    folder = out / job.replace("/", "__")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (out / "openquake.cfg").write_text(
        f"[dbserver]\nhost = 127.0.0.1\nfile = {out}/db.sqlite3\n"
        "[oq_runtime]\ncode = import oq_runtime.activate\n"
    )
    places = {"OQ_CONFIG_FILE": str(out / "openquake.cfg"), "OQ_DATADIR": str(out / "oqdata")}
    env = os.environ | places
    path = corpus_dir() / f"{job}.ini"
    command = [sys.executable, "-m", "oq_runtime.commands.run", str(path), "--json", "--report"]
    command += ["--exports", "csv", "--export-dir", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads(done.stdout)["jobs"]
    return Path(row["report"]), folder


def judge(job: str, out: Path, browser: Browser | None) -> list[str]:
    """Run a job and check its report; return what is wrong, and print what was compared."""
    report, folder = report_of(job, out)
    page = Page(report.read_text())
    problems = [word for word in page.words if "could not be drawn" in word]
    compared: dict[str, int] = {}
    for figure in page.figures:
        name = figure.output.partition(" ")[0]
        if name in CHECKS:
            try:
                number, wrong = differing(figure, folder)
            except FileNotFoundError:
                continue  # below it is seen whether that is well
            except Exception as exc:
                number, wrong = 0, [f"{figure.title}: {type(exc).__name__}: {exc}"]
            problems += wrong
            compared[name] = compared.get(name, 0) + number
    for wanted in JOBS[job].split():
        if not compared.get(wanted):
            problems.append(f"{wanted} is not in the report")
    if browser:
        browser.open(f"file://{report}")
        seen = browser.run(SEEN)
        said = browser.complaints()
        if seen["drawn"] != len(page.figures) or seen["asked"] or said:
            problems.append(f"the browser: {seen} {said}")
        browser.picture(folder.name)
        browser.resize(400, 800)
        if browser.run(SEEN)["wide"]:
            problems.append("on a telephone it is wider than the screen")
        browser.resize(*SCREEN)
    told = ", ".join(f"{number} of {name}" for name, number in compared.items())
    print(f"{job}: {len(page.figures)} pictures; figures compared: {told}", flush=True)
    return [f"{job}: {problem}" for problem in problems]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("directory", nargs="?", default="build/reports")
    parser.add_argument("job", nargs="*", default=list(JOBS))
    asked = parser.parse_args()
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing and asked.browser:
        print(f"reports: left out: not installed: {', '.join(missing)}")
        return CANNOT_RUN
    out, wanted = Path(asked.directory).resolve(), asked.job
    (out / "oqdata").mkdir(parents=True, exist_ok=True)
    chosen = [job for job in wanted if (corpus_dir() / f"{job}.ini").exists()]
    if absent := set(wanted) - set(chosen):
        print(f"not in the corpus of this engine: {' '.join(sorted(absent))}")
    if missing:
        print(f"not opened in a browser; not installed: {', '.join(missing)}")
        problems = [problem for job in chosen for problem in judge(job, out, None)]
    else:
        with Browser(out) as browser:
            problems = [problem for job in chosen for problem in judge(job, out, browser)]
    for problem in problems:
        print(problem)
    print(f"reports={len(chosen)} problems={len(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
