"""What a member of the group, or the service account, can make of root while roles are played."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
import yaml

from tests.conftest import Attacks
from tests.leftovers import wait_for
from tests.provisioning.machine import PATH, Machine, role
from tests.provisioning.packages import download
from tests.provisioning.roles import ROOT, failures, read, tasks_of

pytestmark = [pytest.mark.attack, pytest.mark.timeout(300)]

SHARED = {"openquake_shared_dir": "/oq_shared", "openquake_users": ["alice", "bob"]}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with the accounts of a cluster: openquake, alice and bob of its group, mallory."""
    made = Machine(tmp_path)
    try:
        made.sh("groupadd --system --gid 880 openquake")
        made.sh("useradd --system --uid 880 --gid openquake --home /var/lib/openquake openquake")
        made.sh("install -d -o openquake -g openquake -m 0750 /var/lib/openquake")
        for name in "alice", "bob", "mallory":
            made.sh(f"useradd --create-home --shell /bin/bash {name}")
        for name in "alice", "bob":
            made.sh(f"gpasswd --add {name} openquake")
        made.sh("install -d -m 0755 /etc/openquake /srv/target")
        yield made
    finally:
        made.close()


def state(machine: Machine, path: str) -> str:
    """Owner, mode and content of a directory, as far as an attack could change them."""
    return machine.sh(f"stat --format='%U %G %a' {path}; ls -A {path}")


# ---- the DbServer, which asks nobody who he is

SERVER = """
import socket
with socket.create_server(("192.0.2.1", 1908)) as server:
    open("/run/serves", "w").close()
    while True:
        server.accept()[0].close()
"""
CLIENT = "python3 -c 'import socket; socket.create_connection((\"192.0.2.1\", 1908), 5)'"


def test_account_without_the_group_asks_the_dbserver(tmp_path: Path, attacks: Attacks) -> None:
    machine = Machine(tmp_path, services=True, address="192.0.2.1")
    try:
        machine.sh("mkdir -p /etc/openquake; groupadd --system --gid 880 openquake")
        machine.sh("useradd --system --uid 880 --gid openquake openquake")
        machine.sh("for name in alice mallory; do useradd $name; done; gpasswd -a alice openquake")
        machine.sh("cat >/root/server", stdin=SERVER)
        machine.sh("systemd-run --unit=server python3 /root/server")
        assert wait_for(lambda: machine.can("test -e /run/serves", "root"))
        assert machine.can(CLIENT, "mallory"), "there is a server"
        for _ in range(2):
            done = machine.play(role("openquake_firewall"))
            assert done.returncode == 0, done.stdout
        assert "changed=0" in done.stdout
        attacks.tried(successes=machine.can(CLIENT, "mallory"))
        assert all(machine.can(CLIENT, name) for name in ("root", "openquake", "alice"))
        machine.sh("gpasswd -d alice openquake")
        machine.play(role("openquake_firewall"))
        attacks.tried(successes=machine.can(CLIENT, "alice"))
    finally:
        machine.close()


# ---- the shared directory


def test_members_link_in_the_shared_directory(machine: Machine, attacks: Attacks) -> None:
    machine.sh("install -d -o openquake -g openquake -m 2770 /oq_shared")
    machine.sh("ln -s /srv/target /oq_shared/openquake", "alice")
    before = state(machine, "/srv/target")
    done = machine.play(role("openquake_shared_dir"), **SHARED)
    machine.play(role("openquake_webui"), **SHARED, openquake_webui_enabled=True)
    attacks.tried(successes=state(machine, "/srv/target") != before)
    assert "/oq_shared/openquake must be a directory of openquake" in str(failures(done.stdout))


def test_members_link_for_the_job_of_verify(machine: Machine, attacks: Attacks) -> None:
    machine.sh("install -d -o openquake -g openquake -m 2770 /oq_shared")
    machine.sh("ln -s /srv/target /oq_shared/openquake-verify", "alice")
    before = state(machine, "/srv/target")
    done = machine.play(role("openquake_verify"), **SHARED, openquake_verify_report="/tmp/report")
    attacks.tried(successes=state(machine, "/srv/target") != before)
    attacks.tried(successes=machine.can("rm /opt/openquake/verify/job.ini", "openquake"))
    assert "checks failed" in done.stdout  # there is no cluster


