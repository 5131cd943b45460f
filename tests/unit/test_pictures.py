"""What the pictures of a report show, read as people do: marks by the ticks of the axes."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import h5py
import numpy
import pytest

from oq_runtime.report import draw
from oq_runtime.report.draw import Curve, Span
from oq_runtime.report.page import made
from tests.reports import Page
from tests.unit.test_report import LEVELS, datastore

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
#: in a picture a place has six digits behind the point, and is some hundred points from an end
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words stay words; else they are outlines of letters."""
    monkeypatch.setitem(draw.STYLE, "svg.fonttype", "none")


@dataclass
class Axis:
    """A title, and what ticks say; places are points of the picture, from its left or its top."""

    title: str
    ticks: list[tuple[float, str]]

    @property
    def labels(self) -> list[str]:
        return [label for _, label in self.ticks]

    @property
    def logarithmic(self) -> bool:
        """Whether equal ways are equal factors; ticks that fit neither are wrong."""
        found = [log for log in (False, True) if self._fits(log)]
        assert len(found) == 1, self.ticks
        return found[0]

    def read(self, place: float, *, log: bool = False) -> float:
        """The value at a place, by the first and the last tick; a longitude may be above 180."""
        (begin, *_, end), (least, *_, most) = zip(*self._scale(log), strict=True)
        value = least + (place - begin) * (most - least) / (end - begin)
        return float(10**value if log else value)

    def place(self, value: float) -> float:
        (begin, *_, end), (least, *_, most) = zip(*self._scale(False), strict=True)
        return float(begin + (value - least) * (end - begin) / (most - least))

    def _scale(self, log: bool) -> list[tuple[float, float]]:
        values = numpy.array([float(label) for label in self.labels])
        if self.title == "longitude (°)":
            values = numpy.unwrap(values, period=360)
        values = numpy.log10(values) if log else values
        return list(zip((at for at, _ in self.ticks), values.tolist(), strict=True))

    def _fits(self, log: bool) -> bool:
        if log and any(float(label) <= 0 for label in self.labels):
            return False
        scale = self._scale(log)
        values = [10**value if log else value for _, value in scale]
        close = 1e-4 * max(map(abs, values))
        return [self.read(at, log=log) for at, _ in scale] == pytest.approx(values, abs=close)


@dataclass
class Mark:
    """A point, a line or a box: its corners, and how it is drawn."""

    corners: list[tuple[float, float]]
    colour: str
    dashed: bool = False

    @property
    def look(self) -> tuple[str, bool]:
        return self.colour, self.dashed

    @property
    def edges(self) -> tuple[float, float, float, float]:
        """Left, right, top, bottom."""
        across, down = zip(*self.corners, strict=True)
        return min(across), max(across), min(down), max(down)


