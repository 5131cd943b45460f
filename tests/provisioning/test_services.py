"""What a run has changed is in force at its end, and at the end of the next where it was killed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.provisioning.machine import NOTIFIES, Machine, role
from tests.provisioning.roles import ROOT, failures

pytestmark = pytest.mark.timeout(300)

UNIT = "/etc/systemd/system/served.service"
#: counts in /run/starts and /run/reloads how often it was started and told to read again
SERVED = """
[Service]
ExecStartPre=/bin/sh -c 'echo >>/run/starts'
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c 'echo >>/run/reloads'
"""
FRESH = {"openquake_unit": "served.service", "openquake_files": ["/etc/read", "/etc/not-there"]}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, services=True)
    try:
        yield made
    finally:
        made.close()


#: stands in for systemctl: a unit that was started at a moment
SYSTEMCTL = """\
#!/bin/sh
case $* in
*ActiveState*) echo active ;;
*NeedDaemonReload*) echo no ;;
*) date --utc --date='{}' '+%a %F %T.%6N UTC' ;;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize(("started", "told"), [("now", ""), ("1 hour", "served.service\n")])
def test_service_that_started_while_the_clock_was_ahead(
    tmp_path: Path, started: str, told: str
) -> None:
    """Nothing is newer than it for an hour, so it is started anew."""
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL.format(started))
    program.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / "roles/openquake/files/stale.sh", "served.service"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == told


def count(machine: Machine, what: str) -> int:
    return len(machine.run("cat", f"/run/{what}").stdout.splitlines())


@pytest.mark.slow
def test_service_reads_what_is_newer_than_it(machine: Machine) -> None:
    machine.sh(f"touch /etc/read; cat >{UNIT}", stdin=SERVED)
    done = machine.play(role("openquake", "fresh"), **FRESH)
    assert "changed=0" in done.stdout
    assert count(machine, "starts") == 0  # one that does not run is not started
    machine.sh("systemctl start served")
    done = machine.play(role("openquake", "fresh"), **FRESH)
    assert "changed=0" in done.stdout, done.stdout
    for script, how, what in (
        ("touch /etc/read", "restarted", "starts"),
        (f"touch {UNIT}", "restarted", "starts"),
        (f"touch {UNIT}; systemctl daemon-reload", "restarted", "starts"),
        ("touch /etc/read", "reloaded", "reloads"),
    ):
        before = count(machine, what)
        machine.sh(script)
        fresh = role("openquake", "fresh")
        done = machine.play(fresh, fresh, **FRESH, openquake_how=how)  # the second does nothing
        assert "changed=1 " in done.stdout and "failed=0" in done.stdout, done.stdout
        assert count(machine, what) == before + 1


# ---- the mounts of a worker


def automounts(machine: Machine) -> list[str]:
    return machine.sh("cd /etc/systemd/system; ls *.automount 2>/dev/null || true").split()


#: of somebody whose home is in a mount of the cluster, as the sessions of systemd's are
SESSION = """
cd /etc/systemd/system
printf '[Unit]\\nDescription=OpenQuake: /oq of the master when it is used\\n' >oq.automount
printf '[Automount]\\nWhere=/oq\\n' >>oq.automount
printf '[Unit]\\nDescription=OpenQuake: /oq of the master\\n' >oq.mount
printf '[Mount]\\nWhat=tmpfs\\nWhere=/oq\\nType=tmpfs\\n' >>oq.mount
printf '[Unit]\\nRequiresMountsFor=/oq/home\\n' >session.service
printf '[Service]\\nExecStart=sleep infinity\\n' >>session.service
mkdir -p /oq
systemctl start session
"""


def test_sessions_outlive_the_mount_of_their_home(machine: Machine) -> None:
    """That of Ansible's login among them: the play would end in the midst."""
    machine.sh(SESSION)
    assert machine.can("mountpoint -q /oq", "root")
    done = machine.play(role("openquake_nfs_client", "remove"), host="w1")
    assert done.returncode == 0, done.stdout
    assert machine.can("systemctl is-active session", "root")
    assert not machine.can("mountpoint -q /oq || test -e /etc/systemd/system/oq.mount", "root")


