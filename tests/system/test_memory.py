"""A task that wants more memory than its host has."""

from __future__ import annotations

import json

from tests.system.cluster import USERS, VENV, WORKERS, Cluster

#: The argument of one of four tasks wants 8 GiB where it is unpickled, 64 MiB at a time: the kernel
#: refuses at once what is beyond all its memory. Prints how the job ended. The task function is one
#: that the workers have.
DRIVER = """
import json, logging
from openquake.baselib import parallel
from oq_runtime.cluster.debug import die_once

class Eater:
    def __reduce__(self):
        return eval, ("[b'x' * (64 << 20) for _ in range(128)] == []",)

logging.basicConfig(level=logging.INFO)
try:
    found = list(parallel.Starmap(die_once, [(False,), (Eater(),), (False,), (False,)]))
    print(json.dumps({"results": len(found)}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


def test_a_task_that_eats_the_memory_of_its_host(cluster: Cluster) -> None:
    """Its process is killed, it is run again alone, then the job ends with the figures."""
    boots = {name: cluster.hosts[name].boot_id() for name in WORKERS}
    pids = {name: agent(cluster, name) for name in WORKERS}
    done = cluster.master.run(
        f"OQ_DISTRIBUTE=zmq {VENV}/bin/python -", USERS[0], text=DRIVER, limit_s=600
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.get("error") == "OutOfMemory", (found, done.stderr)
    last = found["text"].splitlines()[-1]
    assert "was given up after 2 attempts" in last, found
    assert "alone" in found["text"], found
    assert "GiB" in last, found
    for name in WORKERS:
        assert cluster.hosts[name].boot_id() == boots[name], f"{name} has started anew"
        assert agent(cluster, name) == pids[name], f"the agent of {name} has started anew"
    cluster.wait_all_up()
    assert not any(row["busy"] for row in cluster.status().values())


def agent(cluster: Cluster, worker: str) -> str:
    return cluster.hosts[worker].out("systemctl show -P MainPID openquake-worker")
