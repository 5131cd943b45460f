"""Pictures of what a job has calculated, each with the figures that are drawn in it.

A picture is made where its output is in the datastore of the job itself. Figures are those of the
engine; means over realizations are made here only where the engine leaves them to its exports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from oq_runtime.report import draw
from oq_runtime.report.draw import Curve
from oq_runtime.report.store import Store, Table
from oq_runtime.text import clean

#: intensity measures, sites, probabilities, loss types and realizations that are drawn
MOST_IMTS, MOST_SITES, MOST_POES, MOST_LOSSES, MOST_RLZS = 4, 3, 2, 4, 5
#: rows of a table of places
MOST_PLACES = 20
UNITS = {"PGA": "g", "SA": "g", "PGV": "cm/s", "PGD": "cm", "IA": "m/s", "CAV": "g·s"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A map of an output.

    ``output``: as the engine calls it; ``image``: an address that has all of it.
    """

    output: str
    title: str
    image: str
    table: Table


Pictures = Iterator[Picture]


@dataclass(frozen=True, slots=True)
class Places:
    """Where sites are, and their numbers."""

    lons: Any
    lats: Any
    numbers: Any

    def name(self, site: int) -> str:
        return f"site {self.numbers[site]} ({self.lons[site]:.3f}°, {self.lats[site]:.3f}°)"


def unit(imt: str) -> str:
    """Return an intensity measure with its unit."""
    found = UNITS.get(imt.partition("(")[0])
    return f"{clean(imt)} ({found})" if found else clean(imt)


def figure(value: float) -> str:
    """Return a figure with the digits that the engine's exports have."""
    return f"{float(value):.5E}"


def _sites(store: Store, number: int) -> Places:
    """Return where so many sites are: those of the job, or all that the hazard has."""
    sites = store.file["sitecol"]
    if len(sites) != number:
        sites = store.file.get("complete", sites.complete)
    return Places(sites.lons, sites.lats, sites.sids)


def _statistics(store: Store, name: str) -> tuple[Any, list[str]]:
    """Return an array whose second axis is that of statistics, or realizations, and their names."""
    if f"{name}-stats" in store.own:
        found = store.own.getitem(f"{name}-stats")
        return found, list(store.oq.hazard_stats())[: found.shape[1]]
    found = store.own.getitem(f"{name}-rlzs")
    return found, [f"rlz-{number:03d}" for number in range(min(found.shape[1], MOST_RLZS))]


def _has(store: Store, name: str) -> bool:
    return f"{name}-stats" in store.own or f"{name}-rlzs" in store.own


def _first(store: Store, name: str) -> tuple[Any, str]:
    """Return the values of the first statistic, by (what,), and its name; or the mean.

    The engine leaves means of some outputs to its exports: they are by the weights.
    """
    kind, slash, rest = name.partition("/")
    stats = list(store.oq.hazard_stats())
    if f"{kind}-stats{slash}{rest}" in store.own and stats:
        return store.own.getitem(f"{kind}-stats{slash}{rest}")[:, 0], stats[0]
    found = store.own.getitem(f"{kind}-rlzs{slash}{rest}")[:]
    if found.shape[1] == 1 or found.dtype.names:
        return found[:, 0], "the only realization" if found.shape[1] == 1 else "rlz-000"
    return _weighted(store, found), "mean"


def _weighted(store: Store, found: Any) -> Any:
    weights = store.file["weights"][:] if "weights" in store.file else numpy.ones(found.shape[1])
    return numpy.average(found, axis=1, weights=weights)


# ---- hazard


def hazard_curves(store: Store) -> Pictures:
    """Curves of the sites with the greatest hazard; quantiles of the first one."""
    if not _has(store, "hcurves"):
        return
    found, names = _statistics(store, "hcurves")  # sites, statistics, measures, levels
    first = found[:, 0]
    places = _sites(store, len(first))
    for m, (imt, levels) in list(enumerate(store.oq.imtls.items()))[:MOST_IMTS]:
        order = numpy.argsort(-first[:, m].sum(axis=1), kind="stable")[:MOST_SITES].tolist()
        drawn = [
            Curve(f"{names[0]}, {places.name(site)}", levels, first[site, m], number)
            for number, site in enumerate(order)
        ]
        drawn += [
            Curve(
                f"{name}, site {places.numbers[order[0]]}", levels, found[order[0], s, m], 0, True
            )
            for s, name in enumerate(names[1:], 1)
        ]
        years = float(store.oq.investigation_time or 0)
        span = f"{years:g} {'year' if years == 1 else 'years'}" if years else "the time"
        yield Picture(
            "hcurves",
            f"Hazard curves, {clean(imt)}",
            draw.curves(drawn, unit(imt), f"probability of exceedance in {span}"),
            _of_curves(unit(imt), drawn),
        )


