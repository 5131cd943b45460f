"""The ports in firewalld and ufw where one is active: opened for many workers, and closed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.provisioning.machine import Machine, role
from tests.provisioning.packages import download

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def of(count: int) -> dict[str, Any]:
    """Settings of a master with so many workers."""
    workers = [f"198.51.100.{number}" for number in range(1, count + 1)]
    addresses = {"m1": "192.0.2.1"} | {f"w{address}": address for address in workers}
    return {"openquake_worker_addresses": workers, "openquake_addresses": addresses}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, services=True)
    try:
        made.sh("mkdir -p /etc/openquake; ln -sf /bin/true /usr/sbin/policy-rc.d")
        yield made
    finally:
        made.close()


def install(machine: Machine, name: str) -> None:
    machine.sh(f"DEBIAN_FRONTEND=noninteractive dpkg --install {download(name)}/*.deb")


def play(machine: Machine, workers: int, part: str = "main") -> str:
    done = machine.play(role("openquake_firewall", part), args=("-e", json.dumps(of(workers))))
    assert done.returncode == 0, done.stdout
    return done.stdout


def check(machine: Machine, rules: str, workers: int) -> None:
    """Open for many workers, for one, for nobody."""
    before = machine.sh(rules)
    play(machine, workers)
    opened = machine.sh(rules)
    assert opened.count("198.51.100.") == 3 * workers
    assert "changed=0" in play(machine, workers)
    assert machine.sh(rules) == opened
    play(machine, 1)
    opened = machine.sh(rules)
    assert "198.51.100.1" in opened
    assert "198.51.100.2" not in opened
    play(machine, 1, "remove")
    assert machine.sh(rules) == before


def test_firewalld(machine: Machine) -> None:
    install(machine, "firewalld")
    machine.sh("systemctl start firewalld")
    check(machine, "firewall-cmd --list-rich-rules", 100)
    assert machine.sh("firewall-cmd --permanent --list-rich-rules") == ""


def test_ufw(machine: Machine) -> None:
    install(machine, "ufw")
    machine.sh("ufw --force enable")
    check(machine, "LC_ALL=C ufw show added", 10)


#: stands in for ufw: its table is a file, and while there is /run/refused it takes one rule only
UFW = """\
#!/bin/sh
touch /run/rules
case $* in
status) echo 'Status: active' ;;
'show added') cat /run/rules ;;
'delete allow '*) sed -i "/^ufw allow from $6 to any port ${10} /d" /run/rules ;;
*)
    [ ! -e /run/refused ] || [ ! -s /run/rules ] || exit 1
    echo "ufw allow from $5 to any port $9 proto tcp comment 'openquake'" >>/run/rules
    ;;
esac
"""


def test_what_a_run_has_opened_that_failed_is_closed(machine: Machine) -> None:
    machine.sh("cat >/usr/sbin/ufw; chmod +x /usr/sbin/ufw; touch /run/refused", stdin=UFW)
    for wanted, left in (["192.0.2.2 1908", "192.0.2.3 1908"], 1), ([], 0):
        given = ("-e", json.dumps({"__openquake_firewall_wanted": wanted}))
        done = machine.play(role("openquake_firewall", "openings"), args=given)
        assert len(machine.sh("cat /run/rules").splitlines()) == left, done.stdout


#: as docker and a list of bans have them
OTHERS = """
table ip nat_like_docker {
    chain post { type nat hook postrouting priority srcnat; oifname != "d0" masquerade; }
}
table inet bans {
    set banned { type ipv4_addr; elements = { 203.0.113.7 } }
    chain input { type filter hook input priority filter; ip saddr @banned drop; }
}
"""


def test_tables_of_others_stay_and_ours_comes_back(machine: Machine) -> None:
    machine.sh("nft -f -", stdin=OTHERS)
    others = "nft list table ip nat_like_docker; nft list table inet bans"
    ours = "nft list table inet openquake"
    before = machine.sh(others)
    for _ in range(2):
        play(machine, 2)
        assert machine.sh(others) == before
    loaded = machine.sh(ours)
    machine.sh("nft flush ruleset; systemctl start openquake-firewall-check.service")
    assert machine.sh(ours) == loaded
    machine.sh("nft -f -", stdin=OTHERS)
    play(machine, 2, "remove")
    assert machine.sh(others) == before
    assert not machine.can(ours, "root")
