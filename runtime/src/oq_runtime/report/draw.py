"""Pictures for a page: matplotlib without a screen, one file of text per picture.

All of them are 360 points wide, as a telephone is, so that what is written in them is readable
there. Not covered: what is drawn (``results``, ``work``).
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from oq_runtime.errors import InputError
from oq_runtime.text import clean

os.environ["MPLBACKEND"] = "agg"  # the user's may need a screen, or not be there
try:
    import matplotlib
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as exc:
    raise InputError(
        f"the pictures of a report need matplotlib, and it cannot be loaded ({exc}); install it "
        "from the lock of the engine"
    ) from exc

WIDTH_IN, HEIGHT_IN = 5.0, 3.4
#: of Okabe and Ito, told apart by the colour-blind: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#BBBBBB"
#: part of a whole from which it is named
LEAST_PART = 0.001
#: even in lightness, read by the colour-blind and in grey
SCALE = "cividis"
#: points from which they are drawn as a picture in the picture
MANY_POINTS = 2000
#: names below bars
MOST_TICKS = 14
#: characters of a label
LABEL_CHARACTERS = 60
#: the greatest by the least value from which a scale of colours is logarithmic
WIDE_RANGE = 50.0
#: the end of a logarithmic axis by its begin from which powers of ten alone have a number
MANY_TENS = 100.0
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # of words of others
    "svg.fonttype": "path",
    "svg.hashsalt": "oq",  # the same page for the same job
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a diagram.

    ``style``: solid for what counts, dashed for what is beside it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def label(words: object) -> str:
    """Return words of others as a label; what begins with _ would have no place in a legend."""
    return clean(str(words), LABEL_CHARACTERS).lstrip("_") or "-"


def _plain(number: float, _position: int | None = None) -> str:
    return f"{number:g}"


def _picture(figure: Figure) -> str:
    """Return a picture as the address that has all of it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _axes(height_in: float = HEIGHT_IN) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_IN, height_in))
    return figure, figure.add_subplot()


def _logarithmic(axis: Any) -> None:
    least, most = axis.get_view_interval()
    # powers of ten alone would be one number there, or none
    steps = (1.0,) if most >= MANY_TENS * least else (1.0, 2.0, 5.0)
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_major_locator(LogLocator(subs=steps, numticks=7))
    axis.set_minor_formatter(NullFormatter())


def curves(
    found: Sequence[Curve], x: str, y: str, *, log_x: bool = True, log_y: bool = True
) -> str:
    """Draw curves; on a logarithmic axis what is not positive is left out.

    :param x: label of the axis, with its unit
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        seen = False
        for one in found:
            xs, ys = numpy.asarray(one.x, float), numpy.asarray(one.y, float)
            shown = numpy.isfinite(xs) & numpy.isfinite(ys)
            shown &= (xs > 0) | (not log_x)
            shown &= (ys > 0) | (not log_y)
            seen |= bool(shown.any())
            axes.plot(
                xs[shown],
                ys[shown],
                color=COLOURS[one.colour % len(COLOURS)],
                linestyle="--" if one.dashed else "-",
                linewidth=1.0 if one.dashed else None,
                marker="o" if shown.sum() < 3 else None,
                label=label(one.label),
            )
        axes.set(xlabel=x, ylabel=y)
        if log_x and seen:
            axes.set_xscale("log")
            _logarithmic(axes.xaxis)
        if log_y and seen:
            axes.set_yscale("log")
            _logarithmic(axes.yaxis)
        if len(found) > 1:
            axes.legend()
        return _picture(figure)


def bars(names: Sequence[str], values: Sequence[float], y: str, *, below: str = "") -> str:
    """Draw a bar for each name."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        axes.bar(range(len(names)), values, color=COLOURS[0], width=0.8)
        every = math.ceil(len(names) / MOST_TICKS) or 1
        slanted = sum(map(len, names[::every])) > MOST_TICKS * 3
        axes.set_xticks(
            range(0, len(names), every),
            [label(name) for name in names[::every]],
            rotation=35 if slanted else 0,
            ha="right" if slanted else "center",
        )
        axes.set(ylabel=y, xlabel=below)
        axes.grid(axis="x", visible=False)
        return _picture(figure)


