"""Start-up of an agent: ``oq-agent``, the daemon of a node, and the private one of a session.

Finds the node's address and its directories, and leaves none of them behind.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import zmq

from oq_runtime import cgroups, config, descriptors, facts, logind, logs, metrics, processes
from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.errors import ConfigError, OqRuntimeError
from oq_runtime.files import crashes, private
from oq_runtime.node import systemd
from oq_runtime.node.agent import DIRECTORIES, Agent
from oq_runtime.wire import security, strangers

log = logging.getLogger(__name__)


def own_address(cluster: config.Cluster) -> str:
    """Return the address in ``host_cores`` that belongs to this node; raises ConfigError."""
    local = {a.address for found in psutil.net_if_addrs().values() for a in found}
    mine = [host for host in cluster.hosts if host in local or _resolved(host) & local]
    if len(mine) != 1:
        raise ConfigError(
            f"[zworkers] host_cores names {len(mine)} addresses of this node; "
            f"it has {', '.join(sorted(a for a in local if '.' in a))}; set --address"
        )
    return mine[0]


def _resolved(host: str) -> set[str]:
    try:
        return {str(row[4][0]) for row in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def own_directory(variable: str, name: str) -> Path:
    """Return the directory ``name`` where systemd wants it, else where temporary files are.

    Raises ConfigError when somebody else has it already, or it cannot be made.
    """
    return private.own(Path(os.environ.get(variable) or tempfile.gettempdir(), name))


def run_daemon(address: str | None, settings: config.Config) -> None:
    """Serve the cluster of openquake.cfg on this node until SIGTERM, which drains.

    Raises ConfigError for a node that is not in the cluster, and OqRuntimeError when the address
    cannot be bound or is not protected.
    """
    cluster = settings.cluster
    if cluster is None:
        raise ConfigError(
            "no cluster is configured: set [distribution] oq_distribute = zmq and the workers' "
            "addresses in [zworkers] host_cores of openquake.cfg"
        )
    address = address or own_address(cluster)
    if address not in cluster.hosts:
        raise ConfigError(f"{address} is not in [zworkers] host_cores: {', '.join(cluster.hosts)}")
    wanted, why = cluster.hosts[address], "as host_cores says"
    if wanted < 0:
        wanted, why = config.available_cores()
    keys = security.Keys.derive(security.read_secret(cluster.authkey))
    os.umask(0o077)
    descriptors.check(wanted, strangers.MOST)
    cgroups.check_processes(wanted)
    descriptors.raise_limit()
    # named alike each time, so that what a killed predecessor has left is found
    name = f"oq-agent-{address}-{cluster.ctrl_port}"
    directory, disk = (own_directory(variable, name) for variable in DIRECTORIES)
    memory = private.memory_name(disk)
    try:
        agent = Agent(
            directory=directory,
            memory=memory,
            disk=disk,
            control_url=cluster.control_url(address),
            slots=wanted,
            owner=None,
            own_facts=facts.own(
                cluster.dbserver, cluster.shared_dir, settings.limits, settings.urgent_group
            ),
            limits=settings.limits,
            keys=keys,
            urgent_key=settings.urgent_key,
        )
    except zmq.ZMQError as exc:
        raise OqRuntimeError(f"{cluster.control_url(address)}: {exc.strerror}") from exc
    # from here on the port is bound, so no other agent uses these directories
    try:
        private.remove_memory(disk)
        for stale in [*directory.iterdir(), *disk.iterdir()]:
            stale.unlink(missing_ok=True)
        private.add_memory(disk, memory, stays=not logind.removes_memory())
        signal.signal(signal.SIGTERM, lambda *_: agent.drain())
        signal.signal(signal.SIGINT, lambda *_: agent.stop())
        agent.exporter = metrics.start(address, metrics.agent_ports(settings.metrics_port))
        systemd.notify("READY=1")
        log.info(f"ready on {agent.control_url} with {wanted} slots: {why}")
        agent.run()
        log.info("ended")
    finally:
        private.remove(disk, memory)
        private.remove(directory)


def daemon() -> None:
    """``oq-agent``: exit 0 after SIGTERM or SIGINT, 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(
        prog="oq-agent", description="Serve this node's slots to the OpenQuake cluster."
    )
    parser.add_argument("--address", help="of this node in host_cores, if it has several")
    parser.add_argument("--log-level", choices=logs.LEVELS, help="instead of [oq_runtime]'s")
    processes.open_standard()
    args = parser.parse_args()
    try:
        settings = config.Config.from_sections(config.read())
        logs.start(args.log_level or settings.log_level)
        run_daemon(args.address, settings)
    except OqRuntimeError as exc:
        print(f"oq-agent: {exc}", file=sys.stderr)
        sys.exit(2 if isinstance(exc, ConfigError) else 1)


def main() -> None:
    """The private agent of ``launch``."""
    parser = argparse.ArgumentParser(prog="oq-agent-private")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--control-url", required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--owner", type=int, required=True)
    parser.add_argument("--limits", type=Limits.from_text, default=DEFAULTS)
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info")
    args = parser.parse_args()
    logs.start(args.log_level)
    descriptors.raise_limit()
    memory = private.memory_of(args.directory)
    try:
        with crashes.kept(args.directory, "agent"):
            agent = Agent(
                directory=args.directory,
                memory=memory,
                disk=args.directory,
                control_url=args.control_url,
                slots=args.slots,
                owner=args.owner,
                own_facts=facts.own(limits=args.limits),
                limits=args.limits,
            )
            signal.signal(signal.SIGTERM, lambda *_: agent.stop())
            agent.make_ready()
            agent.run()
    finally:
        private.remove(args.directory, memory)


if __name__ == "__main__":
    main() if "--directory" in sys.argv else daemon()
