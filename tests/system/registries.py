"""From where the hosts get their packages: as this machine gets its own.

The mirrors of Debian, proxies, the settings of pip and certificates that an administrator has added
are read from this machine at run time and written to the hosts. Nothing of it is in this project.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

#: where an administrator puts certificates of his own
CERTIFICATES = Path("/usr/local/share/ca-certificates")
#: settings of pip that mean the same on another host
PIP_SETTINGS = ("cert", "index-url", "extra-index-url", "proxy", "timeout", "trusted-host")
RESOLVED = Path("/run/systemd/resolve/resolv.conf")


def apt_sources(suite: str) -> str:
    """Lines for ``sources.list`` of a suite: the mirrors of this machine, which may have another.

    :param suite: code name of a release
    """
    own = platform.freedesktop_os_release()["VERSION_CODENAME"]
    wanted = ("Created-By: Packages", "Origin: Debian", "Component: main")
    found = _output("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", *wanted)
    lines = dict.fromkeys(found.replace(f" {own}", f" {suite}").splitlines())
    return "".join(f"deb {line} main\n" for line in lines)


def apt_options() -> str:
    """The proxies and time limits of apt, as lines for a file in ``apt.conf.d``."""
    lines = _output("apt-config", "dump").splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("Acquire::http"))


def certificates() -> list[Path]:
    """The certificates that an administrator has added to this machine."""
    return sorted(CERTIFICATES.glob("**/*.crt"))


def pip_settings() -> str:
    """The text of a ``pip.conf`` with what pip has here and that can hold elsewhere.

    Directories of this machine are left out: the hosts do not have them.
    """
    found = {}
    for line in _output("python3", "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        words = [word for word in value.strip("'\"").split() if not word.startswith("file:")]
        if section in ("global", "install", ":env:") and key in PIP_SETTINGS and words:
            found[key] = " ".join(words)
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items())


def resolver() -> str:
    """The text of a ``resolv.conf`` that works from another host."""
    path = RESOLVED if RESOLVED.exists() else Path("/etc/resolv.conf")
    return path.read_text()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