class Drawn:
    """A picture; a mark that is drawn later is above the others."""

    def __init__(self, address: str) -> None:
        self.root = ElementTree.fromstring(base64.b64decode(address.partition(",")[2]))
        self.groups = {str(group.get("id")): group for group in self.root.iter(f"{SVG}g")}
        self.x, self.y = self.axis(1), self.axis(2)

    def axis(self, number: int) -> Axis:
        """Those of the picture itself come first, then two of its scale of colours."""
        title, ticks = "", []
        for group in self.groups.get(f"matplotlib.axis_{number}", ()):
            found = [text.text or "" for text in group.iter(f"{SVG}text")]
            if group.get("id", "").startswith("text_"):
                [title] = found
            elif found:
                [label] = found
                [at] = group.iter(f"{SVG}use")
                side = "x" if group.get("id", "").startswith("xtick_") else "y"
                ticks.append((float(str(at.get(side))), label.replace("\N{MINUS SIGN}", "-")))
        return Axis(title, sorted(ticks))

    def marks(self, kind: str, within: str = "axes_1") -> list[Mark]:
        """Those of a kind, as matplotlib calls it, without the axes' own."""
        return [
            mark
            for group in self.groups[within]
            if re.fullmatch(rf"{kind}_\d+", group.get("id", ""))
            for mark in self._marks(group)
            if mark.colour != "#ffffff" and len(mark.corners) != 2  # the ground, and the frame
        ]

    def _marks(self, group: Element) -> Iterator[Mark]:
        shapes = {f"#{path.get('id')}": path for path in group.iter(f"{SVG}path")}
        for use in group.iter(f"{SVG}use"):
            right, down = float(str(use.get("x"))), float(str(use.get("y")))
            corners = _corners(shapes[str(use.get(LINK))]) if "Poly" in group.get("id", "") else []
            moved = [(x + right, y + down) for x, y in corners] or [(right, down)]
            yield Mark(moved, *_look(use))
        for path in group.iter(f"{SVG}path"):
            if not path.get("id"):
                yield Mark(_corners(path), *_look(path))

    @property
    def legend(self) -> list[tuple[str, tuple[str, bool]]]:
        """Names with the colour beside them, and whether a line is dashed; in their order."""
        [inside] = [group for name, group in self.groups.items() if name.startswith("legend_")]
        found = []
        for text in inside.iter(f"{SVG}text"):
            x, y = float(str(text.get("x"))), float(str(text.get("y")))
            beside = [
                mark
                for group in inside
                if not group.get("id", "").startswith("text_")
                for mark in self._marks(group)
                if 0 < x - mark.edges[1] < 10 and abs(y - mark.edges[3]) < 6
            ]
            assert len(beside) == 1, text.text
            found.append((x, y, text.text or "", beside[0].look))
        return [(text, look) for _, _, text, look in sorted(found)]

    def brightness(self, x: float, y: float) -> float:
        """Of the coloured cell at a place."""
        from matplotlib.image import imread

        image = next(self.root.iter(f"{SVG}image"))
        left, top, width, height = (
            float(str(image.get(name))) for name in ("x", "y", "width", "height")
        )
        upside = re.fullmatch(r"scale\(1 -1\) translate\(0 -([\d.]+)\)", image.get("transform", ""))
        assert upside
        pixels = imread(io.BytesIO(base64.b64decode(str(image.get(LINK)).partition(",")[2])))
        row = (float(upside[1]) - y - top) / height * len(pixels)
        column = (x - left) / width * len(pixels[0])
        return float(pixels[int(row), int(column), :3].sum())


