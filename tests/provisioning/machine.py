"""A spare machine: this one's files under an overlay, for roles to change as root.

What is changed there is gone with it: namespaces of its own for mounts, processes, network and
names, and as root directory a copy-on-write view of this machine's, with the packages that the
roles install. With ``services`` systemd runs in it, with no units but those that a test or a role
makes. As on a hardened host, nothing can be executed in its /tmp, and roles are played under a
umask that lets nobody else read what they make without a mode. Needs root and overlayfs, and
systemd needs the second version of cgroups.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.leftovers import wait_for
from tests.provisioning.packages import files_of_the_roles
from tests.provisioning.roles import ROOT

#: it ends with the tests, however these end
UNSHARE = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child",
           "--net", "--uts", "--ipc")  # fmt: skip
#: $1: an empty directory, $2: its cgroup for systemd or nothing, $3: an address or nothing,
#: $4: files that it has besides, $5...: directories that are seen as they are
MAKE = """
set -e
spare=$1 cgroup=$2 address=$3 files=$4
shift 4
mount -t tmpfs spare "$spare"
mkdir "$spare/work" "$spare/root"
cp -a "$files" "$spare/changed"
root=$spare/root
mount -t overlay -o "lowerdir=/,upperdir=$spare/changed,workdir=$spare/work" spare "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs spare "$root/dev"
for node in null zero full random urandom tty; do
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir -m 1777 "$root/dev/shm"
mkdir "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 spare "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs spare "$root/run"
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev spare "$root/tmp"
for seen do
    mkdir -p "$root$seen"
    mount --bind "$seen" "$root$seen"
    mount -o remount,bind,ro "$root$seen"
done
ip link set lo up
[ -z "$address" ] || ip address add "$address/24" dev lo
# made: nobody enters the root of before
[ -n "$cgroup" ] || exec chroot "$root" sh -c "echo made; exec sleep infinity"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mkdir "$root/sys/fs/cgroup/$cgroup"
echo $$ >"$root/sys/fs/cgroup/$cgroup/cgroup.procs"
umount "$root/sys/fs/cgroup"
printf '[Unit]\nRequires=dbus.socket\nAfter=dbus.socket\n' >"$root/etc/systemd/system/spare.target"
exec unshare --cgroup sh -c '
    mount -t cgroup2 cgroup2 "$0/sys/fs/cgroup"
    exec chroot "$0" sh -c "echo made; exec env container=spare /lib/systemd/systemd \
        --unit=spare.target --show-status=0 </dev/null >/dev/null 2>&1"' "$root"
"""
#: $1: an empty directory, $2: a cgroup that is to go
REMOVE = """
mount -t cgroup2 cgroup2 "$1"
find "$1/$2" -depth -type d -exec rmdir {} +
"""
#: the namespaces that are entered
ENTER = ("--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--root", "--wd")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
HARDENED = ("sh", "-c", 'umask 077; exec "$@"', "hardened")
#: stands in for a service that says when it is ready, and then that it lives
NOTIFIES = """\
#!/usr/bin/python3
import os, socket, time
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1))
    notify.send(b"READY=1")
    while True:
        time.sleep(5)
        notify.send(b"WATCHDOG=1")
"""
INVENTORY = """\
[master]
m1 openquake_address=192.0.2.1
[workers]
w1 openquake_address=192.0.2.2
[all:vars]
ansible_connection=local
ansible_python_interpreter=/usr/bin/python3
"""


class Machine:
    """A spare machine that uses ``folder``, an empty directory, until it is closed.

    :param services: whether systemd runs there
    :param address: one that it has
    """

    def __init__(self, folder: Path, services: bool = False, address: str = "") -> None:
        if os.geteuid() != 0:
            pytest.skip("a spare machine needs root")
        self.folder = folder
        self.cgroup = f"spare-{os.getpid()}-{folder.name}" if services else ""
        files = files_of_the_roles()
        seen = sorted({str(ROOT), sys.prefix, sys.base_prefix, str(Path(sys.prefix).resolve())})
        self.holder = subprocess.Popen(
            [*UNSHARE, "sh", "-c", MAKE, "spare", folder, self.cgroup, address, files, *seen],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        assert self.holder.stderr is not None
        if self.holder.stdout.readline() != "made\n":
            raise OSError(self.holder.stderr.read())
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        self.inside = children.read_text().strip()
        if services:
            self.wait_for_services()

    def wait_for_services(self) -> None:
        wait_for(lambda: self.run("systemctl", "is-system-running").stdout == "running\n", 30)

    def close(self) -> None:
        os.kill(int(self.inside), signal.SIGKILL)
        self.holder.communicate()
        if self.cgroup:
            mounted = ["unshare", "--mount", "sh", "-c", REMOVE, "remove"]
            mounted += [str(self.folder), self.cgroup]
            assert wait_for(lambda: subprocess.run(mounted, capture_output=True).returncode == 0)

    def _enter(self, command: tuple[str, ...]) -> list[str]:
        return ["nsenter", f"--target={self.inside}", *ENTER, "--", *command]

    def run(
        self, *command: str, stdin: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there as root, in the root directory."""
        return subprocess.run(
            self._enter(command),
            input=stdin,
            env={**os.environ, "PATH": PATH, **(env or {})},
            capture_output=True,
            text=True,
        )

    def sh(self, script: str, user: str = "root", stdin: str | None = None) -> str:
        """Run a shell script there as somebody; return its output, raise OSError if it fails."""
        done = self.run("runuser", f"--user={user}", "--", "sh", "-euc", script, stdin=stdin)
        if done.returncode:
            raise OSError(f"{script}: {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def can(self, script: str, user: str) -> bool:
        """Say whether somebody can do what a shell script says."""
        try:
            self.sh(script, user)
        except OSError:
            return False
        return True

    @contextmanager
    def serving(self, *command: str) -> Iterator[None]:
        """Have a program run there as root, from its first line of output on."""
        with subprocess.Popen(
            self._enter(command),
            env=os.environ | {"PATH": PATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield
            finally:
                process.kill()

    def play(
        self, *tasks: dict[str, Any], host: str = "m1", args: tuple[str, ...] = (), **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """Play tasks on a host of the inventory, which is this machine, as an administrator."""
        play = {
            "hosts": host,
            "gather_facts": False,
            "pre_tasks": [{"ansible.builtin.setup": {"gather_subset": ["min"]}}],
            "roles": ["openquake"],
            "vars": settings,
            "tasks": list(tasks),
        }
        for name, text in ("inventory.ini", INVENTORY), ("play.yml", yaml.safe_dump([play])):
            self.sh(f"cat >/tmp/{name}", stdin=text)
        env = {
            "PATH": f"{Path(sys.executable).parent}:{PATH}",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
            "ANSIBLE_CACHE_PLUGIN_CONNECTION": "/tmp/facts",
            "ANSIBLE_NOCOLOR": "1",
            "HOME": "/root",
        }
        inventory = ("-i", "/tmp/inventory.ini")
        return self.run(*HARDENED, "ansible-playbook", *inventory, *args, "/tmp/play.yml", env=env)


def role(name: str, tasks_from: str = "main") -> dict[str, Any]:
    """Return the task that plays a role, or a part of it."""
    return {
        "name": f"{name} {tasks_from}",
        "ansible.builtin.include_role": {"name": name, "tasks_from": f"{tasks_from}.yml"},
    }
