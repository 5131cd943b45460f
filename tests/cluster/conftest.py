"""One network and one cluster for all tests of this folder; after each test both are as before."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import netns
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import calculate, datastore, result
from tests.cluster.netns import Net
from tests.leftovers import shm, wait_for

HERE = Path(__file__).parent
#: how long the processes of an ended job may take to go away
LEFTOVERS_LIMIT_S = 10.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the folder where there can be no network namespaces."""
    ours = [item for item in items if HERE in item.path.parents]
    if ours and (reason := netns.unavailable()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def net() -> Iterator[Net]:
    """The hosts ``master``, ``node1``, ``node2`` and ``node3`` at 192.0.2.1 to 192.0.2.4."""
    with Net() as net:
        yield net


@pytest.fixture(scope="session")
def master(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster of this session; its DbServer and its agents are started when they are needed."""
    with Cluster(net, tmp_path_factory.mktemp("c")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def dbserver(master: Cluster) -> Cluster:
    """The cluster with its DbServer, which calculations start by themselves."""
    master.start_dbserver()
    return master


@pytest.fixture(scope="session")
def webui(master: Cluster) -> Cluster:
    """The cluster with its DbServer and its WebUI."""
    master.start_webui()
    return master


@pytest.fixture
def cluster(request: pytest.FixtureRequest, master: Cluster) -> Cluster:
    """The cluster with all agents: started once, and again those that died.

    The mark ``settings(name=value, ...)`` sets [oq_runtime] of openquake.cfg. Calculators, which
    take seconds to import, are there for tests of ``undisturbed`` ones.
    """
    settings: dict[str, Any] = {} if "undisturbed" in request.fixturenames else {"preload": ""}
    for mark in reversed(list(request.node.iter_markers("settings"))):  # the nearest is the last
        settings |= mark.kwargs
    master.configure(**settings)
    master.start_agents()
    return master


@pytest.fixture(scope="session")
def undisturbed(master: Cluster) -> Path:
    """The datastore of the small calculation on one machine."""
    return datastore(result(calculate(master, "--cores=2")))


@pytest.fixture
def no_agents(master: Cluster) -> Cluster:
    """The cluster; the agents that earlier tests have started are ended."""
    master.stop_agents()
    return master


@pytest.fixture(autouse=True)
def leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no fault, no process, no session directory, no shared memory is left."""
    if "net" not in request.fixturenames:
        yield
        return
    net: Net = request.getfixturevalue("net")
    if "cluster" in request.fixturenames:  # what an agent has from its start on is not left over
        request.getfixturevalue("cluster")
    before = shm()
    running = {host: set(net.processes(host)) for host in net.hosts}
    yield
    for host in net.hosts:
        net.clear(host)
    if "master" not in request.fixturenames:
        left = {host: set(net.processes(host)) - running[host] for host in net.hosts}
        for pid in set().union(*left.values()):  # they would be found again after the next test
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not any(left.values()), f"processes left behind: {left}"
        return
    cluster: Cluster = request.getfixturevalue("master")
    if "cluster" in request.fixturenames:  # the dead cannot clean up, their successors do
        cluster.start_agents()
    if not wait_for(lambda: not cluster.leftovers(before), LEFTOVERS_LIMIT_S):
        lines = cluster.leftovers(before)
        cluster.remove_leftovers()
        pytest.fail("\n".join(["left behind:", *lines]))
