"""The harness itself: hosts, their faults, the master's services; and that nothing is left."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import netns
from tests.cluster.cluster import Cluster
from tests.cluster.netns import MASTER, Net, NetError
from tests.leftovers import wait_for

SLEEP = [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]


#: for answers that must not come
SHORT_S = 0.3


def interfaces_of_the_machine() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def test_every_host_reaches_every_other(net: Net) -> None:
    pairs = itertools.permutations(net.hosts, 2)
    assert [pair for pair in pairs if net.connect_s(*pair) is None] == []


def test_cut_cable(net: Net) -> None:
    net.link_down("node1")
    assert net.connect_s(MASTER, "node1", limit_s=SHORT_S) is None
    assert net.connect_s("node1", MASTER, limit_s=SHORT_S) is None
    assert net.connect_s(MASTER, "node2") is not None
    net.link_up("node1")
    assert net.connect_s(MASTER, "node1") is not None


@pytest.mark.parametrize("direction", ["in", "out"])
def test_one_way_drop(net: Net, direction: netns.Direction) -> None:
    count = "import socket; s = socket.create_server(('', 7000), family=socket.AF_INET); s.accept()"
    listener = net.popen("node1", [sys.executable, "-I", "-S", "-c", count])
    assert wait_for(lambda: net.listens("node1", 7000), 10)
    net.drop("node1", direction)
    assert net.connect_s(MASTER, "node1", 7000, limit_s=SHORT_S) is None
    # the SYN has come in, only the answer is lost: half open on the node
    half_open = net.run("node1", ["ss", "-Htan", "state", "syn-recv"]).stdout
    assert bool(half_open.strip()) is (direction == "out")
    net.undrop("node1")
    assert net.connect_s(MASTER, "node1") is not None
    listener.kill()
    listener.wait()


def test_delay_counts_in_each_direction(net: Net) -> None:
    net.connect_s(MASTER, "node1")  # from here on the hosts know their addresses
    net.netem("node1", delay_ms=200)
    seconds = net.connect_s(MASTER, "node1")
    assert seconds is not None and seconds >= 0.4
    undisturbed = net.connect_s(MASTER, "node2")
    assert undisturbed is not None and undisturbed < 0.4
    net.clear("node1")
    mended = net.connect_s(MASTER, "node1")
    assert mended is not None and mended < 0.4


def test_total_loss(net: Net) -> None:
    net.netem("node1", loss_percent=100)
    assert net.connect_s(MASTER, "node1", limit_s=SHORT_S) is None


def test_power_cut_ends_the_processes_of_one_host() -> None:
    with Net(("a", "b")) as net:
        victim, other = net.popen("a", SLEEP), net.popen("b", SLEEP)
        assert net.processes("a") == [victim.pid]
        net.kill_all("a")
        assert victim.wait() == -signal.SIGKILL
        assert net.processes("b") == [other.pid]


@pytest.mark.parametrize("host", [MASTER, "node3"])
def test_dbserver_answers(dbserver: Cluster, host: str) -> None:
    assert dbserver.dbserver_answers(host)


def test_dbserver_is_out_of_reach_of_a_host_that_is_cut_off(dbserver: Cluster) -> None:
    dbserver.net.drop("node3", "in")
    assert not dbserver.dbserver_answers("node3", limit_s=SHORT_S)


def test_webui_answers_a_node(webui: Cluster) -> None:
    assert webui.get("/v1/engine_version", "node2")


def test_leftovers_are_found(master: Cluster) -> None:
    process = master.net.popen("node2", SLEEP)
    session = master.tmpdir("node1") / "oq-run-left"
    session.mkdir()
    (session / "control").touch()
    found = "\n".join(master.leftovers())
    assert f"node2: process {process.pid}" in found
    assert f"node1: {session}" in found
    master.remove_leftovers()
    assert process.wait() == -signal.SIGKILL
    assert master.leftovers() == []


def test_service_that_does_not_start_says_why(no_agents: Cluster) -> None:
    with pytest.raises(NetError, match=r"(?s)agent-node1: exit code 2\n.*error: "):
        no_agents.start_agent("node1", "--no-such-option")


def test_nothing_is_left_of_a_network() -> None:
    ours = {netns.BRIDGE, "br-b", "port-a", "port-b", "near-b", "far-b"}
    before = interfaces_of_the_machine() & ours
    with Net(("a", "b")) as net:
        process = net.popen("a", SLEEP)
        net.drop("b", "in")
        names = {net.namespace(host) for host in ("a", "b", netns.SWITCH)}
        assert names <= {path.name for path in netns.NAMESPACES.iterdir()}
        assert interfaces_of_the_machine() & ours == before
    assert process.returncode == -signal.SIGKILL
    assert not names & {path.name for path in netns.NAMESPACES.iterdir()}
    assert interfaces_of_the_machine() & ours == before


def test_nothing_is_left_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Net(("a", "b")) as net:
        _ = 1 / 0
    assert not list(netns.NAMESPACES.glob(f"{net.namespace('')}*"))


def test_network_of_a_killed_run_is_removed() -> None:
    code = (
        "import os, signal\nfrom tests.cluster.netns import Net\n"
        f"with Net(('a', 'b')) as net:\n    print(net.popen('a', {SLEEP!r}).pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    out, _ = run.communicate()
    stale = {path.name for path in netns.NAMESPACES.glob(f"oqnet-{run.pid}-*")}
    assert len(stale) == 3
    assert stale <= set(netns.remove_stale())
    assert not stale & {path.name for path in netns.NAMESPACES.iterdir()}
    assert wait_for(lambda: not _alive(int(out)), 5)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
