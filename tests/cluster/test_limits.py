"""Tasks that kill their worker or never end, and nodes that run out of disk."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import SHORT_BEATS, drive, result

pytestmark = [pytest.mark.timeout(300), pytest.mark.settings(**SHORT_BEATS), pytest.mark.slow]

#: an attempt goes to disk when it is larger than 64 MiB
VALUES, NBYTES = 9_000_000, 72_000_000


def failed(found: dict, *words: str) -> None:
    """The error names the task with its whole history, and every one of the words."""
    for word in ("#3", socket.gethostname(), "3 attempts", *words):
        assert word in found.get("text", ""), (word, found)


def test_poison_task(cluster: Cluster) -> None:
    found = result(drive(cluster, "poison", [(x,) for x in range(6)]))
    assert found["error"] == "WorkerDied", found
    failed(found, "poison", "SIGKILL")
    nodes = [cluster.net.address[node] for node in cluster.slots]
    assert sum(f"on {node}" in found["text"] for node in nodes) >= 2, "always on the same node"


@pytest.mark.settings(task_timeout_s=2)
def test_task_that_never_returns(cluster: Cluster) -> None:
    found = result(drive(cluster, "hang", [(x,) for x in range(6)]))
    assert found["error"] == "WorkerDied", found
    failed(found, "hang", "task_timeout_s is 2 s")


# ---- disks


@contextlib.contextmanager
def small_disk(cluster: Cluster, nbytes: int, *nodes: str) -> Iterator[None]:
    """Give nodes a TMPDIR of this size, and their agents a new start in it."""
    mounted: list[Path] = []
    try:
        for node in nodes:
            cluster.stop_agent(node)
            path = cluster.tmpdir(node)
            options = f"size={nbytes},mode=0700"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
            mounted.append(path)
            cluster.start_agent(node)
        yield
    finally:
        for node, path in zip(nodes, mounted, strict=False):
            if node in cluster.agents:
                cluster.stop_agent(node)
            subprocess.run(["umount", "--lazy", path], check=True)


def arrays(cluster: Cluster, tasks: int) -> dict:
    """The end of a job whose results outgrow the memory of the spool."""
    return result(drive(cluster, "array", [(x, VALUES) for x in range(tasks)]))


def test_disk_that_holds_one_result(cluster: Cluster) -> None:
    with small_disk(cluster, NBYTES * 3 // 2, "node3"):
        found = arrays(cluster, 10)
    assert found.get("value", {}).get("array") == sum(range(10)) * VALUES, found


def test_full_disk_of_one_node(cluster: Cluster) -> None:
    with small_disk(cluster, 4 << 20, "node3"):
        (cluster.tmpdir("node3") / "ballast").write_bytes(bytes(3 << 20))
        found = arrays(cluster, 10)
    assert found.get("value", {}).get("array") == sum(range(10)) * VALUES, found


def test_full_disks_everywhere(cluster: Cluster) -> None:
    with small_disk(cluster, 4 << 20, *cluster.slots):
        found = arrays(cluster, 4)
    assert found["error"] == "WorkerDied", found
    assert "No space left on device" in found["text"] and "3 attempts" in found["text"], found
    assert any(str(cluster.tmpdir(node)) in found["text"] for node in cluster.slots), found
