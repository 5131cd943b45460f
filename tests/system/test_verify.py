"""``verify.yml`` passes on a sound cluster; it names each defect, its host, and what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.system.cluster import MASTER, NEWCOMER, WORKERS, Cluster
from tests.system.playbooks import Played

VERIFY = "playbooks/verify.yml"
WORKER = WORKERS[0]
SITE = "site.yml"


@dataclass(frozen=True)
class Defect:
    """
    :param host: on which it is
    :param inject: a command for root that makes it
    :param undo: a command for root that takes it back; empty where site.yml has to
    :param says: what the line about it has, beside the name of the host
    :param remedy: what it has of what to do
    """

    name: str
    host: str
    inject: str
    says: str
    remedy: str = SITE
    undo: str = ""


DEFECTS = (
    Defect(
        "export removed", MASTER,
        "rm /etc/exports.d/*openquake*; exportfs -ra",
        "is exported to []",
    ),
    Defect("agent stopped", WORKER, "systemctl stop openquake-worker", "openquake-worker"),
    Defect(  # or it would be loaded again within half a minute
        "firewall flushed", WORKER,
        "systemctl stop openquake-firewall-check.timer; nft flush ruleset",
        "the table of the firewall is not loaded",
    ),
    Defect(
        "wrong secret", WORKER,
        "echo this-is-not-the-secret-of-it >/etc/openquake/authkey; "
        "systemctl restart openquake-worker",
        "secret in /etc/openquake/authkey is not the master's",
    ),
    Defect(
        "swap back on", WORKER,
        "sed -i 's/^#openquake-swap# //' /etc/fstab; systemctl daemon-reload; "
        "swapon --all",
        "swap is on",
    ),
    Defect(
        "clock off by an hour", WORKER,
        "date --set '+1 hour' >/dev/null",
        "clock",
        "time service",
        "date --set '-1 hour' >/dev/null",
    ),
    Defect(
        "mounted for writing", WORKER,
        "systemctl stop openquake-worker; umount /home; mount -t nfs4 -o rw,vers=4.2 "
        "$(findmnt -no SOURCE /opt/openquake | cut -d: -f1):/home /home; "
        "systemctl start openquake-worker",
        "read-only",
    ),
    Defect(
        "own name on a loopback address", WORKER,
        "sed -i \"1i 127.0.1.1 $(hostname)\" /etc/hosts",
        "127.0.1.1",
    ),
    Defect(
        "disk full", WORKER,
        "fallocate -l $(df --output=avail -B1 / | tail -1) /var/tmp/fills",
        "No space left on device",  # nor has Ansible a place for its files
        "mend that first",
        "rm /var/tmp/fills",
    ),
    Defect(
        "another engine", MASTER,
        "for f in /opt/openquake/venv/lib/python3*/site-packages/openquake_engine-*.dist-info/"
        "METADATA; do sed -i 's/^Version: .*/Version: 3.25.1/' $f; done",
        "3.25.1",
        "upgrade.yml",
        "for f in /opt/openquake/venv/lib/python3*/site-packages/openquake_engine-*.dist-info/"
        "METADATA; do sed -i 's/^Version: .*/Version: 3.26.2/' $f; done",
    ),
    Defect(
        "another number of openquake", WORKER,
        "systemctl stop openquake-worker; usermod -u 4321 openquake",
        "openquake is 4321:880, not 880:880",
        "correct openquake_uid, or the account",
        "usermod -u 880 openquake; systemctl start openquake-worker",
    ),
    Defect(
        "oqdata closed to the group", MASTER,
        "chmod 0755 /home/alice/oqdata; setfacl -b /home/alice/oqdata",
        "oqdata",
    ),
    Defect(
        "the key of the master gone", MASTER,
        "rm -f /etc/openquake/ssh/id_ed25519 /etc/openquake/id_ed25519 "
        "/var/lib/openquake/.ssh/id_ed25519",
        "ssh",
    ),
    Defect("dbserver down", MASTER, "systemctl stop openquake-dbserver", "openquake-dbserver"),
)  # fmt: skip


def check_named(cluster: Cluster, played: Played, defect: Defect) -> None:
    """One line of what is printed has the host, the fault and the remedy."""
    assert played.code != 0, f"{defect.name}: not found"
    rows = json.loads((cluster.directory / "verify.json").read_text())["checks"]
    failed = [row for row in rows if not row["ok"]]
    found = [row for row in failed if row["host"] == defect.host and defect.says in row["detail"]]
    assert found, failed
    assert defect.remedy in found[0]["detail"], found
    assert found[0]["detail"] in " ".join(played.output.split()), played


def test_it_passes_on_a_sound_cluster(cluster: Cluster) -> None:
    played = cluster.play(VERIFY)
    assert played.code == 0, played
    assert played.total("failed") == 0


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_it_names(cluster: Cluster, defect: Defect) -> None:
    host = cluster.hosts[defect.host]
    host.run(defect.inject)
    try:
        check_named(cluster, cluster.play(VERIFY), defect)
        if not defect.undo:
            mended = cluster.play(SITE)
            assert mended.code == 0, mended
            assert cluster.play(VERIFY).code == 0
    finally:
        if defect.undo:
            host.run(defect.undo)


def test_it_names_a_host_that_is_off(cluster: Cluster) -> None:
    cluster.hosts[WORKER].cut()
    played = cluster.play(VERIFY)
    assert played.code != 0
    assert WORKER in played.errors, played
    assert NEWCOMER not in played.output
