"""``python -m tests.system``: make what is missing, then go through the rows; see README.md.

Arguments are those of pytest. Exit code 77: left out here, with the reason in one line.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system import browser, image, kernel, playbooks, store

HERE = Path(__file__).parent
CANNOT_RUN = 77
PACKAGES = (
    *kernel.PACKAGES,
    *image.PACKAGES,
    *browser.PACKAGES,
    "iproute2",
    "nftables",
    "openssh-client",
)


def unavailable() -> str:
    """Say why there can be no hosts here; empty when there can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the hosts are user-mode kernels, for Linux on x86-64"
    if os.geteuid() != 0:
        return "a bridge, masquerading and the images of the hosts need root"
    if not shutil.which("apt-get"):
        return "kernel and images are made from Debian packages; apt-get is missing"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    if not playbooks.ANSIBLE.exists():
        return "there is no Ansible; run make .venv-provision"
    return ""


def install() -> None:
    """Install the packages of Debian that are missing."""
    shown = subprocess.run(
        ("dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *PACKAGES),
        capture_output=True,
        text=True,
    ).stdout
    installed = {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}
    if missing := [name for name in PACKAGES if name not in installed]:
        print(f"installing {' '.join(missing)}", flush=True)
        # another program may be at it
        options = ("--quiet=2", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600")
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        quiet = functools.partial(subprocess.run, env=env, stdout=subprocess.DEVNULL)
        quiet(("apt-get", "update"))  # lists that are there may do
        quiet(("apt-get", "install", *options, *missing), check=True)


def main() -> int:
    if reason := unavailable():
        print(f"system tests: left out: {reason}", file=sys.stderr)
        return CANNOT_RUN
    with (store.directory() / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("system tests: left out: another run is under way here", file=sys.stderr)
            return CANNOT_RUN
        install()
        kernel.program()
        image.base(image.wanted())
        os.environ["OQ_SYSTEM_STARTED"] = "1"
        return pytest.main(["-p", "no:cacheprovider", str(HERE), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