def test_member_renames_the_results_of_another(machine: Machine, attacks: Attacks) -> None:
    done = machine.play(role("openquake_shared_dir"), **SHARED)
    assert done.returncode == 0, done.stdout
    machine.sh("mkdir -p /oq_shared/alice/oqdata; touch /oq_shared/alice/oqdata/calc_1", "alice")
    for path in "/oq_shared/alice", "/oq_shared/alice/oqdata", "/oq_shared/alice/oqdata/calc_1":
        attacks.tried(successes=machine.can(f"mv {path} {path}.mine", "bob"))
    attacks.tried(successes=machine.can("echo mine >/oq_shared/alice/oqdata/calc_1", "bob"))


def test_member_sits_on_the_place_of_another(machine: Machine, attacks: Attacks) -> None:
    machine.sh("install -d -o openquake -g openquake -m 2770 /oq_shared")
    machine.sh("mkdir -m 0777 /oq_shared/alice", "bob")
    done = machine.play(role("openquake_shared_dir"), **SHARED)
    attacks.tried(successes=done.returncode == 0)
    assert "/oq_shared/alice must be a directory of alice, and is: d" in str(failures(done.stdout))


def test_shared_directory_is_only_where_root_alone_writes(
    machine: Machine, attacks: Attacks
) -> None:
    machine.sh("ln -s /srv /link; install -d -o alice /srv/hers")
    for path in "/srv/hers/results", "/link/results", "/home/alice/results":
        done = machine.play(role("openquake_shared_dir", "validate"), openquake_shared_dir=path)
        attacks.tried(successes=done.returncode == 0)
        assert "is on the way to openquake_shared_dir" in str(failures(done.stdout)), done.stdout


@pytest.mark.slow
def test_directories_are_only_where_root_alone_writes(machine: Machine, attacks: Attacks) -> None:
    """A link of root's, to where alice may write, is no better; one to elsewhere is.

    But none to what is mounted, or has the environments.
    """
    machine.sh(
        "install -d -o alice /srv/hers /srv/hers/deep; install -d -m 0775 -g alice /srv/both"
    )
    machine.sh("ln -s /srv/hers/deep /srv/link; ln -s /opt /srv/good")
    ways = role("openquake", "ways")
    wrong = {
        "openquake_home": "/srv/hers/home",
        "openquake_prefix": "/srv/link/prefix",
        "openquake_config_dir": "/srv/hers",
        "openquake_custom_tmp": "/srv/both/tmp",
    }
    done = machine.play(ways, **wrong)
    attacks.tried(successes=done.returncode == 0)
    [message] = failures(done.stdout)
    for path in wrong.values():
        assert path in message, message
    done = machine.play(ways, host="w1", openquake_shared_dir="/srv/hers/results")
    attacks.tried(successes=done.returncode == 0)
    assert "/srv/hers/results: /srv/hers (alice, mode 755)" in str(failures(done.stdout))
    good = {"openquake_home": "/srv/good/home", "openquake_custom_tmp": "/var/tmp"}
    done = machine.play(ways, **good)
    assert done.returncode == 0, done.stdout
    for host, name in ("m1", "openquake_prefix"), ("w1", "openquake_shared_dir"):
        done = machine.play(ways, host=host, **{name: "/srv/good/oq"})
        [message] = failures(done.stdout)
        assert message.startswith("/srv/good/oq is /opt/oq here, by a link; put a directory in")


