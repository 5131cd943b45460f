"""Another shared directory than the homes, one of which is of Ansible's login, and back again."""

from __future__ import annotations

from tests.system.cluster import USERS, Cluster
from tests.system.test_shares import check_exports, check_mounts
from tests.system.test_verify import WRITABLE, WRONG_CLOCK, check_named, check_sound

#: that of inventory.example.ini
OTHER = "/oq_shared"
#: the default
HOMES = "/home"


def move(cluster: Cluster, directory: str) -> None:
    """Set it, play ``site.yml``, and look at what is left of the one before."""
    old, cluster.settings["openquake_shared_dir"] = cluster.shared, directory
    played = cluster.play("site.yml")
    assert played.code == 0, played
    assert played.total("failed") == played.total("unreachable") == 0, played
    cluster.wait_all_up()
    check_exports(cluster)
    for name in cluster.workers:
        worker = cluster.hosts[name]
        check_mounts(cluster, worker)
        units = worker.out("systemctl list-units --all --plain --no-legend -t mount,automount")
        # that of the homes stays known by its name to the sessions of those who have logged in
        at = [line.split()[0] for line in units.splitlines() if line.split()[1] != "not-found"]
        left = [unit for unit in at if unit.startswith(f"{old.strip('/')}.")]
        assert not left, f"{name}: {left}"
        kind = worker.run(f"stat -f -c %T {old}", check=False).stdout
        assert kind.strip() != "nfs", name


def test_another_shared_directory(cluster: Cluster) -> None:
    """By ``site.yml`` alone, and nobody is locked out meanwhile; ``verify.yml`` passes there.

    It sees a mount for writing and a wrong clock there as well, the former of which goes with the
    way back, the next row.
    """
    move(cluster, OTHER)
    datastore = cluster.submit(USERS[0], cluster.give_example(USERS[0], "risk")).complete()
    assert datastore.startswith(f"{OTHER}/{USERS[0]}/oqdata/"), datastore
    check_sound(cluster)
    check_named(cluster, WRITABLE, WRONG_CLOCK)


def test_back_from_another_shared_directory(cluster: Cluster) -> None:
    cluster.settings["openquake_shared_dir"] = OTHER
    move(cluster, HOMES)
    check_sound(cluster)
