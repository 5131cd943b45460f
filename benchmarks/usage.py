"""What the processes of a calculation use: CPU time, peak memory, bytes on the wire."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.netns import NAMESPACES, Net

#: seconds between two looks at the processes; what one does after the last look is not seen
INTERVAL_S = 0.25
#: what the command line of a process has when it starts; most of them rename themselves later
ROLES = {
    "oq_runtime.engine.job": "engine",
    "openquake.commands": "engine",
    "oq_runtime.session.broker": "broker",
    "oq_runtime.node.daemon": "agent",
    "openquake.baselib.workerpool": "agent",  # the engine's own kind of it
}
PARENTS = ("agent", "engine", "worker")


@dataclass
class Used:
    role: str
    cpu_s: float = 0.0
    peak_bytes: int = 0


class Usage:
    """Looks at the processes on the hosts until it is closed.

    Roles: ``engine``, ``broker``, ``agent`` and ``worker``, which is anything below the others.
    """

    def __init__(self, net: Net, ours: tuple[str, ...]) -> None:
        self.net = net
        self.nodes = ours
        self.spaces = {(NAMESPACES / net.namespace(host)).stat().st_ino for host in net.hosts}
        self.used: dict[int, Used] = {}
        self.wire_before = self._wire_bytes()
        self.wire_bytes = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Usage:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self.wire_bytes = self._wire_bytes() - self.wire_before

    def cpu_s(self, *roles: str) -> float:
        return sum(used.cpu_s for used in self.used.values() if used.role in roles)

    def peak_gib(self, role: str) -> float:
        """The most memory that one process of this role has had resident."""
        return max((u.peak_bytes for u in self.used.values() if u.role == role), default=0) / 2**30

    def _wire_bytes(self) -> int:
        """Bytes that the nodes have received and sent."""
        total = 0
        for node in self.nodes:
            argv = ["ip", "-n", self.net.namespace(node), "-s", "-j", "link", "show", "dev", "eth0"]
            [link] = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
            total += sum(link["stats64"][way]["bytes"] for way in ("rx", "tx"))
        return total

    def _watch(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            for pid in psutil.pids():
                # a process may end at any moment
                with contextlib.suppress(OSError, psutil.Error):
                    if os.stat(f"/proc/{pid}/ns/net").st_ino in self.spaces:
                        self._look(pid)

    def _look(self, pid: int) -> None:
        process = psutil.Process(pid)
        if pid not in self.used:
            self.used[pid] = Used(self._role(process))
        used = self.used[pid]
        times = process.cpu_times()
        used.cpu_s = times.user + times.system
        used.peak_bytes = max(used.peak_bytes, peak_bytes(pid))

    def _role(self, process: psutil.Process) -> str:
        line = " ".join(process.cmdline())
        parent = self.used.get(process.ppid())
        if parent and parent.role in PARENTS:
            return "worker"
        return next((role for module, role in ROLES.items() if module in line), "other")


def peak_bytes(pid: int) -> int:
    """The most memory that a living process has had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
