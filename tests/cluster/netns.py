"""Hosts as network namespaces: real addresses, real TCP, and faults of single hosts.

    master 192.0.2.1   node1 192.0.2.2   node2 192.0.2.3   ...   each its own namespace, eth0
        |                  |                 |
        +------ br0 -------+-----------------+                   in a namespace of its own

Nothing is added to the network of the machine. The hosts share its files, process ids and name,
but neither addresses nor ports. Needs root, iproute2, nsenter and /dev/net/tun.
Not covered: what runs on the hosts (``cluster``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tests.cluster import wire
from tests.cluster.wire import Fault
from tests.leftovers import wait_for

Direction = Literal["in", "out"]

#: TEST-NET-1 of RFC 5737: routed nowhere
NETWORK = "192.0.2"
MASTER = "master"
HOSTS = (MASTER, "node1", "node2", "node3")
NAMESPACES = Path("/run/netns")
#: oqnet-PID-START-NUMBER-HOST: of the creator its pid and start, and the number of its network
_NAME = re.compile(r"oqnet-(\d+)-(\d+)-\d+-\w+")
SWITCH = "switch"
BRIDGE = "br0"
#: an interface name has at most 15 characters, and "port-" is in front of it
HOST_NAME_CHARS = 10
ENTER_LIMIT_S = 10.0
KILL_LIMIT_S = 5.0
COMMAND_LIMIT_S = 30.0
_numbers = itertools.count(1)

_CONNECT = """
import socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])).close()
except ConnectionRefusedError:
    pass
except OSError:
    sys.exit(1)
print(time.monotonic() - start)
"""


class NetError(Exception):
    """A command of the harness failed; the message has the command and its stderr."""


class Process(subprocess.Popen[str]):
    """A process on a host; ``log`` is the file with its stderr."""

    host: str
    log: Path


def unavailable() -> str:
    """Say why there can be no network of namespaces here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for name in ("ip", "ss", "nsenter"):
        if not shutil.which(name):
            return f"no command {name!r} (Debian: apt-get install iproute2 util-linux)"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    try:
        with Net(("probe1", "probe2")) as net:
            if net.connect_s("probe1", "probe2") is None:
                return "the hosts of a probe do not reach one another"
    except (NetError, OSError) as error:
        return f"no network namespaces: {error}"
    return ""


def remove_stale() -> list[str]:
    """Remove namespaces, and the processes in them, whose creator is gone; return their names."""
    stale = []
    for name in _namespaces():
        match = _NAME.fullmatch(name)
        if match and _start_ticks(int(match[1])) != int(match[2]):
            with contextlib.suppress(NetError):  # another run was faster
                _kill(name)
                _command("ip", "netns", "delete", name)
            stale.append(name)
    return stale


