"""``python -m benchmarks.simulation``: the scheduler alone, driven by a simulated cluster.

No socket, process or clock: an event heap plays nodes, workers, network and engine, with lognormal
task lengths, nodes that are lost and come back, workers that die, and stragglers. All tasks are
submitted at once.

    events/s, us/event   of CPU time inside the scheduler
    run_s, peak_MiB      of this process, with all that is simulated
    makespan_s, /bound   simulated, and against what no scheduler can beat: max(total work / slots,
                         longest task), of the same tasks on a cluster without any fault
    late                 tasks that end after 1.05 x bound
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import resource
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from oq_runtime.core import scheduler as core
from oq_runtime.core.limits import Limits

#: seconds between two beats of a node, and between two ticks of the broker
BEAT_S = 2.0
#: seconds of a message on its way, and of the engine for one result
LATENCY_S, CONSUME_S = 0.0005, 0.0005
#: bytes per second of the master's network, and bytes of a result
BANDWIDTH, RESULT_BYTES = 1e9, 100_000
#: seconds after which a lost node is back
REBOOT_S = 120.0
#: of the bound; a task that ends later is late
LATE = 1.05
SWEEP_NODES, SWEEP_TASKS_PER_NODE = (10, 100, 1000, 10_000), 100


@dataclass(frozen=True)
class Scenario:
    """
    :param slots: worker processes per node
    :param median_s: of the task lengths; ``sigma`` is that of their logarithms
    :param weight_sigma: by how much the weights, by which tasks are ordered, miss the lengths
    :param lost: part of the nodes that are lost once
    :param dying: part of the attempts whose worker dies in the middle
    :param speculation: whether stragglers get a second attempt
    :param straggling: part of the attempts that take ``slowdown`` times as long
    """

    nodes: int = 1000
    slots: int = 64
    tasks: int = 1_000_000
    seed: int = 1
    median_s: float = 60.0
    sigma: float = 0.5
    weight_sigma: float = 0.2
    lost: float = 0.005
    dying: float = 0.0005
    straggling: float = 0.001
    slowdown: float = 3.0
    speculation: bool = False


class Simulation:
    """
    :param scenario: what happens
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        mu = math.log(scenario.median_s)
        draw = self.rng.lognormvariate
        self.lengths = array("d", (draw(mu, scenario.sigma) for _ in range(scenario.tasks)))
        # as many attempts as it takes: the deaths are the simulation's, not the tasks'
        limits = Limits(speculation=scenario.speculation, max_attempts=100)
        self.core = core.Scheduler(limits)
        self.aborted: set[tuple[int, int]] = set()
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.scheduled = 0
        self.now = 0.0
        self.pipe_free_s = 0.0  # when the master's network has carried all that was granted
        self.up: dict[str, int] = {}  # node -> how often it has joined; missing while it is down
        self.joins: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.handling_s = 0.0
        self.ends = array("d")

    @property
    def bound_s(self) -> float:
        slots = self.scenario.nodes * self.scenario.slots
        return max(sum(self.lengths) / slots, max(self.lengths))

    def run(self) -> None:
        """Run until every task has ended."""
        scenario, rng = self.scenario, self.rng
        for n in range(scenario.nodes):
            # the nodes do not beat in step
            self.at(rng.uniform(0, BEAT_S), self.join, f"n{n}")
        busy_s = self.bound_s
        for n in rng.sample(range(scenario.nodes), round(scenario.lost * scenario.nodes)):
            self.at(rng.uniform(BEAT_S, busy_s), self.lose, f"n{n}", rng.random() < 0.5)
        self.at(BEAT_S, self.tick)
        for task, length in enumerate(self.lengths):
            weight = length * rng.lognormvariate(0, scenario.weight_sigma)
            self.handle(core.Submitted(task, 0, 0, weight))
        while self.core.tasks or self.core.staged:
            self.now, _, action, arguments = heapq.heappop(self.heap)
            action(*arguments)
        self.core.check_invariants()

    def at(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        self.scheduled += 1
        heapq.heappush(self.heap, (seconds, self.scheduled, action, arguments))

    def after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + seconds, action, *arguments)

    def handle(self, event: core.Event) -> None:
        """Let the scheduler take the event, on the clock; then follow what it wants done."""
        start = time.thread_time()
        effects = self.core.handle(event, self.now)
        self.handling_s += time.thread_time() - start
        self.events[type(event).__name__] += 1
        for effect in effects:
            match effect:
                case core.Assign(node, task, attempt):
                    self.after(LATENCY_S, self.start, node, self.joins[node], task, attempt)
                case core.GrantUpload(node, task, attempt):
                    self.upload(node, task, attempt)
                case core.Commit(_, task, _):
                    self.ends.append(self.now)
                    self.after(CONSUME_S, self.handle, core.Consumed(task))
                case core.AbortAttempt(_, task, attempt):
                    self.aborted.add((task, attempt))
                case core.GiveUp(task, error, _, history):
                    raise RuntimeError(f"task {task}: {error}: {history}")

    # ---- nodes

    def join(self, node: str) -> None:
        self.joins[node] += 1
        self.up[node] = self.joins[node]
        self.handle(core.NodeJoined(node, self.scenario.slots))
        self.after(BEAT_S, self.beat, node, self.up[node])

    def beat(self, node: str, since: int) -> None:
        if self.up.get(node) == since:
            self.handle(core.NodeSeen(node, closed=False))
            self.after(BEAT_S, self.beat, node, since)

    def lose(self, node: str, silently: bool) -> None:
        if self.up.pop(node, None) and not silently:
            self.handle(core.NodeGone(node, "its connection was closed"))
        self.after(REBOOT_S, self.join, node)

    def tick(self) -> None:
        self.handle(core.Tick())
        self.after(BEAT_S, self.tick)

    # ---- attempts; ``since`` tells a node from what it was before its loss

    def start(self, node: str, since: int, task: int, attempt: int) -> None:
        if self.up.get(node) != since or (task, attempt) in self.aborted:
            return
        self.handle(core.AttemptStarted(node, task, attempt))
        length, rng, scenario = self.lengths[task], self.rng, self.scenario
        if rng.random() < scenario.dying:
            died = core.AttemptDied(node, task, attempt, "worker process 1 killed by SIGKILL")
            self.after(rng.uniform(0, length), self.report, since, died)
            return
        if rng.random() < scenario.straggling:
            length *= scenario.slowdown
        nbytes = round(rng.expovariate(1 / RESULT_BYTES)) + 1
        self.after(length, self.report, since, core.AttemptEnded(node, task, attempt, nbytes))

    def report(
        self, since: int, event: core.AttemptEnded | core.AttemptDied | core.Uploaded
    ) -> None:
        aborted = (event.task, event.attempt) in self.aborted
        if self.up.get(event.node) == since and not aborted:
            self.handle(event)

    def upload(self, node: str, task: int, attempt: int) -> None:
        seconds = self.core.tasks[task].nbytes / BANDWIDTH
        self.pipe_free_s = max(self.pipe_free_s, self.now) + seconds
        uploaded = core.Uploaded(node, task, attempt, True)
        self.at(self.pipe_free_s + LATENCY_S, self.report, self.up.get(node, 0), uploaded)


