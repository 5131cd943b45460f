"""One more worker: a line in the inventory, and ``site.yml``."""

from __future__ import annotations

from tests.system.cluster import NEWCOMER, USERS, Cluster, sampled
from tests.system.test_jobs import busy

UNITS = "openquake-dbserver nfs-server openquake-worker openquake-webui ssh"


def starts(cluster: Cluster) -> dict[str, str]:
    """Per host, which start of each service is running, and the threads of the NFS server."""
    command = (
        f"systemctl show -P InvocationID {UNITS}; cat /proc/fs/nfsd/threads 2>/dev/null || true"
    )
    return {one.name: one.out(command) for one in cluster.members}


def test_a_third_worker_joins_and_nothing_else_is_restarted(cluster: Cluster) -> None:
    before = starts(cluster)
    cluster.start([NEWCOMER])
    cluster.workers.append(NEWCOMER)
    played = cluster.play("site.yml")
    assert played.code == 0, played
    assert played.total("failed") == played.total("unreachable") == 0, played
    cluster.wait_all_up()
    after = starts(cluster)
    assert {name: after[name] for name in before} == before
    job = cluster.submit(USERS[0], cluster.give_example(USERS[0], "risk"))
    most = sampled(lambda: busy(cluster), job)
    job.complete()
    assert most.get(NEWCOMER), f"tasks under way: {most}"
    again = cluster.play("site.yml")
    assert again.total("changed") == 0, again.changed_tasks