def test_accounts_link_for_what_verify_looks_at(machine: Machine, attacks: Attacks) -> None:
    """It is seen as the link that it is."""
    machine.sh("install -d -o openquake /var/lib/openquake/oqdata")
    machine.sh("ln -s /etc/shadow ~openquake/oqdata/db.sqlite3", "openquake")
    program = ROOT / "roles/openquake_verify/files/verify.py"
    settings = json.dumps({"prefix": "/opt/openquake", "home": "/var/lib/openquake", "uid": 880})
    settings = settings.replace("}", ', "config_dir": "/etc/openquake", "shared_dir": "/home"}')
    load = f"import runpy; print(runpy.run_path({str(program)!r})['check']"
    asked = f"{load}(runpy.run_path({str(program)!r})['database']))"
    done = machine.run("python3", "-c", asked, "master", settings)
    attacks.tried(successes="owner 0" in done.stdout or "bytes" in done.stdout)
    assert "mode 777" in done.stdout, done.stdout + done.stderr


def test_results_are_read_by_the_group_and_by_nobody_else(machine: Machine) -> None:
    """What the refusals above are not to cost; with files of before."""
    machine.sh("install -d -o openquake -g openquake -m 2770 /oq_shared")
    machine.sh(
        "umask 077; mkdir -p /oq_shared/alice/oqdata/old; cd /oq_shared/alice/oqdata/old;"
        "echo 1 >calc_1",
        "alice",
    )
    done = machine.play(role("openquake_shared_dir"), **SHARED)
    assert done.returncode == 0, done.stdout
    machine.sh("umask 077; cd /oq_shared/alice/oqdata; mkdir new; echo 2 >new/calc_2", "alice")
    for path in "old/calc_1", "new/calc_2":
        assert machine.can(f"cat /oq_shared/alice/oqdata/{path}", "openquake")
        assert machine.can(f"cat /oq_shared/alice/oqdata/{path}", "bob")
        assert not machine.can(f"cat /oq_shared/alice/oqdata/{path}", "mallory")
    assert machine.sh("stat -c '%U %G %a' /oq_shared") == "openquake openquake 3770"
    again = machine.play(role("openquake_shared_dir"), **SHARED)
    assert "changed=0" in again.stdout


# ---- the home of the service account


ENGINE = {"__openquake_engine_venv": "/opt/openquake/venv-1"}


def test_accounts_link_for_the_job_database(machine: Machine, attacks: Attacks) -> None:
    machine.sh(
        "mkdir -p /opt/openquake/venv-1/bin && cd /opt/openquake/venv-1/bin && "
        "touch oq oq-run oq-workers && ln -s /srv/target /var/lib/openquake/oqdata"
    )
    before = state(machine, "/srv/target")
    done = machine.play(role("openquake_engine", "activate"), **ENGINE)
    attacks.tried(successes=state(machine, "/srv/target") != before)
    assert "changing permissions of 'oqdata': Operation not permitted" in done.stdout, done.stdout


JOBS = """python3 -c 'import sqlite3
with sqlite3.connect("db.sqlite3") as database:
    database.execute("CREATE TABLE job (id, status)")'
"""
TELL = {"name": "Tell", "ansible.builtin.debug": {"var": "__openquake_engine_problem"}}


def test_accounts_links_for_the_copy_of_the_job_database(
    machine: Machine, attacks: Attacks
) -> None:
    """Beside it root makes nothing, and it is not read by root."""
    machine.sh(f"cd /srv/target; umask 077; {JOBS}")
    machine.sh(f"mkdir -m 0700 ~openquake/oqdata; cd ~openquake/oqdata; {JOBS}", "openquake")
    change = role("openquake_engine", "change"), TELL
    for link, failing in (
        ("/etc/ld.so.preload db.sqlite3.of-venv-0.half", "Keep a copy of the job database"),
        ("/srv/target/db.sqlite3 db.sqlite3", "Look for jobs that run"),
    ):
        machine.sh(f"cd ~openquake/oqdata; ln -sf {link}", "openquake")
        done = machine.play(*change, **ENGINE, __openquake_engine_from="/opt/openquake/venv-0")
        attacks.tried(successes=machine.can("test -e /etc/ld.so.preload", "root"))
        copied = "grep -s SQLite ~openquake/oqdata/db.sqlite3.of-*"
        attacks.tried(successes=machine.can(copied, "openquake"))
        assert failing in done.stdout.partition("TASK [Tell]")[2], done.stdout


