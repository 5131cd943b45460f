"""The kernel of the hosts: Debian's own source of Linux, built as an ordinary program.

A user-mode kernel (``ARCH=um``) is a Linux that runs as a process of this machine: real NFS, real
nftables, real swap, and a power cut is a SIGKILL. Debian's package user-mode-linux has no nftables
for the family ``inet``; the options of ours stand in ``kernel.config``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.system import store

OPTIONS = Path(__file__).with_name("kernel.config")
PACKAGE = "linux-source-6.1"
PACKAGES = (PACKAGE, "bc", "bison", "flex", "gcc", "libelf-dev", "libssl-dev", "make", "xz-utils")
RECIPE = (
    "make -s ARCH=um defconfig",
    "scripts/kconfig/merge_config.sh -m -O . .config {options} >merged",
    "make -s ARCH=um olddefconfig",
    "make -s ARCH=um -j{jobs} linux",
)


def program() -> Path:
    """The kernel, an executable; built if the store does not have it.

    That takes about fifteen minutes of two free cores, and 2 GB in the temporary directory.
    """
    version = subprocess.run(
        ("dpkg-query", "--show", "--showformat=${Version}", PACKAGE),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return store.kept(
        f"linux-{version}-{store.digest(OPTIONS.read_bytes(), *RECIPE)}",
        build,
    )


def build(target: Path) -> None:
    """Unpack the source, set the options, build.

    :raises RuntimeError: if the source does not know an option of ours, or leaves it out
    """
    print(f"building {target.stem}, about fifteen minutes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="oq-system-kernel-") as scratch:
        subprocess.run(
            ("tar", "--strip-components=1", "-xf", f"/usr/src/{PACKAGE}.tar.xz"),
            cwd=scratch,
            check=True,
        )
        for command in RECIPE:
            if "linux" in command:
                check_options(Path(scratch, ".config").read_text())
            subprocess.run(
                command.format(options=OPTIONS, jobs=os.cpu_count()),
                shell=True,  # our own text, without any input
                cwd=scratch,
                check=True,
            )
        subprocess.run(("strip", "-o", target, "linux"), cwd=scratch, check=True)


def check_options(config: str) -> None:
    """Compare the configuration with the options asked for.

    :param config: text of ``.config``, after the defaults were filled in
    :raises RuntimeError: naming the options that are not as asked for
    """
    wanted = [line for line in OPTIONS.read_text().splitlines() if line.startswith("CONFIG_")]
    have = set(config.splitlines())
    missing = [
        option
        for option in wanted
        if option not in have and f"# {option.removesuffix('=n')} is not set" not in have
    ]
    if missing:
        raise RuntimeError(f"the kernel's source does not take {', '.join(missing)}")


if __name__ == "__main__":
    print(program())
