"""Packages of Debian that this machine lacks: fetched once into ``build/``, for spare machines.

Spare machines have no network, so what a role would install has to be there already.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.provisioning.roles import ROOT

FOLDER = ROOT / "build" / "packages"
#: what the roles install on a bare machine, but for the engine's Python and a time service
OF_THE_ROLES = ("acl", "nfs-kernel-server", "nftables", "openssh-client", "sudo")
#: $1: a new directory; $2...: packages, whose files go there. Some have files in /bin, /lib and
#: /sbin, which are links into /usr on a machine.
UNPACK = """
set -e
mkdir -m 0755 "$1"
root=$1
shift
for package do dpkg-deb --extract "$package" "$root"; done
for part in bin lib sbin; do
    [ ! -d "$root/$part" ] || { mkdir -p "$root/usr"; cp -a "$root/$part" "$root/usr"; }
    rm -rf "${root:?}/$part"
done
# its script would make that
[ ! -e "$root/usr/sbin/exportfs" ] || : >"$root/etc/exports"
"""


def download(*names: str) -> Path:
    """Return a directory with packages of the distribution, and what they depend on.

    What is installed on this machine is not among them.
    """
    folder = FOLDER / "-".join(names)
    if not shutil.which("apt-get"):
        pytest.skip("packages of Debian are fetched by apt-get, which is missing")
    if not folder.exists():
        half = folder.with_suffix(".half")
        command = ["apt-get", "-qq", "install", "--download-only", "--no-install-recommends"]
        command += ["--no-upgrade", "--yes", f"-oDir::Cache::archives={half}", *names]
        for _ in range(2):
            shutil.rmtree(half, ignore_errors=True)
            (half / "partial").mkdir(parents=True)
            if subprocess.run(command).returncode == 0:
                break
            subprocess.run(["apt-get", "-qq", "update"])  # the lists are missing, or old
        else:
            pytest.skip(f"apt-get cannot download {' '.join(names)}")
        half.rename(folder)
    return folder


@functools.cache
def files_of_the_roles() -> Path:
    """Return a directory with the files of the packages that the roles install.

    Their scripts have not run: accounts of theirs are missing, and dpkg does not know them.
    """
    packages = download(*OF_THE_ROLES)
    root = packages / "files"
    if not root.exists():
        half = root.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        command = ["sh", "-c", UNPACK, "unpack", half, *sorted(packages.glob("*.deb"))]
        subprocess.run(command, check=True)
        half.rename(root)
    return root


def program_of_the_roles(name: str) -> list[str]:
    """Return the beginning of a command line that runs a program of those packages here."""
    if shutil.which(name):
        return [name]
    files = files_of_the_roles()
    libraries = {str(path.parent) for path in files.glob("usr/lib/**/*.so*")}
    [program] = files.glob(f"usr/*bin/{name}")
    return ["env", f"LD_LIBRARY_PATH={':'.join(sorted(libraries))}", str(program)]