SSH = {"__openquake_ssh_client_package": "openssh-client"}


def test_accounts_link_for_its_key(machine: Machine, attacks: Attacks) -> None:
    machine.sh(
        "mkdir -m 0700 ~openquake/.ssh && ln -s /etc/ld.so.preload ~openquake/.ssh/id_ed25519",
        "openquake",
    )
    machine.sh("mkdir -p /etc/openquake/ssh")
    done = machine.play(role("openquake_ssh", "master"), **SSH)
    attacks.tried(successes=machine.can("test -e /etc/ld.so.preload", "root"))
    assert done.returncode == 0, done.stdout


def test_accounts_link_for_its_public_key(machine: Machine, attacks: Attacks) -> None:
    machine.sh(
        "mkdir -m 0700 ~openquake/.ssh && cd ~openquake/.ssh && touch id_ed25519 && "
        "ln -s /etc/shadow id_ed25519.pub",
        "openquake",
    )
    machine.sh("mkdir -p /etc/openquake/ssh")
    machine.play(role("openquake_ssh", "master"), **SSH)
    machine.play(role("openquake_ssh", "worker"), host="w1", **SSH)
    keys = machine.run("cat", "/etc/openquake/ssh/authorized_keys").stdout
    attacks.tried(successes=machine.sh("head -1 /etc/shadow") in keys)
    assert " ssh-ed25519 AAAA" in keys


@pytest.mark.parametrize(
    "line", ["root:x:1:2:3", "ssh-ed25519 " + 68 * "A" + "\nssh-ed25519 " + 68 * "B"]
)
def test_public_key_that_is_none(machine: Machine, attacks: Attacks, line: str) -> None:
    machine.sh("mkdir /etc/openquake/ssh; cat >/etc/openquake/ssh/id_ed25519.pub", stdin=line)
    done = machine.play(role("openquake_ssh", "worker"), host="w1", **SSH)
    attacks.tried(successes=machine.can("test -e /etc/openquake/ssh/authorized_keys", "root"))
    assert "is not the line of an ed25519 key" in str(failures(done.stdout))


def test_only_the_account_reads_the_key(machine: Machine, attacks: Attacks) -> None:
    machine.sh("mkdir -p /etc/openquake/ssh")
    done = machine.play(role("openquake_ssh", "master"), **SSH)
    assert done.returncode == 0, done.stdout
    key = "/etc/openquake/ssh/id_ed25519"
    for name in "alice", "mallory":
        attacks.tried(successes=machine.can(f"cat {key}", name))
    attacks.tried(successes=machine.can(f"chmod 0600 {key} || rm {key}", "openquake"))
    # ssh itself takes it
    public = machine.sh(f"ssh-keygen -y -f {key}", "openquake")
    assert public.split()[:2] == machine.sh(f"cat {key}.pub").split()[:2]
    again = machine.play(role("openquake_ssh", "master"), **SSH)
    assert "changed=0" in again.stdout


@pytest.mark.slow
def test_keys_in_the_home_of_the_account_open_nothing(machine: Machine, attacks: Attacks) -> None:
    machine.sh("umask 077; mkdir ~/.ssh; ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/mine", "mallory")
    mine = machine.sh("cat ~/.ssh/mine.pub", "mallory")
    machine.sh("usermod --password '*' --shell /bin/sh openquake; mkdir -p /run/sshd")
    machine.sh(
        "umask 077; mkdir ~openquake/.ssh; cat >~openquake/.ssh/authorized_keys",
        "openquake",
        stdin=mine,
    )
    login = "ssh -i ~/.ssh/mine -o BatchMode=yes -o StrictHostKeyChecking=no"
    login += " -o ConnectionAttempts=9 openquake@127.0.0.1 id"  # it says a line before it listens
    machine.sh("ssh-keygen -A")
    if not machine.can("test -e /usr/sbin/sshd", "root"):
        machine.sh(
            f"DEBIAN_FRONTEND=noninteractive dpkg --install {download('openssh-server')}/*.deb"
        )
    with machine.serving("/usr/sbin/sshd", "-D", "-d"):
        assert "uid=880" in machine.sh(login, "mallory")  # as long as nobody has played the role
    for host in "m1", "w1":
        machine.play(role("openquake_ssh"), host=host, **SSH)
        with machine.serving("/usr/sbin/sshd", "-D", "-d"):
            try:
                said = machine.sh(login, "mallory")
            except OSError as exc:
                said = str(exc)
        attacks.tried(successes="uid=" in said)
        assert "Permission denied" in said, said


