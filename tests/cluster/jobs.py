"""Jobs on the cluster for the tests of this folder, and whether their results are right.

A calculation is the event-based risk example, made smaller; right is what a run on one machine
gives. A stream are task functions through the engine's Starmap (``driver``), with partial results
and subtasks; right is a sum that is known beforehand, off by what is lost or comes twice.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from oq_runtime.commands.progress import StatusReader
from oq_runtime.wire import protocol
from tests.cluster.cluster import Cluster
from tests.cluster.netns import MASTER, Process
from tests.conformance.compare import compare
from tests.leftovers import wait_for

EXAMPLE = Path(__file__).parents[2] / "examples/event_based_risk"
#: a quarter of the example, 5 s of work; and each worker takes 4 s to import the engine
YEARS, FEWER_YEARS = "ses_per_logic_tree_path = 20000", "ses_per_logic_tree_path = 5000"
DRIVER = Path(__file__).parent / "driver.py"
JOB_LIMIT_S = 240.0
#: partial results of each task of a stream
PARTS = 5
TAIL_CHARS = 3000
#: between two questions to the nodes, each a process that needs the cores of the job
STATUS_PAUSE_S = 0.3

#: [oq_runtime] for tests that need not wait for the defaults of 2, 10, 30, 30 and 60 s
SHORT_BEATS: dict[str, float] = {
    "beat_s": 0.5,
    "suspect_s": 1.5,
    "lost_s": 4,
    "no_nodes_limit_s": 6,
}
#: [oq_runtime] of jobs of whose end ``notice`` is to hear
NOTICES = {"notify": """sh -c 'cat >"$TMPDIR/notice"'"""}
#: a calculation that is still there when it is aborted
MANY_YEARS = "ses_per_logic_tree_path=100000"


def job_file(cluster: Cluster) -> Path:
    """The job file of the small calculation, beside its inputs."""
    path = cluster.home / "job/job.ini"
    if not path.exists():
        shutil.copytree(EXAMPLE, path.parent)
        text = path.read_text()
        assert YEARS in text
        path.write_text(text.replace(YEARS, FEWER_YEARS))
    return path


def calculate(cluster: Cluster, *args: str, **env: str) -> Process:
    """Start the small calculation through ``oq-run``."""
    return cluster.oq_run(job_file(cluster), "--json", *args, **env)


def corpus(job: str) -> Path:
    """A job of those that the engine brings along."""
    spec = importlib.util.find_spec("openquake.qa_tests_data")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / job


def drive(
    cluster: Cluster, function: str, arguments: Sequence[Sequence[Any]], **env: str
) -> Process:
    """Start tasks of a function of tests/local/tasks, one per list of arguments."""
    args = [str(DRIVER), function, json.dumps(list(arguments))]
    return cluster.run(args, {"OQ_DISTRIBUTE": "zmq", **env})


def stream(cluster: Cluster, tasks: int = 24, seconds: float = 1.0, **env: str) -> Process:
    """Start a job of so many streaming tasks, each of which takes so long."""
    return drive(cluster, "stream", [(x, PARTS, seconds) for x in range(tasks)], **env)


def sum_of_stream(tasks: int = 24) -> int:
    return sum(x * (PARTS * (PARTS + 1) // 2) + x * x for x in range(tasks))


def result(run: Process, limit_s: float = JOB_LIMIT_S) -> dict[str, Any]:
    """What the job has printed at its end, and the end of its log."""
    out, _ = run.communicate(timeout=limit_s)
    log = run.log.read_text(errors="replace")[-TAIL_CHARS:]
    assert out.strip(), f"the job said nothing, exit code {run.returncode}\n{log}"
    found: dict[str, Any] = json.loads(out)
    return found | {"log": log}


def notice(cluster: Cluster) -> dict[str, Any]:
    """What was told of the end of a job."""
    path = cluster.tmpdir(MASTER) / "notice"
    assert wait_for(lambda: path.exists() and path.read_text(), 60)
    told: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return told


def datastore(calculation: dict[str, Any]) -> Path:
    assert calculation["exit"] == 0, (calculation["error"], calculation["log"])
    return Path(calculation["jobs"][-1]["datastore"])


def check_calculation(run: Process, undisturbed: Path) -> dict[str, Any]:
    """The calculation ends, and with the same results; returns what it has printed."""
    found = result(run)
    assert not compare(undisturbed, datastore(found))
    return found


def check_stream(run: Process, tasks: int = 24) -> dict[str, Any]:
    """The stream ends with the right sum; returns what it has printed."""
    found = result(run)
    assert found.get("value", {}).get("sum") == sum_of_stream(tasks), found
    return found


# ---- what the nodes do


def status(cluster: Cluster, host: str = MASTER) -> dict[str, dict[str, Any]]:
    """Per node what ``oq-workers status`` says on a host."""
    argv = [sys.executable, "-m", "oq_runtime.commands.workers", "status", "--json"]
    done = cluster.net.run(host, argv, cluster.env(host))
    assert done.stdout, done.stderr
    rows = json.loads(done.stdout)
    return {node: rows[cluster.net.address[node]] for node in cluster.slots}


def busy(cluster: Cluster, *nodes: str, host: str = MASTER) -> int:
    """Slots of these nodes (of all, if none is named) that are busy."""
    rows = status(cluster, host)
    return sum(rows[node].get("busy", 0) for node in nodes or rows)


def under_way(cluster: Cluster, run: Process, *nodes: str, least: int = 1) -> Process:
    """Wait until each of the nodes (some node, if none is named) does tasks of the job."""

    def reached() -> bool:
        rows = status(cluster)
        if not nodes:
            return bool(sum(row.get("busy", 0) for row in rows.values()) >= least)
        return all(rows[node].get("busy", 0) >= least for node in nodes)

    found = wait_for(lambda: run.poll() is not None or reached(), 120, STATUS_PAUSE_S)
    ended = run.poll() is not None
    assert found and not ended, result(run) if ended else f"no tasks: {status(cluster)}"
    return run


def workers(cluster: Cluster, node: str) -> list[psutil.Process]:
    """The worker processes of a node, which are children of its fork server."""
    servers = psutil.Process(cluster.agents[node].pid).children()
    return [worker for server in servers for worker in server.children()]


def broker(run: Process) -> psutil.Process:
    """The broker of a job: the one that has the job's process as its owner."""
    found: list[psutil.Process] = []

    def look() -> bool:
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "oq_runtime.session.broker" in words and words[words.index("--owner") + 1] == str(
                run.pid
            ):
                found.append(process)
        return bool(found)

    assert wait_for(look, 60), f"job {run.pid} has no broker: {run.log.read_text()}"
    return found[0]


def broker_status(run: Process) -> protocol.Status | None:
    """What the broker of a job says of its nodes; None when the job ends meanwhile."""
    words = broker(run).cmdline()
    reader = StatusReader(Path(words[words.index("--directory") + 1]))
    try:
        reader.poll()
        found: list[protocol.Status] = []
        wait_for(
            lambda: (
                run.poll() is not None
                or ((status := reader.poll()) and found.append(status) is None)
            ),
            60,
        )
    finally:
        reader.close()
    assert found or run.poll() is not None, "the broker does not answer"
    return found[0] if found else None


def number(run: Process) -> int:
    """The number of a calculation, as its log has it."""
    found = re.search(r"#(\d+) ", run.log.read_text())
    assert found, run.log.read_text()
    return int(found[1])
