"""``python -m benchmarks``: measure rows on systems in turn, for several rounds.

In each round every system is started, measured and ended, one after the other, so that whatever
else happens on the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.rows import EXPERIMENTS, Experiment
from benchmarks.systems import (
    ENGINES,
    JOURNAL,
    NO_JOURNAL,
    PEERS,
    PEERS_PYTHON,
    ROOT,
    SEALED,
    Failed,
    Hung,
    Lab,
)
from tests.cluster import netns

#: failures after which a system is not asked again for the same row
TRIES = 2
BUILD = ROOT / "build"
#: by row the ratio to another system at the last release, see ``report.ratios``
RELEASED = Path(__file__).with_name("released.json")


@dataclass
class Bench:
    """
    :param experiments: those that are wanted
    :param systems: names of those that are wanted
    """

    lab: Lab
    experiments: list[Experiment]
    systems: set[str]
    quick: bool
    console: Console

    def __post_init__(self) -> None:
        self.figures = {
            row.name: report.Figures(row)
            for experiment in self.experiments
            for row in experiment.rows
        }

    def round(self) -> None:
        kinds = groupby(self.experiments, lambda e: (e.on is not None, dict(e.slots)))
        for (shared, _), group in kinds:
            experiments = list(group)
            systems = dict.fromkeys(s for e in experiments for s in e.systems if s in self.systems)
            for system in systems:
                mine = [e for e in experiments if system in e.systems]
                mine = [e for e in mine if not self.in_vain(system, e)]
                if mine:
                    (self.shared if shared else self.apart)(system, mine)

    def in_vain(self, system: str, experiment: Experiment) -> bool:
        """Whether it has failed as often as one needs to see; hanging takes minutes."""
        rows = [self.figures[row.name] for row in experiment.rows]
        return all(len(f.failures.get(system, ())) >= TRIES for f in rows)

    def shared(self, system: str, experiments: Sequence[Experiment]) -> None:
        """Measure all of them on one start of the system."""
        left = list(experiments)
        try:
            with self.lab.running(system, left[0].slots) as running:
                while left:
                    assert left[0].on
                    self.take(system, left[0].on(running, self.quick))
                    left.pop(0)
        except (Hung, Failed) as exc:
            self.fail(system, left.pop(0), exc)
            if left:
                self.shared(system, left)

    def apart(self, system: str, experiments: Sequence[Experiment]) -> None:
        for experiment in experiments:
            assert experiment.measure
            try:
                self.take(system, experiment.measure(self.lab, system, self.quick))
            except (Hung, Failed) as exc:
                self.fail(system, experiment, exc)

    def take(self, system: str, found: dict[str, float]) -> None:
        for row, value in found.items():
            self.figures[row].add(system, value)
            unit = self.figures[row].row.unit
            self.console.print(f"{row:20} {system:20} {value:10.4g} {unit}", highlight=False)

    def fail(self, system: str, experiment: Experiment, exc: Exception) -> None:
        for row in experiment.rows:
            self.figures[row.name].fail(system, str(exc))
            self.console.print(f"{row.name:20} {system:20} {exc}", highlight=False)


def names(text: str, known: Sequence[str], what: str) -> list[str]:
    """Split a list of names; exits with one line for one that is not known."""
    given = [name for name in text.split(",") if name]
    for name in given:
        if name not in known:
            sys.exit(f"there is no {what} {name!r}; choose of {', '.join(known)}")
    return given


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Keep so many cores busy beside the measurement."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--row", default="", help="comma-separated; default: all but huge and real")
    parser.add_argument(
        "--system", default="", help="comma-separated; default: all but the pairs for the journal"
    )
    parser.add_argument("--rounds", type=int, help="default: 5, quick: 2")
    parser.add_argument("--quick", action="store_true", help="less work, fewer rounds")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="beside N busy loops")
    parser.add_argument("--json", type=Path, default=BUILD / "bench.json")
    parser.add_argument("--plots", type=Path, help="directory for one PNG per row")
    parser.add_argument(
        "--release", action="store_true", help=f"keep the ratios of this run in {RELEASED.name}"
    )
    args = parser.parse_args()
    rows = names(args.row, [experiment.name for experiment in EXPERIMENTS], "row")
    experiments = [e for e in EXPERIMENTS if (e.name in rows if rows else not e.on_request)]
    known = [*ENGINES, *PEERS, SEALED]
    systems = set(names(args.system, known, "system")) or {*known} - {JOURNAL, NO_JOURNAL}
    if reason := netns.unavailable():
        sys.exit(f"the benchmarks need network namespaces: {reason}")
    if not PEERS_PYTHON.exists():
        sys.exit(f"{PEERS_PYTHON} is missing; run make .venv-bench")
    rounds = args.rounds or (2 if args.quick else 5)
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are removed
    with busy(args.busy), Lab(BUILD / "bench-log") as lab:
        bench = Bench(lab, experiments, systems, args.quick, console)
        for number in range(1, rounds + 1):
            console.rule(f"round {number} of {rounds}")
            bench.round()
    figures = list(bench.figures.values())
    report.show(console, figures)
    report.write(args.json, figures)
    console.print(f"written to {args.json}")
    if args.plots:
        for one in figures:
            if any(one.values.values()):
                console.print(f"drawn in {report.plot(args.plots, one)}")
    released = json.loads(RELEASED.read_text()) if RELEASED.exists() else {}
    if args.release:
        text = json.dumps(released | report.ratios(figures), indent=1, sort_keys=True)
        RELEASED.write_text(text + "\n")
    elif lines := report.fallen(figures, released):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
