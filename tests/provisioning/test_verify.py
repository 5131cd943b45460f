"""What verify.yml asks a node: each defect has one line that says what, and what to do."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.leftovers import wait_for
from tests.provisioning.machine import Machine, role
from tests.provisioning.roles import ROOT

pytestmark = pytest.mark.timeout(300)

SCRIPT = ROOT / "roles/openquake_verify/files/verify.py"
SETTINGS: dict[str, Any] = {
    "engine": "3.26.2",
    "uid": 880,
    "gid": 880,
    "prefix": "/opt/openquake",
    "home": "/var/lib/openquake",
    "config_dir": "/etc/openquake",
    "shared_dir": "/oq_shared",
    "homes": False,
    "closed_results": [],
    "same_secret": True,
    "master": "127.0.0.1",
    "workers": ["192.0.2.2"],
    "is_master": False,
    "nfs": True,
    "clock_s": 0,
    "dbserver_port": 1908,
    "receiver_ports": "1912-1920",
    "ctrl_port": 1909,
    "webui_port": 0,
    "swap_off": False,
}
SETUP = """
groupadd --gid 880 openquake
useradd --uid 880 --gid openquake --home /var/lib/openquake openquake
install -d -o openquake /var/lib/openquake /var/cache/openquake
mkdir -p /opt/openquake/venv/bin /oq_shared
mount -t tmpfs -o ro,mode=1777 software /opt/openquake
mount -t tmpfs -o ro,mode=1777 192.0.2.9:/results /oq_shared
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, services=True)
    try:
        made.sh(SETUP)
        yield made
    finally:
        made.close()


def verify(
    machine: Machine, place: str, *, by: tuple[str, ...] = (), **changed: Any
) -> dict[str, str]:
    """Return the details of the checks, those of a failed one after a ``!``."""
    settings = json.dumps(SETTINGS | changed)
    proxy = {"http_proxy": "http://127.0.0.1:9"}  # of the host, to other hosts
    done = machine.run(*by, "python3", "-", place, settings, stdin=SCRIPT.read_text(), env=proxy)
    rows = json.loads(done.stdout)
    return {row["check"]: ("" if row["ok"] else "!") + row["detail"] for row in rows}


def test_mounts(machine: Machine) -> None:
    found = verify(machine, "worker", nfs=False)
    assert found["mounts"] == "read-only, of the master"
    found = verify(machine, "worker")
    wanted = "!/opt/openquake is tmpfs of software, not 127.0.0.1:/opt/openquake; run site.yml"
    assert found["mounts"] == wanted
    machine.sh("mount -o remount,rw /oq_shared")
    found = verify(machine, "worker", nfs=False)
    assert found["mounts"].startswith("!/oq_shared is not mounted read-only"), found
    assert machine.sh("ls -A /oq_shared") == ""
    machine.sh("umount /oq_shared")
    found = verify(machine, "worker", nfs=False)
    assert found["mounts"].startswith("!/oq_shared is not mounted; see systemctl status /oq_shared")


def test_root_is_nobody_in_a_shared_directory(machine: Machine) -> None:
    """As over NFS: it takes root for nobody, so ``touch`` is refused before it is read-only."""
    squashed = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    own = "uid=880,gid=880,mode=3770"
    machine.sh(f"umount /oq_shared; mount -t tmpfs -o ro,{own} results /oq_shared")
    said = machine.run(*squashed, "touch", "/oq_shared/x").stderr
    assert "Permission denied" in said, said
    assert verify(machine, "worker", by=squashed, nfs=False)["mounts"] == "read-only, of the master"
    machine.sh(f"mount -o remount,rw,{own} /oq_shared")
    found = verify(machine, "worker", by=squashed, nfs=False)["mounts"]
    assert found == "!/oq_shared is not mounted read-only; run site.yml"


@pytest.mark.parametrize(
    "kind, source, options, fault",
    [
        ("nfs4", "192.0.2.1:/home", "ro,vers=4.2", ""),
        ("nfs4", "192.0.2.9:/home", "ro,vers=4.2", "/home is nfs4 of 192.0.2.9:/home, not"),
        ("nfs4", "192.0.2.1:/srv", "ro,vers=4.2", "/home is nfs4 of 192.0.2.1:/srv, not"),
        ("nfs", "192.0.2.1:/home", "ro,vers=3", "/home is nfs of 192.0.2.1:/home, not"),
        ("nfs4", "192.0.2.1:/home", "ro,vers=4.1", "/home is not mounted with vers=4.2; run"),
        ("nfs4", "192.0.2.1:/home", "rw,vers=4.2", "/home is not mounted read-only; run site.yml"),
    ],
)
def test_mount_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, kind: str, source: str, options: str, fault: str
) -> None:
    settings = json.dumps(SETTINGS | {"master": "192.0.2.1"})
    monkeypatch.setattr(sys, "argv", ["verify.py", "worker", settings])
    script = runpy.run_path(str(SCRIPT))
    mount = script["Mount"](kind, source, set(options.split(",")))
    told = ""
    try:
        script["check_mount"](Path("/home"), mount)
    except script["Wrong"] as exc:
        told = str(exc)
    assert told.startswith(fault) and bool(told) == bool(fault)


