"""A wrong inventory is refused with one line before any host is touched."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from tests.provisioning.roles import ansible, failures

GOOD = """\
[master]
m1 ansible_host=192.0.2.1
[workers]
w1 ansible_host=192.0.2.2
w2 ansible_host=192.0.2.3
[all:vars]
"""


class Site:
    """``site.yml`` with an ssh that only notes that it was called."""

    def __init__(self, folder: Path) -> None:
        self.inventory = folder / "inventory.ini"
        self.touched = folder / "touched"
        self.ssh = folder / "ssh"
        self.ssh.write_text(f'#!/bin/sh\necho "$@" >>{self.touched}\nexit 255\n')
        self.ssh.chmod(0o755)

    def run(self, inventory: str, *args: str) -> tuple[int, str]:
        self.inventory.write_text(textwrap.dedent(inventory))
        env = {"ANSIBLE_SSH_EXECUTABLE": str(self.ssh)}
        done = ansible("ansible-playbook", "-i", str(self.inventory), *args, "site.yml", env=env)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def refused(site: Site, inventory: str, *args: str) -> str:
    """Return the one message with which an inventory is refused."""
    code, output = site.run(inventory, *args)
    assert code != 0, output
    assert not site.touched.exists(), f"a host was touched: {site.touched.read_text()}"
    messages = failures(output)
    assert len(messages) == 1, output
    assert "\n" not in messages[0]
    return messages[0]


def test_good_inventory_goes_on_to_the_hosts(site: Site) -> None:
    code, output = site.run(GOOD)
    assert code != 0
    assert "UNREACHABLE" in output
    assert site.touched.exists()


def test_example_inventory_is_good(site: Site) -> None:
    example = Path(__file__).parents[2] / "inventory.example.ini"
    _, output = site.run(example.read_text())
    assert "UNREACHABLE" in output, output
    everything = re.sub(r"^#(?=\w)(?!openquake_wheelhouse)", "", example.read_text(), flags=re.M)
    _, output = site.run(everything)
    assert "UNREACHABLE" in output, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        (
            "-e",
            '{"openquake_uid": "881", "openquake_gid": 881, "openquake_webui_enabled": "yes",'
            '"openquake_config_extra": {"memory": {"pmap_max_mb": 200}},'
            '"openquake_runtime": {"lost_s": "45.5"}, "openquake_custom_tmp": "/var/tmp",'
            '"openquake_users": ["carla.rossi", "carla@example.org"]}',
        ),
        ("-e", "openquake_ctrl_port=11909"),
        ("-e", '{"openquake_cores": 0}'),
        ("-e", "openquake_worker_group=openquake_workers"),
    ],
)
def test_settings_as_text(site: Site, args: tuple[str, ...]) -> None:
    text = GOOD.replace("[workers]", "[openquake_workers]") if "_group" in args[1] else GOOD
    code, output = site.run(text, *args)
    assert code != 0
    assert "UNREACHABLE" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/etc/oq", "/srv/oq", "/opt/oq/settings"])
def test_directory_of_the_settings_of_ones_own(site: Site, path: str) -> None:
    _, output = site.run(f"{GOOD}openquake_config_dir={path}\n")
    assert "UNREACHABLE" in output, output


@pytest.mark.slow
def test_hosts_that_are_not_of_the_cluster_do_not_matter(site: Site) -> None:
    bastion = "[bastions]\nb1 ansible_host=192.0.2.9 openquake_shared_dir=odd openquake_uid=0\n"
    _, output = site.run(bastion + GOOD)
    assert "UNREACHABLE" in output, output
    site.touched.unlink()
    assert "openquake_uid=0" in refused(site, f"{bastion}{GOOD}openquake_uid=0\n")


@pytest.mark.slow
def test_root_is_for_the_hosts(site: Site) -> None:
    """And not for this machine, where the tasks are done as whoever plays them."""
    message = refused(site, GOOD, "-e", "ansible_become=true")
    assert message.startswith("-e ansible_become makes root of what is done on this machine too;")
    _, output = site.run(f"{GOOD}ansible_become=true\n")
    assert "UNREACHABLE" in output, output


def test_no_inventory(site: Site) -> None:
    assert refused(site, "").startswith("There is no inventory; copy inventory.example.ini")


def test_no_master(site: Site) -> None:
    message = refused(site, "[workers]\nw1 ansible_host=192.0.2.2\n")
    assert message == "The inventory has 0 hosts in the group [master]; it must have exactly one"


def test_two_masters(site: Site) -> None:
    text = GOOD.replace("[workers]", "m2 ansible_host=192.0.2.9\n[workers]")
    message = refused(site, text)
    assert message == "The inventory has 2 hosts in the group [master]; it must have exactly one"


def test_no_workers(site: Site) -> None:
    message = refused(site, "[master]\nm1 ansible_host=192.0.2.1\n")
    expected = "The inventory has no host in the group [workers]; add one line for each worker"
    assert message == expected


def test_names_that_no_host_can_have(site: Site) -> None:
    text = GOOD.replace("w1 ", "w\u00f6rker ").replace("w2 ", "-w2 ")
    assert refused(site, text).startswith("w\u00f6rker, -w2 is no name by which other hosts can")


SETTINGS = {
    "openquake_engine_version=3.24.1": "value of openquake_engine_version must be one of: 3.26.2, "
    "3.25.1, 3.23.5, got: 3.24.1",
    "openquake_shared_dir=/opt/openquake/x": "openquake_shared_dir=/opt/openquake/x in "
    "openquake_prefix=/opt/openquake",
    "openquake_shareddir=/data": "openquake_shareddir is no setting, did you mean "
    "openquake_shared_dir?",
    "openquake_firewall_provider=iptables": "value of openquake_firewall_provider must be one of: "
    "auto, nftables, none, got: iptables",
    "openquake_nfs_server_threads=many": "openquake_nfs_server_threads",
    "openquake_users=alice": "openquake_users=alice: give a list",
    "openquake_webui_sources=192.0.2.0/24": "openquake_webui_sources=192.0.2.0/24: give a list",
    "openquake_authkey=changeme": "openquake_authkey is weak",
    'openquake_authkey="sixteen letters!"': "openquake_authkey is weak",
    "openquake_ctrl_port=1915": "openquake_receiver_ports=1912-1920, openquake_webui_port=8800 and "
    "NFS (2049) overlap",
    "openquake_dbserver_port=2049": "overlap; give each its own",
    "openquake_dbserver_port=80": "Port 80 cannot be used; give ports from 1024 to 65535",
    "openquake_dbserver_port=dbserver": "argument 'openquake_dbserver_port' is of type str",
    "openquake_receiver_ports=1920-1912": "openquake_receiver_ports=1920-1912 is not a range",
    "openquake_receiver_ports=1912": "openquake_receiver_ports=1912 is not a range",
    # as a list these would take all memory
    "openquake_receiver_ports=1912-999999999": "such as 1912-1920, from 1024 to 65535",
    "ansible_port=11908\nopenquake_dbserver_port=11908": "sshd has the port 11908 of m1, 11908 of "
    "w1, 11908 of w2, which is one of openquake_dbserver_port=11908",
    "openquake_uid=0": "openquake_uid=0 or openquake_gid=880 is out of range",
    'openquake_users=["alice", "b c"]': "openquake_users: b c is no login name",
    'openquake_users=["alice", "root"]': "openquake_users: root is no account of a user",
    'openquake_users=["openquake"]': "openquake_users: openquake is no account of a user",
    'openquake_webui_sources=["192.0.2.0/33"]': "openquake_webui_sources: 192.0.2.0/33 is not "
    "understood",
    "openquake_webui_url=hazard.example": "openquake_webui_url=hazard.example is not understood",
    "openquake_wheelhouse=/nowhere": "=/nowhere is no directory of this machine",
    'openquake_runtime={"lost": 3}': "lost. Supported parameters include",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting(site: Site, setting: str) -> None:
    message = refused(site, f"{GOOD}{setting}\n")
    assert SETTINGS[setting] in message
    assert "openquake_authkey=" not in message  # the secret is never shown


#: what Ansible would make something of, and how it is told
KINDS: dict[str, tuple[object, str]] = {
    "openquake_users": (None, "openquake_users=None: give a value, or leave it out"),
    "openquake_webui_hosts": (
        {"alice": 1},
        "openquake_webui_hosts={'alice': 1}: give a list, such",
    ),
    "openquake_runtime": ('{"lost_s": 30}', 'openquake_runtime={"lost_s": 30}: give a dictionary'),
    "openquake_shared_dir": (["/data"], "openquake_shared_dir=['/data']: give a text"),
    "openquake_uid": (True, "openquake_uid=True: give a number"),
    "openquake_authkey": (["correct-horse-battery-staple"], "openquake_authkey: give a text"),
    "openquake_custom_tmp": (
        "/srv/x\ny",
        "openquake_custom_tmp=/srv/x?y: give text without control",
    ),
}
VALUES: dict[str, tuple[object, str]] = {
    "openquake_worker_memory_max": ("lots", "_memory_max: lots is not understood; give an amount"),
    "openquake_nfs_server_threads": (0, "_nfs_server_threads=0: give a number from 1 to 10000"),
    "openquake_firewall_nfs_sources": (
        ["192.0.2.1", "a b"],
        "_sources: a b is not understood; give",
    ),
    "openquake_nfs_client_options": (
        ["ro,soft"],
        "ro,soft is not understood; give options without",
    ),
    "openquake_engine_runtime": (
        "/nowhere/oq_runtime.whl",
        "openquake_engine_runtime=/nowhere/oq_runtime.whl is not there; give a path of the machine",
    ),
    "openquake_engine_constraints": ("/nowhere", "_engine_constraints=/nowhere is not there; give"),
    "openquake_verify_job": ("/nowhere", "openquake_verify_job=/nowhere is not there; give a path"),
    "openquake_nfs_client_mounts": (
        [{"path": "/etc"}],
        "openquake_nfs_client_mounts: /etc is no path for a mount; give an absolute one of its own",
    ),
    "openquake_webui_proxy": (
        "a b",
        "openquake_webui_proxy: a b is not understood; give the address",
    ),
    "openquake_runtime": (
        {"max_attempts": 0, "lost_s": 5},
        "max_attempts=0: give a number from 1 to 1000000; openquake_runtime: lost_s=5: give more "
        "than suspect_s, 10",
    ),
}
EXTRA = {"dbserver": {"port": 1}, "memory": {"pmap_max_mb": 1, "limit": "1\n2"}, "a": 1}


@pytest.mark.parametrize("odd", [KINDS, VALUES])
def test_odd_settings_are_all_told(site: Site, odd: dict[str, tuple[object, str]]) -> None:
    message = refused(site, GOOD, "-e", json.dumps({name: row[0] for name, row in odd.items()}))
    for _, expected in odd.values():
        assert expected in message
    assert "battery" not in message


def test_settings_of_the_engine_that_have_a_variable(site: Site) -> None:
    """Else openquake.cfg would say another port than the packet filter."""
    message = refused(site, GOOD, "-e", json.dumps({"openquake_config_extra": EXTRA}))
    assert message.startswith(
        "openquake_config_extra: dbserver.port has a variable of its own, memory.limit is no "
        "setting of one line, a is no section of settings; give"
    )


#: of openquake_shared_dir, _prefix, _home, _config_dir and _custom_tmp, and what they are called
PATHS = [
    (["/", "/opt/a b", "/srv/../home", "/etc/oq/", "tmp"], "only, without / at its end"),
    (["oq_shared", "/opt/'x'", "/srv/.", "/etc//oq", "/srv/x;y"], "only, without / at its end"),
    (["/usr", "/var/log/oq", "/var/lib/dpkg", "/etc", "/etc/tmp"], "is a directory of the system"),
    (["/srv", "/home", "/etc/oq", "/usr/oq", "/root"], "is a directory of the system"),
]


@pytest.mark.parametrize(("paths", "called"), PATHS)
def test_paths_are_all_told(site: Site, paths: list[str], called: str) -> None:
    names = [f"openquake_{name}" for name in ("shared_dir", "prefix", "home", "config_dir")]
    odd = dict(zip([*names, "openquake_custom_tmp"], paths, strict=True))
    message = refused(site, GOOD, "-e", json.dumps(odd))
    assert called in message
    for name, path in odd.items():
        assert f"{name}={path}" in message


HOSTS = {
    "ansible_host=192.0.2.300": "192.0.2.300 is no IPv4 address in a cluster",
    "openquake_address=worker2.example": "worker2.example is no IPv4 address in a cluster",
    "openquake_address=127.0.0.1": "127.0.0.1 is no IPv4 address in a cluster",
    "openquake_address=192.0.2.2": "Two hosts of the inventory have the same address",
    "openquake_cores=-2": "openquake_cores=-2 is not understood",
    "openquake_swap_off=maybe": "openquake_swap_off",
    "openquake_cores=all": "argument 'openquake_cores' is of type str",
    "openquake_shared_dir=/data": "openquake_shared_dir must be the same for all hosts",
}


@pytest.mark.parametrize("setting", HOSTS)
def test_setting_of_one_host(site: Site, setting: str) -> None:
    line = "w2 ansible_host=192.0.2.3"
    wrong = f"w2 {setting}" if setting.startswith("ansible_host") else f"{line} {setting}"
    assert HOSTS[setting] in refused(site, GOOD.replace(line, wrong))


def test_limit_without_facts_of_the_others(site: Site) -> None:
    message = refused(site, GOOD, "--limit", "w1")
    assert message == (
        "--limit leaves out m1, w2, of which no facts are cached; run without --limit"
    )


def test_worker_that_leaves(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.ini"
    inventory.write_text(GOOD)
    remove = ["ansible-playbook", "-i", str(inventory), "playbooks/remove_worker.yml"]
    done = ansible(*remove)
    [message] = failures(done.stdout)
    assert message.startswith("'' is not in the group [workers]; name a worker with -e openquake_")
    assert "One whose line is deleted already must have it again" in message
    inventory.write_text(GOOD.replace("w2 ansible_host=192.0.2.3\n", ""))
    done = ansible(*remove, "-e", "openquake_leaving=w1")
    assert failures(done.stdout)[0].startswith("w1 is the last worker; add another one first")