def template(name: str) -> str:
    """Render a template of openquake_ssh, with the variables of the role."""
    environment = jinja2.Environment()
    environment.filters["comment"] = str
    text = (ROOT / "roles/openquake_ssh/templates" / name).read_text()
    settings = read("openquake_ssh", "vars/main.yml")
    return environment.from_string(text).render(ansible_managed="", **settings)


def test_the_gate_starts_and_kills_the_agent_and_nothing_else(
    machine: Machine, attacks: Attacks
) -> None:
    """As root; sshd runs it, whatever the master's account has asked for."""
    gate = "/usr/local/libexec/gate"
    machine.sh(
        f"mkdir -p /usr/local/libexec; cat >{gate}; chmod +x {gate}", stdin=template("gate.sh.j2")
    )
    machine.sh("umask 0337; cat >/etc/sudoers.d/gate", stdin=template("sudoers.j2"))
    program = "#!/bin/sh\necho $(id -un): $* >>/run/asked\n"
    machine.sh(
        "cat >/usr/bin/systemctl.new; mv /usr/bin/systemctl.new /usr/bin/systemctl", stdin=program
    )
    machine.sh("chmod +x /usr/bin/systemctl")

    def ask(words: str) -> subprocess.CompletedProcess[str]:
        command = ("runuser", "--user=openquake", "--", gate)
        sets = {"SSH_CONNECTION": "192.0.2.1 50000 192.0.2.2 22", "SSH_ORIGINAL_COMMAND": words}
        return machine.run(*command, env=sets)

    assert [ask(words).returncode for words in ("ping", "start", "kill")] == [0, 0, 0]
    asked = machine.sh("cat /run/asked").splitlines()
    unit = "openquake-worker.service"
    assert asked == [f"root: start {unit}", f"root: kill --signal=SIGKILL {unit}"]
    for words in "", "id", "stop", "start sshd", "ping; id", "$(id)", "ping\nid", "-n id":
        done = ask(words)
        attacks.tried(successes=done.returncode != 126 or "uid=" in done.stdout)
    for words in f"stop {unit}", "start sshd", f"kill {unit}", f"start {unit} sshd":
        attacks.tried(successes=machine.can(f"sudo -n /usr/bin/systemctl {words}", "openquake"))
    assert machine.sh("cat /run/asked").splitlines() == asked


# ---- secrets


#: notes every argument and every variable of a process that is seen, until it is killed
WATCH = """
import glob, time
print("watching", flush=True)
seen = set()
while True:
    time.sleep(0.01)
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            text = open(path, "rb").read()
        except OSError:
            continue
        if text not in seen:
            seen.add(text)
            open("/run/processes", "ab").write(text + b"\\n")
"""
#: the system's log: what modules say of themselves goes there
LOG = """
import socket
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.bind("/dev/log")
print("logging", flush=True)
while True:
    text = log.recv(1 << 20)
    open("/run/log", "ab").write(text + b"\\n")
"""
#: in place of the engine's Python: as far as Ansible can tell, the account is made
PYTHON = "#!/bin/sh\ncat >/dev/null\necho made\n"