def _of_curves(x: str, found: Sequence[Curve]) -> Table:
    """Return what curves with the same places on their axis show."""
    rows = [
        (f"{float(place):g}", *(figure(one.y[number]) for one in found))
        for number, place in enumerate(found[0].x)
    ]
    return Table((x, *(clean(one.label) for one in found)), rows, len(rows))


def hazard_maps(store: Store) -> Pictures:
    if not _has(store, "hmaps"):
        return
    found, names = _statistics(store, "hmaps")  # sites, statistics, measures, probabilities
    values = found[:, 0]
    if len(values) < 2:
        return
    places = _sites(store, len(values))
    for m, imt in list(enumerate(store.oq.imtls))[:MOST_IMTS]:
        for p, poe in list(enumerate(store.oq.poes))[:MOST_POES]:
            title = f"Hazard map, {names[0]} {clean(imt)}, probability {poe:g}"
            yield _map("hmaps", title, places, values[:, m, p], unit(imt))


def _map(output: str, title: str, places: Places, values: Any, name: str) -> Picture:
    order = numpy.argsort(-values, kind="stable")[:MOST_PLACES].tolist()
    rows = [
        (
            str(places.numbers[site]), f"{places.lons[site]:.5f}", f"{places.lats[site]:.5f}",
            figure(values[site]),
        )
        for site in order
    ]  # fmt: skip
    return Picture(
        output,
        title,
        draw.points(places.lons, places.lats, values, name),
        Table(("site", "longitude", "latitude", name), rows, len(values)),
    )


def spectra(store: Store) -> Pictures:
    """Uniform hazard spectra of the site with the greatest hazard."""
    if not (_has(store, "hmaps") and getattr(store.oq, "uniform_hazard_spectra", False)):
        return
    from openquake.hazardlib.imt import from_string

    found, names = _statistics(store, "hmaps")
    values = found[:, 0]
    imts = list(enumerate(store.oq.imtls))
    periods = sorted((from_string(i).period, m) for m, i in imts if i.startswith(("PGA", "SA")))
    if len(periods) < 2:
        return
    where = [m for _, m in periods]
    site = int(numpy.argmax(values[:, where].sum(axis=(1, 2))))
    drawn = [
        Curve(f"probability {poe:g}", [x for x, _ in periods], values[site, where, p], p)
        for p, poe in list(enumerate(store.oq.poes))[: len(draw.COLOURS)]
    ]
    yield Picture(
        "uhs",
        f"Uniform hazard spectra, {names[0]}, {_sites(store, len(values)).name(site)}",
        draw.curves(drawn, "period (s)", "acceleration (g)", log_x=False, log_y=False),
        _of_curves("period (s)", drawn),
    )


# the bins of a disaggregation by their units
BINS = {"Mag": "magnitude", "Dist": "distance (km)", "Lon": "longitude (°)", "Lat": "latitude (°)",
        "Eps": "epsilon", "TRT": "tectonic region type"}  # fmt: skip