def simulate(scenario: Scenario) -> dict[str, str]:
    """Run one scenario; return its figures by name."""
    simulation = Simulation(scenario)
    start = time.perf_counter()
    simulation.run()
    real_s = time.perf_counter() - start
    events, bound_s = simulation.events.total(), simulation.bound_s
    return {
        "nodes": f"{scenario.nodes}",
        "slots": f"{scenario.slots}",
        "tasks": f"{scenario.tasks}",
        "events": f"{events}",
        "events/s": f"{events / simulation.handling_s:.0f}",
        "us/event": f"{simulation.handling_s / events * 1e6:.2f}",
        "run_s": f"{real_s:.0f}",
        "peak_MiB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f}",
        "retries": f"{simulation.core.kinds[0].retries}",
        "makespan_s": f"{simulation.now:.0f}",
        "/bound": f"{simulation.now / bound_s:.3f}",
        "late": f"{sum(end > LATE * bound_s for end in simulation.ends)}",
    }


def show(figures: dict[str, str], head: bool) -> None:
    if head:
        print("  ".join(f"{name:>10}" for name in figures))
    print("  ".join(f"{value:>10}" for value in figures.values()), flush=True)


def sweep(scenario: Scenario) -> None:
    """Grow cluster and work together, each size in a process of its own."""
    for nodes in SWEEP_NODES:
        tasks = nodes * SWEEP_TASKS_PER_NODE
        arguments = [f"--nodes={nodes}", f"--slots={scenario.slots}", f"--tasks={tasks}"]
        arguments += [f"--seed={scenario.seed}"] + ["--no-head"] * (nodes > SWEEP_NODES[0])
        subprocess.run([sys.executable, "-m", "benchmarks.simulation", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--speculation", action="store_true")
    for field in [f for f in fields(Scenario) if f.type != "bool"]:
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--sweep", action="store_true", help=f"{SWEEP_NODES} nodes")
    parser.add_argument("--no-head", action="store_true")
    options = vars(parser.parse_args())
    whole_sweep, head = options.pop("sweep"), not options.pop("no_head")
    scenario = Scenario(**options)
    if whole_sweep:
        sweep(scenario)
    else:
        show(simulate(scenario), head)


if __name__ == "__main__":
    main()
