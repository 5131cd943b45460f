"""What programs of the hosts say is read as it is meant; what does not work is told in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.machine import Machine, role
from tests.provisioning.roles import ROOT, failures

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


@pytest.mark.slow
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


def test_python_is_the_same_as_on_the_master(machine: Machine) -> None:
    """It answers to this host first, and then to the master."""
    program(machine, "/usr/local/bin/python-two", "echo 3.1$(cat /run/two 2>/dev/null || echo 2)")
    machine.sh("sed -i '2a echo 1 >/run/two' /usr/local/bin/python-two")
    done = machine.play(
        role("openquake_user", "validate"), host="w1", openquake_python="/usr/local/bin/python-two"
    )
    told = "/usr/local/bin/python-two is 3.12 here and 3.11 on the master; set openquake_python to"
    assert told in failures(done.stdout)[0], done.stdout


def test_directory_of_ansible_is_used_as_long_as_it_is_there(machine: Machine) -> None:
    """Also when another shared_dir is set: the home is read-only until the old one is unmounted."""
    told = {"var": "ansible_remote_tmp"}
    play = (role("openquake", "login"), {"name": "Tell", "ansible.builtin.debug": told})
    where = '"ansible_remote_tmp": "/var/lib/openquake-ansible"'
    for owner, used in ("root", True), ("nobody", False):  # it is another login's
        machine.sh(f"install -d -m 0700 -o {owner} /var/lib/openquake-ansible")
        done = machine.play(*play, host="w1", openquake_shared_dir="/oq_shared")
        assert done.returncode == 0, done.stdout
        assert (where in done.stdout) is used, done.stdout


#: keys of the login; $1: in what the mount of the master's home, or of this part of it, hides
KEYS = """
cd /root
umount .ssh 2>/dev/null || mkdir -p .ssh
printf '%s' "$1" >.ssh/authorized_keys
mount -t tmpfs none .ssh
printf 'ssh-ed25519 A' >.ssh/authorized_keys
"""


def test_home_in_a_mount_that_would_go(machine: Machine) -> None:
    """What the mount has hidden is the home then: without these keys nobody could log in."""
    unit = "[Unit]\nDescription=OpenQuake: /root of the master\n[Mount]\n"
    for where, hidden, refused in (
        ("/root", "", True), ("/root", "ssh-ed25519 OLD", True), ("/root", "ssh-ed25519 A", False),
        ("/roo", "", False), ("/oq_shared", "", False),
    ):  # fmt: skip
        machine.sh(f"set -- '{hidden}'\n{KEYS}")
        text = f"{unit}What=192.0.2.1:{where}\nWhere={where}\n"
        machine.sh("cat >/etc/systemd/system/root.mount", stdin=text)
        done = machine.play(
            role("openquake_nfs_client", "validate"), host="w1", openquake_shared_dir="/oq_shared"
        )
        said = [line for line in failures(done.stdout) if "as root, whose home /root is" in line]
        assert bool(said) is refused, (where, hidden, done.stdout, done.stderr)
        assert not refused or "stay with openquake_shared_dir=/root" in said[0]


#: brings along what makes environments
OWN_PYTHON = """case "$*" in
"-m venv .") mkdir -p bin lib && cp "$0" bin/python ;;
"-c import ensurepip") echo asked >>/run/ensurepip ;;
esac
"""


def test_python_of_its_own_needs_no_package(machine: Machine) -> None:
    """There is none of its name, and where one is asked for nevertheless the play fails."""
    program(machine, "/usr/local/bin/python-own", OWN_PYTHON)
    machine.sh("touch /srv/oq_runtime-1-py3-none-any.whl")
    done = machine.play(
        role("openquake_engine", "build"),
        openquake_python="/usr/local/bin/python-own",
        __openquake_engine_venv="/opt/openquake/venv-1",
        __openquake_engine_wheel={"stat": {"path": "/srv/oq_runtime-1-py3-none-any.whl"}},
    )
    assert done.returncode == 0, done.stdout
    assert machine.sh("cat /run/ensurepip") == "asked"
    # whatever the umask of who has played it
    assert machine.can(
        "/opt/openquake/venv-1/bin/python && cat /opt/openquake/venv-1/.complete", "nobody"
    )


def test_directory_for_temporary_files_must_be_there(machine: Machine) -> None:
    validate = role("openquake_engine", "validate")
    done = machine.play(validate, openquake_custom_tmp="/srv/scratch")
    assert "openquake_custom_tmp=/srv/scratch is no directory here" in failures(done.stdout)[0]
    machine.sh("mkdir /srv/scratch")
    assert machine.play(validate, openquake_custom_tmp="/srv/scratch").returncode == 0


#: a disk of which little is left
FULL = """df.real "$@" | awk '{ $4 = 1234; print }'"""


@pytest.mark.slow
def test_little_space_and_a_number_for_people_are_told(machine: Machine) -> None:
    """With figures, and nothing fails."""
    # a checkout in /tmp stays where it is
    here = f"mkdir -p {ROOT}; mount --bind /here {ROOT}" if ROOT.is_relative_to("/tmp") else ""
    machine.sh(f"mkdir /here /oq_shared; mount --bind {ROOT} /here")
    machine.sh(f"mount -t tmpfs -o size=300m small /tmp; {here}")
    machine.sh("mount -t tmpfs -o size=3000m small /oq_shared")
    machine.sh("mkdir -p /var/lib/openquake; mount -t tmpfs -o size=500m small /var/lib/openquake")
    parts = role("openquake", "storage"), role("openquake_user", "validate")
    done = machine.play(*parts, openquake_uid=1880, openquake_shared_dir="/oq_shared/results")
    assert done.returncode == 0, done.stdout
    assert "/oq_shared/results has 3.1 GB free for results, less than 20.0 GB" in done.stdout
    assert "/tmp has 0.3 GB free for temporary files, less than 2.0 GB" in done.stdout
    assert (
        "/var/lib/openquake has 0.5 GB free for the job database, less than 1.0 GB" in done.stdout
    )
    assert "openquake_uid=1880 is above 999" in done.stdout
    assert "partition of its own" not in done.stdout
    done = machine.play(*parts, openquake_shared_dir="/srv")
    assert "/srv is in the file system of the system" in done.stdout, done.stdout
    assert "is above 999" not in done.stdout
    machine.sh("mv /usr/bin/df /usr/bin/df.real")
    program(machine, "/usr/bin/df", FULL)
    done = machine.play(parts[0], host="w1")
    said = "/ has 1.2 GB free for system, logs and results in transit, less than 5.0 GB"
    assert done.returncode == 0 and said in done.stdout, done.stdout


#: a package, and a repository with nothing else
REPOSITORY = """
mkdir -p /srv/packages/spare/DEBIAN
cd /srv/packages
printf '%s\\n' 'Package: oq-spare' 'Version: 1' 'Architecture: all' 'Maintainer: nobody' \\
    'Description: none' >spare/DEBIAN/control
