"""What programs of the hosts say is read as it is meant; what does not work is told in a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.machine import Machine, role
from tests.provisioning.roles import failures

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    try:
        made.sh("mkdir -p /etc/openquake")
        yield made
    finally:
        made.close()


def program(machine: Machine, path: str, text: str) -> None:
    machine.sh(f"rm -f {path}; cat >{path}; chmod 0755 {path}", stdin=f"#!/bin/sh\n{text}")


def test_ufw_of_another_language(machine: Machine) -> None:
    program(
        machine,
        "/usr/sbin/ufw",
        'echo "$*" >>/run/ufw; [ "$LC_ALL" = C ] && echo "Status: active" || echo "Status: Aktiv"',
    )
    machine.play(
        role("openquake_firewall", "openings"),
        __openquake_firewall_wanted=["192.0.2.2 1908"],
        environment={"LC_ALL": "de_DE.UTF-8"},
    )
    assert "allow proto tcp from 192.0.2.2 to any port 1908" in machine.sh("cat /run/ufw")


def test_kernel_without_nftables(machine: Machine) -> None:
    noise = 'i=0; while [ $i -lt 40 ]; do echo "Protocol not supported $i" >&2; i=$((i+1)); done'
    program(machine, "/usr/sbin/nft", f"{noise}; exit 1")
    done = machine.play(role("openquake_firewall", "validate"))
    assert failures(done.stdout) == [
        "nftables does not work with this kernel (Protocol not supported 0); use another one, or "
        "set openquake_firewall_provider=none and let another firewall keep strangers out"
    ]
    done = machine.play(role("openquake_firewall", "validate"), openquake_firewall_provider="none")
    assert done.returncode == 0, done.stdout


def test_version_of_python_is_read_and_not_guessed(machine: Machine) -> None:
    """It goes into the name of the environment, where an empty one was taken before."""
    told = {"var": "__openquake_engine_python_version.stdout"}
    play = (role("openquake_engine", "validate"), {"name": "Tell", "ansible.builtin.debug": told})
    late = "[ -e /run/asked ] && echo 3.11; touch /run/asked"
    program(machine, "/usr/local/bin/python-late", late)
    done = machine.play(*play, openquake_python="/usr/local/bin/python-late")
    assert '__openquake_engine_python_version.stdout": "3.11"' in done.stdout, done.stdout
    program(machine, "/usr/local/bin/python-none", ":")
    done = machine.play(*play, openquake_python="/usr/local/bin/python-none")
    assert done.returncode != 0, done.stdout


def test_directory_for_temporary_files_must_be_there(machine: Machine) -> None:
    validate = role("openquake_engine", "validate")
    done = machine.play(validate, openquake_custom_tmp="/srv/scratch")
    assert "openquake_custom_tmp=/srv/scratch is no directory here" in failures(done.stdout)[0]
    machine.sh("mkdir /srv/scratch")
    assert machine.play(validate, openquake_custom_tmp="/srv/scratch").returncode == 0


def test_little_space_and_a_number_for_people_are_told(machine: Machine) -> None:
    """With figures, and nothing fails."""
    machine.sh("mount -t tmpfs -o size=300m small /tmp; mkdir /oq_shared")
    machine.sh("mount -t tmpfs -o size=3000m small /oq_shared")
    parts = role("openquake", "storage"), role("openquake_user", "validate")
    done = machine.play(*parts, openquake_uid=1880, openquake_shared_dir="/oq_shared/results")
    assert done.returncode == 0, done.stdout
    assert "/oq_shared/results has 3.1 GB free for results, less than 20.0 GB" in done.stdout
    assert "/tmp has 0.3 GB free for temporary files, less than 2.0 GB" in done.stdout
    assert "openquake_uid=1880 is above 999" in done.stdout
    assert "partition of its own" not in done.stdout
    done = machine.play(*parts, openquake_shared_dir="/srv")
    assert "/srv is in the file system of the system" in done.stdout, done.stdout
    assert "is above 999" not in done.stdout


def test_cloud_init_that_keeps_the_names_is_told(machine: Machine) -> None:
    """Of several settings the last one counts."""
    machine.sh("mkdir -p /etc/cloud/cloud.cfg.d; cd /etc/cloud; echo '# none' >cloud.cfg")
    for name, setting, told in (
        ("50", "false", False),
        ("60", "'localhost'  # of the image", True),
        ("70", "True", True),
        ("80", "false", False),
    ):
        machine.sh(f"cat >/etc/cloud/cloud.cfg.d/{name}.cfg", stdin=f"manage_etc_hosts: {setting}")
        done = machine.play(role("openquake_user", "validate"))
        assert done.returncode == 0, done.stdout
        assert ("cloud-init writes /etc/hosts here" in done.stdout) is told, done.stdout


def test_users_are_people(machine: Machine) -> None:
    """Whatever root and the service account are called."""
    machine.sh("groupadd --gid 880 openquake; useradd --uid 880 --gid 880 openquake; useradd alice")
    for name, number in ("toor", 0), ("oq", 880):
        machine.sh(f"useradd --non-unique --uid {number} --gid 880 {name}")
    for name, other in ("toor", "root"), ("oq", "openquake"):
        done = machine.play(role("openquake_user", "validate"), openquake_users=["alice", name])
        expected = f"openquake_users names {name}, who has the number of {other} here"
        assert expected in "".join(failures(done.stdout)), done.stdout


def test_look_up_of_the_names_must_work(machine: Machine) -> None:
    """One that does not run finds nothing wrong."""
    names = {"openquake_user_manage_hosts": False, "openquake_python": "/bin/false"}
    done = machine.play(role("openquake_user", "names"), **names)
    assert done.returncode != 0, done.stdout
    machine.sh("echo 192.0.2.1 m1 >/etc/hosts; echo 192.0.2.2 w1 >>/etc/hosts; hostname m1")
    names["openquake_python"] = "/usr/bin/python3"
    assert machine.play(role("openquake_user", "names"), **names).returncode == 0


def test_who_is_not_named_any_more_has_no_access(machine: Machine) -> None:
    """Nor who was added by hand; results stay where they are, and their owner's."""
    for name in "alice", "bob", "carla":
        machine.sh(f"useradd {name}")
    settings = {"openquake_shared_dir": "/oq_shared", "openquake_users": ["alice", "bob"]}
    roles = role("openquake_user", "account"), role("openquake_shared_dir")
    done = machine.play(*roles, **settings)
    assert done.returncode == 0, done.stdout
    secret, results = "/etc/openquake/authkey", "/oq_shared/bob/oqdata/calc_1.hdf5"
    machine.sh(f"gpasswd --add carla openquake; install -g openquake -m 0640 /dev/null {secret}")
    machine.sh(f"echo 1 >{results}", "bob")
    assert machine.can(f"cat {secret}", "bob") and machine.can(f"cat {secret}", "carla")
    settings["openquake_users"] = ["alice"]
    done = machine.play(*roles, **settings, args=("--check",))
    assert "bob, carla" in done.stdout, done.stdout
    assert machine.can(f"cat {secret}", "bob")
    done = machine.play(*roles, **settings)
    assert "playbooks/rotate_authkey.yml" in done.stdout, done.stdout
    assert machine.can(f"cat {secret}", "alice")
    for name in "bob", "carla":
        assert not machine.can(f"cat {secret} || touch /oq_shared/new", name)
    assert machine.sh(f"stat -c %U {results}; cat {results}", "openquake") == "bob\n1"
    assert "changed=0" in machine.play(*roles, **settings).stdout
