"""Another shared directory than the homes is refused while these are mounted."""

from __future__ import annotations

from tests.system.cluster import Cluster
from tests.system.test_shares import check_exports, check_mounts

#: that of inventory.example.ini
OTHER = "/oq_shared"


def test_another_shared_directory(cluster: Cluster) -> None:
    """The master withdraws an export first: nobody could log in on the workers any more."""
    old, cluster.settings["openquake_shared_dir"] = cluster.shared, OTHER
    try:
        played = cluster.play("site.yml")
    finally:
        cluster.settings["openquake_shared_dir"] = old
    assert played.code != 0
    assert f"is in {old} of the master, which would not export it any more" in played.text, played
    assert played.total("changed") == 0, played.changed_tasks
    check_exports(cluster)
    for name in cluster.workers:
        check_mounts(cluster, cluster.hosts[name])
    cluster.wait_all_up()
