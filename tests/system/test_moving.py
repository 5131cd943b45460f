"""Another shared directory: a change of the inventory, and ``site.yml``."""

from __future__ import annotations

from tests.system.cluster import USERS, Cluster
from tests.system.test_shares import check_exports, check_mounts
from tests.system.test_verify import check_sound

#: that of inventory.example.ini
OTHER = "/oq_shared"


def test_another_shared_directory(cluster: Cluster) -> None:
    """The rows after this one go on with it."""
    old, cluster.settings["openquake_shared_dir"] = cluster.shared, OTHER
    played = cluster.play("site.yml")
    assert played.code == 0, played
    assert played.total("failed") == played.total("unreachable") == 0, played
    cluster.wait_all_up()
    check_exports(cluster)
    for name in cluster.workers:
        worker = cluster.hosts[name]
        check_mounts(cluster, worker)
        units = worker.out("systemctl list-units --all --plain --no-legend -t mount,automount")
        at = [line.split()[0] for line in units.splitlines()]
        left = [unit for unit in at if unit.startswith(f"{old.strip('/')}.")]
        assert not left, f"{name}: {left}"
        assert worker.out(f"stat -f -c %T {old}") != "nfs", name
    datastore = cluster.submit(USERS[0], cluster.give_example(USERS[0], "risk")).complete()
    assert datastore.startswith(f"{OTHER}/{USERS[0]}/oqdata/"), datastore
    check_sound(cluster)