def disaggregations(store: Store) -> Pictures:
    """Disaggregations of the first site by one or two quantities, where most is in them.

    A matrix of more than two is that of its first ones, whatever the others are.
    """
    if not _has(store, "disagg"):
        return
    stats = "disagg-stats" in store.own
    group = store.own.getitem("disagg-stats" if stats else "disagg-rlzs")
    bins = store.own.getitem("disagg-bins")
    what = next(iter(store.oq.hazard_stats())) if stats else "first realization"
    for kind in sorted(group, key=lambda name: (name.count("_"), name)):
        parts = [part for part in kind.split("_") if part in BINS]
        whole = group[kind][0][..., 0]  # of the first site: bins, measures, probabilities
        sums = whole.sum(axis=tuple(range(len(parts))))
        m, p = numpy.unravel_index(int(numpy.argmax(sums)), sums.shape)
        matrix = whole[..., m, p]
        shown = [part for part in parts if part != "TRT" or len(parts) == 1][:2]
        rest = tuple(n for n, part in enumerate(parts) if part not in shown)
        matrix = 1 - numpy.prod(1 - matrix, axis=rest)
        edges = [_edges(bins[part]) for part in shown]
        middles = [_middles(one) for one in edges]
        head = (*(BINS[part] for part in shown), "probability")
        rows: list[tuple[str, ...]]
        if len(shown) == 1:
            image = draw.bars(middles[0], matrix, "probability", below=head[0])
            rows = [(middle, figure(value)) for middle, value in zip(*middles, matrix, strict=True)]
        else:
            x, y = zip(head, edges, strict=False)
            image = draw.cells(x, y, matrix.T, "probability")
            rows = [
                (middles[0][i], middles[1][j], figure(matrix[i, j]))
                for i, j in numpy.argwhere(matrix).tolist()
            ]
        imt = clean(list(store.oq.imtls)[m])
        poes = list(store.oq.poes)
        ordinal = f"probability {poes[p]:g}" if p < len(poes) else f"level {p}"
        yield Picture(
            f"disagg {kind}",
            f"Disaggregation by {' and '.join(shown)}, {what}, {imt}, site 0, {ordinal}",
            image,
            Table(head, rows[:MOST_PLACES], len(rows)),
        )


def _edges(found: Any) -> Any:
    return found[0] if len(found.shape) == 2 else found[:]  # those of places differ by site


def _middles(edges: Any) -> list[str]:
    if edges.dtype.kind in "SO":
        return [clean(one.decode() if isinstance(one, bytes) else str(one)) for one in edges]
    return [f"{middle:.5g}" for middle in (edges[:-1] + edges[1:]) / 2]


# ---- events


def ruptures(store: Store) -> Pictures:
    if "ruptures" not in store.own or not len(table := store.own.getitem("ruptures")):
        return
    found = table.fields(["id", "mag", "n_occ", "hypo"])[:]  # there may be millions
    lons, lats, _ = found["hypo"].T
    order = numpy.argsort(-found["mag"], kind="stable")[:MOST_PLACES]
    rows = [
        (str(row["id"]), f"{row['hypo'][0]:.5f}", f"{row['hypo'][1]:.5f}", f"{row['mag']:.3f}",
         str(row["n_occ"]))
        for row in found[order]
    ]  # fmt: skip
    events = f", {found['n_occ'].sum()} events" if "scenario" not in _mode(store) else ""
    head = ("rupture", "longitude", "latitude", "magnitude", "events")
    yield Picture(
        "ruptures",
        f"Ruptures: {len(found)}{events}; their hypocentres",
        draw.points(lons, lats, found["mag"], "magnitude"),
        Table(head, rows, len(found)),
    )


def _mode(store: Store) -> str:
    return str(store.oq.calculation_mode)


def ground_motion(store: Store) -> Pictures:
    """The average ground motion of all events at each site."""
    if "avg_gmf" not in store.own:
        return
    found = store.own.getitem("avg_gmf")[0]  # sites, measures
    if len(found) < 2:
        return
    places = _sites(store, len(found))
    if "station_data" in store.file:  # they have what was recorded
        rest = ~numpy.isin(places.numbers, store.file["station_data/site_id"][:])
        found = found[rest]
        places = Places(places.lons[rest], places.lats[rest], places.numbers[rest])
    for m, imt in list(enumerate(store.oq.imtls))[:MOST_IMTS]:
        title = f"Average ground motion of the events, {clean(imt)}"
        yield _map("avg_gmf", title, places, found[:, m], unit(imt))


# ---- risk


def _loss_units(store: Store) -> dict[str, str]:
    """Return the unit of each type of loss, where the datastore has it."""
    for name in ("aggcurves", "aggrisk"):
        if name in store.own and "units" in (attrs := store.own.getitem(name).attrs):
            units = str(attrs["units"]).split()
            return dict(zip(store.oq.loss_types, units, strict=False))
    return {}


def _loss(store: Store, kind: str) -> str:
    return f"{clean(kind)} ({clean(found)})" if (found := _loss_units(store).get(kind)) else kind


