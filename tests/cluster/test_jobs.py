"""Real jobs on the cluster: equal results whatever happens to workers, agents, nodes and links.

A job is a small event-based risk calculation that streams its results, compared with an undisturbed
run on one machine. The faults of the network are made by ``netns``. Not covered: the rules of
scheduling (tests/unit) and jobs without a cluster (tests/local).
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.netns import Process
from tests.conformance.compare import compare

pytestmark = pytest.mark.timeout(300)

JOB = Path(__file__).parents[2] / "examples/event_based_risk/job.ini"
JOB_LIMIT_S = 240.0
#: a fault comes when this many tasks are under way
UNDER_WAY = 2


def finish(run: Process, limit_s: float = JOB_LIMIT_S) -> dict:
    out, _ = run.communicate(timeout=limit_s)
    log = run.log.read_text(errors="replace")[-3000:]
    assert out.strip(), f"oq-run said nothing, exit code {run.returncode}\n{log}"
    return json.loads(out) | {"log": log}


def datastore(result: dict) -> Path:
    assert result["exit"] == 0, (result["error"], result["log"])
    return Path(result["jobs"][-1]["datastore"])


@pytest.fixture(scope="session")
def undisturbed(master: Cluster) -> Path:
    """The datastore of a run on one machine."""
    return datastore(finish(master.oq_run(JOB, "--json", "--cores=2")))


def start(cluster: Cluster, *args: str, **env: str) -> Process:
    """Start the job; returns when tasks are under way on the nodes."""
    run = cluster.oq_run(JOB, "--json", *args, **env)
    reached = cluster.wait_for(lambda: run.poll() is not None or busy(cluster) >= UNDER_WAY, 120)
    assert reached and run.poll() is None, finish(run) if run.poll() is not None else "no tasks"
    return run


def busy(cluster: Cluster) -> int:
    """Slots that are busy, as ``oq-workers status`` has it."""
    return sum(row.get("busy", 0) for row in status(cluster).values())


def status(cluster: Cluster, host: str = "master") -> dict[str, dict]:
    argv = [sys.executable, "-m", "oq_runtime.workers", "status", "--json"]
    done = cluster.net.run(host, argv, cluster.env(host))
    return json.loads(done.stdout)


def workers(cluster: Cluster, node: str) -> list[psutil.Process]:
    return psutil.Process(cluster.agents[node].pid).children()


def check_equal(run: Process, undisturbed: Path) -> dict:
    result = finish(run)
    assert not compare(undisturbed, datastore(result))
    return result


def test_every_node_takes_part(cluster: Cluster, undisturbed: Path) -> None:
    run = start(cluster)
    seen: set[str] = set()

    def all_seen() -> bool:
        seen.update(host for host, row in status(cluster).items() if row.get("busy"))
        return len(seen) == len(cluster.slots) or run.poll() is not None

    cluster.wait_for(all_seen, 60)
    check_equal(run, undisturbed)
    assert seen == {cluster.net.address[node] for node in cluster.slots}


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before_start", "after_first", "after_last", "before_end"])
def test_worker_dies_at(cluster: Cluster, undisturbed: Path, point: str) -> None:
    for node in cluster.slots:  # the workers inherit the environment of their agent
        cluster.stop_agent(node)
        cluster.start_agent(node, OQ_RUNTIME_FAULT=f"{point}:3:1")
    try:
        result = check_equal(cluster.oq_run(JOB, "--json"), undisturbed)
        assert result["retries"] == 1, "the worker has not died"
    finally:
        for node in cluster.slots:
            cluster.stop_agent(node)
        cluster.start_agents()


def kill_workers(cluster: Cluster) -> None:
    rng = random.Random(1)
    for node in ("node2", "node3"):
        rng.choice(workers(cluster, node)).kill()


def kill_agent(cluster: Cluster) -> None:
    cluster.agents["node3"].kill()


def restart_agent(cluster: Cluster) -> None:
    cluster.agents["node3"].kill()
    cluster.agents["node3"].wait()
    cluster.start_agent("node3")


def power_cut(cluster: Cluster) -> None:
    cluster.net.kill_all("node3")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kill_workers, kill_agent, restart_agent, power_cut])
def test_process_faults(
    cluster: Cluster, undisturbed: Path, fault: Callable[[Cluster], None]
) -> None:
    run = start(cluster)
    fault(cluster)
    check_equal(run, undisturbed)


def test_restarted_agent_is_used_again(cluster: Cluster, undisturbed: Path) -> None:
    run = start(cluster)
    restart_agent(cluster)
    address = cluster.net.address["node3"]
    used = cluster.wait_for(
        lambda: run.poll() is not None or status(cluster)[address].get("jobs"), 60
    )
    assert used and run.poll() is None, "the job ended, or never came back to the node"
    check_equal(run, undisturbed)


@pytest.mark.slow
def test_node_that_joins_gets_tasks(cluster: Cluster, undisturbed: Path) -> None:
    cluster.stop_agent("node3")
    run = start(cluster)
    cluster.start_agent("node3")
    address = cluster.net.address["node3"]
    got = cluster.wait_for(
        lambda: run.poll() is not None or status(cluster)[address].get("busy"), 60
    )
    assert got and run.poll() is None, "the node got no task while the job ran"
    check_equal(run, undisturbed)


@pytest.mark.slow
def test_hung_agent_is_lost_and_its_attempts_are_refused(
    cluster: Cluster, undisturbed: Path
) -> None:
    run = start(cluster)
    agent = cluster.agents["node3"]
    agent.send_signal(signal.SIGSTOP)
    began_s = time.monotonic()
    try:
        # the limit is 30 s by default; the agent wakes up 10 s later, or when the job is done
        cluster.wait_for(lambda: run.poll() is not None or time.monotonic() - began_s > 40, 60)
    finally:
        agent.send_signal(signal.SIGCONT)
    check_equal(run, undisturbed)


@pytest.mark.slow
def test_link_down_for_45_s(cluster: Cluster, undisturbed: Path) -> None:
    run = start(cluster)
    cluster.net.link_down("node3")
    began_s = time.monotonic()
    cluster.wait_for(lambda: run.poll() is not None or time.monotonic() - began_s > 45, 60)
    cluster.net.link_up("node3")
    check_equal(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["in", "out"])
def test_silent_drop_in_one_direction(cluster: Cluster, undisturbed: Path, direction: str) -> None:
    run = start(cluster)
    cluster.net.drop("node3", direction)
    check_equal(run, undisturbed)


@pytest.mark.slow
def test_loss_and_delay(cluster: Cluster, undisturbed: Path) -> None:
    for node in cluster.slots:
        cluster.net.netem(node, loss_percent=20, delay_ms=100)
    check_equal(cluster.oq_run(JOB, "--json"), undisturbed)


@pytest.mark.slow
def test_all_nodes_lost(cluster: Cluster) -> None:
    run = start(cluster)
    for node in cluster.slots:
        cluster.net.kill_all(node)
    result = finish(run)
    assert result["exit"] in (1, 3)
    assert "no node left" in result["error"] or "NoWorkers" in result["error"], result


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["SIGINT", "SIGHUP"])
def test_interrupt_frees_the_slots(cluster: Cluster, number: signal.Signals) -> None:
    run = start(cluster)
    run.send_signal(number)
    began_s = time.monotonic()
    assert cluster.wait_for(lambda: busy(cluster) == 0, 10)
    took_s = time.monotonic() - began_s
    assert finish(run, 20)["exit"] == 130
    assert took_s < 5, f"{took_s:.1f} s"


# ---- who may come in


@pytest.mark.parametrize(
    ("key", "word"),
    [("x" * 32, "authkey"), ("changeme", "changeme"), ("tiny", "shorter")],
    ids=["wrong", "default", "short"],
)
def test_wrong_authkey(cluster: Cluster, tmp_path: Path, key: str, word: str) -> None:
    cfg = tmp_path / "openquake.cfg"
    cfg.write_text(cluster.cfg.read_text().replace(cluster.authkey, key))
    began_s = time.monotonic()
    result = finish(cluster.oq_run(JOB, "--json", OQ_CONFIG_FILE=str(cfg)), 60)
    assert result["exit"] in (2, 3), result
    assert word in result["error"] or "default" in result["error"], result
    assert key not in result["error"] or key == "changeme"
    assert time.monotonic() - began_s < 30
    if word == "authkey":
        log = (cluster.log / "agent-node1.log").read_text()
        assert "refused a connection" in log, "the node says nothing of it"


def test_status_names_the_host_that_does_not_answer(cluster: Cluster) -> None:
    cluster.stop_agent("node2")
    argv = [sys.executable, "-m", "oq_runtime.workers", "status"]
    done = cluster.net.run("master", argv, cluster.env("master"))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if "unreachable" in line]
    assert cluster.net.address["node2"] in line and "no answer" in line


def test_oq_workers_status_in_the_format_of_the_engine(cluster: Cluster) -> None:
    argv = [sys.executable, "-m", "openquake.commands", "workers", "status"]
    done = cluster.net.run("master", argv, cluster.env("master", LOGNAME="openquake"))
    address = cluster.net.address
    expected = [(address[node], 0, slots) for node, slots in cluster.slots.items()]
    assert str(expected) in done.stdout, (done.stdout, done.stderr)