@pytest.mark.slow
def test_mounts_of_other_settings_go(machine: Machine) -> None:
    """A path with a dash; then another one, after which the first is not waited for any more.

    Whether the units start depends on the kernel.
    """
    machine.sh("touch /usr/sbin/mount.nfs4")
    mount = (role("openquake_nfs_client", "validate"), role("openquake_nfs_client", "mount"))
    machine.play(*mount, host="w1", openquake_shared_dir="/oq-shared")
    assert automounts(machine) == ["opt-openquake.automount", "oq\\x2dshared.automount"]
    machine.play(*mount, host="w1", openquake_shared_dir="/srv/.results")
    assert automounts(machine) == ["opt-openquake.automount", "srv-.results.automount"]
    assert not machine.can("test -e /oq-shared", "root")
    done = machine.play(role("openquake_nfs_client", "remove"), host="w1")
    assert done.returncode == 0, done.stdout
    assert automounts(machine) == []


#: one that is stopped by a change of the mounts
WORKER = """
printf '[Service]\\nExecStart=sleep infinity\\n[Install]\\nWantedBy=spare.target\\n' \
    >/etc/systemd/system/openquake-worker.service
systemctl enable --now openquake-worker.service
"""


@pytest.mark.slow
def test_agent_that_a_change_of_the_mounts_has_stopped_runs_again(machine: Machine) -> None:
    machine.sh("touch /usr/sbin/mount.nfs4; mknod /dev/autofs c 10 235; systemctl daemon-reexec")
    mount = (role("openquake_nfs_client", "validate"), role("openquake_nfs_client", "mount"))
    machine.play(*mount, host="w1", openquake_shared_dir="/srv/one")
    machine.sh(WORKER)
    pid = "systemctl show --value --property=MainPID openquake-worker"
    first = machine.sh(pid)
    done = machine.play(*mount, host="w1", openquake_shared_dir="/srv/two")
    assert done.returncode == 0, done.stdout
    assert machine.sh(pid) not in ("0", first)
    done = machine.play(*mount, host="w1", openquake_shared_dir="/srv/two")
    assert "changed=0" in done.stdout, done.stdout


#: as where the kernel has NFS: what is mounted, by the path
FINDMNT = """\
#!/bin/sh
case $* in
*/opt/openquake) echo "nfs4 192.0.2.9:/opt/openquake ro,nosuid,nodev,relatime,vers=4.2" ;;
*) exit 1 ;;
esac
"""


