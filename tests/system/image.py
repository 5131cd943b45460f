"""The disks of the hosts: a bare Debian as an installer leaves it, and what is a host's own.

The image, made once for each release, has systemd, sshd, sudo, Python and one administrator, who
may use sudo with a password; nothing that the roles are to install. A host's disk is a copy of it,
with name, address, keys and file systems written into it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.system import registries, store

PACKAGES = ("mmdebstrap", "debian-archive-keyring", "e2fsprogs")
#: for the role's user Ansible, who is asked for it by sudo; reached by nobody but this machine
ADMIN, ADMIN_UID, PASSWORD = "admin", 1000, "a word for sudo"
#: of the file system; only what is written takes space here
DISK_BYTES, SWAP_BYTES = 24 << 30, 512 << 20
INSTALLED = (
    "systemd,systemd-sysv,libpam-systemd,udev,dbus,openssh-server,sudo,python3,python3-apt,"
    "iproute2,procps,ca-certificates"
)
#: the package lists stay, as an installer leaves them
OPTIONS = ("--quiet", "--variant=minbase", "--skip=cleanup/apt/lists", f"--include={INSTALLED}")
#: run with the root directory of the image in ``$1``
CUSTOM = (
    'chroot "$1" useradd --create-home --shell /bin/bash --uid {uid} --groups sudo {admin}',
    'echo {admin}:{password} | chroot "$1" chpasswd',
    # two hosts must have neither the same keys nor the same identity
    'rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/machine-id && touch "$1"/etc/machine-id',
    'chroot "$1" systemctl --quiet enable systemd-networkd',
    'install -d -m 700 "$1"/root/.ssh',
    'install -d -m 700 -o {uid} -g {uid} "$1"/home/{admin}/.ssh',
    'chroot "$1" update-ca-certificates >/dev/null 2>&1',
)


def wanted() -> str:
    """The release of Debian that this run is for."""
    return os.environ.get("OQ_SYSTEM_SUITE") or "bookworm"


def base(suite: str) -> Path:
    """The image of a release of Debian; made if the store does not have it, in two minutes.

    :param suite: its code name
    """
    sources, options, pip = (
        registries.apt_sources(suite),
        registries.apt_options(),
        registries.pip_settings(),
    )
    certificates = registries.certificates()
    custom = [
        line.format(uid=ADMIN_UID, admin=ADMIN, password=shlex.quote(PASSWORD)) for line in CUSTOM
    ]

    def make(target: Path) -> None:
        print(f"making the image of {suite}, about two minutes", flush=True)
        with tempfile.TemporaryDirectory(prefix="oq-system-image-") as scratch:
            (given := Path(scratch, "given")).mkdir()
            (given / "apt.conf").write_text(options)
            (given / "pip.conf").write_text(pip)
            copies = [f"copy-in {given}/pip.conf /etc"]
            copies += [f"copy-in {path} {registries.CERTIFICATES}" for path in certificates]
            root = Path(scratch, "root")
            subprocess.run(
                (
                    "mmdebstrap", *OPTIONS, f"--aptopt={given}/apt.conf",
                    *(f"--customize-hook={hook}" for hook in (*copies, *custom)),
                    suite, root, "-",
                ),
                input=sources, text=True, check=True,
            )  # fmt: skip
            target.touch()
            with target.open("r+b") as image:
                image.truncate(DISK_BYTES)
            subprocess.run(("mkfs.ext4", "-q", "-F", "-d", root, target), check=True)

    recipe: list[str | bytes] = [sources, options, pip]
    recipe += [path.read_bytes() for path in certificates]
    name = store.digest(*OPTIONS, *custom, str(DISK_BYTES), *recipe)
    return store.kept(f"debian-{suite}-{name}", make)


def disk(target: Path, suite: str, files: Mapping[str, str]) -> None:
    """Make the disk of a host.

    :param target: file that does not exist
    :param suite: release of Debian
    :param files: texts by path; what stands there already is replaced. Those in the
        administrator's home are his, the others root's; all are readable by all, but for keys
    """
    subprocess.run(("cp", "--sparse=always", base(suite), target), check=True)
    commands = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (path, text) in enumerate(files.items()):
            local = Path(scratch, str(number))
            local.write_text(text)
            local.chmod(0o600 if path.endswith("_key") else 0o644)
            commands += [f"rm {path}", f"write {local} {path}"]
            if path.startswith(f"/home/{ADMIN}/"):
                fields = {"uid": ADMIN_UID, "gid": ADMIN_UID}
                commands += [f"sif {path} {name} {value}" for name, value in fields.items()]
        script = Path(scratch, "commands")
        script.write_text("\n".join(commands))
        subprocess.run(("debugfs", "-w", "-f", script, target), check=True, capture_output=True)


def swap(target: Path, uuid: str) -> None:
    """Make a disk of swap space.

    :param target: file that does not exist
    :param uuid: by which fstab names it
    """
    with target.open("wb") as image:
        image.truncate(SWAP_BYTES)
    subprocess.run(("mkswap", "--quiet", "--uuid", uuid, target), check=True, capture_output=True)
