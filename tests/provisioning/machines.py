"""Several spare machines as a cluster: Ansible reaches each by an ssh that enters it.

One that is cut off does not answer to it any more; its services run on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.provisioning.machine import ENTER, PATH, Machine
from tests.provisioning.roles import PLAIN, ROOT

#: the last two arguments are the host and the command
SSH = """\
#!/bin/bash
host=${@: -2:1} command=${@: -1}
read -r inside <"$(dirname "$0")/$host.pid" || exit 255
exec nsenter --target="$inside" ENTER -- env -i PATH=PATH HOME=/root LC_ALL=C.UTF-8 \\
    sh -c "umask 077; $command"
""".replace("ENTER", " ".join(ENTER)).replace("=PATH", f"={PATH}")
INVENTORY = """\
[master]
m1 openquake_address=192.0.2.1
[workers]
w1 openquake_address=192.0.2.2
w2 openquake_address=192.0.2.3
[all:vars]
ansible_become=false
ansible_python_interpreter=/usr/bin/python3
ansible_ssh_transfer_method=piped
"""


class Machines:
    """m1 is the master, w1 and w2 are workers.

    :param folder: an empty directory
    :param settings: variables of the inventory
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = settings
        self.all: dict[str, Machine] = {}
        for number, name in enumerate(("m1", "w1", "w2"), start=1):
            (folder / name).mkdir()
            self.all[name] = Machine(folder / name, services=True, address=f"192.0.2.{number}")
            self.all[name].sh(f"hostname {name}")
            self.join(name)
        self.ssh = folder / "ssh"
        self.ssh.write_text(SSH)
        self.ssh.chmod(0o755)
        (folder / "inventory.ini").write_text(INVENTORY)

    def __getitem__(self, name: str) -> Machine:
        return self.all[name]

    def connect(self) -> None:
        """Let the machines reach each other: m1 has a bridge to which the others are wired."""
        switch = self.all["m1"]
        switch.sh("ip link add wire type bridge; ip link set wire up")
        for number, (name, machine) in enumerate(self.all.items(), start=1):
            if machine is not switch:
                ends = ["name", "wire", "netns", machine.inside, "type", "veth"]
                ends += ["peer", "name", name, "netns", switch.inside]
                subprocess.run(["ip", "link", "add", *ends], check=True)
                switch.sh(f"ip link set {name} master wire up")
            address = f"192.0.2.{number}/24"
            machine.sh(
                f"ip address del {address} dev lo; ip address add {address} dev wire;"
                "ip link set wire up"
            )

    def join(self, name: str) -> None:
        """Let a machine answer."""
        (self.folder / f"{name}.pid").write_text(f"{self.all[name].inside}\n")

    def cut(self, name: str) -> None:
        """Let a machine answer no longer."""
        (self.folder / f"{name}.pid").unlink()

    def sh(self, script: str, *names: str) -> dict[str, str]:
        """Run a shell script as root on machines, all if none is named; return their outputs."""
        return {name: self.all[name].sh(script) for name in names or self.all}

    def start(self, playbook: str, *args: str) -> subprocess.Popen[str]:
        """Start a playbook of the repository."""
        (self.folder / "settings.yml").write_text(yaml.safe_dump(self.settings))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = os.environ | PLAIN | {"ANSIBLE_SSH_EXECUTABLE": str(self.ssh), "PATH": path}
        env["ANSIBLE_CACHE_PLUGIN_CONNECTION"] = str(self.folder / "facts")
        return subprocess.Popen(
            [
                "ansible-playbook",
                f"--inventory={self.folder / 'inventory.ini'}",
                f"--extra-vars=@{self.folder / 'settings.yml'}",
                *args,
                playbook,
            ],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def play(self, playbook: str, *args: str) -> subprocess.CompletedProcess[str]:
        """Play a playbook of the repository."""
        process = self.start(playbook, *args)
        output, _ = process.communicate()
        return subprocess.CompletedProcess([playbook, *args], process.returncode, output)

    def close(self) -> None:
        for machine in self.all.values():
            machine.close()