def aggregate_curves(store: Store) -> Pictures:
    """The total loss by return period."""
    if "aggcurves" not in store.own or "loss" not in store.own.getitem("aggcurves"):
        return
    from openquake.risklib.scientific import LOSSID

    table = store.own.read_df("aggcurves")
    table = table[table.agg_id == table.agg_id.max()]  # the last one is of all assets
    for kind in list(store.oq.loss_types)[:MOST_LOSSES]:
        drawn = []
        if f"agg_curves-stats/{kind}" in store.own:
            found = store.own.getitem(f"agg_curves-stats/{kind}")
            about = json.loads(found.attrs["json"])
            periods = about["return_period"]
            drawn = [
                Curve(name, periods, found[-1, s, :, 0], s, s > 0)
                for s, name in enumerate(about["stat"])
            ]
        else:
            of_kind = table[table.loss_id == LOSSID[kind]]
            for number in sorted(of_kind.rlz_id.unique())[:MOST_RLZS]:
                rows = of_kind[of_kind.rlz_id == number].sort_values("return_period")
                name = f"rlz-{number:03d}"
                drawn.append(
                    Curve(name, rows.return_period.tolist(), rows.loss.to_numpy(), len(drawn))
                )
        if drawn and len(drawn[0].x):
            yield Picture(
                f"aggcurves {kind}",
                f"Loss curve of all assets, {clean(kind)}",
                draw.curves(drawn, "return period (years)", f"loss, {_loss(store, kind)}",
                            log_y=False),
                _of_curves("return period (years)", drawn),
            )  # fmt: skip


def average_losses(store: Store) -> Pictures:
    name = "avg_losses-stats" if "avg_losses-stats" in store.own else "avg_losses-rlzs"
    if name not in store.own:
        return
    assets = store.file["assetcol"].array
    for kind in list(store.own.getitem(name))[:MOST_LOSSES]:
        values, what = _first(store, f"avg_losses/{kind}")
        title = f"Average losses, {clean(kind)}, {what}"
        yield _of_assets(f"avg_losses {kind}", title, assets, values, _loss(store, kind))


def _of_assets(
    output: str, title: str, assets: Any, values: Any, name: str, *, total: bool = True
) -> Picture:
    """Draw the values of each place; the table has the assets with the greatest values.

    :param total: the values can be added
    """
    places, of = numpy.unique(
        numpy.stack([assets["lon"], assets["lat"]], axis=1), axis=0, return_inverse=True
    )
    there: Any = numpy.bincount(of.ravel(), weights=values, minlength=len(places))
    if not total:
        there = there / numpy.bincount(of.ravel(), minlength=len(places))
    order = numpy.argsort(-values, kind="stable")[:MOST_PLACES].tolist()
    rows = [("all", "", "", figure(values.sum(dtype=float)))] if total else []
    rows += [
        (
            clean(assets["id"][a].decode()), f"{assets['lon'][a]:.5f}", f"{assets['lat'][a]:.5f}",
            figure(values[a]),
        )
        for a in order
    ]  # fmt: skip
    image = draw.points(places[:, 0], places[:, 1], there, name)
    head = ("asset", "longitude", "latitude", name)
    return Picture(output, title, image, Table(head, rows, len(values) + total))


def loss_curves(store: Store) -> Pictures:
    """Loss curves of the assets that lose most."""
    if not _has(store, "loss_curves"):
        return
    found, names = _statistics(store, "loss_curves")  # assets, statistics
    assets = store.file["assetcol"].array
    kinds = found.dtype.names
    for kind in kinds[:MOST_LOSSES]:
        of_kind = found[:, 0][kind]
        losses, poes = of_kind["losses"], of_kind["poes"]
        areas = numpy.trapezoid(poes, losses, axis=1)
        for asset in numpy.argsort(-areas, kind="stable")[:1].tolist():
            name = clean(assets["id"][asset].decode())
            drawn = [Curve(names[0], losses[asset], poes[asset])]
            rows = [(figure(x), figure(y)) for x, y in zip(drawn[0].x, drawn[0].y, strict=True)]
            yield Picture(
                f"loss_curves {kind}",
                f"Loss curve of asset {name}, {clean(kind)}, {names[0]}",
                draw.curves(drawn, f"loss, {_loss(store, kind)}", "probability of exceedance",
                            log_x=False),
                Table(("loss", "probability of exceedance"), rows, len(rows)),
            )  # fmt: skip


