"""Settings: openquake.cfg as the engine reads it, without importing the engine.

The sections of the engine keep their meaning: ``[distribution] oq_distribute``, ``[dbserver]``,
``[zworkers]``, ``[directory] shared_dir``. A cluster is configured when ``oq_distribute = zmq`` and
``host_cores`` names another host than this one. Ours are in ``[oq_runtime]``:

======================  =======  ==================================================================
key                     default  meaning
======================  =======  ==================================================================
code                             ``import oq_runtime.activate`` switches the runtime on
cores                   all      slots of the private agent when no cluster is configured
window_mb               1024     MiB of results staged in the broker at a time
beat_s                  2        seconds between two beats of broker and agent, each way
suspect_s               10       seconds of silence after which a node gets no new tasks
lost_s                  30       seconds of silence after which a node is lost: its tasks are run
                                 elsewhere, and it kills the workers of a job it does not hear of
no_nodes_limit_s        60       seconds without any node after which a job fails
memory_soft_percent     80       memory in use on a node, in per cent, above which it gets no tasks
memory_hard_percent     90       the same, above which the newest task is killed
max_attempts            3        attempts of a task that may end with the death of its worker
task_timeout_s          0        seconds after which the worker of a task is killed; 0: never
preload                 *        modules that a node imports once for all workers, separated by
                                 commas; * ``openquake.calculators.base``
speculation             off      on: a task that takes much longer than those of its function did
                                 gets a second attempt on another node, when nothing else waits
======================  =======  ==================================================================

The limits must be the same on all hosts: broker and agents judge each other by them.
"""

from __future__ import annotations

import configparser
import importlib.util
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.errors import ConfigError

#: names the directory of a session that ``oq-run`` has started for its engine process
SESSION_VARIABLE = "OQ_RUNTIME_SESSION"
#: set in worker processes, in which the runtime must not activate itself
WORKER_VARIABLE = "OQ_RUNTIME_WORKER"
#: set in worker processes: the control URL of their agent, and the number of the attempt
NODE_VARIABLE, ATTEMPT_VARIABLE = "OQ_RUNTIME_NODE", "OQ_RUNTIME_ATTEMPT"
#: ``POINT:TASK:ATTEMPTS``: for tests, a worker kills itself at this point of this task
FAULT_VARIABLE = "OQ_RUNTIME_FAULT"
PRELOAD = "openquake.calculators.base"

