"""One host: a user-mode kernel with its disks; it starts, loses its power, and is looked at.

What the kernel, systemd and the journal say on the console is kept, of all boots, in
``<directory>/<name>.console``. The harness looks as root, by a key of its own; Ansible comes in as
an administrator does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.leftovers import wait_for
from tests.system import image, kernel, network, registries

#: a boot takes 10 s on an idle machine
BOOT_LIMIT_S = 240.0
COMMAND_LIMIT_S = 120.0
#: directory of the kernels' sockets and pids; a short path, and gone after a boot of this machine
UML = network.STATE / "uml"
#: a question to it: magic, version, bytes of the command, the command (mconsole_user.h of Linux)
MCONSOLE, MCONSOLE_MAGIC = struct.Struct("=III512s"), 0xCAFEBABE
FSTAB = """\
/dev/ubda / ext4 errors=remount-ro 0 1
"""
SSH_CONFIG = """\
Host {name} {address}
  HostName {address}
  HostKeyAlias {name}
  UserKnownHostsFile {directory}/known_hosts
  IdentityFile {directory}/observer_key
  IdentitiesOnly yes
  BatchMode yes
  ConnectTimeout 20
  ServerAliveInterval 15
"""


class HostError(Exception):
    """A host did not do what it was told; the message has the command and what it said."""


@dataclass
class Host:
    """
    :param name: also its name in the inventory
    :param address: in the network of the run
    :param memory_mb: of the machine
    :param directory: of the run, which has ``observer_key`` and gets disks and console
    :param suite: release of Debian
    :param with_swap: a disk of swap with its line in fstab, as installers make it
    """

    name: str
    address: str
    memory_mb: int
    directory: Path
    suite: str
    with_swap: bool = True
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    boots: int = field(default=0, init=False)

    @property
    def disk(self) -> Path:
        return self.directory / f"{self.name}.disk"

    @property
    def swap_disk(self) -> Path:
        return self.directory / f"{self.name}.swap"

    @property
    def console(self) -> Path:
        return self.directory / f"{self.name}.console"

    # ---- before it runs

    def install(self) -> None:
        """Make its disks, if they are not there, and let ssh know it."""
        with (self.directory / "ssh_config").open("a") as config:
            config.write(
                SSH_CONFIG.format(name=self.name, address=self.address, directory=self.directory)
            )
        key = self.directory / f"{self.name}.host_key"
        if not self.disk.exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", str(key))
            files = self._files()
            if self.with_swap:
                name = str(uuid.uuid4())
                image.swap(self.swap_disk, name)
                files["/etc/fstab"] += f"UUID={name} none swap sw 0 0\n"
            image.disk(self.disk, self.suite, files)
        with (self.directory / "known_hosts").open("a") as known:
            known.write(f"{self.name} {key.with_suffix('.host_key.pub').read_text()}")

    def _files(self) -> dict[str, str]:
        """What an installer asks for, and the keys of the harness."""
        observer = (self.directory / "observer_key.pub").read_text()
        key = self.directory / f"{self.name}.host_key"
        return {
            "/etc/hostname": f"{self.name}\n",
            "/etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n",
            "/etc/fstab": FSTAB,
            "/etc/resolv.conf": registries.resolver(),
            "/etc/systemd/network/lan.network": (
                f"[Match]\nName=eth0\n[Network]\nAddress={self.address}/24\n"
                f"Gateway={network.GATEWAY}\n"
            ),
            "/etc/ssh/ssh_host_ed25519_key": key.read_text(),
            "/etc/ssh/ssh_host_ed25519_key.pub": key.with_suffix(".host_key.pub").read_text(),
            "/root/.ssh/authorized_keys": observer,
            f"/home/{image.ADMIN}/.ssh/authorized_keys": observer,
        }

    # ---- power

    def start(self) -> None:
        """Switch it on; ``wait_up`` waits for it."""
        assert self.process is None, f"{self.name} is on"
        self.boots += 1
        UML.mkdir(parents=True, exist_ok=True)
        number = int(self.address.rpartition(".")[2])
        arguments = [
            f"umid={self.name}", f"uml_dir={UML}", f"ubda={self.disk}",
            *([f"ubdb={self.swap_disk}"] if self.with_swap else []),
            "root=/dev/ubda", "rw", f"mem={self.memory_mb}M",
            f"eth0=tuntap,{network.tap(self.name)},02:00:00:00:00:{number:02x}",
            "con=null", "con0=null,fd:1", "con1=null", "ssl=null",
            "systemd.journald.forward_to_console=1", "systemd.journald.max_level_console=info",
        ]  # fmt: skip
        with self.console.open("ab") as console:
            moment = time.strftime("%H:%M:%S")
            console.write(f"\n=== {self.name}, boot {self.boots}, {moment}\n".encode())
            console.flush()
            self.process = subprocess.Popen(
                (kernel.program(), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def wait_up(self, limit_s: float = BOOT_LIMIT_S) -> None:
        """Wait until systemd has started everything and ssh answers.

        :raises HostError: with the end of the console, if that takes longer
        """
        if not wait_for(lambda: self.reaches(22), limit_s, 0.5):
            raise HostError(f"{self.name} does not answer to ssh\n{self.tail()}")
        self.run("systemctl is-system-running --wait", limit_s=limit_s, check=False)

    def cut(self) -> None:
        """Cut the power: SIGKILL of the kernel with all its processes."""
        assert self.process is not None, f"{self.name} is off"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.process = None
        # a helper of the kernel, which shares its files, may end later than it
        assert wait_for(self._disk_is_free, 60, 0.1), f"something uses {self.disk}"

    def _disk_is_free(self) -> bool:
        with self.disk.open("r+b") as disk:
            try:
                fcntl.lockf(disk, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def reboot(self) -> None:
        """As an administrator does; returns when it is up again."""
        before = self.boot_id()
        self.run("systemctl reboot", check=False)
        if not wait_for(lambda: self.boot_id() not in ("", before), BOOT_LIMIT_S, 1):
            hangs = "" if self.kernel_answers() else ": its kernel hangs, whatever runs on it"
            raise HostError(f"{self.name} does not come back{hangs}\n{self.tail()}")
        self.boots += 1
        self.wait_up()

    def kernel_answers(self) -> bool:
        """Whether the kernel itself is alive, by its management console.

        User-mode kernels were seen to fault without an end at a page of their own, which no program
        of the host can make them do.
        """
        with (
            tempfile.TemporaryDirectory() as directory,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as console,
        ):
            console.bind(f"{directory}/answer")
            console.settimeout(COMMAND_LIMIT_S / 10)
            question = MCONSOLE.pack(MCONSOLE_MAGIC, 2, len(b"version"), b"version")
            try:
                console.sendto(question, str(UML / self.name / "mconsole"))
                return bool(console.recv(4096))
            except OSError:
                return False

    def shut_down(self) -> None:
        """End it in good order, or by a power cut if that takes too long."""
        if self.process is None:
            return
        with contextlib.suppress(HostError, subprocess.TimeoutExpired):
            self.run("systemctl poweroff", limit_s=20, check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.cut()

    def boot_id(self) -> str:
        """Of the kernel that runs; empty if there is no answer."""
        if not self.reaches(22):
            return ""
        return self.run("cat /proc/sys/kernel/random/boot_id", check=False).stdout.strip()

    # ---- looking

    def reaches(self, port: int, limit_s: float = 2.0) -> bool:
        """Does this machine get through to a port of the host?"""
        with contextlib.suppress(OSError):
            socket.create_connection((self.address, port), limit_s).close()
            return True
        return False

    def ssh(self, command: str, user: str = "root") -> list[str]:
        """The command line of a command on the host.

        :param command: for the shell there
        """
        return [
            "ssh",
            "-F",
            str(self.directory / "ssh_config"),
            f"{user}@{self.name}",
            "--",
            command,
        ]

    def run(
        self,
        command: str,
        user: str = "root",
        text: str = "",
        limit_s: float = COMMAND_LIMIT_S,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end.

        :param text: its standard input
        :param check: whether an exit code other than 0 is an error
        :raises HostError: with what it said
        """
        done = subprocess.run(
            self.ssh(command, user), input=text, capture_output=True, text=True, timeout=limit_s
        )
        if check and done.returncode:
            raise HostError(
                f"{user}@{self.name}: {command}: exit code {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done

    def out(self, command: str, user: str = "root", limit_s: float = COMMAND_LIMIT_S) -> str:
        """What a command prints, without the last line's end.

        :raises HostError: if its exit code is not 0
        """
        return self.run(command, user, limit_s=limit_s).stdout.rstrip("\n")

    def tail(self, lines: int = 40) -> str:
        """The end of the console."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def journal(self, lines: int = 60) -> str:
        """What the cluster's units have said since the last boot, and all warnings."""
        if self.process is None or not self.reaches(22):
            return f"{self.name} does not answer; its console ends with\n{self.tail()}"
        units = " ".join(f"-u '{unit}'" for unit in ("openquake*", "nfs*", "opt-*", "nftables*"))
        command = (
            f"systemctl --failed --no-legend; journalctl -b --no-pager -n {lines} {units};"
            f" echo '-- warnings'; journalctl -b --no-pager -n {lines // 3} -p warning"
        )
        try:
            return self.run(command, limit_s=60, check=False).stdout
        except subprocess.TimeoutExpired:
            return f"{self.name} says nothing within a minute; console:\n{self.tail()}"


def remove_dead() -> None:
    """End the kernels that a dead run has left: those with its directory on their command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"uml_dir={UML}".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