def damages(store: Store) -> Pictures:
    """How many assets are in each state of damage, in the mean."""
    if _mode(store) == "event_based_damage":
        found = _damages_in_time(store)
        years = store.oq.risk_investigation_time or store.oq.investigation_time
        of = f", in {years:g} {'year' if years == 1 else 'years'}"
    else:
        found = _damages_of_assets(store) if _has(store, "damages") else {}
        of = " of the events" if "events" in store.own else ""
    for kind, sums in list(found.items())[:MOST_LOSSES]:
        rows = [(clean(state), figure(total)) for state, total in sums.items()]
        yield Picture(
            f"damages {clean(kind)}",
            f"Damage, {clean(kind)}: all assets, mean{of}",
            draw.bars(list(sums), list(sums.values()), "buildings"),
            Table(("state", "buildings"), rows, len(rows)),
        )


def _damages_of_assets(store: Store) -> dict[str, dict[str, float]]:
    """Return the sums over all assets, by type of loss and state."""
    stats = "damages-stats" in store.own
    found = store.own.getitem("damages-stats" if stats else "damages-rlzs")[:]
    states = ["no_damage", *map(str, store.oq.limit_states)]
    sums: dict[str, dict[str, float]] = {}
    for field in found.dtype.names:
        kind, _, state = field.rpartition("-")
        if state in states:
            values = found[field]
            mean = values[:, 0] if stats or values.shape[1] == 1 else _weighted(store, values)
            sums.setdefault(kind, {})[state] = float(mean.sum(dtype=float))
    return sums


def _damages_in_time(store: Store) -> dict[str, dict[str, float]]:
    """Return the engine's own sums, which count events by the time in which they are expected."""
    if "aggrisk" not in store.own:
        return {}
    from openquake.risklib.scientific import LOSSTYPE

    table = store.own.read_df("aggrisk")
    table = table[table.agg_id == table.agg_id.max()]  # the last one is of all assets
    states = ["no_damage", *map(str, store.oq.limit_states)]
    sums = {}
    for number, rows in table.groupby("loss_id"):
        weights = store.file["weights"][:][rows.rlz_id] if len(rows) > 1 else None
        sums[str(LOSSTYPE[number])] = {
            state: float(numpy.average(rows[f"dmg_{n}"], weights=weights))
            for n, state in enumerate(states)
        }
    return sums


def benefits(store: Store) -> Pictures:
    """Benefit-cost ratios of retrofitting."""
    if not _has(store, "bcr"):
        return
    found, what = _first(store, "bcr")
    title = f"Benefit-cost ratio of retrofitting, {what}"
    yield _of_assets("bcr", title, store.file["assetcol"].array, found["bcr"], "ratio", total=False)


def perils(store: Store) -> Pictures:
    """What several perils do to all assets together."""
    if "agg_risk" not in store.own:
        return
    found = store.own.getitem("agg_risk")[:]
    names = [clean(one.decode() if isinstance(one, bytes) else one) for one in found["peril"]]
    for field in [name for name in found.dtype.names if name != "peril"][:MOST_LOSSES]:
        rows = [(name, figure(value)) for name, value in zip(names, found[field], strict=True)]
        yield Picture(
            f"agg_risk {field}",
            f"All assets by peril, {clean(field)}",
            draw.bars(names, found[field], clean(field)),
            Table(("peril", clean(field)), rows, len(rows)),
        )


MAKERS: tuple[Callable[[Store], Pictures], ...] = (
    hazard_curves, hazard_maps, spectra, disaggregations, ruptures, ground_motion, aggregate_curves,
    average_losses, loss_curves, damages, benefits, perils,
)  # fmt: skip


def pictures(store: Store) -> tuple[list[Picture], list[str]]:
    """Return the pictures of a job, and why there are not more of them."""
    found: list[Picture] = []
    missing = []
    for make in MAKERS if store.oq is not None else ():
        try:
            found.extend(make(store))
        except Exception as exc:  # a job that was ended half way has half of an output
            what = make.__name__.replace("_", " ")
            missing.append(f"{what} could not be drawn: {type(exc).__name__}: {clean(str(exc))}")
    return found, missing
