"""What is measured, on which systems, and what our runtime has to reach.

An experiment gives one figure for each of its rows. Those with ``on`` ask a system that is up and
leave it as it was, so that several of them share one start; the others start what they need.
Not covered: repetitions, medians and tables (``report``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.systems import Lab, System

TCP, IPC = "oq-runtime-tcp", "oq-runtime-ipc"
ZMQ, PROCESSPOOL = "engine-zmq", "engine-processpool"
ENGINE = (TCP, IPC, ZMQ, PROCESSPOOL)
PEERS = ("dask", "parsl-htex", "ipyparallel")

#: a system that has not answered by then hangs
LIMIT_S = 180.0


@dataclass(frozen=True)
class Target:
    """At least ``factor`` times the median of ``of``, or ``factor`` itself; at most where less is
    better."""

    factor: float
    of: str = ""


@dataclass(frozen=True)
class Row:
    """
    :param ours: the system that has to reach the targets
    """

    name: str
    title: str
    unit: str
    targets: tuple[Target, ...] = ()
    more_is_better: bool = True
    ours: str = TCP


@dataclass(frozen=True)
class Experiment:
    """
    :param slots: worker processes per node; systems without nodes have their sum
    :param on: figures by row, of a system that is up; the flag asks for the quick variant
    :param measure: the same, for an experiment that starts its system itself
    """

    rows: tuple[Row, ...]
    systems: tuple[str, ...]
    slots: Mapping[str, int] = field(default_factory=lambda: {"node1": 2})
    on: Callable[[System, bool], dict[str, float]] | None = None
    measure: Callable[[Lab, str, bool], dict[str, float]] | None = None


def nothing(system: System, quick: bool) -> dict[str, float]:
    tasks = 500 if quick else 2000
    return {"a": tasks / system.ask("nothing", LIMIT_S, tasks=tasks)["seconds"]}


def result(system: System, quick: bool) -> dict[str, float]:
    tasks, megabytes = 50, 8
    return {"b": tasks * megabytes / system.ask("result", LIMIT_S, tasks=tasks)["seconds"]}


def argument(system: System, quick: bool) -> dict[str, float]:
    tasks, megabytes = 50, 16
    return {"c": tasks * megabytes / system.ask("argument", LIMIT_S, tasks=tasks)["seconds"]}


EXPERIMENTS = (
    Experiment(
        rows=(
            Row(
                "a",
                "2,000 tasks that do nothing",
                "tasks/s",
                (Target(1500), Target(7, ZMQ), Target(1.8, "parsl-htex")),
            ),
        ),
        systems=(*ENGINE, *PEERS),
        on=nothing,
    ),
    Experiment(
        rows=(
            Row(
                "b",
                "50 tasks that return 8 MB each",
                "MB/s",
                (Target(380), Target(1.8, ZMQ), Target(1, PROCESSPOOL)),
            ),
        ),
        systems=(*ENGINE, *PEERS),
        on=result,
    ),
    Experiment(
        rows=(
            Row(
                "c",
                "50 tasks that receive the same 16 MB",
                "MB/s",
                (Target(3000), Target(10, ZMQ), Target(1.4, "dask-scatter")),
            ),
        ),
        systems=(*ENGINE, *PEERS, "dask-scatter"),
        on=argument,
    ),
)
