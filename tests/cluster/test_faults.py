"""Workers, agents, nodes and links fail during a job: it completes, and with the same results.

Most tests shorten the beats; one per kind of loss waits for the default limits. Not covered: the
end of the job itself (``test_ends``), memory and disks (``test_limits``).
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import (
    JOB_LIMIT_S,
    SHORT_BEATS,
    calculate,
    check_calculation,
    check_stream,
    drive,
    result,
    status,
    stream,
    under_way,
    workers,
)
from tests.cluster.netns import Direction, Process
from tests.leftovers import wait_for

pytestmark = pytest.mark.timeout(300)
SLOW = pytest.mark.slow
short_beats = pytest.mark.settings(**SHORT_BEATS)
#: of a frame that holds a beat or a handshake, and no full packet
SHORT_FRAME_BYTES = 1000
LOST_S = SHORT_BEATS["lost_s"]


def log_of(cluster: Cluster, node: str) -> str:
    return (cluster.log / f"agent-{node}.log").read_text()


def hold(cluster: Cluster, run: Process, seconds: float) -> None:
    """Let a fault last; the job must not end before."""
    began_s = time.monotonic()
    cluster.wait_for(lambda: run.poll() is not None or time.monotonic() - began_s > seconds, 300)
    assert run.poll() is None, f"the job ended before the fault did: {result(run)}"


# ---- workers


@short_beats
@pytest.mark.parametrize(
    "point",
    [
        "before_start",
        pytest.param("after_first", marks=SLOW),
        "after_last",
        pytest.param("before_end", marks=SLOW),
    ],
)
def test_worker_dies_at(cluster: Cluster, point: str) -> None:
    for node in cluster.slots:  # the workers inherit the environment of their agent
        cluster.stop_agent(node)
        cluster.start_agent(node, OQ_RUNTIME_FAULT=f"{point}:3:1")
    assert check_stream(stream(cluster))["retries"] == 1, "the worker has not died"


@pytest.mark.slow
@short_beats
def test_workers_die_at_random(cluster: Cluster, undisturbed: Path) -> None:
    run = under_way(cluster, calculate(cluster), "node2", "node3")
    rng = random.Random(1)
    for node in ("node2", "node3"):
        rng.choice(workers(cluster, node)).kill()
    check_calculation(run, undisturbed)


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[Path]:
    """A file system of its own that takes nothing more: who writes there waits for its end."""
    disk, place = folder / "disk", folder / "place"
    place.mkdir()
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", disk, place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no loop device can be mounted here: {mounted.stderr.strip()}")
    try:
        subprocess.run(["fsfreeze", "--freeze", place], check=True)
        yield place
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", place])
        assert wait_for(lambda: subprocess.run(["umount", place]).returncode == 0, 20)


@pytest.mark.slow
@short_beats
def test_workers_that_the_kernel_does_not_let_end(cluster: Cluster, tmp_path: Path) -> None:
    """A device, or a file server, that does not answer costs their slots, and nothing else."""
    slots = sum(cluster.slots.values())
    with frozen(tmp_path) as place:
        run = drive(cluster, "writes", [(x, str(place / "file")) for x in range(2)])

        def waiting() -> list[tuple[str, psutil.Process]]:
            found = [(node, worker) for node in cluster.slots for worker in workers(cluster, node)]
            return [(n, w) for n, w in found if w.status() == psutil.STATUS_DISK_SLEEP]

        assert wait_for(lambda: len(waiting()) == 2, 60), run.log.read_text()
        stuck = waiting()
        assert wait_for(lambda: sum(row["waiting"] for row in status(cluster).values()) == 2, 20)
        run.send_signal(signal.SIGINT)
        run.wait(15)
        assert wait_for(lambda: sum(row["stuck"] for row in status(cluster).values()) == 2, 20)
        for node, worker in stuck:
            said = f"worker process {worker.pid} was killed 5 s ago and does not end"
            assert said in log_of(cluster, node)
            assert f"process {worker.pid} waits in the kernel for 4 s" in log_of(cluster, node)
        assert all(row["state"] == "up" for row in status(cluster).values())
        check_stream(under_way(cluster, stream(cluster), least=slots - 2))
        assert all(worker.is_running() for _, worker in stuck)
        cluster.stop_agent(stuck[0][0])
    assert not psutil.wait_procs([worker for _, worker in stuck], 20)[1]
    cluster.start_agents()
    check_stream(under_way(cluster, stream(cluster), least=slots))


@pytest.mark.slow
@pytest.mark.settings(preload="hanging")
def test_node_whose_workers_do_not_start(cluster: Cluster) -> None:
    """The engine cannot be read there; its tasks go to the others, and it is named."""
    cluster.stop_agent("node2")
    cluster.start_agent("node2", HANGS="1")
    run = under_way(cluster, stream(cluster))
    assert wait_for(lambda: status(cluster)["node2"]["unstarted"] or run.poll() is not None, 120, 1)
    check_stream(run)
    assert "still imports the engine" in log_of(cluster, "node2")
    cluster.stop_agent("node2")


@pytest.mark.slow
@pytest.mark.settings(preload="hanging")
def test_workers_that_start_nowhere(cluster: Cluster) -> None:
    cluster.stop_agents()
    for node in cluster.slots:
        cluster.start_agent(node, HANGS="1")
    run = calculate(cluster)
    said = "waiting: no node begins with its tasks"
    assert wait_for(lambda: said in run.log.read_text(), 180, 1), run.log.read_text()
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == 130
    cluster.stop_agents()


# ---- agents


@short_beats
def test_killed_agent(cluster: Cluster) -> None:
    run = under_way(cluster, stream(cluster), "node3", least=5)
    cluster.agents["node3"].kill()
    assert check_stream(run)["retries"] >= 5


@pytest.mark.slow
@short_beats
def test_restarted_agent_is_used_again(cluster: Cluster) -> None:
    run = under_way(cluster, stream(cluster, 80), "node3")
    cluster.agents["node3"].kill()
    cluster.agents["node3"].wait()
    cluster.start_agent("node3")
    under_way(cluster, run, "node3")
    check_stream(run, 80)


def hang(cluster: Cluster, tasks: int, seconds: float) -> None:
    run = under_way(cluster, stream(cluster, tasks), "node3", least=5)
    agent = cluster.agents["node3"]
    agent.send_signal(signal.SIGSTOP)
    try:
        hold(cluster, run, seconds)
    finally:
        agent.send_signal(signal.SIGCONT)
    under_way(cluster, run, "node3")
    assert check_stream(run, tasks)["retries"] >= 5


@short_beats
def test_agent_that_hangs_is_lost_and_its_attempts_are_refused(cluster: Cluster) -> None:
    hang(cluster, 90, LOST_S + 3)


@pytest.mark.slow
def test_agent_that_hangs_for_40_s(cluster: Cluster) -> None:
    hang(cluster, 160, 40)


@pytest.mark.slow
def test_forty_other_processes_cost_no_node(cluster: Cluster) -> None:
    run = under_way(cluster, stream(cluster, 60), "node3", least=5)
    loop = f"ulimit -t {JOB_LIMIT_S:.0f}; while :; do :; done"
    others = [subprocess.Popen(["sh", "-c", loop]) for _ in range(40)]
    try:
        assert check_stream(run, 60)["retries"] == 0
        assert all(row["state"] == "up" for row in status(cluster).values())
    finally:
        for other in others:
            other.kill()
            other.wait()


# ---- nodes and links


@pytest.mark.slow
@short_beats
def test_power_cut(cluster: Cluster, undisturbed: Path) -> None:
    run = under_way(cluster, calculate(cluster), "node3")
    cluster.net.link_down("node3")  # first: the kernel would tell the others of dead processes
    cluster.net.kill_all("node3")
    check_calculation(run, undisturbed)


def test_killed_node(cluster: Cluster) -> None:
    run = under_way(cluster, stream(cluster), "node3", least=5)
    cluster.net.kill_all("node3")
    assert check_stream(run)["retries"] >= 5


@pytest.mark.slow
def test_link_down_for_45_s(cluster: Cluster) -> None:
    run = under_way(cluster, stream(cluster, 180), "node3", least=5)
    cluster.net.link_down("node3")
    hold(cluster, run, 45)
    cluster.net.link_up("node3")
    under_way(cluster, run, "node3")
    assert check_stream(run, 180)["retries"] >= 5


@pytest.mark.slow
@short_beats
def test_link_down_for_a_moment(cluster: Cluster) -> None:
    run = under_way(cluster, stream(cluster), "node3", least=5)
    cluster.net.link_down("node3")
    hold(cluster, run, LOST_S / 3)
    cluster.net.link_up("node3")
    assert check_stream(run)["retries"] == 0, "a silence below the limit has cost attempts"


def drop(cluster: Cluster, direction: Direction) -> None:
    run = under_way(cluster, stream(cluster), "node3", least=5)
    cluster.net.drop("node3", direction)
    # those whose start was not heard any more are taken back before, as if they still waited
    assert check_stream(run)["retries"] >= 1


@short_beats
@pytest.mark.parametrize("direction", ["in", pytest.param("out", marks=SLOW)])
def test_silent_drop_in_one_direction(cluster: Cluster, direction: Direction) -> None:
    drop(cluster, direction)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["in", "out"])
def test_silent_drop_with_the_default_limits(cluster: Cluster, direction: Direction) -> None:
    drop(cluster, direction)


@pytest.mark.slow
@short_beats
@pytest.mark.parametrize("direction", ["in", "out"])
def test_node_to_which_only_small_messages_come(cluster: Cluster, direction: Direction) -> None:
    """As behind a smaller MTU of which nobody tells: no work for it, and a reason for the user."""
    cluster.net.shorten("node3", SHORT_FRAME_BYTES, direction)
    log = check_stream(stream(cluster))["log"]
    words = {"in": "messages of 16 KiB do not come through", "out": "results do not come through"}
    assert re.search(f"running without .*{words[direction]}", log), log


@short_beats
@pytest.mark.parametrize("direction", [pytest.param("in", marks=pytest.mark.slow), "out"])
def test_large_messages_get_lost_during_a_job(cluster: Cluster, direction: Direction) -> None:
    tasks = 48
    run = under_way(cluster, stream(cluster, tasks), "node3")
    cluster.net.shorten("node3", SHORT_FRAME_BYTES, direction)
    assert check_stream(run, tasks)["retries"] > 0


@pytest.mark.slow
def test_loss_and_delay(cluster: Cluster, undisturbed: Path) -> None:
    for node in cluster.slots:
        cluster.net.netem(node, loss_percent=20, delay_ms=100)
    check_calculation(calculate(cluster), undisturbed)


# ---- all nodes


def lose_all(cluster: Cluster, limit_s: float) -> None:
    run = under_way(cluster, stream(cluster, 80))
    for node in cluster.slots:
        cluster.net.kill_all(node)
    began_s = time.monotonic()
    found = result(run)
    took_s = time.monotonic() - began_s
    assert found["error"] == "NoWorkers", found
    for node in cluster.slots:
        assert cluster.net.address[node] in found["text"], found["text"]
    said = re.search(r"no node left for (\d+) s", found["text"])
    assert said and limit_s - 0.5 <= int(said[1]) < limit_s + 10, found["text"]
    assert limit_s <= took_s < limit_s + 10, f"{took_s:.1f} s"


@pytest.mark.slow
@short_beats
def test_all_nodes_lost(cluster: Cluster) -> None:
    lose_all(cluster, SHORT_BEATS["no_nodes_limit_s"])


@pytest.mark.slow
@pytest.mark.settings(**SHORT_BEATS | {"no_nodes_limit_s": 3})
def test_large_messages_get_lost_to_all_nodes(cluster: Cluster) -> None:
    """They are called again and again, and each call is answered: the job ends all the same."""
    run = under_way(cluster, stream(cluster, 80))
    for node in cluster.slots:
        cluster.net.shorten(node, SHORT_FRAME_BYTES, "in")
    began_s = time.monotonic()
    found = result(run, 60)
    took_s = time.monotonic() - began_s
    assert found["error"] == "NoWorkers", found
    assert re.search(r"no node left for \d+ s", found["text"]), found["text"]
    assert took_s < LOST_S + 3 + 10, f"{took_s:.1f} s"


@pytest.mark.slow
def test_all_nodes_lost_with_the_default_limit(cluster: Cluster) -> None:
    lose_all(cluster, 60)


@pytest.mark.slow
@short_beats
def test_calculation_without_nodes_says_who_is_gone(cluster: Cluster) -> None:
    run = under_way(cluster, calculate(cluster))
    for node in cluster.slots:
        cluster.net.kill_all(node)
    found = result(run)
    assert found["exit"] == 3, found
    assert "no node left" in found["error"], found


@pytest.mark.slow
@short_beats
def test_node_comes_back_before_all_is_given_up(cluster: Cluster) -> None:
    run = under_way(cluster, stream(cluster))
    for node in cluster.slots:
        cluster.net.kill_all(node)
    cluster.wait_for(lambda: all(row["state"] != "up" for row in status(cluster).values()), 20)
    cluster.agents["node3"].wait()
    cluster.start_agent("node3")
    check_stream(run)


#: as of a packet filter, or a router, that forgets connections on which nothing is said
FORGETS = """
table inet forgets {
    chain in { type filter hook input priority 0; policy drop; iif lo accept
        ct state established,related accept
        ct state new tcp flags & (syn|ack) == syn accept
        meta l4proto icmp accept
    }
    chain out { type filter hook output priority 0; policy drop; oif lo accept
        ct state established,related accept
        ct state new tcp flags & (syn|ack) == syn accept
        meta l4proto icmp accept
    }
}
"""
#: seconds of silence after which it does
FORGETS_S = 5


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nft"), reason="nft is not installed")
def test_a_packet_filter_forgets_connections(cluster: Cluster, tmp_path: Path) -> None:
    """On every node, while tasks say nothing for nine times as long; the default beats do."""
    (rules := tmp_path / "rules").write_text(FORGETS)
    remember = ("tcp_loose", 0), ("tcp_timeout_established", FORGETS_S)
    script = "; ".join(f"echo {n} >/proc/sys/net/netfilter/nf_conntrack_{it}" for it, n in remember)
    try:
        for node in cluster.slots:
            for command in ["sh", "-ec", script], ["nft", "-f", str(rules)]:
                done = cluster.net.run(node, command)
                assert done.returncode == 0, done.stderr
        tasks = sum(cluster.slots.values())
        found = result(drive(cluster, "slow", [(x, 9.0 * FORGETS_S) for x in range(tasks)]))
        assert (found["value"], found["retries"]) == ({"sum": sum(range(tasks))}, 0), found
    finally:
        for node in cluster.slots:
            cluster.net.run(node, ["nft", "delete", "table", "inet", "forgets"])
