"""What is measured, on which systems, and what our runtime has to reach.

An experiment gives one figure for each of its rows. Those with ``on`` ask a system that is up and
leave it as it was, so that several of them share one start; the others start what they need.
Not covered: repetitions, medians and tables (``report``).
"""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.systems import JOURNAL, NO_JOURNAL, ROOT, SEALED, Failed, Hung, Lab, System
from benchmarks.usage import Usage, peak_bytes
from tests.conformance.compare import compare

TCP, IPC = "oq-runtime-tcp", "oq-runtime-ipc"
ZMQ, PROCESSPOOL = "engine-zmq", "engine-processpool"
ENGINE = (TCP, IPC, ZMQ, PROCESSPOOL)
PEERS = ("dask", "parsl-htex", "ipyparallel")

#: a system that has not answered by then hangs
LIMIT_S = 180.0
HUGE_LIMIT_S = 300.0
#: the same for one that is to go on after a fault: beyond the time without the fault
FAULT_LIMIT_S = 20.0
LOSS_LIMIT_S = 75.0
UNEQUAL = {"node1": 1, "node2": 2, "node3": 5}
#: seconds of the tasks that are hit by a fault
KILLED_S, LOST_S = 1.0, 4.0
EXAMPLE = ROOT / "examples/hazard_classical/job.ini"
#: parameters that make it run for minutes on two cores, or for seconds
LOAD = ("region_grid_spacing=3", "area_source_discretization=8", "concurrent_tasks=100")
QUICK_LOAD = ("region_grid_spacing=10",)
REAL_LIMIT_S = 3600.0
#: the engine's log line for the first result of a task
FIRST_RESULT = re.compile(rb"\d+% \[\d+ submitted")


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
    :param on_request: it is run only when its name is given
    """

    name: str
    rows: tuple[Row, ...]
    systems: tuple[str, ...]
    slots: Mapping[str, int] = field(default_factory=lambda: {"node1": 2})
    on: Callable[[System, bool], dict[str, float]] | None = None
    measure: Callable[[Lab, str, bool], dict[str, float]] | None = None
    on_request: bool = False


def nothing(system: System, quick: bool) -> dict[str, float]:
    tasks = 500 if quick else 2000
    return {"a": tasks / system.ask("nothing", LIMIT_S, tasks=tasks)["seconds"]}


def result(system: System, quick: bool) -> dict[str, float]:
    tasks, megabytes = 50, 8
    return {"b": tasks * megabytes / system.ask("result", LIMIT_S, tasks=tasks)["seconds"]}


def huge(system: System, quick: bool) -> dict[str, float]:
    """Beyond 4 GiB, where lengths of 32 bits end."""
    megabytes = 450 if quick else 4500
    seconds = system.ask("huge", HUGE_LIMIT_S, floats=megabytes * 1_000_000 // 8)["seconds"]
    return {"huge": megabytes / seconds}


def argument(system: System, quick: bool) -> dict[str, float]:
    tasks, megabytes = 50, 16
    return {"c": tasks * megabytes / system.ask("argument", LIMIT_S, tasks=tasks)["seconds"]}


def unequal(system: System, quick: bool) -> dict[str, float]:
    tasks, mean_s = (200, 0.2) if quick else (1000, 0.2)
    rng = random.Random(7)
    lengths = [rng.uniform(0.1, 1.9) * mean_s for _ in range(tasks)]
    seconds = system.ask("sleep", LIMIT_S, lengths=lengths)["seconds"]
    return {"unequal": 100 * sum(lengths) / (seconds * sum(UNEQUAL.values()))}


def kill(lab: Lab, name: str, quick: bool) -> dict[str, float]:
    with lab.running(name, {"node1": 2}) as system:
        tasks = 6 if quick else 12
        flag = system.cluster.home / "flag"
        call = {"tasks": tasks, "length_s": KILLED_S, "victim": tasks // 2, "flag": str(flag)}
        undisturbed_s = system.ask("kill", LIMIT_S, **call)["seconds"]
        flag.touch()
        limit_s = undisturbed_s + FAULT_LIMIT_S
        return {"kill": system.ask("kill", limit_s, **call)["seconds"] - undisturbed_s}


def loss(lab: Lab, name: str, quick: bool) -> dict[str, float]:
    """A power cut: the link goes first, so that nobody is told of the end of a connection."""
    with lab.running(name, {"node1": 1, "node2": 1}) as system:
        lengths = [LOST_S] * 2
        undisturbed_s = system.ask("sleep", LIMIT_S, lengths=lengths)["seconds"]
        system.tell("sleep", lengths=lengths)
        time.sleep(LOST_S / 2)
        lab.net.link_down("node2")
        lab.net.kill_all("node2")
        return {"loss": system.hear(LOSS_LIMIT_S)["seconds"] - undisturbed_s}


def memory(lab: Lab, name: str, quick: bool) -> dict[str, float]:
    tasks, pause_s = (250, 5.0) if quick else (1250, 20.0)
    with lab.running(name, {"node1": 2}) as system:
        [broker], [agent] = system.processes("session.broker"), system.processes("node.daemon")
        system.ask("flood", LIMIT_S, tasks=tasks, pause_s=pause_s)
        return {
            "memory-broker": peak_bytes(broker.pid) / 2**30,
            "memory-agent": peak_bytes(agent.pid) / 2**30,
        }


def start(lab: Lab, name: str, quick: bool) -> dict[str, float]:
    """Seconds from the command until the engine has the result of a first, tiny task."""
    with lab.calculation(name, {"node1": 2}, EXAMPLE) as (process, _):
        began_s = time.monotonic()
        assert process.stdout
        descriptor, log = process.stdout.fileno(), b""
        while (left_s := began_s + LIMIT_S - time.monotonic()) > 0:
            if select.select([descriptor], [], [], left_s)[0]:
                data = os.read(descriptor, 65536)
                log += data
                if FIRST_RESULT.search(log):
                    return {"start": time.monotonic() - began_s}
                if not data:
                    raise Failed(f"it ended before the first result: {log[-200:]!r}")
    raise Hung("no result of a task")


def real(lab: Lab, name: str, quick: bool) -> dict[str, float]:
    """A calculation from the command to its end; its results must equal those of the others."""
    params = QUICK_LOAD if quick else LOAD
    with (
        lab.calculation(name, {"node1": 2}, EXAMPLE, *params) as (process, cluster),
        Usage(lab.net, ("node1",)) as usage,
    ):
        began_s = time.monotonic()
        try:
            log, _ = process.communicate(timeout=REAL_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Hung(f"not complete after {REAL_LIMIT_S:.0f} s") from None
        wall_s = time.monotonic() - began_s
        if process.returncode:
            raise Failed(f"exit code {process.returncode}: {log[-300:]}")
        [datastore] = cluster.datadir.glob("calc_*.hdf5")
        reference = lab.home / f"{'-'.join(params)}.hdf5"
        if not reference.exists():
            shutil.copy(datastore, reference)
        if different := compare(reference, datastore):
            raise Failed(f"its results are not those of the first system: {different[0]}")
    figures = {
        "real": wall_s,
        "real-overhead": 100 * usage.cpu_s("broker", "agent") / wall_s,
        "real-wire": usage.wire_bytes / 1e6,
    }
    for role in ("engine", "broker", "agent", "worker"):
        figures[f"real-cpu-{role}"] = usage.cpu_s(role)
        figures[f"real-memory-{role}"] = usage.peak_gib(role)
    return figures


EXPERIMENTS = (
    Experiment(
        name="a",
        rows=(
            Row(
                "a",
                "2,000 tasks that do nothing",
                "tasks/s",
                (Target(1500), Target(8, ZMQ), Target(3.5, "parsl-htex")),
            ),
        ),
        systems=(*ENGINE, JOURNAL, *PEERS),
        on=nothing,
    ),
    Experiment(
        name="b",
        rows=(
            Row(
                "b",
                "50 tasks that return 8 MB each",
                "MB/s",
                (Target(380), Target(1.5, ZMQ), Target(1.3, "dask"), Target(0.85, SEALED)),
            ),
        ),
        systems=(*ENGINE, JOURNAL, *PEERS, SEALED),
        on=result,
    ),
    Experiment(
        name="c",
        rows=(
            Row(
                "c",
                "50 tasks that receive the same 16 MB",
                "MB/s",
                (Target(3000), Target(12, ZMQ), Target(1.5, "dask-scatter")),
            ),
        ),
        systems=(*ENGINE, JOURNAL, *PEERS, "dask-scatter"),
        on=argument,
    ),
    Experiment(
        name="unequal",
        rows=(
            Row(
                "unequal",
                "1,000 sleeping tasks of unequal length on nodes with 1, 2 and 5 slots",
                "% of slots x time busy",
                (Target(95),),
            ),
        ),
        systems=(TCP, ZMQ),
        slots=UNEQUAL,
        on=unequal,
    ),
    Experiment(
        name="kill",
        rows=(
            Row(
                "kill",
                f"SIGKILL of a worker in the middle of a task of {KILLED_S:g} s: delay of the job",
                "s",
                (Target(KILLED_S + 2),),
                more_is_better=False,
            ),
        ),
        systems=(*ENGINE, *PEERS),
        measure=kill,
    ),
    Experiment(
        name="loss",
        rows=(
            Row(
                "loss",
                f"power cut of a node in the middle of a task of {LOST_S:g} s: delay of the job",
                "s",
                (Target(30 + LOST_S),),
                more_is_better=False,
            ),
        ),
        systems=(TCP, ZMQ),
        measure=loss,
    ),
    Experiment(
        name="start",
        rows=(
            Row(
                "start",
                "start of a calculation until its first result",
                "s",
                (Target(0.4, PROCESSPOOL),),
                more_is_better=False,
                ours=IPC,
            ),
        ),
        systems=(IPC, PROCESSPOOL),
        measure=start,
    ),
    Experiment(
        name="memory",
        rows=(
            Row(
                "memory-broker",
                "10 GB of results, slowly consumed: peak memory of the broker",
                "GiB",
                (Target(1.3),),
                more_is_better=False,
            ),
            Row(
                "memory-agent",
                "10 GB of results, slowly consumed: peak memory of the agent",
                "GiB",
                (Target(1.3),),
                more_is_better=False,
            ),
        ),
        systems=(TCP, IPC),
        measure=memory,
    ),
    Experiment(
        name="huge",
        rows=(Row("huge", "one task that returns 4.5 GB", "MB/s"),),
        systems=ENGINE,
        on=huge,
        on_request=True,
    ),
    Experiment(
        name="real",
        rows=(
            Row(
                "real",
                "a classical hazard calculation",
                "s",
                (Target(1.02, PROCESSPOOL), Target(1.02, NO_JOURNAL)),
                more_is_better=False,
            ),
            Row(
                "real-overhead",
                "a classical hazard calculation: CPU time of broker and agent",
                "% of one core",
                (Target(5),),
                more_is_better=False,
            ),
            Row(
                "real-wire",
                "a classical hazard calculation: sent and received by the node",
                "MB",
                more_is_better=False,
            ),
            *(
                Row(
                    f"real-cpu-{role}",
                    f"a classical hazard calculation: CPU time of the {role}",
                    "s",
                    more_is_better=False,
                )
                for role in ("engine", "broker", "agent", "worker")
            ),
            *(
                Row(
                    f"real-memory-{role}",
                    f"a classical hazard calculation: peak memory of the {role}",
                    "GiB",
                    more_is_better=False,
                )
                for role in ("engine", "broker", "agent", "worker")
            ),
        ),
        systems=(*ENGINE, NO_JOURNAL),
        measure=real,
        on_request=True,
    ),
)
