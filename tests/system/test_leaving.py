"""Workers leave, alive or dead; the secret changes; the cluster is taken down."""

from __future__ import annotations

import pytest

from tests.system.cluster import NEWCOMER, USERS, WORKERS, Cluster
from tests.system.host import Host

REMOVE = "playbooks/remove_worker.yml"


def traces(host: Host) -> list[str]:
    """What of the cluster is on a host, but for accounts and packages."""
    found = host.out(
        "ls -d /etc/openquake* /usr/bin/oq /usr/bin/oq-* /var/cache/openquake*"
        " /var/lib/openquake-ansible /etc/systemd/system/*openquake* /etc/nfs.conf.d/*openquake*"
        " /etc/exports.d/*openquake* /etc/ssh/sshd_config.d/*openquake* /etc/sudoers.d/*openquake*"
        " /usr/local/libexec/openquake* /opt/openquake 2>/dev/null;"
        " nft list tables 2>/dev/null | grep openquake; findmnt -rno TARGET -t nfs4;"
        " grep -i openquake /etc/hosts /etc/fstab; pgrep -u openquake -l; true"
    )
    return found.splitlines()


def test_a_worker_leaves(cluster: Cluster) -> None:
    if NEWCOMER not in cluster.workers:
        pytest.skip("no third worker has joined")
    played = cluster.play(REMOVE, f"--extra-vars=openquake_leaving={NEWCOMER}")
    assert played.code == 0, played
    cluster.workers.remove(NEWCOMER)
    cluster.wait_all_up()
    leaver = cluster.hosts[NEWCOMER]
    assert traces(leaver) == []
    assert leaver.out("swapon --show --noheadings"), "its swap is not on again"
    leaver.reboot()  # neither a mount that is no more, nor a unit, stops it
    assert traces(leaver) == []
    assert leaver.address not in cluster.master.out(
        "cat /opt/openquake/openquake.cfg /etc/hosts; exportfs -s; nft list table inet openquake"
    )
    again = cluster.play("site.yml")
    assert again.code == 0, again
    assert again.total("changed") == 0, again.changed_tasks


def test_a_dead_worker_leaves(cluster: Cluster) -> None:
    dead = cluster.hosts[WORKERS[1]]
    dead.cut()
    played = cluster.play(REMOVE, f"--extra-vars=openquake_leaving={dead.name}")
    assert f"{dead.name} did not answer, so the units of the cluster are still on it" in played.text
    assert played.total("failed") == 0, played
    cluster.workers.remove(dead.name)
    cluster.wait_all_up()
    assert dead.address not in cluster.master.out("cat /opt/openquake/openquake.cfg; exportfs -s")
    cluster.workers.append(dead.name)  # it comes back, as it was
    dead.start()
    dead.wait_up()
    played = cluster.play("site.yml")
    assert played.code == 0, played
    cluster.wait_all_up()


def test_another_secret(cluster: Cluster) -> None:
    before = cluster.master.out("sha256sum /etc/openquake/authkey")
    played = cluster.play("playbooks/rotate_authkey.yml")
    assert played.code == 0, played
    after = {one.out("sha256sum /etc/openquake/authkey") for one in cluster.members}
    assert len(after) == 1
    assert before not in after
    cluster.wait_all_up()
    cluster.submit(USERS[0], cluster.give_example(USERS[0], "hazard")).complete()


def test_the_cluster_is_taken_down(cluster: Cluster) -> None:
    """Hosts as before, but for the data."""
    kept = cluster.master.out(f"ls {cluster.shared}/*/oqdata/calc_*.hdf5").splitlines()
    assert kept
    refused = cluster.play("playbooks/reset.yml", answers=answers("no"))
    assert refused.code != 0
    cluster.wait_all_up()
    played = cluster.play("playbooks/reset.yml", answers=answers("yes"))
    assert played.code == 0, played
    for one in cluster.members:
        assert traces(one) == [], one.name
        assert one.out("swapon --show --noheadings"), f"swap of {one.name} is not on again"
        one.reboot()
        assert traces(one) == [], one.name
    assert cluster.master.out(f"ls {cluster.shared}/*/oqdata/calc_*.hdf5").splitlines() == kept
    assert cluster.jobs(), "the job database is gone"


def answers(word: str) -> dict[str, str]:
    from tests.system import image

    return {"BECOME password": image.PASSWORD, "Type yes": word}
