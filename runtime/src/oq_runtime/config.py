"""openquake.cfg as the engine reads it, without importing the engine: the cluster, the settings.

The sections of the engine keep their meaning: ``[distribution] oq_distribute``, ``[dbserver]``,
``[zworkers]``, ``[directory] shared_dir``. A cluster is configured when ``oq_distribute = zmq`` and
``host_cores`` names another host than this one. Ours are in ``[oq_runtime]``, see ``settings``.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import ipaddress
import math
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from oq_runtime import cgroups, logs, processes
from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.errors import ConfigError
from oq_runtime.settings import SECTION, Settings

#: names the directory of a session that ``oq-run`` has started for its engine process
SESSION_VARIABLE = "OQ_RUNTIME_SESSION"
#: set in worker processes, in which the runtime must not activate itself
WORKER_VARIABLE = "OQ_RUNTIME_WORKER"
#: set in worker processes: the control URL of their agent, and the number of the attempt
NODE_VARIABLE, ATTEMPT_VARIABLE = "OQ_RUNTIME_NODE", "OQ_RUNTIME_ATTEMPT"
#: ``POINT:TASK:ATTEMPTS``: for tests, a worker kills itself at this point of this task
FAULT_VARIABLE = "OQ_RUNTIME_FAULT"

#: of a host
NAME = re.compile("[A-Za-z0-9._-]+")

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
        host = ipv4("[dbserver] host", dbserver.get("host") or "127.0.0.1")
        receiver = ipv4("[dbserver] receiver_host", dbserver.get("receiver_host") or host)
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
    """What openquake.cfg says, checked.

    :param cores: tasks at a time on this machine, where no cluster is configured
    :param window_bytes: of results that a job has in its broker at a time
    :param journal_bytes: of results of a job that are kept until it is complete
    :param limits: for broker and agents
    :param log_level: for broker and agents
    :param notify: to whom, or to what, the end of a job is told
    :param metrics_port: of agents; sessions have those above it; 0: no metrics
    :param urgent_group: whose members may run urgent jobs
    :param urgent_key: that such jobs have to show, and the file with its secret half
    :param cluster: None: this machine alone
    """

    cores: int
    window_bytes: int = 1 << 30
    journal_bytes: int = 20 * 10**9
    limits: Limits = DEFAULTS
    log_level: logs.Level = "info"
    notify: str = ""
    metrics_port: int = 0
    urgent_group: str = ""
    urgent_key: str = ""
    urgent_key_file: str = ""
    cluster: Cluster | None = None

    @classmethod
    def from_sections(cls, sections: Sections) -> Config:
        """Check the settings; raises ConfigError naming the key and the allowed values."""
        section = sections.get(SECTION, {})
        own = Settings.from_section(section)
        distribute = os.environ.get("OQ_DISTRIBUTE") or sections.get("distribution", {}).get(
            "oq_distribute", ""
        )
        return cls(
            cores=check_cores(section.get("cores") or os.environ.get("OQ_NUM_CORES") or own.cores),
            window_bytes=own.window_mb << 20,
            journal_bytes=int(own.journal_gb * 1e9),
            limits=own.limits,
            log_level=own.log_level,
            notify=own.notify,
            metrics_port=own.metrics_port,
            urgent_group=own.urgent_group,
            urgent_key=own.urgent_key,
            urgent_key_file=own.urgent_key_file,
            cluster=Cluster.from_sections(sections) if distribute == "zmq" else None,
        )

    def check_urgent(self) -> None:
        """Raise ConfigError when this process may not run urgent jobs, by what the kernel says."""
        whom = ""
        if self.urgent_key and not os.access(self.urgent_key_file, os.R_OK):
            whom = f"those who may read {self.urgent_key_file} (urgent_key_file"
        elif not self.urgent_key and not processes.has_group(self.urgent_group):
            group = self.urgent_group
            whom = f"members of the group {group} (urgent_group" if group else "root (urgent_group"
        if whom:
            raise ConfigError(
                f"an urgent job is for {whom} in [{SECTION}] of openquake.cfg); normal and low are "
                "for everybody"
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
    paths += [site / "openquake.cfg", Path(os.path.expanduser("~/openquake.cfg"))]
    if extra := os.environ.get("OQ_CONFIG_FILE"):
        paths.append(Path(os.path.expanduser(extra)))
    parser = configparser.ConfigParser(interpolation=None)
    for path in paths:
        try:
            if not path.exists():
                if extra and path == paths[-1]:
                    raise ConfigError(f"OQ_CONFIG_FILE={extra}: there is no such file")
                continue
            if path.is_fifo():
                raise ConfigError(f"{path} is not a file, but a pipe; give a file")
            text = path.read_text(encoding="utf8")
            if (zero := text.find("\0")) >= 0:  # left by a power cut: no path or name has one
                line = text.count("\n", 0, zero) + 1
                raise ConfigError(f"{path} has a zero byte in line {line}; write it anew")
            parser.read_string(text, str(path))
        except PermissionError as exc:
            if exc.filename and os.access(path.parent, os.X_OK):  # else there may be none
                raise ConfigError(
                    f"{path}: {exc.strerror}; its owner must let you read it"
                ) from exc
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}; give a file") from exc
        except configparser.Error as exc:
            raise ConfigError(f"openquake.cfg: {exc}".replace("\n", " ")) from exc
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{path} is not UTF-8, at byte {exc.start}; save it as that") from exc
    return {section: dict(parser.items(section)) for section in parser.sections()}


def read_preload() -> tuple[str, ...]:
    """Return the names of the modules that workers are to have before their first task."""
    return Settings.from_section(read().get(SECTION, {})).preload


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
        hosts[ipv4("[zworkers] host_cores", host)] = number
    return hosts


def ipv4(key: str, host: str) -> str:
    """Return an address or name as it is; raises ConfigError for an address of IPv6, or neither."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]"))
        if address.version == 6 and not address.is_loopback:
            raise ConfigError(f"{key}: {host} is IPv6; give an IPv4 address, the cluster needs one")
        return host
    with contextlib.suppress(UnicodeError):
        if NAME.fullmatch(host.encode("idna").decode()):  # as it is looked up
            return host
    raise ConfigError(f"{key}: {host} is neither an address nor the name of a host")