@pytest.mark.parametrize("given", [pytest.param(True, marks=pytest.mark.slow), False])
def test_secrets_are_not_told(machine: Machine, attacks: Attacks, given: bool) -> None:
    secrets = {
        "openquake_authkey": "correct-horse-battery-staple",
        "openquake_webui_admin_password": "tr0ub4dor-and-three",
    }
    key = "/etc/openquake/authkey"
    machine.sh(
        "mkdir -p /opt/openquake/venv/bin; cat >/opt/openquake/venv/bin/python; "
        "chmod +x /opt/openquake/venv/bin/python; mkdir -p /etc/openquake/ssh",
        stdin=PYTHON,
    )
    with (
        machine.serving("python3", "-c", LOG),
        machine.serving("python3", "-c", WATCH),
    ):
        done = machine.play(
            role("openquake_config"),
            role("openquake_ssh", "master"),
            # without systemd it does not start
            {"block": [role("openquake_webui")], "rescue": [{"ansible.builtin.meta": "noop"}]},
            {"name": "Keep it", "ansible.builtin.command": f"cp -a {key} {key}.before"},
            {**role("openquake_config", "secret"), "vars": {"openquake_config_renew": True}},
            role("openquake_verify"),  # there is no cluster, so it comes last
            **SSH,
            **(secrets if given else {}),
            openquake_verify_report="/tmp/report",
            openquake_webui_enabled=True,
            args=("-vvv", "--diff"),
        )
    told = done.stdout + done.stderr + machine.sh("cat /run/log; tr '\\0' ' ' </run/processes")
    told += machine.sh("cat /tmp/facts/*")
    assert "Invoked with" in told and "openquake.cfg" in told  # both watchers have seen something
    assert "checks failed" in done.stdout, done.stdout  # it has come to the end
    told += machine.sh("cat /tmp/report")
    wanted = {*secrets.values()} if given else set()
    names = ["authkey.before", "authkey", "webui-admin-password", "webui-secret-key"]
    for name in (*names, "ssh/id_ed25519"):
        lines = machine.sh(f"cat /etc/openquake/{name}").splitlines()
        wanted.add(max(lines, key=len))
    for secret in wanted:
        assert len(secret) > 15
        attacks.tried(successes=secret in told)
    before, now = (machine.sh(f"cat {path}") for path in (f"{key}.before", key))
    assert (before == now) is given  # else it was changed


# ---- the rule, read in the roles

#: what is inside these belongs to the account or to its members
THEIRS = re.compile(
    r"\{\{ *openquake_(home|shared_dir|custom_tmp) *(~[^}]*)?\}\}/|/home/|_engine_(db|kept)\b"
)
#: what runs as the account
AS_OPENQUAKE = ("runuser", "__openquake_engine_copy")
#: where the homes are in openquake_shared_dir: there the directory itself is root's
HOMES = {"{{ openquake_shared_dir }}/openquake", "{{ openquake_shared_dir }}/{{ item }}"}
PATHS = ("path", "dest", "src", "paths", "creates", "removes", "chdir")


def test_no_task_of_root_has_a_path_inside_what_is_theirs() -> None:
    found = []
    for file in [*(ROOT / "roles").glob("*/tasks/*.yml"), *(ROOT / "playbooks").rglob("*.yml")]:
        for task in tasks_of(yaml.safe_load(file.read_text())):
            for name, arguments in task.items():
                if not name.startswith("ansible.builtin.") or not isinstance(arguments, dict):
                    continue
                paths = [str(arguments[key]) for key in PATHS if key in arguments]
                argv = arguments.get("argv") or []
                if not any(word in str(argv) for word in AS_OPENQUAKE):
                    paths += [str(word) for word in argv] if isinstance(argv, list) else [argv]
                paths += [str(path) for path in task.get("loop") or [] if "{{ item }}" in paths]
                found += [
                    f"{file.relative_to(ROOT)}: {task['name']}: {path}"
                    for path in paths
                    if THEIRS.search(path) and path not in HOMES
                ]
    assert found == []


# ---- what root of a worker says of the worker

