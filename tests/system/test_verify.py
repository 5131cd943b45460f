"""``verify.yml`` passes on a sound cluster; it names each defect, its host, and what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.system.cluster import MASTER, WORKERS, Cluster
from tests.system.playbooks import Played

VERIFY = "playbooks/verify.yml"
WORKER, OTHER = WORKERS
SITE = "site.yml"


@dataclass(frozen=True)
class Defect:
    """
    :param host: on which it is
    :param inject: a command for root that makes it, with SHARED for the shared directory
    :param says: what the line about it has, beside the name of the host
    :param remedy: what it has of what to do
    :param by_hand: a command for root: what an administrator mends before ``site.yml``
    """

    name: str
    host: str
    inject: str
    says: str
    remedy: str = SITE
    by_hand: str = ""


WRITABLE = Defect(
    "mounted for writing", OTHER,
    "systemctl stop openquake-worker; umount SHARED; mount -t nfs4 -o rw,vers=4.2 "
    "$(findmnt -no SOURCE -t nfs4 /opt/openquake | cut -d: -f1):SHARED SHARED; "
    "systemctl start openquake-worker",
    "read-only",
)  # fmt: skip
WRONG_CLOCK = Defect(
    "clock off by an hour", WORKER,
    "date --set '+1 hour' >/dev/null",
    "clock",
    "time service",
    "date --set '-1 hour' >/dev/null",
)  # fmt: skip
METADATA = "/opt/openquake/venv/lib/python3*/site-packages/openquake_engine-*.dist-info/METADATA"
#: per round what is wrong at the same time: a cluster with one fault has others soon, and each is
#: to be named
ROUNDS = {
    "shares, secret, firewall, swap and name": (
        Defect(  # not that of the homes: nobody would come in at the workers any more
            "export removed", MASTER,
            "sed -i '/^.opt.openquake /d' /etc/exports.d/*openquake*; exportfs -ra",
            "is exported to []",
        ),
        Defect(  # or it would be loaded again within half a minute
            "firewall flushed", WORKER,
            "systemctl stop openquake-firewall-check.timer; nft flush ruleset",
            "the table of the firewall is not loaded",
        ),
        Defect(
            "wrong secret", WORKER,
            "echo this-is-not-the-secret-of-it >/etc/openquake/authkey",
            "secret in /etc/openquake/authkey is not the master's",
        ),
        Defect(
            "swap back on", WORKER,
            "sed -i 's/^#openquake-swap# //' /etc/fstab; systemctl daemon-reload; "
            "swapon --all",
            "swap is on",
        ),
        Defect(
            "own name on a loopback address", WORKER,
            "sed -i \"1i 127.0.1.1 $(hostname)\" /etc/hosts",
            "127.0.1.1",
        ),
    ),
    "services, accounts, clock and version": (
        WRITABLE,
        Defect("agent stopped", WORKER, "systemctl stop openquake-worker", "openquake-worker"),
        WRONG_CLOCK,
        Defect(
            "another number of openquake", WORKER,
            "usermod -u 4321 openquake",
            "openquake is 4321:880, not 880:880",
            "correct openquake_uid, or the account",
            "usermod -u 880 openquake",
        ),
        Defect(
            "another engine", MASTER,
            f"for f in {METADATA}; do sed -i 's/^Version: .*/Version: 3.25.1/' $f; done",
            "3.25.1",
            "upgrade.yml",
            f"for f in {METADATA}; do sed -i 's/^Version: .*/Version: 3.26.2/' $f; done",
        ),
        Defect(
            "oqdata closed to the group", MASTER,
            "chmod 0755 SHARED/alice/oqdata; setfacl -b SHARED/alice/oqdata",
            "oqdata",
        ),
        Defect(
            "the key of the master gone", MASTER,
            "rm /etc/openquake/ssh/id_ed25519",
            "ssh",
        ),
        Defect("dbserver down", MASTER, "systemctl stop openquake-dbserver", "openquake-dbserver"),
    ),
    "a full disk": (
        Defect(
            "disk full", WORKER,
            "fallocate -l $(df --output=avail -B1 / | tail -1) /var/tmp/fills",
            "No space left on device",  # nor has Ansible a place for its files
            "mend that first",
            "rm /var/tmp/fills",
        ),
    ),
}  # fmt: skip


def printed(cluster: Cluster, played: Played) -> list[dict[str, Any]]:
    """The checks of the report that have failed, and whose line was printed as well."""
    rows = json.loads((cluster.directory / "openquake-verify.json").read_text())["checks"]
    return [row for row in rows if not row["ok"] and row["detail"] in played.text]


def unnamed(cluster: Cluster, played: Played, defects: tuple[Defect, ...]) -> list[str]:
    """The defects of which no line that is printed has the host, the fault and the remedy."""
    failed = printed(cluster, played)

    def named(defect: Defect) -> bool:
        return any(
            row["host"] == defect.host
            and defect.says in row["detail"]
            and defect.remedy in row["detail"]
            for row in failed
        )

    return [defect.name for defect in defects if not named(defect)]


def check_sound(cluster: Cluster) -> None:
    played = cluster.play(VERIFY)
    assert played.code == 0, played
    assert played.total("failed") == 0


def test_it_passes_on_a_sound_cluster(cluster: Cluster) -> None:
    check_sound(cluster)


def check_named(cluster: Cluster, *defects: Defect) -> None:
    """Each of these is named when all are there; what an administrator mends is mended then."""
    for defect in defects:
        cluster.hosts[defect.host].run(defect.inject.replace("SHARED", cluster.shared))
    try:
        played = cluster.play(VERIFY)
    finally:
        for defect in defects:
            if defect.by_hand:
                cluster.hosts[defect.host].run(defect.by_hand)
    missing = unnamed(cluster, played, defects)
    assert played.code != 0, "nothing was found"
    assert not missing, (missing, played)


@pytest.mark.parametrize("subject", ROUNDS)
def test_it_names_each_defect(cluster: Cluster, subject: str) -> None:
    try:
        check_named(cluster, *ROUNDS[subject])
    finally:
        mended = cluster.play(SITE)
    assert mended.code == 0, mended
    check_sound(cluster)


def test_it_names_a_host_that_is_off(cluster: Cluster) -> None:
    cluster.hosts[WORKER].cut()
    played = cluster.play(VERIFY)
    assert played.code != 0
    rows = printed(cluster, played)
    told = {row["host"] for row in rows if "does not answer to Ansible: " in row["detail"]}
    assert told == {WORKER}, played
