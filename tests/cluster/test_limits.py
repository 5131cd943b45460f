"""Tasks that kill their worker or never end, nodes without memory, shared memory or disk."""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.cgroups import inside, limited
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import SHORT_BEATS, drive, result

pytestmark = [pytest.mark.timeout(300), pytest.mark.settings(**SHORT_BEATS)]

#: results larger than the 64 MiB of an attempt that may lie in shared memory
VALUES, NBYTES = 9_000_000, 72_000_000
#: so slow that the agent, which looks twice a second, sees a limit being passed
MB_PER_S = 150
#: with a /dev/shm of its own that holds next to nothing
NO_SHM = ("unshare", "--mount", "sh", "-c",
          'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh")  # fmt: skip


def failed(found: dict[str, Any], *words: str) -> None:
    """The error names the task with its whole history, and every one of the words."""
    for word in ("#3", socket.gethostname(), "3 attempts", *words):
        assert word in found.get("text", ""), (word, found)


def test_poison_task(cluster: Cluster) -> None:
    found = result(drive(cluster, "poison", [(x,) for x in range(6)]))
    assert found["error"] == "WorkerDied", found
    failed(found, "poison", "SIGKILL")
    nodes = [cluster.net.address[node] for node in cluster.slots]
    assert sum(f"on {node}" in found["text"] for node in nodes) >= 2, "always on the same node"


@pytest.mark.slow
@pytest.mark.settings(task_timeout_s=2)
def test_task_that_never_returns(cluster: Cluster) -> None:
    found = result(drive(cluster, "hang", [(x,) for x in range(6)]))
    assert found["error"] == "WorkerDied", found
    failed(found, "hang", "task_timeout_s is 2 s")


# ---- memory


@contextlib.contextmanager
def small_memory(cluster: Cluster, **mebibytes: int) -> Iterator[None]:
    """Give nodes so much memory, in cgroups, and their agents a new start with it."""
    with contextlib.ExitStack() as stack:
        for node, limit in mebibytes.items():
            cgroup = stack.enter_context(limited(limit << 20, node))
            cluster.stop_agent(node)
            cluster.start_agent(node, prefix=inside(cgroup, ()))
            stack.callback(cluster.stop_agent, node)
        yield


@pytest.mark.slow
def test_task_that_no_node_can_hold(cluster: Cluster) -> None:
    with small_memory(cluster, node1=500, node2=700, node3=1800):
        tasks = [(x, 9000 if x == 3 else 0, 0, MB_PER_S, 0) for x in range(6)]
        found = result(drive(cluster, "hold", tasks))
    assert found["error"] == "OutOfMemory", found
    text = found["text"]
    assert "task #3 (hold) was given up after 2 attempts" in text.splitlines()[-1], text
    assert text.count("killed to free memory") == 2, text
    most = re.escape(cluster.net.address["node3"])  # the node with most memory free
    assert re.search(rf"attempt 2: assigned to {most}, alone", text), text
    assert re.search(r"its worker had \d\.\d\d GiB, 1\.\d\d GiB of 1\.76 GiB were in use", text), (
        text
    )


@pytest.mark.slow
def test_tasks_that_need_a_node_of_their_own(cluster: Cluster) -> None:
    with small_memory(cluster, node1=500, node2=700, node3=1800):
        tasks = [(x, 800 if x < 2 else 0, 0, MB_PER_S, 1) for x in range(6)]
        found = result(drive(cluster, "hold", tasks))
    assert found.get("value", {}).get("sum") == 15, found
    assert found["retries"] >= 1, "they fitted side by side"


# ---- disks and shared memory


@contextlib.contextmanager
def small_disk(
    cluster: Cluster, nbytes: int, *nodes: str, prefix: Sequence[str] = ()
) -> Iterator[None]:
    """Give nodes a TMPDIR of this size, and their agents a new start in it."""
    with contextlib.ExitStack() as stack:
        for node in nodes:
            cluster.stop_agent(node)
            path = cluster.tmpdir(node)
            options = f"size={nbytes},mode=0700"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
            unmount = functools.partial(subprocess.run, ["umount", "--lazy", path], check=True)
            stack.callback(unmount)
            cluster.start_agent(node, prefix=prefix)
            stack.callback(cluster.stop_agent, node)
        yield


def arrays(cluster: Cluster, tasks: int) -> dict[str, Any]:
    """The end of a job whose results outgrow what may lie in shared memory."""
    return result(drive(cluster, "array", [(x, VALUES) for x in range(tasks)]))


def check_arrays(cluster: Cluster, tasks: int = 10) -> None:
    found = arrays(cluster, tasks)
    assert found.get("value", {}).get("array") == sum(range(tasks)) * VALUES, found


def test_disk_that_holds_one_result(cluster: Cluster) -> None:
    with small_disk(cluster, NBYTES * 3 // 2, "node3"):
        check_arrays(cluster)


def test_full_disk_of_one_node(cluster: Cluster) -> None:
    with small_disk(cluster, 4 << 20, "node3"):
        (cluster.tmpdir("node3") / "ballast").write_bytes(bytes(3 << 20))
        check_arrays(cluster)


def test_full_shared_memory_of_one_node(cluster: Cluster) -> None:
    cluster.stop_agent("node3")
    cluster.start_agent("node3", prefix=NO_SHM)
    check_arrays(cluster)


def test_full_everywhere(cluster: Cluster) -> None:
    with small_disk(cluster, 4 << 20, *cluster.slots, prefix=NO_SHM):
        found = arrays(cluster, 4)
    assert found["error"] == "WorkerDied", found
    text = found["text"]
    assert "3 attempts" in text and "attempt 4:" not in text, text
    assert "No space left on device" in text.splitlines()[-1], text
    assert "no room for its results" in text.splitlines()[-1], text
