"""A host loses its power: SIGKILL of its kernel, with all that it has."""

from __future__ import annotations

import time
from pathlib import Path

from tests.conformance.compare import compare
from tests.leftovers import wait_for
from tests.system.cluster import MASTER, OWNER, USERS, WORKERS, Cluster

#: until the master's database says that a job is not under way any more
STATE_LIMIT_S = 120.0
#: by which a restart without the master may be longer; for a unit that hangs systemd waits 90 s
LONGER_S = 60.0


def check_services(cluster: Cluster) -> None:
    """Services, exports, firewall and mounts of all hosts are up, without a hand."""
    for one in cluster.members:
        assert one.out("systemctl --failed --no-legend") == "", one.name
        assert "1908" in one.out("nft list table inet openquake") or one.name != MASTER
    assert cluster.master.out("systemctl is-active openquake-dbserver nfs-server").split() == [
        "active", "active",
    ]  # fmt: skip
    assert cluster.master.out("exportfs -s")
    for name in cluster.workers:
        host = cluster.hosts[name]
        assert host.out("systemctl is-active openquake-worker") == "active"
        assert host.out(f"stat -f -c %T {cluster.shared}/ /opt/openquake/").split() == [
            "nfs",
            "nfs",
        ]


def test_a_worker_loses_its_power_in_a_job(
    cluster: Cluster, embedded: dict[str, Path], tmp_path: Path
) -> None:
    worker = cluster.hosts[WORKERS[0]]
    job = cluster.submit(OWNER["risk"], cluster.give_example(OWNER["risk"], "risk"))
    job.under_way(*WORKERS)
    worker.cut()
    datastore = job.complete()
    assert not compare(embedded["risk"], job.fetch(datastore, tmp_path / "risk.hdf5"))
    worker.start()
    worker.wait_up()
    cluster.wait_all_up()
    check_services(cluster)


def test_the_master_loses_its_power_in_a_job(
    cluster: Cluster, embedded: dict[str, Path], tmp_path: Path
) -> None:
    file = cluster.give_example(OWNER["risk"], "risk")
    before = cluster.jobs()
    job = cluster.submit(OWNER["risk"], file)
    job.under_way(*WORKERS)
    cluster.master.cut()
    cluster.master.start()
    cluster.master.wait_up()
    cluster.wait_all_up()
    check_services(cluster)

    def state() -> str:
        [number] = set(cluster.jobs()) - set(before)
        return cluster.jobs()[number]

    assert wait_for(lambda: state() == "failed", STATE_LIMIT_S, 1.0), state()
    free = wait_for(
        lambda: not any(row.get("busy") for row in cluster.status().values()), STATE_LIMIT_S, 1.0
    )
    assert free, cluster.status()
    again = cluster.submit(OWNER["risk"], file)
    datastore = again.complete()
    assert not compare(embedded["risk"], again.fetch(datastore, tmp_path / "risk.hdf5"))


def test_workers_that_start_before_the_master_recover(cluster: Cluster) -> None:
    for one in cluster.members:
        one.cut()
    for name in cluster.workers:
        cluster.hosts[name].start()
    for name in cluster.workers:
        cluster.hosts[name].wait_up()
    cluster.master.start()
    cluster.master.wait_up()
    cluster.wait_all_up()
    job = cluster.submit(USERS[1], cluster.give_example(USERS[1], "hazard"))
    job.complete()
    check_services(cluster)


def test_a_worker_restarts_while_the_master_is_off(cluster: Cluster) -> None:
    """As with the master, and a file of the mounts open, which nobody answers for any more."""
    worker = cluster.hosts[WORKERS[0]]

    def restarted(master: bool) -> float:
        """Seconds for the end of the agent, the way down and the way up."""
        cluster.wait_all_up()
        worker.run(f"ls {cluster.shared}/")
        worker.run("setsid sleep infinity </opt/openquake/venv/pyvenv.cfg >/dev/null 2>&1 &")
        if not master:
            cluster.master.cut()
        began_s = time.monotonic()
        worker.run("systemctl stop openquake-worker")
        worker.reboot()
        return time.monotonic() - began_s

    usual_s, alone_s = restarted(master=True), restarted(master=False)
    cluster.master.start()
    cluster.master.wait_up()
    cluster.wait_all_up()
    check_services(cluster)
    assert alone_s < usual_s + LONGER_S, f"{alone_s:.0f} s instead of {usual_s:.0f} s"