#: each with one defect: another engine, no DbServer, workers that ssh does not reach, an export to
#: a stranger, swap, a packet filter that somebody has flushed
DEFECTS = """
mount -o remount,rw /opt/openquake
mkdir -p /opt/openquake/venv/bin; cd /opt/openquake/venv/bin
printf '#!/bin/sh\\necho 3.25.1\\n' >python
printf '#!/bin/sh\\necho "$1: Connection refused" >&2\\nexit 255\\n' >/usr/bin/ssh
mkdir -p /var/lib/nfs /etc/openquake
printf '/opt/openquake\\t192.0.2.2(ro,root_squash)\\n/opt/openquake\\t*(ro,root_squash)\\n' \
    >/var/lib/nfs/etab
printf 'Filename Type Size Used Priority\\n/dev/sdb1 partition 1 0 -2\\n' >/run/swaps
mount --bind /run/swaps /proc/swaps
touch /etc/openquake/firewall.nft
cd /etc/systemd/system
printf '[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=true\\n' \
    >openquake-firewall.service
printf '[Install]\\nWantedBy=spare.target\\n' >>openquake-firewall.service
chmod +x /opt/openquake/venv/bin/python /usr/bin/ssh
systemctl enable --now openquake-firewall
"""


def test_each_defect_is_told_with_its_remedy(machine: Machine) -> None:
    machine.sh(DEFECTS)
    found = verify(machine, "master", workers=["192.0.2.2", "192.0.2.3"])
    found |= {"swap": verify(machine, "worker", swap_off=True)["swap"]}
    wanted = {
        "engine": "!engine 3.25.1, and the inventory says 3.26.2; run playbooks/upgrade.yml",
        "dbserver": "!openquake-dbserver.service is inactive; see journalctl -u openquake-dbserver",
        "gate": "!ssh does not reach 192.0.2.2: openquake@192.0.2.2: Connection refused; "
        "192.0.2.3: openquake@192.0.2.3: Connection refused; ssh openquake@WORKER",
        "exports": "!/opt/openquake is exported to ['*', '192.0.2.2'], not to ['192.0.2.2', '192.",
        "swap": "!swap is on: /dev/sdb1; run site.yml",
        "firewall": "!the table of the firewall is not loaded; run site.yml",
    }
    assert {name for name, text in wanted.items() if not found[name].startswith(text)} == set(), (
        found
    )


def test_nodes(machine: Machine) -> None:
    machine.sh("echo 127.0.1.1 $(hostname) >/etc/hosts; mount -t tmpfs -o size=1m tmp /tmp")
    found = verify(machine, "worker", clock_s=3601, uid=4321)
    wanted = {
        "clock": "!the clock is 3601 s off the master's; see its time service (timedatectl), and",
        "disk": "!/tmp is on a disk with 1 MiB left; make space",
        "names": "127.0.1.1; run site.yml",
        "account": "!openquake is 880:880, not 4321:880; correct openquake_uid",
        "agent": "!openquake-worker.service is inactive; see journalctl -u openquake-worker",
        "owner": "!/opt/openquake/venv has no engine; run site.yml",
    }
    assert {name for name, text in wanted.items() if text not in found[name]} == set(), found


def test_secret_of_a_node_is_the_masters(machine: Machine) -> None:
    machine.sh("umask 027; mkdir -p /etc/openquake; echo x >/etc/openquake/authkey")
    machine.sh("chgrp openquake /etc/openquake/authkey")
    assert verify(machine, "worker")["secret"].startswith("the master's;")
    found = verify(machine, "worker", same_secret=False)["secret"]
    assert found == "!the secret in /etc/openquake/authkey is not the master's; run site.yml"
    machine.sh("rm /etc/openquake/authkey")
    assert verify(machine, "worker")["secret"].endswith("'/etc/openquake/authkey'; run site.yml")


def test_results_are_open_to_the_group_alone(machine: Machine) -> None:
    machine.sh("umount /oq_shared; chown openquake:openquake /oq_shared; chmod 3770 /oq_shared")
    assert verify(machine, "master")["results"] == "readable for the workers"
    found = verify(machine, "master", closed_results=["chmod 2750 /oq_shared/alice/oqdata"])
    assert found["results"].endswith(": chmod 2750 /oq_shared/alice/oqdata; run site.yml")
    machine.sh("chmod 00755 /oq_shared")
    found = verify(machine, "master")
    assert found["results"] == "!/oq_shared has mode 755, owner 880:880; run site.yml"


ROLE_VARS = yaml.safe_load((ROOT / "roles/openquake_verify/vars/main.yml").read_text())
#: what verify.yml asks of the master, and what the script is told then
ASK = (
    {
        "name": "ask",
        "ansible.builtin.import_role": {"name": "openquake_shared_dir", "tasks_from": "opened.yml"},
        "vars": {"__openquake_shared_dir_ask": True},
    },
    {
        "name": "tell",
        "ansible.builtin.debug": {"msg": "told {{ told }}"},
        "vars": {"told": ROLE_VARS["__openquake_verify_settings"]["closed_results"]},
    },
)