#: as where the master has put another directory in the place of the one that is mounted
STAT = """\
#!/bin/sh
case $* in */srv/results/.) echo "stat: cannot statx: Stale file handle" >&2; exit 1 ;; esac
exec /usr/bin/stat.real "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["", "ro", "noexec", "its directory"])
def test_what_is_mounted_and_of_no_use_is_mounted_anew(machine: Machine, lacks: str) -> None:
    """By hand for writing, say."""
    if lacks == "its directory":
        machine.sh("groupadd --gid 880 openquake; useradd --uid 880 --gid 880 openquake")
        machine.sh("mv /usr/bin/stat /usr/bin/stat.real; cat >/usr/bin/stat", stdin=STAT)
        machine.sh("chmod +x /usr/bin/stat")
    machine.sh("touch /usr/sbin/mount.nfs4; mknod /dev/autofs c 10 235; systemctl daemon-reexec")
    mount = (role("openquake_nfs_client", "validate"), role("openquake_nfs_client", "mount"))
    done = machine.play(*mount, host="w1", openquake_shared_dir="/srv/results")
    assert done.returncode == 0, done.stdout
    machine.sh(WORKER)
    pid = "systemctl show --value --property=MainPID openquake-worker"
    first = machine.sh(pid)
    options = ",".join({"ro", "nosuid", "nodev", "noexec", "relatime"} - {lacks})
    row = f"nfs4 192.0.2.1:/srv/results {options}"
    said = f"echo autofs systemd-1 rw; echo {row}"
    findmnt = f"#!/bin/sh\ncase $* in */srv/results) {said} ;; esac\n"
    machine.sh("cat >/usr/bin/findmnt; chmod +x /usr/bin/findmnt", stdin=findmnt)
    done = machine.play(*mount, host="w1", openquake_shared_dir="/srv/results")
    assert done.returncode == 0, done.stdout
    assert (machine.sh(pid) == first) == (lacks == ""), done.stdout
    assert ("changed=0" in done.stdout) == (lacks == ""), done.stdout


@pytest.mark.parametrize("kind", ["mount", "automount"])
def test_mount_of_another_server_that_is_down_is_not_replaced(machine: Machine, kind: str) -> None:
    validate = role("openquake_nfs_client", "validate")
    text = {
        "mount": "[Mount]\\nWhat=192.0.2.9:/x\\nWhere=/opt/openquake\\nType=nfs4\\n",
        "automount": "[Automount]\\nWhere=/opt/openquake\\n",
    }
    path = f"/etc/systemd/system/opt-openquake.{kind}"
    machine.sh(f"printf '{text[kind]}' >{path}; systemctl daemon-reload")
    done = machine.play(validate, host="w1")
    [message] = failures(done.stdout)
    assert message.startswith(f"/opt/openquake is already a mount of this host, by {path}; ")


@pytest.mark.slow
def test_mounts_of_another_address_of_the_master_are_no_strangers(machine: Machine) -> None:
    machine.sh("touch /usr/sbin/mount.nfs4; mv /usr/bin/findmnt /usr/bin/findmnt.real")
    validate = role("openquake_nfs_client", "validate")
    stub = "cat >/usr/bin/findmnt; chmod +x /usr/bin/findmnt"
    machine.sh(stub, stdin=FINDMNT)
    done = machine.play(validate, host="w1")
    assert "is already a mount of 192.0.2.9:/opt/openquake here" in str(failures(done.stdout))
    machine.sh("cp /usr/bin/findmnt.real /usr/bin/findmnt")
    before = {"openquake_master_address": "192.0.2.9"}
    mount = role("openquake_nfs_client", "mount")
    machine.play(validate, mount, host="w1", args=("-e", json.dumps(before)))
    machine.sh(stub, stdin=FINDMNT)
    done = machine.play(validate, host="w1")
    assert done.returncode == 0, done.stdout


#: the software as a mount, which stays as it is where a service has only to start
SOFTWARE = r"""
mkdir -p /opt/openquake
printf '[Mount]\nWhat=/srv\nWhere=/opt/openquake\nType=none\nOptions=bind\n' \
    >/etc/systemd/system/opt-openquake.mount