def parse_ports(text: str) -> range:
    """Return the ports of ``1912-1920``, both ends included; raises ConfigError."""
    first, _, last = text.partition("-")
    name = "[dbserver] receiver_ports"
    ports = range(_port(name, first.strip()), _port(name, (last or first).strip()) + 1)
    if not ports:
        raise ConfigError(f"{name}={text}: the first port is above the last")
    return ports


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


def has_ipv4(host: str) -> bool:
    """Whether a host has an address that a cluster can use, as far as this one knows its name."""
    try:
        return bool(socket.getaddrinfo(host, None, family=socket.AF_INET))
    except OSError:
        return False


def available_cores() -> tuple[int, str]:
    """Return how many tasks at a time this process has processors for, at least 1, and why.

    That is the CPU affinity, or the least quota of the cgroups around this process. Of a quota that
    is no whole number the rest counts as one: it would be idle otherwise. Threads of one core (SMT)
    count as the kernel counts them, as processors.
    """
    allowed = len(os.sched_getaffinity(0))
    if (found := cgroups.cpu_quota()) and found[0] < allowed:
        quota, directory = found
        return max(1, math.ceil(quota)), f"a CPU quota of {quota:.3g} in {directory}"
    machine = os.cpu_count() or allowed
    return allowed, f"{allowed} of {machine} CPUs by affinity" if allowed < machine else "all CPUs"


def check_cores(text: str | int) -> int:
    """Return the number of slots for a setting; -1 stands for all cores.

    Raises ConfigError for anything but -1 or 1 up to the cores of this machine.
    """
    most, why = available_cores()
    try:
        cores = int(text)
    except ValueError:
        cores = 0
    if cores == -1:
        return most
    if not 1 <= cores <= most:
        raise ConfigError(
            f"cores={text}: give a number from 1 to {most} ({why}), or -1 for all of them"
        )
    return cores


def _port(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigError(f"{name}={text}: give a port from 1 to 65535")
    return int(text)