Sections = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster of ``[dbserver]``, ``[zworkers]`` and ``[directory]``.

    ``hosts`` gives the slots of each worker address (-1: all its cores); ``receiver_ports`` are
    the ports of which each job's broker takes one.
    """

    hosts: dict[str, int]
    ctrl_port: int
    dbserver: str
    receiver_host: str
    receiver_ports: range
    shared_dir: str
    authkey: str = field(repr=False)

    def control_url(self, host: str) -> str:
        return f"tcp://{host}:{self.ctrl_port}"

    @classmethod
    def from_sections(cls, sections: Sections) -> Cluster | None:
        """Return the configured cluster or None; raises ConfigError naming key and remedy."""
        hosts = parse_host_cores(sections.get("zworkers", {}).get("host_cores", ""))
        if not any(not is_loopback(host) for host in hosts):
            return None
        dbserver = sections.get("dbserver", {})
        host = dbserver.get("host") or "127.0.0.1"
        receiver = dbserver.get("receiver_host") or host
        if is_loopback(receiver):
            raise ConfigError(
                f"[dbserver] receiver_host (or host) is {receiver}, which the workers "
                f"{', '.join(hosts)} cannot reach; set it to the master's address in the cluster"
            )
        return cls(
            hosts=hosts,
            ctrl_port=_port("[zworkers] ctrl_port", sections["zworkers"].get("ctrl_port", "1909")),
            dbserver=host,
            receiver_host=receiver,
            receiver_ports=parse_ports(dbserver.get("receiver_ports") or "1912-1920"),
            shared_dir=sections.get("directory", {}).get("shared_dir", ""),
            authkey=dbserver.get("authkey", "changeme"),
        )


@dataclass(frozen=True, slots=True)
class Config:
    """Settings after validation; sizes in bytes."""

    cores: int
    window_bytes: int = 1 << 30
    limits: Limits = DEFAULTS
    cluster: Cluster | None = None

    @classmethod
    def from_sections(cls, sections: Sections) -> Config:
        """Check the settings; raises ConfigError naming the key and the allowed values."""
        own = sections.get("oq_runtime", {})
        distribute = os.environ.get("OQ_DISTRIBUTE") or sections.get("distribution", {}).get(
            "oq_distribute", ""
        )
        return cls(
            cores=check_cores(own.get("cores") or os.environ.get("OQ_NUM_CORES") or "-1"),
            window_bytes=_number(own, "window_mb", 1024, least=1) << 20,
            limits=read_limits(own),
            cluster=Cluster.from_sections(sections) if distribute == "zmq" else None,
        )


def read() -> dict[str, dict[str, str]]:
    """Read the files that the engine reads, in its order: the last one wins.

    Source: ``openquake/baselib/__init__.py`` of engine 3.26. Raises ConfigError for a file that
    cannot be parsed.
    """
    spec = importlib.util.find_spec("openquake")
    places = list(spec.submodule_search_locations or []) if spec else []
    venv = sys.prefix != sys.base_prefix
    site = Path(sys.prefix) if venv else Path("/etc/openquake")
    paths = [Path(place, "engine", "openquake.cfg") for place in places]
    paths += [site / "openquake.cfg", Path.home() / "openquake.cfg"]
    if extra := os.environ.get("OQ_CONFIG_FILE"):
        paths.append(Path(extra).expanduser())
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(paths, encoding="utf8")
    except configparser.Error as exc:
        raise ConfigError(f"openquake.cfg: {exc}".replace("\n", " ")) from exc
    return {section: dict(parser.items(section)) for section in parser.sections()}


def read_preload() -> list[str]:
    """Return the names of the modules that workers are to have before their first task."""
    text = read().get("oq_runtime", {}).get("preload", PRELOAD)
    return [name for name in map(str.strip, text.split(",")) if name]


def parse_host_cores(text: str) -> dict[str, int]:
    """Return the slots of each host of ``host_cores``: ``IP -1, IP N, ...``.

    Raises ConfigError for anything else, naming the entry.
    """
    hosts = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        host, _, cores = entry.partition(" ")
        try:
            number = int(cores or "-1")
        except ValueError:
            number = -2
        if number < -1 or host in hosts:
            what = "named twice" if host in hosts else "not understood"
            raise ConfigError(
                f"[zworkers] host_cores: {entry!r} is {what}; give 'address cores' with cores from "
                "0 up, or -1 for all, separated by commas"
            )
        hosts[host] = number
    return hosts


def parse_ports(text: str) -> range:
    """Return the ports of ``1912-1920``, both ends included; raises ConfigError."""
    first, _, last = text.partition("-")
    name = "[dbserver] receiver_ports"
    ports = range(_port(name, first.strip()), _port(name, (last or first).strip()) + 1)
    if not ports:
        raise ConfigError(f"{name}={text}: the first port is above the last")
    return ports


def read_limits(section: Mapping[str, str]) -> Limits:
    """Return the limits of ``[oq_runtime]``; raises ConfigError naming key and allowed values."""
    found = Limits(
        beat_s=_seconds(section, "beat_s", DEFAULTS.beat_s),
        suspect_s=_seconds(section, "suspect_s", DEFAULTS.suspect_s),
        lost_s=_seconds(section, "lost_s", DEFAULTS.lost_s),
        no_nodes_limit_s=_seconds(section, "no_nodes_limit_s", DEFAULTS.no_nodes_limit_s),
        memory_soft_percent=_number(
            section, "memory_soft_percent", DEFAULTS.memory_soft_percent, least=1
        ),
        memory_hard_percent=_number(
            section, "memory_hard_percent", DEFAULTS.memory_hard_percent, least=1
        ),
        max_attempts=_number(section, "max_attempts", DEFAULTS.max_attempts, least=1),
        task_timeout_s=_seconds(section, "task_timeout_s", DEFAULTS.task_timeout_s, zero=True),
        speculation=_switch(section, "speculation", "off"),
    )
    for low, high in [
        ("beat_s", "suspect_s"),
        ("suspect_s", "lost_s"),
        ("memory_soft_percent", "memory_hard_percent"),
    ]:
        least, value = getattr(found, low), getattr(found, high)
        if value <= least:
            raise ConfigError(f"[oq_runtime] {high}={value:g}: give more than {low}, {least:g}")
    if found.memory_hard_percent > 100:
        percent = found.memory_hard_percent
        raise ConfigError(f"[oq_runtime] memory_hard_percent={percent:g}: give at most 100")
    return found


def is_loopback(host: str) -> bool:
    """Whether a host name or address is, or resolves to, this host's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, family=socket.AF_INET)
    except OSError:
        return host == "localhost"
    return any(ipaddress.ip_address(row[4][0]).is_loopback for row in found)


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_cores(text: str | int) -> int:
    """Return the number of slots for a setting; -1 stands for all cores.

    Raises ConfigError for anything but -1 or 1 up to the cores of this machine.
    """
    most = available_cores()
    try:
        cores = int(text)
    except ValueError:
        cores = 0
    if cores == -1:
        return most
    if not 1 <= cores <= most:
        raise ConfigError(f"cores={text}: give a number from 1 to {most}, or -1 for all cores")
    return cores


def _port(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigError(f"{name}={text}: give a port from 1 to 65535")
    return int(text)


def _number(section: Mapping[str, str], key: str, default: int, *, least: int) -> int:
    text = section.get(key) or str(default)
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(f"[oq_runtime] {key}={text}: give a whole number from {least} up")
    return int(text)


def _seconds(section: Mapping[str, str], key: str, default: float, *, zero: bool = False) -> float:
    text = section.get(key) or str(default)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or (float(text) == 0 and not zero):
        least = "from 0 up" if zero else "above 0"
        raise ConfigError(f"[oq_runtime] {key}={text}: give a number of seconds {least}")
    return float(text)


def _switch(section: Mapping[str, str], key: str, default: str) -> bool:
    text = section.get(key) or default
    value = configparser.ConfigParser.BOOLEAN_STATES.get(text.lower())
    if value is None:
        raise ConfigError(f"[oq_runtime] {key}={text}: give on or off")
    return value