def _corners(path: Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", str(path.get("d")))]


def _look(element: Element) -> tuple[str, bool]:
    """The colour; what has no other one is black."""
    style = dict(part.split(": ", 1) for part in str(element.get("style", "")).split("; ") if part)
    filled = style.get("fill", "#000000")
    return style["stroke"] if filled == "none" else filled, "stroke-dasharray" in style


# ---- maps


def places(drawn: Drawn) -> list[tuple[float, float]]:
    """Longitude and latitude of each point of a map, the undermost first."""
    assert (drawn.x.title, drawn.y.title) == ("longitude (°)", "latitude (°)")
    return [
        (drawn.x.read(x), drawn.y.read(y))
        for mark in drawn.marks("PathCollection")
        for x, y in mark.corners
    ]


def test_a_map_has_the_east_on_the_right_and_the_north_on_top() -> None:
    drawn = Drawn(draw.points([10.0, 14.0, 12.0], [40.0, 41.0, 43.0], [1.0, 2.0, 3.0], "PGA (g)"))
    (west, south), (east, _), (_, north) = (mark.corners[0] for mark in drawn.marks("PathC.*"))
    assert west < east and north < south  # from the top
    assert drawn.axis(4).title == "PGA (g)"
    for found, there in zip(places(drawn), [(10, 40), (14, 41), (12, 43)], strict=True):
        assert found == pytest.approx(there, abs=CLOSE)


def test_a_degree_of_longitude_is_as_long_as_it_is_there() -> None:
    drawn = Drawn(draw.points([10.0, 11.0], [60.0, 60.5], [1.0, 2.0], "x"))
    across = abs(drawn.x.place(11) - drawn.x.place(10))
    assert across / abs(drawn.y.place(61) - drawn.y.place(60)) == pytest.approx(0.5, abs=0.01)


def test_the_date_line_runs_through_a_map() -> None:
    """Places on both its sides are beside each other, and not around the whole earth."""
    drawn = Drawn(draw.points([179.5, -179.5], [10.0, 11.0], [1.0, 2.0], "x"))
    (west, _), (east, _) = places(drawn)
    assert [west, east] == pytest.approx([179.5, 180.5], abs=CLOSE)
    assert "-180" in drawn.x.labels and "0" not in drawn.x.labels
    assert all(-180 <= float(label) <= 180 for label in drawn.x.labels)


def test_greenwich_runs_through_a_map() -> None:
    drawn = Drawn(draw.points([-1.0, 1.0], [50.0, 51.0], [1.0, 2.0], "x"))
    assert [lon for lon, _ in places(drawn)] == pytest.approx([-1, 1], abs=CLOSE)
    assert "0" in drawn.x.labels


@pytest.mark.parametrize("values, wide", [([3.0, 1.0, 2.0], False), ([1.0, 1e-3, 0.05], True)])
def test_colours_of_a_map(values: list[float], wide: bool) -> None:
    """The greatest is on top, and brightest; those far below it have colours as well."""
    drawn = Drawn(draw.points([10.0, 11.0, 12.0], [0.0, 1.0, 0.0], values, "x"))
    assert [round(lon) for lon, _ in places(drawn)] == [11, 12, 10]
    colours = [int(mark.colour[1:3], 16) for mark in drawn.marks("PathCollection")]
    assert colours[0] < colours[1] - 50 < colours[2] - 100
    assert drawn.axis(4).logarithmic is wide


@pytest.mark.parametrize("most", [51.0, 90.0, 1e3, 1e9])
def test_a_wide_scale_of_colours_can_be_read(most: float) -> None:
    scale = Drawn(draw.points([1.0, 2.0], [1.0, 2.0], [0.15, 0.15 * most], "x")).axis(4)
    assert scale.logarithmic and scale.labels == [f"{float(label):g}" for label in scale.labels]


HYPOCENTRES = [(178.9, -17.0, 10.0), (-178.8, -18.5, 20.0), (179.4, -16.25, 30.0)]
ASSETS = [(178.0, -17.0), (-178.5, -18.25), (179.25, -16.0)]


def with_maps(path: Path) -> Path:
    """A datastore with each output that is drawn on a map."""
    from openquake.baselib import hdf5
    from openquake.risklib.asset import AssetCollection, TagCollection

    datastore(path, "maps")
    kinds = [("id", "i8"), ("mag", "f4"), ("n_occ", "i4"), ("hypo", "f8", 3)]
    rows = [(n, 5.0 + n, 1, where) for n, where in enumerate(HYPOCENTRES)]
    found = numpy.array(
        [(b"a%d" % n, *where) for n, where in enumerate(ASSETS)],
        [("id", "S9"), ("lon", "f8"), ("lat", "f8")],
    )
    assets = object.__new__(AssetCollection)
    vars(assets).update(
        array=found, tagcol=TagCollection(["taxonomy"]), time_event="avg", occupancy_periods="",
        tot_sites=3, fields=[], occfields=[], tagnames=[],
    )  # fmt: skip
    with h5py.File(path, "r+") as file:
        file["ruptures"] = numpy.array(rows, kinds)
        file["avg_gmf"] = numpy.array([[[0.2], [0.1], [0.3]]] * 2)
        file["avg_losses-rlzs/structural"] = [[30.0], [10.0], [20.0]]
        file["bcr-rlzs"] = numpy.array([[(2.0,)], [(3.0,)], [(1.0,)]], [("bcr", "f8")])
    with hdf5.File(str(path), "r+") as engines:
        engines["assetcol"] = assets
    return path


def test_maps_of_a_page_show_its_figures(tmp_path: Path) -> None:
    page = Page(made(with_maps(tmp_path / "calc_7.hdf5")))
    maps = {}
    for figure, address in zip(page.figures, page.pictures(), strict=True):
        head, *rows = figure.rows
        if "longitude" in head:
            columns = head.index("longitude"), head.index("latitude")
            listed = [[float(row[n]) for n in columns] for row in rows if row[0] != "all"]
            seen = [[(lon + 180) % 360 - 180, lat] for lon, lat in places(Drawn(address))]
            maps[figure.output] = len(seen)
            assert sorted(seen) == [pytest.approx(place, abs=CLOSE) for place in sorted(listed)]
    outputs = ("hmaps", "ruptures", "avg_gmf", "avg_losses structural", "bcr")
    assert maps == dict.fromkeys(outputs, 3)


# ---- diagrams

CURVES = [
    Curve("mean", LEVELS, [0.5, 0.1, 0.002]),
    Curve("quantile-0.15", LEVELS, [0.3, 0.05, 0.001], 0, True),
    Curve("rlz-007", LEVELS, [0.7, 0.4, 0.2], 4),
]


def check_named(drawn: Drawn, found: Sequence[Curve], *, log_x: bool, log_y: bool) -> None:
    """Each name in the legend is beside the look of the line that has the curve of that name."""
    by_look = {mark.look: mark for mark in drawn.marks("line2d")}
    assert [name for name, _ in drawn.legend] == [one.label for one in found]
    assert len(by_look) == len(found)
    for one, (_, look) in zip(found, drawn.legend, strict=True):
        across, down = zip(*by_look[look].corners, strict=True)
        assert look == (draw.COLOURS[one.colour].lower(), one.dashed)
        assert [drawn.x.read(x, log=log_x) for x in across] == pytest.approx(one.x, rel=CLOSE)
        assert [drawn.y.read(y, log=log_y) for y in down] == pytest.approx(one.y, rel=CLOSE)


@pytest.mark.parametrize("log_x, log_y", [(True, True), (True, False), (False, False)])
def test_curves(log_x: bool, log_y: bool) -> None:
    drawn = Drawn(draw.curves(CURVES, "PGA (g)", "probability", log_x=log_x, log_y=log_y))
    assert (drawn.x.title, drawn.y.title) == ("PGA (g)", "probability")
    assert (drawn.x.logarithmic, drawn.y.logarithmic) == (log_x, log_y)
    check_named(drawn, CURVES, log_x=log_x, log_y=log_y)


SPANS = [
    (0.2, 0.8),
    (0.5, 0.51),
    (3.0, 3.0),
    (0.15, 9.0),
    (100.0, 900.0),
    (1e-3, 1.0),
    (1e-30, 1.0),
]


@pytest.mark.parametrize("least, most", SPANS)
def test_a_logarithmic_axis_can_be_read(least: float, most: float) -> None:
    """Also where there is no power of ten on it; and its numbers have room."""
    values = numpy.geomspace(least, most, 5).tolist()
    drawn = Drawn(draw.curves([Curve("", values, values)], "x", "y"))
    for axis in (drawn.x, drawn.y):
        assert 2 <= len(axis.labels) <= 9 and axis.labels == [f"{float(n):g}" for n in axis.labels]
    wide = [6.0 * len(label) for label in drawn.x.labels]
    for (one, other), room in zip(
        itertools.pairwise(drawn.x.ticks), itertools.pairwise(wide), strict=True
    ):
        assert other[0] - one[0] > sum(room) / 2


def test_what_a_logarithmic_axis_has_no_place_for_is_left_out() -> None:
    found = Curve("", [0.0, *LEVELS, 10.0, 100.0], [1.0, 0.5, 0.1, 0.01, 0.0, math.nan])
    drawn = Drawn(draw.curves([found], "x", "y"))
    [line] = drawn.marks("line2d")
    read = [drawn.x.read(x, log=True) for x, _ in line.corners]
    assert read == pytest.approx(LEVELS, rel=CLOSE)


def test_hazard_curves_of_a_page_show_its_figures(tmp_path: Path) -> None:
    page = Page(made(datastore(tmp_path / "calc_7.hdf5", "curves")))
    drawn = Drawn(page.pictures()[0])
    head, *rows = page.figures[0].rows
    columns = [[float(row[n]) for row in rows] for n in range(len(head))]
    assert page.figures[0].output == "hcurves" and drawn.x.title == head[0] == "PGA (g)"
    assert drawn.y.title == "probability of exceedance in 50 years"
    found = [
        Curve(name, columns[0], values, number)
        for number, (name, values) in enumerate(zip(head[1:], columns[1:], strict=True))
    ]
    check_named(drawn, found, log_x=True, log_y=True)


def test_steps_hold_until_the_next_one() -> None:
    found = [Curve("a", [0, 1, 3], [0, 2, 1]), Curve("b", [0, 2, 4], [1, 3, 2], 1, True)]
    drawn = Drawn(draw.steps(found, "time (s)", "memory (GB)"))
    assert (drawn.x.title, drawn.y.title) == ("time (s)", "memory (GB)")
    held = [
        Curve("a", [0, 1, 1, 3, 3], [0, 0, 2, 2, 1]),
        Curve("b", [0, 2, 2, 4, 4], [1, 1, 3, 3, 2], 1, True),
    ]
    check_named(drawn, held, log_x=False, log_y=False)


def test_bars_are_as_high_as_their_values() -> None:
    drawn = Drawn(draw.bars(["none", "slight", "complete"], [3.0, 1.0, 2.0], "buildings"))
    assert (drawn.x.labels, drawn.y.title) == (["none", "slight", "complete"], "buildings")
    for (at, _), mark, value in zip(drawn.x.ticks, drawn.marks("patch"), [3, 1, 2], strict=True):
        left, right, top, bottom = mark.edges
        assert (left + right) / 2 == pytest.approx(at, abs=0.01)
        assert [drawn.y.read(top), drawn.y.read(bottom)] == pytest.approx([value, 0], abs=CLOSE)


def test_cells_have_rows_upwards() -> None:
    """As a disaggregation: the greatest is that of high magnitudes nearby."""
    values = [[1.0, 2.0, 5.0], [0.0, 4.0, 3.0]]
    magnitudes, distances = numpy.array([5.0, 6.0, 7.0, 8.0]), numpy.array([0.0, 10.0, 20.0])
    drawn = Drawn(
        draw.cells(("magnitude", magnitudes), ("distance (km)", distances), values, "probability")
    )
    assert (drawn.x.title, drawn.y.title) == ("magnitude", "distance (km)")
    assert drawn.axis(4).title == "probability"
    seen = {
        value: drawn.brightness(drawn.x.place(5.5 + column), drawn.y.place(5.0 + 10 * row))
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    }
    assert sorted(seen, key=lambda value: seen[value]) == sorted(seen)
    assert len(set(seen.values())) == len(seen)


# ---- where the time went


def test_lanes() -> None:
    """The first is on top; a colour is that of what ran, and black what did not count."""
    kinds = ["classical", "postclassical", "not there", "did not count"]
    spans = [Span(0, 0.0, 2.0, 0), Span(0, 2.0, 4.0, 1), Span(1, 1.0, 3.0, 3), Span(2, 0.5, 4.0, 0)]
    drawn = Drawn(draw.lanes(["a 0", "a 1", "b 0"], spans, kinds, 5.0))
    assert drawn.x.title == "time (s)" and drawn.y.labels == ["a 0", "a 1", "b 0"]
    assert [name for name, _ in drawn.legend] == ["classical", "postclassical", "did not count"]
    colours = {name: colour for name, (colour, _) in drawn.legend}
    assert len(set(colours.values())) == 3 and colours["did not count"] == "#000000"
    seen = set()
    for mark in drawn.marks("PolyCollection"):
        left, right, top, bottom = mark.edges
        [lane] = [n for n, (at, _) in enumerate(drawn.y.ticks) if top < at < bottom]
        times = (round(drawn.x.read(left), 3), round(drawn.x.read(right), 3))
        [kind] = [n for n, name in enumerate(kinds) if colours.get(name) == mark.colour]
        seen.add(Span(lane, *times, kind))
    assert seen == set(spans)


def test_shares_are_as_wide_as_their_parts() -> None:
    parts = [("computed", 0.6), ("not there", 0.0), ("ends of phases", 0.3), ("the engine", 0.1)]
    drawn = Drawn(draw.shares(parts))
    named = ["60.0 % computed", "30.0 % ends of phases", "10.0 % the engine"]
    assert [name for name, _ in drawn.legend] == named
    colours = [colour for _, (colour, _) in drawn.legend]
    boxes = [mark for mark in drawn.marks("patch") if mark.edges[1] > mark.edges[0]]
    assert [mark.colour for mark in boxes] == colours and len(set(colours)) == 3
    whole = boxes[-1].edges[1] - boxes[0].edges[0]
    wide = [(mark.edges[1] - mark.edges[0]) / whole for mark in boxes]
    assert wide == pytest.approx([0.6, 0.3, 0.1], abs=CLOSE)


# ---- what cannot be drawn


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize(
    "what, line",
    [
        ("store.branches", "Logic tree: branches: ZeroDivisionError: planted"),
        ("draw.lanes", "Where the time went: ZeroDivisionError: planted"),
        ("draw.curves", "hazard curves could not be drawn: ZeroDivisionError: planted"),
    ],
)
def test_what_cannot_be_made_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, line: str
) -> None:
    """And not the page: all other sections are there as they were."""
    path = datastore(tmp_path / "calc_7.hdf5", "half")
    whole = Page(made(path))
    monkeypatch.setattr(f"oq_runtime.report.{what}", broken)
    page = Page(made(path))
    assert [word for word in page.words if "planted" in word] == [line]
    lost: dict[str, Callable[[str], bool]] = {
        "store.branches": lambda output: False,
        "draw.lanes": lambda output: output not in ("hcurves", "hmaps"),
        "draw.curves": lambda output: output == "hcurves",
    }
    outputs = [figure.output for figure in whole.figures]
    assert [one.output for one in page.figures] == [one for one in outputs if not lost[what](one)]
    efficiency = [word for word in whole.words if word.startswith("slot efficiency")]
    assert len(efficiency) == 1 and efficiency[0] in page.words