BY_NAME = """\
[master]
m1 openquake_address=192.0.2.1
[workers]
w1 ansible_python_interpreter=/usr/local/bin/liar
[all:vars]
ansible_connection=local
ansible_become=false
ansible_python_interpreter=/usr/bin/python3
openquake_shared_dir=/oq_shared
"""
#: what a worker makes of its answers to Ansible, as a script for sed, and how that is refused
SAID = {
    "as it is": ("", "Two hosts of the inventory have the same address (192.0.2.1, 192.0.2.1)"),
    "an address and a line": (
        r's/"address": "192.0.2.1"/"address": "192.0.2.9\\n[x]\\ncode = 1"/',
        "is no IPv4 address in a cluster",
    ),
    "an address and an end of line": (
        r's/"address": "192.0.2.1"/"address": "192.0.2.9\\n"/',
        "is no IPv4 address in a cluster",
    ),
    "a key and a line": (
        r's/"address": "192.0.2.1"/"address": "192.0.2.9"/;'
        r's/ssh_host_key_[a-z0-9]*_public": "/&A\\n/',
        "w1 has a host key that is none",
    ),
}


@pytest.mark.parametrize("said", SAID)
def test_worker_that_says_what_is_not(tmp_path: Path, attacks: Attacks, said: str) -> None:
    """Its address and its host keys go into files of root on the other nodes."""
    script, expected = SAID[said]
    machine = Machine(tmp_path, address="192.0.2.1")
    try:
        machine.sh("ip route add default dev lo src 192.0.2.1; rm -f /etc/ssh/ssh_host_*")
        machine.sh("ssh-keygen -qA; cat >/tmp/inventory.ini", stdin=BY_NAME)
        liar = f"#!/bin/sh\n/usr/bin/python3 \"$@\" | sed '{script}'\n"
        machine.sh("cat >/usr/local/bin/liar; chmod +x /usr/local/bin/liar", stdin=liar)
        done = validate(machine)
    finally:
        machine.close()
    attacks.tried(successes=expected not in "".join(failures(done.stdout)))
    assert expected in "".join(failures(done.stdout)), done.stdout


def validate(machine: Machine) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": f"{Path(sys.executable).parent}:{PATH}",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_CACHE_PLUGIN": "memory",
        "ANSIBLE_NOCOLOR": "1",
        "HOME": "/root",
    }
    playbook = str(ROOT / "playbooks/validate.yml")
    return machine.run("ansible-playbook", "-i/tmp/inventory.ini", playbook, env=env)


@pytest.mark.slow
def test_worker_that_takes_the_name_of_another(machine: Machine, attacks: Attacks) -> None:
    """What it calls itself is its own affair; the others know it by the inventory."""
    names = {"fqdn": "packages.example.org", "nodename": "m1", "hostname": "mirror"}
    key = {"ssh_host_key_rsa_public": "AAAA", "ssh_host_key_rsa_public_keytype": "ssh-rsa"}
    says = {
        "name": "Hear w1",
        "ansible.builtin.set_fact": {**names, **key, "cacheable": True},
        "delegate_to": "w1",
        "delegate_facts": True,
    }
    machine.sh("hostname master.example; mkdir /etc/openquake/ssh")
    parts = role("openquake_user", "names"), role("openquake_ssh", "master")
    done = machine.play(says, *parts, args=("-e", "ansible_port=2222"))
    assert done.returncode == 0, done.stdout
    hosts = machine.sh("cat /etc/hosts")
    assert "192.0.2.2 w1\n" in hosts
    assert "192.0.2.1 master.example m1 master\n" in hosts
    known = machine.sh("cat /etc/openquake/ssh/known_hosts")
    assert "[192.0.2.2]:2222,[w1]:2222 ssh-rsa AAAA" in known
    # and so goes ssh: to the port of Ansible, from the address that the workers let in
    for name in "192.0.2.2", "w1":
        client = machine.sh(f"ssh -G openquake@{name}", "openquake").splitlines()
        assert {"port 2222", "bindaddress 192.0.2.1"} <= {*client}, client
    for name in names.values():
        attacks.tried(successes=bool(re.search(rf"^192\.0\.2\.2.*\b{name}\b", hosts, re.M)))
        attacks.tried(successes=name in known)
