"""What no member would send, to an agent and to a broker that serve a job: neither minds.

The strangers have no key. The members have one, and may do whatever the owner of a job may do; they
must not break the agent or the broker of others by what they send.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import psutil
import pytest

from oq_runtime.wire.strangers import MOST as STRANGERS
from tests.cluster.cluster import CTRL_PORT, SLOTS, Cluster
from tests.cluster.jobs import SHORT_BEATS, broker, drive, result, status, under_way
from tests.cluster.netns import MASTER, Process
from tests.cluster.tapped import HOWS
from tests.conftest import Attacks
from tests.leftovers import wait_for

pytestmark = [pytest.mark.timeout(300), pytest.mark.attack]

ATTACKER = str(Path(__file__).parent / "attacker.py")
LIAR = str(Path(__file__).parent / "liar.py")
TAPPED = str(Path(__file__).parent / "tapped.py")
#: of a million floats each way, see ``driver``
TAPPED_TASKS, SHARED = 80, 1_000_000
RECEIVER_PORT = 1912
#: bytes by which an agent or a broker may grow: 96 MiB, and what comes until it has looked
GROWTH_BYTES = 256 << 20
ATTACK_LIMIT_S = 240
#: that a process may have open on a host with small limits
OPEN_FILES = 1024
#: of the job that is served meanwhile; on 8 slots they would take longer than an attack may
TASKS, TASK_S = 1000, 2.0


@pytest.fixture
def over(tmp_path: Path) -> Path:
    """A file with which the job need not wait for anything more."""
    return tmp_path / "over"


def serve(cluster: Cluster, over: Path) -> Process:
    """Start the job; returns when the node with the most slots has tasks of it."""
    tasks = [(x, TASK_S, str(over)) for x in range(TASKS)]
    return under_way(cluster, drive(cluster, "unless", tasks), "node3")


class Target:
    """A process with a port, and the most memory that it has had."""

    def __init__(self, cluster: Cluster, host: str, port: int, pid: int) -> None:
        self.address = cluster.net.address[host]
        self.port = port
        self.pid = pid
        self.before_bytes = self.peak_bytes()
        self.before_files = self.open_files()

    def peak_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"process {self.pid} has ended")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def crowded(self) -> bool:
        """Whether strangers are there."""
        return self.open_files() > self.before_files + STRANGERS / 2

    def admit(self, files: int) -> int:
        """Let the process have so many files open; return how many it could have."""
        soft, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (files, hard))
        return soft

    def grown(self) -> int:
        return self.peak_bytes() - self.before_bytes

    def check(self) -> None:
        assert psutil.pid_exists(self.pid), "the process that was attacked has ended"
        assert self.grown() < GROWTH_BYTES, f"grown by {self.grown() >> 20} MiB"


def targets(cluster: Cluster, run: Process) -> list[Target]:
    """The agent with the most slots, and the broker of the job."""
    agent = cluster.agents["node3"].pid
    return [
        Target(cluster, "node3", CTRL_PORT, agent),
        Target(cluster, MASTER, RECEIVER_PORT, broker(run).pid),
    ]


def attack(cluster: Cluster, how: str, target: Target, count: int, **options: int) -> Process:
    argv = [sys.executable, ATTACKER, how, target.address, str(target.port), str(count)]
    log = cluster.log / "attacker.log"
    env = cluster.env("node1")
    return cluster.net.popen("node1", argv, env, log=log, stdout=subprocess.PIPE, **options)


def sent(attacker: Process) -> int:
    out, _ = attacker.communicate(timeout=ATTACK_LIMIT_S)
    assert attacker.returncode == 0, attacker.log.read_text()
    return int(json.loads(out.splitlines()[-1])["sent"])


def check_undisturbed(
    cluster: Cluster,
    run: Process,
    attacked: list[Target],
    over: Path,
    nodes: Collection[str] = tuple(SLOTS),
) -> None:
    assert run.poll() is None, "the job has not lasted as long as the attack"
    for target in attacked:
        target.check()
    assert all(row["state"] == "up" for node, row in status(cluster).items() if node in nodes)
    over.touch()
    found = result(run)
    assert found.get("value", {}).get("sum") == sum(range(TASKS)), found
    assert found["retries"] == 0, found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["strangers", "members"])
def test_random_and_mutated_frames(cluster: Cluster, over: Path, how: str) -> None:
    run = serve(cluster, over)
    attacked = targets(cluster, run)
    if how == "members":  # at the broker they have a key for their own connection alone
        del attacked[1]
    attackers = [attack(cluster, how, target, 25_000) for target in attacked]
    assert all(sent(attacker) >= 25_000 for attacker in attackers)
    check_undisturbed(cluster, run, attacked, over)


def test_a_million_frames_without_a_ticket(cluster: Cluster, over: Path, attacks: Attacks) -> None:
    run = serve(cluster, over)
    _, target = targets(cluster, run)
    attacks.tried(sent(attack(cluster, "tickets", target, 1_000_000)))
    check_undisturbed(cluster, run, [target], over)


@pytest.mark.slow
@pytest.mark.settings(**SHORT_BEATS)
@pytest.mark.parametrize("way", ["to node", "to broker"])
def test_somebody_on_the_way(cluster: Cluster, tmp_path: Path, attacks: Attacks, way: str) -> None:
    """Whatever he does ends the connection, and all results are right."""
    notes = tmp_path / "notes"
    cluster.stop_agents()
    cluster.start_agent("node3", program=[TAPPED, way, str(notes)])
    found = result(drive(cluster, "square", [["own"]] * TAPPED_TASKS))
    assert found.get("value", {}).get("sum") == sum(x * x for x in range(TAPPED_TASKS)) * SHARED
    assert found["retries"] >= len(HOWS), found
    tampered = notes.read_text().split()
    # one thing per connection, so one that did not end would be the last
    assert tampered == list(HOWS)[: len(tampered)]
    attacks.tried(len(HOWS), len(HOWS) - len(tampered))


@pytest.mark.slow
def test_idle_connections(cluster: Cluster, over: Path) -> None:
    run = serve(cluster, over)
    attacked = targets(cluster, run)
    attackers = [attack(cluster, "idle", t, 1000, stdin=subprocess.PIPE) for t in attacked]
    for attacker in attackers:
        assert attacker.stdout is not None
        assert json.loads(attacker.stdout.readline()) == {"open": 1000}
    try:
        check_undisturbed(cluster, run, attacked, over)
    finally:
        for attacker in attackers:
            attacker.communicate()


def test_silent_connections_beyond_the_limit_of_open_files(
    cluster: Cluster, over: Path, attacks: Attacks
) -> None:
    """Three thousand, opened again as they are closed, on hosts that admit 1,024 files."""
    run = serve(cluster, over)
    attacked = targets(cluster, run)
    limits = [target.admit(OPEN_FILES) for target in attacked]
    attackers = [attack(cluster, "silent", target, 3000) for target in attacked]
    try:
        for target in attacked:
            assert wait_for(target.crowded, 20), "the attack has not begun"
            assert wait_for(lambda t=target: t.open_files() < OPEN_FILES / 2, 20)  # type: ignore[misc]
        for attacker in attackers:
            attacks.tried(sent(attacker))
        check_undisturbed(cluster, run, attacked, over)
    finally:
        for target, limit in zip(attacked, limits, strict=True):
            target.admit(limit)


def test_frame_of_a_gibibyte_of_a_stranger(cluster: Cluster, over: Path) -> None:
    run = serve(cluster, over)
    attacked = targets(cluster, run)
    for target in attacked:
        assert sent(attack(cluster, "huge", target, 1)) < 1 << 30
    check_undisturbed(cluster, run, attacked, over)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["large", "bomb"])
def test_message_that_fills_an_agent(
    cluster: Cluster, over: Path, attacks: Attacks, how: str
) -> None:
    run = serve(cluster, over)
    agent, _ = targets(cluster, run)
    sent(attack(cluster, how, agent, 1200))
    attacks.tried(1, agent.grown() >= GROWTH_BYTES)
    check_undisturbed(cluster, run, [agent], over)


@pytest.mark.parametrize("how", ["huge", "bomb"])
def test_message_that_fills_a_broker(
    no_agents: Cluster, over: Path, attacks: Attacks, how: str
) -> None:
    """A node, which has a ticket, sends it; the others serve the job."""
    no_agents.configure(preload="")
    no_agents.start_agent("node3")
    run = serve(no_agents, over)
    attacked = targets(no_agents, run)
    said = no_agents.log / "agent-node1.log"
    before = said.stat().st_size if said.exists() else 0
    no_agents.start_agent("node1", program=[LIAR, how])
    assert wait_for(lambda: said.read_text()[before:], ATTACK_LIMIT_S), "nothing was sent"
    assert f"sent {1 << 30} bytes" in said.read_text()[before:]
    attacks.tried(1, attacked[1].grown() >= GROWTH_BYTES)
    no_agents.stop_agent("node1")
    check_undisturbed(no_agents, run, attacked, over, nodes=["node3"])


@pytest.mark.slow
def test_questions_whose_answers_nobody_reads(cluster: Cluster, over: Path) -> None:
    run = serve(cluster, over)
    agent = targets(cluster, run)[:1]
    sent(attack(cluster, "deaf", agent[0], 200_000))
    check_undisturbed(cluster, run, agent, over)


@pytest.mark.slow
def test_job_whose_task_has_no_call(cluster: Cluster, over: Path) -> None:
    run = serve(cluster, over)
    agent = targets(cluster, run)[:1]
    assert sent(attack(cluster, "half", agent[0], 10)) == 20
    assert wait_for(lambda: len(status(cluster)["node3"]["jobs"]) == 1, 10)
    check_undisturbed(cluster, run, agent, over)
