"""What a run has changed is in force at its end, and at the end of the next where it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.machine import Machine, role

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


def count(machine: Machine, what: str) -> int:
    return len(machine.run("cat", f"/run/{what}").stdout.splitlines())


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
        for _ in range(2):
            done = machine.play(role("openquake", "fresh"), **FRESH, openquake_how=how)
            assert done.returncode == 0, done.stdout
        assert "changed=0" in done.stdout
        assert count(machine, what) == before + 1


# ---- the mounts of a worker


def automounts(machine: Machine) -> list[str]:
    return machine.sh("cd /etc/systemd/system; ls *.automount 2>/dev/null || true").split()


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


# ---- the server of NFS

RPCBIND = """
printf '[Socket]\\nListenStream=127.0.0.1:111\\n' >/usr/lib/systemd/system/rpcbind.socket
printf '[Service]\\nExecStart=sleep infinity\\n' >/usr/lib/systemd/system/rpcbind.service
systemctl daemon-reload
systemctl start rpcbind.socket
"""
#: stands in for the server, which a kernel without NFS has not
NFS = f"""
printf '#!/bin/sh\\n' >/usr/sbin/exportfs
chmod +x /usr/sbin/exportfs
printf '[Service]\\nExecStart=sleep infinity\\n[Install]\\nWantedBy=spare.target\\n' \
    >/etc/systemd/system/nfs-server.service
{RPCBIND}
"""


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


def rpcbind(machine: Machine) -> str:
    return machine.run("systemctl", "is-enabled", "rpcbind.socket").stdout.strip()


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
    done = machine.play(role("openquake_nfs_client", "remove"), host="w1")
    assert done.returncode == 0, done.stdout
    assert rpcbind(machine) == "static"


# ---- the agent

#: says that it is ready, and waits
AGENT = """\
#!/usr/bin/python3
import os, socket, time
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1))
time.sleep(600)
"""
SETUP = f"""
groupadd --gid 880 openquake
useradd --uid 880 --gid openquake --home /var/lib/openquake openquake
install -d -o openquake -g openquake /var/lib/openquake /var/cache/openquake
mkdir -p /opt/openquake/venv-1/bin /etc/openquake
ln -s venv-1 /opt/openquake/venv
touch /var/cache/openquake/venv-1.compiled
cat >/opt/openquake/venv-1/bin/oq-agent <<'EOF'
{AGENT}
EOF
chmod +x /opt/openquake/venv-1/bin/oq-agent
printf '[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=true\\n' \
    >/etc/systemd/system/openquake-firewall.service
"""


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
