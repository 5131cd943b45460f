"""What a host of the same network gets to see that is not in the cluster."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.system import network
from tests.system.cluster import Cluster

PROBE = Path(__file__).parents[2] / "molecule/shared/files/probe.py"
#: of the deployment page, and those of older NFS
PORTS = (111, 1908, 1909, *range(1912, 1921), 2049, 8800, 20048)
SSH = 22
LOOPBACK = ("127.0.0.1", "[::1]")


def check_closed(cluster: Cluster) -> None:
    """A stranger is out on every port but ssh."""
    for one in cluster.members:
        lines = one.out("ss -Hltn").splitlines()
        sockets = [line.split()[3].rpartition(":") for line in lines]
        listening = {int(port) for address, _, port in sockets if address not in LOOPBACK}
        wanted = sorted({*PORTS, *listening} - {SSH})
        argv = [one.address, str(SSH), *map(str, wanted)]
        said = network.from_stranger(sys.executable, "-", *argv, text=PROBE.read_text())
        answers = json.loads(said)
        assert answers.pop(str(SSH)) == "open"
        opened = {port for port, answer in answers.items() if answer == "open"}
        assert not opened, f"{one.name} lets a stranger in: {opened}"
        reached = {port for port in listening - {SSH} if answers[str(port)] != "timeout"}
        assert not reached, f"{one.name} answers a stranger on {reached}"


def check_mounts(cluster: Cluster) -> None:
    """NFS works through the firewall: the workers read a file that no cache can have."""
    path = f"/opt/openquake/.system-test-{time.time_ns()}"
    cluster.master.run(f"umask 022; echo {path} >{path}")
    answers = {name: cluster.hosts[name].out(f"cat {path}") for name in cluster.workers}
    cluster.master.run(f"rm {path}")
    assert answers == dict.fromkeys(cluster.workers, path)


def test_a_stranger_is_out(cluster: Cluster) -> None:
    check_closed(cluster)


def test_and_after_nftables_was_restarted(cluster: Cluster) -> None:
    for one in cluster.members:
        one.run("systemctl restart nftables")
    check_closed(cluster)
    check_mounts(cluster)
    assert cluster.all_up()


@pytest.mark.parametrize("order", [("worker1", "worker2", "master")])
def test_and_after_all_hosts_were_restarted(cluster: Cluster, order: tuple[str, ...]) -> None:
    for name in order:
        cluster.hosts[name].reboot()
    check_closed(cluster)
    cluster.wait_all_up()
    check_mounts(cluster)
