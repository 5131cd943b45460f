"""Parts of ``site.yml``: in check mode, by tags, by ``--limit``; and a secret in a vault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.machines import Machines
from tests.provisioning.roles import ROOT, ansible

pytestmark = pytest.mark.timeout(900)

#: of site.yml, as docs/operating.md has them
TAGS = ["user", "swap", "firewall", "config", "ssh", "shared_dir", "engine", "nfs", "dbserver"]
TAGS += ["worker", "webui"]
PLAYBOOK = ("ansible-playbook", "-i", "inventory.example.ini", "site.yml")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(
        tmp_path,
        openquake_nfs_client_provider="external",
        openquake_nfs_server_provider="external",
        openquake_shared_dir="/oq_shared",
    )
    try:
        made.connect()
        yield made
    finally:
        made.close()


def test_tags_are_those_of_the_document() -> None:
    said = ansible(*PLAYBOOK, "--list-tags").stdout
    found = {tag for row in re.findall(r"TASK TAGS: \[(.*)\]", said) for tag in row.split(", ")}
    assert found == {*TAGS, "always"}
    text = (ROOT / "docs/operating.md").read_text()
    assert [tag for tag in TAGS if f"`{tag}`" not in text] == []


@pytest.mark.parametrize("tag", ["firewall", "nfs"])
def test_tag_has_its_subject_and_the_checks(tag: str) -> None:
    said = ansible(*PLAYBOOK, "--list-tasks", f"--tags={tag}").stdout
    rows = [row for row in said.splitlines() if "TAGS" in row and "Validating arguments" not in row]
    tasks = [row for row in rows if re.search(rf" : .*TAGS: \[.*{tag}", row)]
    assert tasks
    assert {re.sub(r"_(server|client)", "", row.split()[0]) for row in tasks} == {
        f"openquake_{tag}"
    }
    assert any("Check that the numbers are free" in row for row in rows)
    assert not any("Make the account" in row for row in rows)


@pytest.mark.slow
def test_check_mode_changes_nothing_on_bare_machines(cluster: Machines) -> None:
    cluster.sh("touch /run/before")
    done = cluster.play("site.yml", "--check", "--diff")
    assert done.returncode == 0, done.stdout
    assert "inet openquake" in done.stdout  # the table that there would be
    left = cluster.sh("find /etc /opt /usr /var/lib -xdev -newer /run/before -type f")
    assert {name: found.splitlines() for name, found in left.items()} == {
        "m1": [],
        "w1": [],
        "w2": [],
    }


@pytest.mark.slow
def test_one_subject_on_one_host(cluster: Machines) -> None:
    done = cluster.play("playbooks/validate.yml")  # the facts of all
    assert done.returncode == 0, done.stdout
    cluster.cut("w2")
    done = cluster.play("site.yml", "--tags=user,firewall", "--limit=w1,localhost")
    assert done.returncode == 0, done.stdout
    table = cluster["w1"].sh("nft list table inet openquake")
    assert re.search(r"tcp dport 1909 ip saddr 192\.0\.2\.1 accept", table)
    assert "192.0.2.3 w2" in cluster["w1"].sh("cat /etc/hosts")
    assert not cluster["w1"].can("test -e /etc/openquake/authkey", "root")
    for name in "m1", "w2":
        assert not cluster[name].can("getent passwd openquake || test -e /etc/openquake", "root")


@pytest.mark.slow
def test_secret_in_a_vault(cluster: Machines) -> None:
    secret, password = "the-secret-of-the-vault", cluster.folder / "password"
    password.write_text("of the vault\n")
    vault = f"--vault-password-file={password}"
    done = ansible("ansible-vault", "encrypt_string", vault, "--name=openquake_authkey", secret)
    (cluster.folder / "group_vars").mkdir()
    (cluster.folder / "group_vars/all.yml").write_text(done.stdout)
    done = cluster.play("site.yml", "--tags=user,config", "-vvv", vault)
    assert done.returncode == 0, done.stdout
    assert secret not in done.stdout
    assert set(cluster.sh("cat /etc/openquake/authkey").values()) == {secret}
    assert "changed=0" in cluster.play("site.yml", "--tags=user,config", vault).stdout


@pytest.mark.slow
def test_dead_host_costs_a_quarter_of_a_minute(tmp_path: Path) -> None:
    """One that loses all packets, in a network of its own."""
    if os.geteuid() != 0:
        pytest.skip("a network of its own needs root")
    network = (
        "set -e; ip link add lost type veth peer name end; ip link set lost up;"
        "ip link set end up; ip addr add 192.0.2.2/24 dev lost;"
        "ip neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 nud permanent dev lost"
    )
    ping = f"{Path(sys.executable).parent}/ansible all -i 192.0.2.1, -m ansible.builtin.ping"
    began_s = time.monotonic()
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", f"{network}; {ping}"],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CACHE_PLUGIN_CONNECTION": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "UNREACHABLE" in done.stdout, done.stderr
    assert "timed out" in done.stdout
    assert 10 < time.monotonic() - began_s < 40
