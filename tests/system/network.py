"""The network of the hosts: a bridge of this machine, one tap for each host, and a way out.

    this machine 198.18.15.1   master .10   worker1 .11   worker2 .12   ...   stranger .250
             |                     |            |             |                   |
             +-- oqsys ------------+------------+-------------+-------------------+

The way out is masquerading, for the packages that the hosts install. ``stranger`` is a network
namespace with an address of its own: a host of the same network that is not in the cluster. All
names begin with ``oqsys``, and one run has them at a time; so ``remove`` takes away exactly what is
of this run or of one that is dead.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

#: from RFC 2544, for tests of network devices: routed nowhere
NETWORK = "198.18.15"
PREFIX = "oqsys"
GATEWAY = f"{NETWORK}.1"
STRANGER, STRANGER_ADDRESS = f"{PREFIX}-stranger", f"{NETWORK}.250"
#: what remove needs to know of the machine as it was
STATE = Path("/run/openquake-system-test")
#: what is set on this machine meanwhile; each page of a host can be a mapping of its kernel here,
#: of which 65,530 are too few for a host that compiles: its kernel then kills at random
SETTINGS = {
    Path("/proc/sys/net/ipv4/ip_forward"): "1",
    Path("/proc/sys/vm/max_map_count"): "1048576",
}
MASQUERADE = f"""
table ip {PREFIX} {{
    chain out {{
        type nat hook postrouting priority srcnat
        ip saddr {NETWORK}.0/24 oifname != "{PREFIX}*" masquerade
    }}
}}
"""


def make(taps: list[str]) -> None:
    """Make the network.

    :param taps: names of the hosts, which the taps get
    :raises NetworkError: when the machine does not allow it
    """
    remove()
    STATE.mkdir(mode=0o700, exist_ok=True)
    for setting, value in SETTINGS.items():
        (STATE / setting.name).write_text(setting.read_text())
        setting.write_text(f"{value}\n")
    _run("ip", "link", "add", PREFIX, "type", "bridge", "mcast_snooping", "0")
    _run("ip", "address", "add", f"{GATEWAY}/24", "dev", PREFIX)
    _run("ip", "link", "set", PREFIX, "up")
    for name in taps:
        _run("ip", "tuntap", "add", tap(name), "mode", "tap")
        _run("ip", "link", "set", tap(name), "master", PREFIX, "up")
    _run("ip", "netns", "add", STRANGER)
    _run("ip", "link", "add", tap("stranger"), "master", PREFIX, "type", "veth",
         "peer", "name", "eth0", "netns", STRANGER)  # fmt: skip
    _run("ip", "link", "set", tap("stranger"), "up")
    _run("ip", "-n", STRANGER, "address", "add", f"{STRANGER_ADDRESS}/24", "dev", "eth0")
    _run("ip", "-n", STRANGER, "link", "set", "eth0", "up")
    _run("nft", "-f", "-", text=MASQUERADE)


def remove() -> None:
    """Remove all of it, of whichever run; there may be nothing."""
    for setting in SETTINGS:
        before = STATE / setting.name
        if before.exists():
            setting.write_text(before.read_text())
            before.unlink()
    links = json.loads(_run("ip", "-json", "link", "show"))
    for name in (link["ifname"] for link in links):
        if name == PREFIX or name.startswith(f"{PREFIX}-"):
            _run("ip", "link", "delete", name)
    if f"{STRANGER}" in _run("ip", "netns", "list").split():
        _run("ip", "netns", "delete", STRANGER)
    if f"table ip {PREFIX}" in _run("nft", "list", "tables").splitlines():
        _run("nft", "delete", "table", "ip", PREFIX)


def tap(name: str) -> str:
    """The interface of this machine that is a host's cable; at most 15 characters."""
    return f"{PREFIX}-{name}"


def plug(name: str, *, in_: bool) -> None:
    """Pull the cable of a host, or put it in again."""
    _run("ip", "link", "set", tap(name), "up" if in_ else "down")


def from_stranger(*command: str, text: str | None = None, limit_s: float = 300.0) -> str:
    """Run a command with the stranger's network; returns its output.

    :param text: its standard input
    """
    return _run("ip", "netns", "exec", STRANGER, *command, text=text, limit_s=limit_s)


class NetworkError(Exception):
    """A command failed; the message has the command and what it said."""


def _run(*command: str, text: str | None = None, limit_s: float = 60.0) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=limit_s)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