@pytest.mark.slow
def test_it_asks_for_the_results_and_changes_nothing(machine: Machine) -> None:
    names: dict[str, Any] = {"openquake_users": ["alice"], "openquake_shared_dir": "/home"}
    machine.sh("useradd --create-home --groups openquake alice")
    machine.sh("install -d -o openquake -g openquake /home/openquake")
    done = machine.play(*ASK, **names)
    assert "told ['setfacl" in done.stdout and "changed=0" in done.stdout, done.stdout
    assert not machine.can("test -e /home/alice/oqdata", "root")
    machine.sh("chmod 0700 /home/alice")
    machine.play(role("openquake_shared_dir", "opened"), **names)
    done = machine.play(*ASK, **names)
    assert "told []" in done.stdout, done.stdout
    machine.sh(
        "umask 077; mkdir ~/oqdata/new; echo results >~/oqdata/new/calc; touch ~/own", "alice"
    )
    assert machine.sh("cat /home/alice/oqdata/new/calc", "openquake") == "results"
    assert not machine.can("ls /home/alice || cat /home/alice/own", "openquake")
    assert not machine.can("cat /home/alice/oqdata/new/calc", "nobody")
    machine.sh("chmod 0755 /home/alice/oqdata; setfacl -b /home/alice/oqdata")
    done = machine.play(*ASK, **names)
    assert "told ['chgrp openquake /home/alice/oqdata'" in done.stdout, done.stdout


def test_silent_node_is_told_with_what_ansible_says_of_it(machine: Machine) -> None:
    said = "mkdir: cannot create directory: No space left on device"
    given = {
        "openquake_hosts": ["w1"],
        "__openquake_verify_nodes": {"results": [{"unreachable": True, "msg": said}]},
        "__openquake_verify_stranger": {"stdout": "[]"},
        "__openquake_verify_checks": ROLE_VARS["__openquake_verify_checks"],
        "__openquake_verify_answered": [],
        "__openquake_verify_silent": ["w1"],
    }
    told = {"name": "tell", "ansible.builtin.debug": {"var": "__openquake_verify_checks"}}
    done = machine.play(told, args=("-e", json.dumps(given)))
    assert f"does not answer to Ansible: {said}; mend that first" in done.stdout, done.stdout


#: answers as ``oq-workers`` does, with 1 where a worker is down
WORKERS = """\
#!/bin/sh
echo '{"192.0.2.2": {"state": "down", "slots": 0}}'
exit 1
"""


def test_workers_that_are_down_are_told_as_text(machine: Machine) -> None:
    machine.sh("mount -o remount,rw /opt/openquake; mkdir -p /opt/openquake/venv/bin")
    program = "/opt/openquake/venv/bin/oq-workers"
    machine.sh(f"cat >{program}; chmod +x {program}", stdin=WORKERS)
    found = verify(machine, "master")
    assert found["workers"].startswith("!192.0.2.2: down; see journalctl"), found


WEBUI = """\
#!/usr/bin/python3
import http.server
class Login(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302 if self.path == "/engine/" else 200)
        self.send_header("Location", "/accounts/login/")
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 8800), Login)
with open("/run/serves", "w"):
    server.serve_forever()
"""
WEBUI_UNIT = """
printf '[Service]\\nExecStart=/usr/bin/webui\\n[Install]\\nWantedBy=spare.target\\n' \
    >/etc/systemd/system/openquake-webui.service
chmod +x /usr/bin/webui
systemctl enable --now openquake-webui
"""


def test_webui_is_asked_without_a_proxy(machine: Machine) -> None:
    machine.sh(f"cat >/usr/bin/webui; {WEBUI_UNIT}", stdin=WEBUI)
    assert wait_for(lambda: machine.can("test -e /run/serves", "root"))
    assert verify(machine, "master", webui_port=8800)["webui"] == "asks for a login"


#: as a worker's kernel shows it: what waits for the first use, and the mount on it
MOUNTINFO = """\
23 29 0:21 / /proc rw,nosuid - proc proc rw
51 29 0:45 / /home rw,relatime shared:25 - autofs systemd-1 rw,fd=50,pgrp=1
88 51 0:52 / /home ro,nosuid,nodev shared:40 - nfs4 192.0.2.1:/home ro,vers=4.2,hard
"""


def test_mount_is_read_as_the_kernel_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["verify.py", "worker", json.dumps(SETTINGS)])
    mounted = runpy.run_path(str(SCRIPT))["mounted"]
    found = mounted(Path("/home"), MOUNTINFO)
    assert (found.kind, found.source) == ("nfs4", "192.0.2.1:/home")
    assert {"ro", "vers=4.2", "nosuid"} <= found.options
    assert mounted(Path("/home"), MOUNTINFO.partition("88 51")[0]) is None