systemctl daemon-reload
systemctl start opt-openquake.mount
"""


def test_an_upgrade_mounts_the_software_anew_where_it_comes_from_the_master(
    machine: Machine,
) -> None:
    """And neither where the host is the master, which computes, nor where others mount it."""
    machine.sh(SOFTWARE + WORKER)
    which = "systemctl show --value --property=InvocationID opt-openquake.mount"
    first = machine.sh(which)
    start = role("openquake_worker", "start")
    external = {**start, "vars": {"openquake_nfs_client_provider": "external"}}
    note = {"name": "Note", "ansible.builtin.shell": f"{which} >/run/which"}
    for host, tasks in ("m1", (start,)), ("w1", (external, note, start)):
        done = machine.play(*tasks, host=host, openquake_worker_remount=True)
        assert done.returncode == 0, done.stdout
        assert (machine.sh(which) == first) == (host == "m1")
    assert machine.sh("cat /run/which") == first


# ---- the server of NFS

RPCBIND = """
printf '[Socket]\\nListenStream=127.0.0.1:111\\n' >/usr/lib/systemd/system/rpcbind.socket
printf '[Service]\\nExecStart=sleep infinity\\n' >/usr/lib/systemd/system/rpcbind.service
systemctl daemon-reload
systemctl start rpcbind.socket
"""
#: its table is a file; it fails while there is /run/refused
EXPORTFS = """\
#!/bin/sh
case $1 in
-s) [ ! -e /run/exported ] || awk '/^\\// {for (i = 2; i <= NF; i++) print $1, $i}' /run/exported ;;
*)
    [ ! -e /run/refused ] || exit 1
    cat /etc/exports.d/*.exports >/run/exported 2>/dev/null || true
    ;;
esac
"""
#: stands in for the server, which a kernel without NFS has not
NFS = f"""
cat >/usr/sbin/exportfs <<'EOF'
{EXPORTFS}
EOF
chmod +x /usr/sbin/exportfs
printf '[Service]\\nExecStart=sleep infinity\\n[Install]\\nWantedBy=spare.target\\n' \
    >/etc/systemd/system/nfs-server.service
{RPCBIND}
"""


@pytest.mark.slow
def test_server_speaks_one_version_and_is_restarted_for_its_settings_alone(
    machine: Machine,
) -> None:
    machine.sh(NFS)
    pid = "systemctl show --value --property=MainPID nfs-server"
    done = machine.play(role("openquake_nfs_server"))
    assert done.returncode == 0, done.stdout
    assert not machine.can("systemctl is-active rpcbind.socket", "root")
    assert machine.run("systemctl", "is-enabled", "rpcbind.socket").stdout == "masked\n"
    conf = machine.sh("cat /etc/nfs.conf.d/openquake.conf")
    assert {"vers2 = n", "vers3 = n", "vers4.2 = y"} <= {*conf.splitlines()}
    first = machine.sh(pid)
    # its exports are read again, as they are not there; nothing else happens, nor for more workers
    more = {"openquake_worker_hosts": ["w1", "w2"]}
    done = machine.play(role("openquake_nfs_server"), args=("-e", json.dumps(more)))
    assert done.returncode == 0, done.stdout
    assert machine.sh(pid) == first
    machine.sh("touch /etc/nfs.conf.d/openquake.conf")  # as by a run that was killed
    machine.play(role("openquake_nfs_server"))
    assert machine.sh(pid) != first
    done = machine.play(role("openquake_nfs_server", "remove"))
    assert done.returncode == 0, done.stdout
    assert machine.run("systemctl", "is-enabled", "rpcbind.socket").stdout == "static\n"


@pytest.mark.slow
def test_exports_that_a_run_has_failed_to_withdraw_go_with_the_next(machine: Machine) -> None:
    machine.sh(NFS)
    server = role("openquake_nfs_server")
    both = ["192.0.2.2", "192.0.2.7"]
    for clients, options in (both, "rw"), (both[:1], "rw"), (both[:1], "ro"):
        given = {"__openquake_nfs_server_clients": clients}
        args = ("-e", json.dumps(given | {"openquake_nfs_server_options": [options]}))
        machine.sh("touch /run/refused")
        assert machine.play(server, args=args).returncode != 0
        machine.sh("rm /run/refused")
        done = machine.play(server, args=args)
        assert done.returncode == 0, done.stdout
        exported = machine.sh("exportfs -s | grep ^/opt/openquake").splitlines()
        assert exported == [f"/opt/openquake {client}({options})" for client in clients]
    assert "changed=0" in machine.play(server, args=args).stdout


@pytest.mark.slow
def test_what_was_exported_before_stays_until_it_is_not_mounted_any_more(machine: Machine) -> None:
    """Or who has his home in it could not log in on a worker any more, Ansible included."""
    machine.sh(NFS)
    server = role("openquake_nfs_server")
    withdraw = role("openquake_nfs_server", "withdraw")
    settled = {
        "ansible.builtin.set_fact": {"__openquake_nfs_client_settled": True},
        "delegate_to": "w1",
        "delegate_facts": True,
    }

    def exported(path: str, *tasks: dict[str, Any]) -> tuple[set[str], str]:
        """What is exported after some tasks, and what they have printed."""
        done = machine.play(*tasks, openquake_shared_dir=path)
        assert done.returncode == 0, done.stdout
        rows = machine.sh("exportfs -s").splitlines()
        return {" ".join(row.split("(")[0].split()) for row in rows}, done.stdout

    for path in ("/srv/old", "/srv/new", "/srv/link"):
        machine.sh(f"mkdir {path}")
    old, new = ({f"{path} 192.0.2.2" for path in ("/opt/openquake", at)} for at in
                ("/srv/old", "/srv/new"))  # fmt: skip
    assert exported("/srv/old", server)[0] == old
    for _ in range(2):  # w1 has not come to its mounts
        found, said = exported("/srv/new", server, withdraw)
        assert found == old | new
        assert "/srv/old of the settings before stays exported to 192.0.2.2, where" in said
    assert "changed=0" in said
    assert exported("/srv/new", settled, server, withdraw)[0] == new
    # nor does one stay that is something else by now
    assert exported("/srv/link", server)[0] == new | {"/srv/link 192.0.2.2"}
    machine.sh("rmdir /srv/link && ln -s /etc /srv/link")
    assert exported("/srv/new", server)[0] == new


def rpcbind(machine: Machine) -> str:
    return machine.run("systemctl", "is-enabled", "rpcbind.socket").stdout.strip()


@pytest.mark.slow
def test_rpcbind_is_shut_on_a_worker_too_until_its_last_mount_goes(machine: Machine) -> None:
    """Whether the mounts themselves start depends on the kernel; it comes before them."""
    machine.sh("touch /usr/sbin/mount.nfs4")
    machine.sh(RPCBIND)
    machine.play(
        role("openquake_nfs_client", "mount"), host="w1", openquake_nfs_client_v4_only=False
    )
    assert rpcbind(machine) == "static"
    for shared in ("/srv/one", "/srv/two"):  # for the second the mount of the first goes
        mount = role("openquake_nfs_client", "mount")
        machine.play(mount, host="w1", openquake_shared_dir=shared)
        assert rpcbind(machine) == "masked"
        assert not machine.can("systemctl is-active rpcbind.socket", "root")
        assert machine.sh("readlink /etc/systemd/system/rpc-statd.service") == "/dev/null"
    done = machine.play(role("openquake_nfs_client", "remove"), host="w1")
    assert done.returncode == 0, done.stdout
    assert rpcbind(machine) == "static"


START = "systemctl start rpcbind; systemctl is-active rpcbind"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openquake_nfs_client", "openquake_nfs_server"])
def test_what_the_roles_have_masked_is_unmasked_and_nothing_else(
    machine: Machine, name: str
) -> None:
    machine.sh("touch /usr/sbin/mount.nfs4")
    machine.sh(NFS)
    # by its administrator
    machine.sh("ln -s /dev/null /etc/systemd/system/rpc-statd.service")
    machine.sh("cp /usr/lib/systemd/system/rpcbind.service /etc/systemd/system")
    make, host = role(name), "m1"
    if name == "openquake_nfs_client":
        make, host = role(name, "mount"), "w1"
    for undo, settings in (make, {f"{name}_v4_only": False}), (role(name, "remove"), {}):
        machine.play(make, make, host=host)  # the second notes nothing else
        assert rpcbind(machine) == "masked"
        assert not machine.can(START, "root")
        machine.play(undo, host=host, **settings)
        assert rpcbind(machine) == "static"
        assert machine.can(f"{START}; systemctl stop rpcbind", "root")
        assert machine.sh("readlink /etc/systemd/system/rpc-statd.service") == "/dev/null"


# ---- the keys


@pytest.mark.slow
def test_key_that_a_killed_run_has_half_made_is_made_good(machine: Machine) -> None:
    machine.sh(SETUP)
    machine.sh("mkdir -p /etc/openquake/ssh")
    key = "/etc/openquake/ssh/id_ed25519"
    client = {"__openquake_ssh_client_package": "openssh-client"}
    public = []
    for left in "true", f"rm {key}.pub", f"mv {key} {key}.new", f"mv {key} {key}.new; rm {key}.pub":
        machine.sh(left)
        done = machine.play(role("openquake_ssh", "master"), **client)
        assert done.returncode == 0, done.stdout
        public.append(machine.sh(f"cat {key}.pub"))
        assert machine.sh(f"ssh-keygen -y -f {key}", "openquake") == public[-1]
        assert machine.sh("cd /etc/openquake/ssh; ls id*").split() == [
            "id_ed25519",
            "id_ed25519.pub",
        ]
        assert machine.sh(f"stat --format=%a {key}.pub") == "644"
    assert public[0] == public[1]
    done = machine.play(role("openquake_ssh", "master"), **client)
    assert "changed=0" in done.stdout


# ---- the agent

SETUP = f"""
groupadd --gid 880 openquake
useradd --uid 880 --gid openquake --home /var/lib/openquake openquake
install -d -o openquake -g openquake /var/lib/openquake /var/cache/openquake
mkdir -p /opt/openquake/venv-1/bin /etc/openquake
ln -s venv-1 /opt/openquake/venv
touch /var/cache/openquake/venv-1.compiled
cat >/opt/openquake/venv-1/bin/oq-agent <<'EOF'
{NOTIFIES}
EOF
chmod +x /opt/openquake/venv-1/bin/oq-agent
printf '[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=true\\n' \
    >/etc/systemd/system/openquake-firewall.service
"""


@pytest.mark.slow
def test_agent_learns_a_new_secret(machine: Machine) -> None:
    machine.sh(SETUP)
    machine.sh("ip address add 192.0.2.2/24 dev lo")
    pids = []
    for secret in "the-secret-of-yesterday", "the-secret-of-today", "the-secret-of-today":
        done = machine.play(
            role("openquake_config", "secret"),
            role("openquake_worker"),
            host="w1",
            openquake_authkey=secret,
            openquake_master_host="w1",
        )
        assert done.returncode == 0, done.stdout
        pids.append(machine.sh("systemctl show --value --property=MainPID openquake-worker"))
    assert pids[0] != pids[1] == pids[2] != "0"
    assert "changed=0" in done.stdout


@pytest.mark.slow
def test_agent_learns_of_another_environment(machine: Machine) -> None:
    machine.sh(SETUP)
    machine.sh("ip address add 192.0.2.2/24 dev lo")
    machine.sh("cp -r /opt/openquake/venv-1 /opt/openquake/venv-2")
    machine.sh("touch /var/cache/openquake/venv-2.compiled")
    pids = []
    for environment in "venv-1", "venv-2", "venv-2":
        machine.sh(
            f"cd /opt/openquake; [ $(readlink venv) = {environment} ] || ln -sfn {environment} venv"
        )
        done = machine.play(role("openquake_worker"), host="w1", openquake_master_host="w1")
        assert done.returncode == 0, done.stdout
        pids.append(machine.sh("systemctl show --value --property=MainPID openquake-worker"))
    assert pids[0] != pids[1] == pids[2] != "0"
    assert "changed=0" in done.stdout


# ---- the account


@pytest.mark.slow
def test_account_of_another_installer_that_is_busy_is_told(machine: Machine) -> None:
    machine.sh("groupadd --gid 880 openquake; useradd --uid 880 --gid 880 -m openquake")
    unit = "[Service]\nUser=openquake\nExecStart=sleep infinity\n"
    machine.sh("cat >/etc/systemd/system/openquake-dbserver.service", stdin=unit)
    machine.sh("systemctl start openquake-dbserver")
    pid = machine.sh("systemctl show --value --property=MainPID openquake-dbserver")
    done = machine.play(role("openquake_user", "validate"))
    told = f"with home /home/openquake, and has running processes ({pid}), so its home cannot"
    assert told in str(failures(done.stdout))
    machine.sh("systemctl stop openquake-dbserver")
    done = machine.play(role("openquake_user", "validate"), role("openquake_user", "account"))
    assert done.returncode == 0, done.stdout
    assert machine.sh("getent passwd openquake").split(":")[5] == "/var/lib/openquake"


@pytest.mark.slow
def test_jobs_that_go_on_are_those_of_the_users(machine: Machine) -> None:
    """Who leaves the list has no unit any more, and with an empty list there is none at all.

    What the unit does is seen in ``system/test_power``.
    """
    wants = "cd /etc/systemd/system; ls -d openquake-resume@* *.wants/openquake-resume@* || true"
    machine.sh("useradd alice; useradd bob")
    for users in (["alice", "bob"], ["bob"], []):
        done = machine.play(role("openquake_dbserver", "resume"), openquake_resumed=users)
        assert done.returncode == 0, done.stdout
        found = machine.sh(wants).split()
        there = [f"multi-user.target.wants/openquake-resume@{user}.service" for user in users]
        assert found == there + ["openquake-resume@.service"] * bool(users)
        done = machine.play(role("openquake_dbserver", "resume"), openquake_resumed=users)
        assert "changed=0" in done.stdout, done.stdout


#: notes what it turns on
SWAPON = """\
#!/bin/sh
[ "$1" != --all ] || cat "${LIBMOUNT_FSTAB:-/etc/fstab}" >>/run/swap
"""
#: a unit of an administrator, which cannot be masked, and one of a package; they only run
SWAP = r"""
cat >/usr/sbin/swapon
printf '#!/bin/sh\n' >/usr/sbin/swapoff
chmod +x /usr/sbin/swapon
printf '/dev/sda1 / ext4 rw 0 1\n/swapfile none swap sw 0 0\n' >/etc/fstab
printf '[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n' \
    >/usr/lib/systemd/system/zramswap.service
cp /usr/lib/systemd/system/zramswap.service /etc/systemd/system/dphys-swapfile.service
mkdir -p /etc/openquake
systemctl daemon-reload
systemctl start zramswap dphys-swapfile
"""
#: a run that ends before its handlers, as one does that is killed
KILLED = {"name": "Killed", "ansible.builtin.fail": {"msg": "killed"}}


@pytest.mark.slow
def test_swap_stays_off_and_comes_back(machine: Machine) -> None:
    """Entries of fstab, and units that make swap."""
    machine.sh(SWAP, stdin=SWAPON)
    states = "systemctl is-active zramswap dphys-swapfile || true"
    here = ("-e", '{"openquake_in_container": false, "openquake_swap_off": true}')
    done = machine.play(role("openquake_swap", "off"), host="w1", args=here)
    assert done.returncode == 0, done.stdout
    assert machine.sh(states) == "inactive\ninactive"
    machine.run("systemctl", "start", "zramswap", "dphys-swapfile")
    assert machine.sh(states) == "inactive\ninactive"
    again = machine.play(role("openquake_swap", "off"), host="w1", args=here)
    assert "changed=0" in again.stdout, again.stdout
    machine.play(role("openquake_swap", "restore"), KILLED, host="w1", args=here)
    assert machine.sh(states) == "active\nactive"
    assert machine.sh("cat /run/swap") == "/swapfile none swap sw 0 0"
    assert "\n/swapfile none swap" in machine.sh("cat /etc/fstab")
    assert not machine.can("ls /etc/systemd/system/*.d/openquake-swap.conf", "root")


def test_swap_that_is_gone_stops_no_reset(machine: Machine) -> None:
    """A unit that somebody has removed since it was masked; the others come back."""
    machine.sh(SWAP, stdin=SWAPON)
    here = ("-e", '{"openquake_in_container": false, "openquake_swap_off": true}')
    machine.play(role("openquake_swap", "off"), host="w1", args=here)
    machine.sh("rm /usr/lib/systemd/system/zramswap.service; systemctl daemon-reload")
    done = machine.play(role("openquake_swap", "restore"), host="w1", args=here)
    assert done.returncode == 0, done.stdout
    assert "Not all swap is on again" in done.stdout and "zramswap" in done.stdout, done.stdout
    assert machine.sh("systemctl is-active dphys-swapfile") == "active"


SSHD = "/etc/ssh/sshd_config.d/openquake.conf"


@pytest.mark.slow
def test_sshd_forgets_the_cluster_also_where_a_reset_was_killed(machine: Machine) -> None:
    machine.sh(
        "mkdir -p /etc/ssh/sshd_config.d; cat >/etc/systemd/system/ssh.service", stdin=SERVED
    )
    machine.sh(f"touch {SSHD}")
    machine.sh(f"systemctl start ssh; rm {SSHD}")  # by a run that was killed then
    for _ in range(2):
        done = machine.play(role("openquake_ssh", "remove"))
        assert done.returncode == 0, done.stdout
        assert count(machine, "reloads") == 1


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_a_worker_that_leaves_does_not_touch_the_software_of_all(
    machine: Machine, mode: str
) -> None:
    """Where its administrator has mounted that, reading and writing too."""
    machine.sh(
        "mkdir -p /opt/openquake && mount -t tmpfs software /opt/openquake"
        f" && touch /opt/openquake/openquake.cfg && mount -o remount,{mode} /opt/openquake"
    )
    done = machine.play(role("openquake_config", "remove"), host="w1")
    assert done.returncode == 0, done.stdout
    assert machine.can("ls /opt/openquake/openquake.cfg", "root")
    machine.sh("umount /opt/openquake && touch /opt/openquake/openquake.cfg")
    done = machine.play(role("openquake_config", "remove"))
    assert done.returncode == 0, done.stdout
    assert not machine.can("ls /opt/openquake", "root")