class Net:
    """
    A network of hosts; a context manager, after which nothing of it is left.

    :param hosts: names, of at most 10 characters; they get 192.0.2.1, 192.0.2.2 and so on
    :raises NetError: when the machine does not allow it, with the message of ``ip``
    """

    def __init__(self, hosts: Sequence[str] = HOSTS) -> None:
        for host in hosts:
            if not re.fullmatch(rf"\w{{1,{HOST_NAME_CHARS}}}", host) or host == SWITCH:
                raise ValueError(f"{host!r} is no name for a host of this network")
        self.hosts = tuple(hosts)
        self.address = {host: f"{NETWORK}.{n}" for n, host in enumerate(hosts, 1)}
        pid = os.getpid()
        self._prefix = f"oqnet-{pid}-{_start_ticks(pid)}-{next(_numbers)}"
        self._wires: dict[str, subprocess.Popen[str]] = {}
        self._faults: dict[str, dict[Direction, Fault]] = {}
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        remove_stale()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _make(self) -> None:
        switch = self.namespace(SWITCH)
        _command("ip", "netns", "add", switch)
        self._switch("link", "add", "name", BRIDGE, "type", "bridge", "mcast_snooping", "0")
        self._switch("link", "set", "dev", BRIDGE, "up")
        for host in self.hosts:
            name, port = self.namespace(host), _port(host)
            _command("ip", "netns", "add", name)
            self._switch("link", "add", "name", port, "type", "veth", "peer", "name", "eth0",
                         "netns", name)  # fmt: skip
            self._switch("link", "set", "dev", port, "master", BRIDGE, "up")
            _command("ip", "-n", name, "link", "set", "dev", "lo", "up")
            address = f"{self.address[host]}/24"
            _command("ip", "-n", name, "address", "add", address, "dev", "eth0")
            _command("ip", "-n", name, "link", "set", "dev", "eth0", "up")

    def close(self) -> None:
        """Kill every process on the hosts and remove them; may be called again."""
        left = set(_namespaces())
        ours = [name for host in (*self.hosts, SWITCH) if (name := self.namespace(host)) in left]
        for name in ours:
            _kill(name)
        for process in (*self._processes, *self._wires.values()):
            process.wait(KILL_LIMIT_S)
            for stream in (process.stdin, process.stdout):
                if stream:
                    with contextlib.suppress(OSError):  # unsent words to a dead wire
                        stream.close()
        self._wires.clear()
        self._faults.clear()
        self._processes.clear()
        for name in ours:
            _command("ip", "netns", "delete", name)

    def namespace(self, host: str) -> str:
        """The name of the host's namespace, for ``ip -n``."""
        return f"{self._prefix}-{host}"

    # -- processes

    def popen(
        self,
        host: str,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        log: Path | None = None,
        **options: Any,
    ) -> Process:
        """
        Start a process on a host, in a session of its own; its pid is that of the program.

        :param log: file to which stderr is appended, and stdout if ``options`` has no ``stdout``;
                    without it both are discarded
        :param options: as for ``subprocess.Popen``
        """
        with (log or Path(os.devnull)).open("ab") as stream:
            defaults: dict[str, Any] = {
                "stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream, "env": env,
            }  # fmt: skip
            process = Process(
                self._inside(host, argv), text=True, start_new_session=True, **defaults | options
            )
        process.host, process.log = host, log or Path(os.devnull)
        self._processes.append(process)
        # a process that is still on its way in would be missed by kill_all
        if not wait_for(
            lambda: process.poll() is not None or self._has(host, process), ENTER_LIMIT_S
        ):
            process.kill()
            raise NetError(f"{process.args!r} did not enter the namespace of {host}")
        return process

    def _has(self, host: str, process: Process) -> bool:
        with contextlib.suppress(FileNotFoundError):
            space = Path(f"/proc/{process.pid}/ns/net").stat()
            return space.st_ino == (NAMESPACES / self.namespace(host)).stat().st_ino
        return False

    def run(
        self,
        host: str,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        limit_s: float = COMMAND_LIMIT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; raises subprocess.TimeoutExpired."""
        return subprocess.run(
            self._inside(host, argv), env=env, text=True, capture_output=True, timeout=limit_s
        )

    def processes(self, host: str) -> list[int]:
        """The pids on the host, without zombies."""
        return _pids(self.namespace(host))

    def kill_all(self, host: str) -> None:
        """SIGKILL every process on the host: with ``link_down`` before it, a power cut."""
        _kill(self.namespace(host))

    def kill_session(self, process: Process) -> None:
        """SIGKILL the process and what it has started in its own session."""
        for pid in self.processes(process.host):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == process.pid:
                    os.kill(pid, signal.SIGKILL)
        process.wait(KILL_LIMIT_S)

    def listens(self, host: str, port: int) -> bool:
        """Is there a TCP socket that listens on this port of the host?"""
        name = self.namespace(host)
        return bool(_command("ss", "-N", name, "-Hltn", f"sport = :{port}").strip())

    def connect_s(self, host: str, to: str, port: int = 9, limit_s: float = 1.0) -> float | None:
        """
        Connect by TCP from one host to another; one round trip.

        :returns: seconds until the other host answered, be it by refusing (port 9 is nobody's);
                  None when it did not within ``limit_s``
        """
        argv = [sys.executable, "-I", "-S", "-c", _CONNECT]
        done = self.run(host, [*argv, self.address[to], str(port), str(limit_s)])
        if done.stderr:
            raise NetError(f"connection from {host} to {to}: {done.stderr}")
        return float(done.stdout) if done.returncode == 0 else None

    # -- faults

    def link_down(self, host: str) -> None:
        """Pull the host's cable: no carrier at its end, no answer to ARP; nobody gets a RST."""
        self._switch("link", "set", "dev", _port(host), "down")

    def link_up(self, host: str) -> None:
        self._switch("link", "set", "dev", _port(host), "up")

    def drop(self, host: str, direction: Direction) -> None:
        """Drop silently all that goes ``in`` to the host, or all that goes ``out`` of it."""
        self._set_faults(host, (direction,), drop=True)

    def undrop(self, host: str, direction: Direction | None = None) -> None:
        """End ``drop`` in one direction, or in both."""
        if host in self._faults:
            self._set_faults(host, (direction,) if direction else ("in", "out"), drop=False)

    def netem(self, host: str, loss_percent: float = 0.0, delay_ms: float = 0.0) -> None:
        """Lose and delay in each direction: a round trip takes twice ``delay_ms`` longer."""
        self._set_faults(host, ("in", "out"), loss_percent=loss_percent, delay_ms=delay_ms)

    def shorten(self, host: str, most_bytes: int, *directions: Direction) -> None:
        """Lose the frames that are longer, without a word: the sender knows of no smaller MTU."""
        self._set_faults(host, directions or ("in", "out"), most_bytes=most_bytes)

    def clear(self, host: str) -> None:
        """End all faults of the host."""
        process = self._wires.pop(host, None)
        self._faults.pop(host, None)
        self._switch("link", "set", "dev", _port(host), "master", BRIDGE, "up")
        if process:
            process.communicate(timeout=COMMAND_LIMIT_S)  # the end of its stdin ends it
            self._switch("link", "delete", "dev", _bridge(host))

    def _set_faults(self, host: str, directions: Sequence[Direction], **fields: Any) -> None:
        faults = self._faults.setdefault(host, {"in": Fault(), "out": Fault()})
        for direction in directions:
            faults[direction] = dataclasses.replace(faults[direction], **fields)
        if host not in self._wires:
            self._lay_wire(host)
        line = json.dumps({name: dataclasses.asdict(fault) for name, fault in faults.items()})
        self._tell(host, line)
        # with the first word the wire carries: now the host may be plugged into it
        self._switch("link", "set", "dev", _port(host), "master", _bridge(host))

    def _lay_wire(self, host: str) -> None:
        """Put a wire between the bridge and a second bridge, which is the host's own."""
        near, far, bridge = f"near-{host}", f"far-{host}", _bridge(host)
        argv = [sys.executable, "-I", "-S", wire.__file__, near, far]
        self._wires[host] = subprocess.Popen(
            self._inside(SWITCH, argv), text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._hear(host, "made")
        self._switch("link", "add", "name", bridge, "type", "bridge", "mcast_snooping", "0")
        self._switch("link", "set", "dev", bridge, "up")
        self._switch("link", "set", "dev", near, "master", bridge, "up")
        self._switch("link", "set", "dev", far, "master", BRIDGE, "up")

    def _tell(self, host: str, line: str) -> None:
        stdin = self._wires[host].stdin
        assert stdin
        stdin.write(f"{line}\n")
        stdin.flush()
        self._hear(host, "set")

    def _hear(self, host: str, word: str) -> None:
        stdout = self._wires[host].stdout
        assert stdout
        if (heard := stdout.readline().strip()) != word:
            raise NetError(f"the wire of {host} says {heard!r} instead of {word!r}; it is broken")

    def _inside(self, host: str, argv: Sequence[str | Path]) -> list[str]:
        # not ``ip netns exec``: that puts a new /sys over the one with the cgroups
        return ["nsenter", f"--net={NAMESPACES / self.namespace(host)}", "--", *map(str, argv)]

    def _switch(self, *args: str) -> None:
        _command("ip", "-n", self.namespace(SWITCH), *args)


def _port(host: str) -> str:
    return f"port-{host}"


def _bridge(host: str) -> str:
    return f"br-{host}"


def _command(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    if done.returncode:
        raise NetError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _namespaces() -> list[str]:
    return sorted(path.name for path in NAMESPACES.iterdir()) if NAMESPACES.is_dir() else []


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _command("ip", "netns", "pids", namespace).split()]


def _kill(namespace: str) -> None:
    deadline = time.monotonic() + KILL_LIMIT_S
    while pids := _pids(namespace):  # again: a process may have forked meanwhile
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise NetError(f"processes {pids} in {namespace} survive SIGKILL")


def _start_ticks(pid: int) -> int | None:
    """When the process started, in ticks after boot; a pid alone may be somebody else's by now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