dpkg-deb --build spare spare.deb
{ cat spare/DEBIAN/control
  printf 'Filename: ./spare.deb\\nSize: %s\\n' "$(stat -c %s spare.deb)"
  printf 'SHA256: %s\\n' "$(sha256sum <spare.deb | cut -d ' ' -f 1)"; } >Packages
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/packages ./' >/etc/apt/sources.list
touch /var/lib/apt/lists/lock
rm -f /var/lib/apt/periodic/update-success-stamp
touch -d '1 day ago' /var/lib/apt/lists
"""
#: installs something on a new machine, for longer than apt's module waits by itself
INSTALLS = """
import fcntl, time
held = [open(f"/var/lib/{name}", "w") for name in ("dpkg/lock-frontend", "apt/lists/lock")]
for lock in held:
    fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(75)
"""


@pytest.mark.slow
def test_packages_wait_for_another_program_that_installs(machine: Machine) -> None:
    machine.sh(REPOSITORY)
    wanted = {"openquake_program": "/usr/bin/oq-spare", "openquake_package": "oq-spare"}
    with machine.serving("python3", "-c", INSTALLS):
        done = machine.play(role("openquake", "package"), **wanted)
    assert done.returncode == 0, done.stdout
    assert machine.sh("dpkg-query --show oq-spare") == "oq-spare\t1"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_new_secret_must_be_another(machine: Machine) -> None:
    """And neither is told, where it is refused."""
    secrets = "the-secret-of-yesterday", "the-secret-of-tomorrow"
    machine.sh(f"echo {secrets[0]} >/etc/openquake/authkey")
    for given, refused in (secrets[0], True), (secrets[1], False), ("", False):
        another = role("openquake_config", "another")
        done = machine.play(another, args=("-vvv",), openquake_authkey=given)
        assert (done.returncode != 0) is refused, done.stdout
        said = "The secret in use is the openquake_authkey of the inventory already"
        assert (said in done.stdout) is refused
        assert not any(secret in done.stdout for secret in secrets)


@pytest.mark.slow
def test_master_and_worker_that_have_changed_places(machine: Machine) -> None:
    """A master that computes has both units, and one of another installer is of no cluster."""
    standing = role("openquake", "standing")
    settings = "mkdir -p /etc/systemd/system; echo X-Settings=1 >/etc/systemd/system/openquake-{}"
    machine.sh("echo [Unit] >/etc/systemd/system/openquake-dbserver.service")
    assert machine.play(standing, host="w1").returncode == 0
    machine.sh(settings.format("worker.service"))
    done = machine.play(standing, host="m1")
    assert failures(done.stdout) == [
        "m1 is the worker of a cluster that stands, and the inventory says master; correct the "
        "inventory, or take that cluster down with its own inventory and playbooks/reset.yml first"
    ]
    assert machine.play(standing, host="w1").returncode == 0
    machine.sh(settings.format("dbserver.service"))
    assert machine.play(standing, host="m1").returncode == 0
    done = machine.play(standing, host="w1")
    assert "w1 is the master of a cluster that stands" in failures(done.stdout)[0]


def test_worker_whose_address_is_not_known_is_not_shut_out(machine: Machine) -> None:
    """As from a checkout that has no facts of it, when it is too busy to answer."""
    machine.sh(
        "mkdir -p /etc/systemd/system /opt/openquake;"
        "echo X-Settings=1 >/etc/systemd/system/openquake-dbserver.service;"
        "echo 'host_cores = 192.0.2.2 -1, 192.0.2.77 4' >/opt/openquake/openquake.cfg"
    )
    standing = role("openquake", "standing")
    known = {
        "openquake_worker_hosts": ["w1", "w3"],
        "openquake_worker_addresses": ["192.0.2.2"],
        "openquake_addresses": {"w1": "192.0.2.2"},
    }
    args = ("-e", json.dumps(known))
    done = machine.play(standing, args=args)
    [message] = failures(done.stdout)
    assert message.startswith("The workers of this cluster have the addresses 192.0.2.77 as well")
    assert "set openquake_address for w3" in message
    # a new one, which nobody has reached yet, keeps nobody from anything
    machine.sh("echo 'host_cores = 192.0.2.2 -1' >/opt/openquake/openquake.cfg")
    assert machine.play(standing, args=args).returncode == 0


#: what two machines of one image say of themselves
IMAGE = {"nodename": "image", "machine_id": "4711"}


def test_hosts_of_one_image_and_one_in_fips_mode(machine: Machine) -> None:
    own = {"fips": False, "service_mgr": "systemd", "all_ipv4_addresses": ["192.0.2.1"]}
    for fips in False, True:
        says = [
            {
                "name": f"Hear {host}",
                "ansible.builtin.set_fact": {**own, **IMAGE, "fips": fips, "cacheable": True},
                "delegate_to": host,
                "delegate_facts": True,
            }
            for host in ("m1", "w1")
        ]
        done = machine.play(*says, role("openquake", "facts"))
        if fips:
            assert failures(done.stdout)[-1].startswith("This host is in FIPS mode"), done.stdout
        else:
            assert "m1, w1 call themselves image, and NFS takes them for one" in done.stdout
            assert "m1, w1 have the number 4711 in /etc/machine-id" in done.stdout, done.stdout


#: what sshd says of a host whose administrators have shut it
SSHD = "echo port 22; echo usepam no; [ $# = 1 ] || echo allowgroups sudo"


def test_what_keeps_the_master_out_of_a_worker_is_named(machine: Machine) -> None:
    machine.sh("groupadd --gid 880 openquake; useradd --uid 880 --gid 880 --expiredate 1 openquake")
    machine.sh("passwd --quiet --lock openquake; touch /run/nologin")
    program(machine, "/usr/sbin/sshd", SSHD)
    done = machine.play(role("openquake_ssh", "try"), host="w1")
    expected = "sshd here has: allowgroups sudo; the account is locked; the account has expired; "
    expected += "/run/nologin is there; let openquake in"
    assert expected in failures(done.stdout)[0], done.stdout


#: does what the files say, and refuses a directory that is not there, or all
EXPORTFS = """
[ "$1" = -s ] && { cat /run/exported 2>/dev/null; exit 0; }
[ ! -e /run/broken ] || { echo 'exportfs: bad option list' >&2; exit 1; }
sed -n 's/^\\(\\/[^ ]*\\) /\\1  /p' /etc/exports.d/openquake.exports >/run/exported
[ ! -s /etc/exports ] || { echo 'exportfs: Failed to stat /srv/gone' >&2; exit 1; }
"""


def test_broken_export_of_others_does_not_stop_ours(machine: Machine) -> None:
    program(machine, "/usr/sbin/exportfs", EXPORTFS)
    machine.sh("echo '/srv/gone *(ro)' >/etc/exports")
    roles, settings = role("openquake_nfs_server"), {"openquake_nfs_server_provider": "external"}
    done = machine.play(roles, **settings)
    assert done.returncode == 0, done.stdout
    assert "complains of others: exportfs: Failed to stat /srv/gone" in done.stdout
    assert "192.0.2.2(ro," in machine.sh("cat /run/exported")
    assert machine.sh("cat /etc/exports") == "/srv/gone *(ro)"
    machine.sh("rm /run/exported; touch /run/broken")
    done = machine.play(roles, **settings)
    expected = "exportfs refuses the exports of the cluster (exportfs: bad option list); correct"
    assert failures(done.stdout)[0].startswith(expected), done.stdout
