"""Faults drawn at random during jobs on the cluster of network namespaces.

    python -m tests.cluster.chaos --runs N --seed S [--limits default]

Each run is a job on nodes of 1, 2 and 5 slots, and one fault of the first six rows of the matrix in
docs/reliability.md, of a random kind, at a random moment, on a random node. Four of five jobs are
streams whose sum is known; the fifth is the event-based risk example, made smaller, compared with a
run on one machine. The limits of silence are short (SHORT_BEATS) unless ``--limits default``.

One line per run; at the end the sums, and all of it as JSON in build/. A run is as it should be
when the job completes with equal results, or, where all nodes are lost for good, when it says so
within the limit; and when nothing is left behind. Exit code 1 unless all are.
Not covered: the end of the job itself (``test_ends``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oq_runtime.commands.run import EXIT_NO_WORKERS
from oq_runtime.session.client import READY_SECS
from tests.cluster import netns
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import SHORT_BEATS, calculate, stream, sum_of_stream, workers
from tests.cluster.netns import Net, Process
from tests.conformance.compare import compare
from tests.leftovers import shm

BUILD = Path(__file__).parents[2] / "build"
POINTS = ["before_start", "after_first", "after_last", "before_end"]
#: each so many-th job is a calculation
CALCULATION_EVERY = 5
REFERENCE_RUNS = 3
TASKS = 32
#: seconds after which a job is called hung and killed
HUNG_S = 180.0
#: seconds besides the limit within which a job without nodes must have failed
GIVE_UP_S = 15.0
LEFTOVERS_LIMIT_S = 10.0


@dataclass
class Run:
    """One job and what was done to it; ``delay_s`` is over the slowest undisturbed one."""

    number: int
    job: str
    fault: str = ""
    detail: list[str] = field(default_factory=list)
    outcome: str = ""
    expected: str = "equal"
    retries: int = 0
    seconds: float = 0.0
    delay_s: float = 0.0
    left: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return self.outcome == self.expected and not self.left


class Drill:
    """The cluster with one job under way, for the faults below.

    :param settings: the limits of silence
    """

    def __init__(self, cluster: Cluster, settings: dict[str, float]) -> None:
        self.cluster = cluster
        self.net = cluster.net
        self.settings = settings
        self.shm_before = shm()
        self.reference_s: dict[str, float] = {}
        self.datastore: Path | None = None
        self.rng = random.Random()
        self.run = Run(0, "")
        self.process: Process | None = None
        self.began_s = 0.0

    # -- what a fault may use

    def start(self) -> Process:
        """Start the job, and wait until a random moment of it."""
        self.began_s = time.monotonic()
        if self.run.job == "stream":
            self.process = stream(self.cluster, TASKS)
        else:
            self.process = calculate(self.cluster)
        # the job itself takes a second to start
        self.hold(self.rng.uniform(1.0, 0.9 * self.reference_s[self.run.job]))
        self.note(f"at {time.monotonic() - self.began_s:.1f} s")
        return self.process

    def hold(self, seconds: float) -> None:
        """Wait so long, or until the job has ended."""
        process = self.process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

    def node(self) -> str:
        node = self.rng.choice(list(self.cluster.slots))
        self.note(node)
        return node

    def silence_s(self) -> float:
        """A time below or above the limit after which a node is lost."""
        seconds = self.rng.uniform(0.3, 2.0) * self.settings["lost_s"]
        self.note(f"for {seconds:.1f} s")
        return seconds

    def note(self, text: str) -> None:
        self.run.detail.append(text)

    # -- one run

    def reference(self, job: str) -> None:
        """Run the job undisturbed; keep the longest time, and the datastore of one machine."""
        for _ in range(REFERENCE_RUNS):
            self.run = Run(0, job)
            self.began_s = time.monotonic()
            self.process = stream(self.cluster, TASKS) if job == "stream" else None
            if self.process is None:
                self.process = calculate(self.cluster)
            self.end()
            if self.run.outcome not in ("equal", "no reference"):
                raise SystemExit(f"an undisturbed {job} went wrong: {self.run.outcome}")
            print(f"reference: {job}, {self.run.seconds:.1f} s", flush=True)
            self.reference_s[job] = max(self.reference_s.get(job, 0.0), self.run.seconds)

    def one(self, number: int, seed: int) -> Run:
        self.rng = random.Random(f"{seed}-{number}")
        calculation = number % CALCULATION_EVERY == 0
        self.run = Run(number, "calculation" if calculation else "stream")
        name, fault = self.rng.choice(list(FAULTS.items()))
        self.run.fault = name
        fault(self)
        self.end()
        self.run.delay_s = self.run.seconds - self.reference_s[self.run.job]
        return self.run

    def end(self) -> None:
        """Wait for the end of the job, judge it, and make the cluster whole again."""
        process = self.process
        assert process is not None
        try:
            left_s = max(1.0, HUNG_S - (time.monotonic() - self.began_s))
            out, _ = process.communicate(timeout=left_s)
            self.run.seconds = time.monotonic() - self.began_s
            self.run.outcome = self.judge(json.loads(out) if out.strip() else {})
        except subprocess.TimeoutExpired:
            self.run.outcome = f"hung after {HUNG_S:.0f} s"
            self.net.kill_session(process)
        for host in self.net.hosts:
            self.net.clear(host)
        for agent in self.cluster.agents.values():
            with contextlib.suppress(ProcessLookupError):
                agent.send_signal(signal.SIGCONT)
        self.cluster.start_agents()
        if not self.cluster.wait_for(lambda: not self.left(), LEFTOVERS_LIMIT_S):
            self.run.left = self.left()
            self.cluster.remove_leftovers()

    def left(self) -> list[str]:
        return self.cluster.leftovers(self.shm_before)

    def judge(self, report: dict[str, Any]) -> str:
        self.run.retries = report.get("retries", 0)
        error = str(report.get("error") or "").splitlines()
        # a calculation's error has no name, but its exit code
        if "NoWorkers" in "".join(error[:1]) or report.get("exit") == EXIT_NO_WORKERS:
            text = str(report.get("text") or report["error"])
            limit_s = self.settings["no_nodes_limit_s"] + self.settings["lost_s"] + GIVE_UP_S
            if "no worker slots after" in text:  # they were lost before the session had any
                limit_s += READY_SECS
            late = self.run.seconds > self.reference_s.get(self.run.job, 0.0) + limit_s
            hosts = [self.net.address[node] for node in self.cluster.slots]
            named = all(host in text for host in hosts)
            return "given up" + (", late" if late else "") + ("" if named else ": no hosts named")
        if error:
            return f"failed: {error[0]} {str(report.get('text', ''))[:300]}"
        if not report:
            assert self.process is not None
            return f"no report: {self.process.log.read_text(errors='replace')[-300:]}"
        if self.run.job == "stream":
            found = report["value"].get("sum")
            return "equal" if found == sum_of_stream(TASKS) else f"wrong sum {found}"
        if self.datastore is None:
            return "no reference"
        datastore = Path(report["jobs"][-1]["datastore"])
        differences = compare(self.datastore, datastore)
        datastore.unlink()
        return f"{len(differences)} differences: {differences[0]}" if differences else "equal"


# ---- the faults


def kill_workers(drill: Drill) -> None:
    drill.start()
    for _ in range(drill.rng.randint(1, 2)):  # the third death would end the job
        node = drill.node()
        found = []
        with contextlib.suppress(Exception):
            found = workers(drill.cluster, node)
        if found:
            with contextlib.suppress(Exception):
                drill.rng.choice(found).kill()


def worker_dies_at_a_point(drill: Drill) -> None:
    point, task = drill.rng.choice(POINTS), drill.rng.randrange(TASKS)
    drill.note(f"{point} of task {task}")
    for node in drill.cluster.slots:
        drill.cluster.stop_agent(node)
        drill.cluster.start_agent(node, OQ_RUNTIME_FAULT=f"{point}:{task}:1")
    drill.start()


def kill_agent(drill: Drill) -> None:
    drill.start()
    agent = drill.cluster.agents[drill.node()]
    agent.kill()
    agent.wait()  # else it may count as one that runs


def restart_agent(drill: Drill) -> None:
    drill.start()
    node = drill.node()
    drill.cluster.agents[node].kill()
    drill.cluster.agents[node].wait()
    drill.hold(drill.rng.uniform(0.0, 3.0))
    drill.cluster.start_agent(node)


def hang_agent(drill: Drill) -> None:
    drill.start()
    agent = drill.cluster.agents[drill.node()]
    agent.send_signal(signal.SIGSTOP)
    drill.hold(drill.silence_s())
    agent.send_signal(signal.SIGCONT)


def kill_node(drill: Drill) -> None:
    drill.start()
    drill.net.kill_all(drill.node())


def power_cut(drill: Drill) -> None:
    drill.start()
    node = drill.node()
    drill.net.link_down(node)
    drill.net.kill_all(node)


def link_down(drill: Drill) -> None:
    drill.start()
    node = drill.node()
    drill.net.link_down(node)
    drill.hold(drill.silence_s())
    drill.net.link_up(node)


def drop_one_way(drill: Drill) -> None:
    drill.start()
    node, way = drill.node(), drill.rng.choice(["in", "out"])
    drill.note(way)
    drill.net.drop(node, way)  # type: ignore[arg-type]
    drill.hold(drill.silence_s())
    drill.net.undrop(node)


def loss_and_delay(drill: Drill) -> None:
    drill.start()
    drill.net.netem(drill.node(), loss_percent=20, delay_ms=100)


def node_joins(drill: Drill) -> None:
    node = drill.node()
    drill.cluster.stop_agent(node)
    drill.start()
    drill.cluster.start_agent(node)


def all_nodes_lost_for_a_while(drill: Drill) -> None:
    drill.start()
    for node in drill.cluster.slots:
        drill.net.kill_all(node)
    drill.hold(drill.rng.uniform(0.0, 0.5) * drill.settings["no_nodes_limit_s"])
    for node in drill.cluster.slots:
        drill.cluster.agents[node].wait()
    drill.cluster.start_agents()


def all_nodes_lost(drill: Drill) -> None:
    process = drill.start()
    for node in drill.cluster.slots:
        drill.net.kill_all(node)
    if process.poll() is None:
        drill.run.expected = "given up"


FAULTS: dict[str, Callable[[Drill], None]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        kill_workers, worker_dies_at_a_point, kill_agent, restart_agent, hang_agent, kill_node,
        power_cut, link_down, drop_one_way, loss_and_delay, node_joins, all_nodes_lost_for_a_while,
        all_nodes_lost,
    )
}  # fmt: skip


# ---- the whole


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests.cluster.chaos", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="Number of the first run.")
    parser.add_argument("--limits", choices=["short", "default"], default="short")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs: give a number above 0")
    if reason := netns.unavailable():
        parser.error(f"there can be no cluster here: {reason}")
    with (
        Net() as net,
        tempfile.TemporaryDirectory(prefix="oq-c-") as home,
        Cluster(net, Path(home)) as cluster,
    ):
        runs = series(cluster, args)
    report(runs, args)
    return 0 if all(run.right for run in runs) else 1


def series(cluster: Cluster, args: argparse.Namespace) -> list[Run]:
    settings = dict(SHORT_BEATS) if args.limits == "short" else {}
    cluster.configure(**settings)
    cluster.start_dbserver()
    cluster.start_agents()
    drill = Drill(cluster, {"lost_s": 30.0, "no_nodes_limit_s": 60.0, **settings})
    print(f"limits: {settings or 'the defaults'}", flush=True)
    alone = calculate(cluster, "--cores=2")
    out, _ = alone.communicate(timeout=HUNG_S)
    drill.reference("stream")
    drill.datastore = Path(json.loads(out)["jobs"][-1]["datastore"])
    drill.reference("calculation")
    runs = []
    for number in range(args.first, args.first + args.runs):
        run = drill.one(number, args.seed)
        runs.append(run)
        left = f"; left behind: {', '.join(run.left)}" if run.left else ""
        print(f"{number} {run.job}, {run.fault} ({', '.join(run.detail)}): {run.outcome}, "
              f"{run.retries} retries, {run.delay_s:+.1f} s{left}", flush=True)  # fmt: skip
    return runs


def report(runs: list[Run], args: argparse.Namespace) -> None:
    outcomes = Counter(run.outcome for run in runs)
    complete = [run for run in runs if run.outcome == "equal" or "differences" in run.outcome]
    complete += [run for run in runs if run.outcome.startswith("wrong sum")]
    sums = {
        "runs": len(runs),
        "complete": len(complete),
        "equal": outcomes["equal"],
        "given_up_as_promised": sum(r.right for r in runs if r.expected == "given up"),
        "wrong": sum(not run.right for run in runs),
        "left_behind": sum(bool(run.left) for run in runs),
        "attempts_lost": sum(run.retries for run in runs),
        "longest_delay_s": round(max((run.delay_s for run in complete), default=0.0), 1),
    }
    print(" ".join(f"{name}={value}" for name, value in sums.items()))
    BUILD.mkdir(exist_ok=True)
    path = BUILD / f"chaos-cluster-{args.seed}-{args.first}.json"
    rows = {"seed": args.seed, "limits": args.limits, **sums, "rows": [asdict(r) for r in runs]}
    path.write_text(json.dumps(rows, indent=1))
    print(path)


if __name__ == "__main__":
    sys.exit(main())
