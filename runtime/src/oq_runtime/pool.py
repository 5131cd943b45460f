"""The agents of the cluster as an administrator sees them: ask all, or tell all, in two seconds."""

from __future__ import annotations

import time
from typing import Any, Literal

import zmq

from oq_runtime import protocol, security, transport
from oq_runtime.config import Cluster
from oq_runtime.errors import NoWorkers, ProtocolError

#: seconds for a host to answer
ANSWER_SECS = 2.0
Action = Literal["status", "start", "stop", "kill"]


class Pool:
    """
    :param cluster: whose hosts are asked

    Raises ConfigError when the authkey cannot be used.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.keys = security.Keys.derive(security.read_secret(cluster.authkey))

    def ask(self, action: Action) -> dict[str, protocol.AgentStatus | str]:
        """Return per host its answer, or in words why there is none."""
        context: zmq.Context[Any] = zmq.Context()
        answers: dict[str, protocol.AgentStatus | str] = {}
        poller = zmq.Poller()
        sockets, monitors = {}, {}
        try:
            for host in self.cluster.hosts:

                def secure(socket: zmq.Socket[Any], host: str = host) -> None:
                    security.secure_client(socket, self.keys)
                    monitors[host] = security.HandshakeMonitor(socket)
                    poller.register(monitors[host].socket, zmq.POLLIN)

                url = self.cluster.control_url(host)
                sockets[host] = transport.dealer(context, url, secure=secure)
                poller.register(sockets[host], zmq.POLLIN)
                transport.send(sockets[host], protocol.Command(action=action))
            deadline_s = time.monotonic() + ANSWER_SECS
            while len(answers) < len(sockets) and (left_s := deadline_s - time.monotonic()) > 0:
                poller.poll(round(left_s * 1000))
                for host, socket in sockets.items():
                    for kind, reason in monitors[host].events():
                        if kind == "refused":
                            answers.setdefault(host, reason)
                    if frames := transport.receive(socket):
                        answers[host] = _answer(frames[0])
        finally:
            for monitor in monitors.values():
                monitor.close()
            context.destroy(linger=0)
        silent = f"no answer in {ANSWER_SECS:g} s; is its openquake-worker service running?"
        return {host: answers.get(host, silent) for host in sockets}

    def triples(self, action: Action) -> list[tuple[str, int, int]]:
        """Return ``[(host, busy, slots), ...]`` of the hosts that answer, as ``oq workers``."""
        return [
            (host, answer.busy, answer.slots)
            for host, answer in self.ask(action).items()
            if isinstance(answer, protocol.AgentStatus)
        ]

    def wait(self, seconds: float) -> list[tuple[str, int, int]]:
        """Wait until every host answers; raises NoWorkers naming those that do not in time."""
        deadline_s = time.monotonic() + seconds
        while True:
            answers = self.ask("status")
            missing = {host: text for host, text in answers.items() if isinstance(text, str)}
            if not missing:
                return self.triples("status")
            if time.monotonic() > deadline_s:
                detail = "; ".join(f"{host}: {text}" for host, text in missing.items())
                raise NoWorkers(f"after {seconds:g} s: {detail}")
            time.sleep(0.2)


def _answer(frame: bytes) -> protocol.AgentStatus | str:
    try:
        message = protocol.decode(frame)
    except ProtocolError as exc:
        return str(exc)
    return message if isinstance(message, protocol.AgentStatus) else "it did not understand"