def cells(x: tuple[str, Any], y: tuple[str, Any], values: Any, name: str) -> str:
    """Draw a value for each pair of bins.

    :param x: label and edges of the bins, one more than there are values
    :param values: rows for y
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        mesh = axes.pcolormesh(x[1], y[1], values, cmap=SCALE, rasterized=True)
        axes.set(xlabel=x[0], ylabel=y[0])
        axes.grid(visible=False)
        figure.colorbar(mesh, ax=axes, label=name, format=FuncFormatter(_plain))
        return _picture(figure)


def points(lons: Any, lats: Any, values: Any, name: str) -> str:
    """Draw a map: a point for each place, the greatest on top.

    A degree of longitude is as long as it is there; the date line may run through.

    :param lons: degrees
    :param name: of the values, with their unit
    """
    lons, lats = numpy.array(lons, float), numpy.asarray(lats, float)
    values = numpy.asarray(values, float)
    if numpy.ptp(lons) > 180:
        lons[lons < 0] += 360
    order = numpy.argsort(values, kind="stable")
    lons, lats, values = lons[order], lats[order], values[order]
    finite = values[numpy.isfinite(values)]
    positive = finite[finite > 0]
    norm = None
    if len(positive) and finite[0] >= 0 and positive[-1] > WIDE_RANGE * positive[0]:
        # what is far below the greatest would leave it no colours
        least = max(positive[0], positive[-1] / 1e4)
        norm, values = LogNorm(least, positive[-1]), numpy.maximum(values, least)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.0)
        size = min(40.0, max(2.0, 6000 / max(1, len(lons))))
        drawn = axes.scatter(
            lons,
            lats,
            c=values,
            s=size,
            cmap=SCALE,
            norm=norm,
            linewidths=0,
            rasterized=len(lons) > MANY_POINTS,
        )
        axes.set_aspect(1 / max(0.05, math.cos(math.radians(float(numpy.mean(lats))))), "datalim")
        degrees = FuncFormatter(lambda lon, _: _plain((lon + 180) % 360 - 180))
        axes.xaxis.set_major_formatter(degrees)
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set(xlabel="longitude (°)", ylabel="latitude (°)")
        bar = figure.colorbar(drawn, ax=axes, label=name, format=FuncFormatter(_plain))
        if norm:
            _logarithmic(bar.ax.yaxis)
        return _picture(figure)


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """Draw how a whole is divided: a bar with its parts.

    :param parts: names, and their parts of 1; what is hardly there is not named
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(0.9 + 0.22 * sum(part >= LEAST_PART for _, part in parts))
        left = 0.0
        for (name, part), colour in zip(parts, (*COLOURS, GREY), strict=False):
            named = f"{100 * part:.1f} % {label(name)}" if part >= LEAST_PART else "_"
            axes.barh([0], [part], left=[left], color=colour, label=named)
            left += part
        axes.set(xlim=(0, 1))
        axes.set_axis_off()
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0))
        return _picture(figure)


@dataclass(frozen=True, slots=True)
class Span:
    """A time in a lane; ``kind``: the number of what it was."""

    lane: int
    begins: float
    ends: float
    kind: int


def lanes(names: Sequence[str], spans: Sequence[Span], kinds: Sequence[str], end_s: float) -> str:
    """Draw what ran when: a lane for each name.

    :param kinds: what a span may be; in the order of the colours, the last one in black
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(min(8.0, 1.2 + 0.16 * len(names)))
        axes.grid(axis="y", visible=False)
        least = end_s / 2000  # or it would not be seen
        used = []
        for kind, name in enumerate(kinds):
            boxes = [
                [
                    (one.begins, one.lane - 0.4),
                    (max(one.ends, one.begins + least), one.lane - 0.4),
                    (max(one.ends, one.begins + least), one.lane + 0.4),
                    (one.begins, one.lane + 0.4),
                ]
                for one in spans
                if one.kind == kind
            ]
            if boxes:
                last = kind == len(kinds) - 1
                colour = "#000000" if last else COLOURS[kind % (len(COLOURS) - 1)]
                many = len(spans) > MANY_POINTS
                used.append(
                    axes.add_collection(
                        PolyCollection(
                            boxes,
                            facecolors=colour,
                            edgecolors="white",
                            linewidths=0 if many else 0.3,
                            label=label(name),
                            rasterized=many,
                        )
                    )
                )
        axes.set(xlim=(0, end_s or 1), ylim=(len(names) - 0.5, -0.5), xlabel="time (s)")
        step = math.ceil(len(names) / 40) or 1
        axes.set_yticks(range(0, len(names), step), [label(name) for name in names[::step]])
        figure.legend(handles=used, loc="outside upper left", ncols=2)
        return _picture(figure)


def steps(found: Sequence[Curve], x: str, y: str) -> str:
    """Draw values that hold until the next one."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(2.6)
        for one in found:
            axes.step(
                one.x, one.y, where="post", color=COLOURS[one.colour % len(COLOURS)],
                linestyle="--" if one.dashed else "-", linewidth=1.2, label=label(one.label),
                rasterized=len(one.x) > MANY_POINTS,
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        if len(found) > 1:
            axes.legend()
        return _picture(figure)
