"""The agents of the cluster as an administrator sees them: ask all, or tell all, in two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import zmq

from oq_runtime.cluster import remote
from oq_runtime.config import Cluster
from oq_runtime.errors import NoWorkers, ProtocolError
from oq_runtime.wire import protocol, security, transport

#: seconds for a host to answer
ANSWER_SECS = 2.0
#: pings for the round trip; bytes for the bandwidth, in pieces of which so many are under way
PINGS, LOAD_BYTES, PIECE_BYTES, PIECES = 5, 16 << 20, 1 << 20, 4
Action = Literal["status", "start", "stop", "kill"]
#: what a host says of itself, or in words why it says nothing
Answer = protocol.AgentStatus | str
SILENT = f"no answer in {ANSWER_SECS:g} s; is its openquake-worker service running?"


@dataclass(frozen=True, slots=True)
class Speed:
    """The way to a node: a round trip, and the bytes that go each way at the same time."""

    round_trip_s: float
    bytes_per_s: float


class Line:
    """A connection to the agent of one host."""

    def __init__(self, context: zmq.Context[Any], url: str, keys: security.Keys) -> None:
        monitors: list[security.HandshakeMonitor] = []

        def secure(socket: zmq.Socket[Any]) -> None:
            security.secure_client(socket, keys)
            monitors.append(security.HandshakeMonitor(socket))

        self.socket = transport.dealer(context, url, secure=secure)
        self.monitor = monitors[0]

    def answer(self) -> Any:
        """Return a message, or why there will be none in words; None as long as nothing comes."""
        for kind, reason in self.monitor.events():
            if kind == "refused":
                return reason
        if frames := transport.receive(self.socket):
            try:
                return protocol.decode(frames[0])
            except ProtocolError as exc:
                return str(exc)
        return None


class Pool:
    """
    :param cluster: whose hosts are asked

    Raises ConfigError when the authkey cannot be used.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.keys = security.Keys.derive(security.read_secret(cluster.authkey))

    def ask(self, action: Action, hosts: Iterable[str] | None = None) -> dict[str, Answer]:
        """Return per host (all by default) its answer, or in words why there is none."""
        context: zmq.Context[Any] = zmq.Context()
        answers: dict[str, Answer] = {}
        poller = zmq.Poller()
        lines = {}
        try:
            for host in self.cluster.hosts if hosts is None else hosts:
                line = lines[host] = self._line(context, host)
                poller.register(line.socket, zmq.POLLIN)
                poller.register(line.monitor.socket, zmq.POLLIN)
                transport.send(line.socket, protocol.Command(action=action))
            deadline_s = time.monotonic() + ANSWER_SECS
            while len(answers) < len(lines) and (left_s := deadline_s - time.monotonic()) > 0:
                poller.poll(round(left_s * 1000))
                for host, line in lines.items():
                    match line.answer():
                        case protocol.AgentStatus() | str() as answer:
                            answers[host] = answer
                        case protocol.Refused(reason=reason):
                            answers[host] = reason
        finally:
            _close(context, lines.values())
        return {host: answers.get(host, SILENT) for host in lines}

    def start(self) -> dict[str, Answer]:
        """Let all hosts take tasks, after starting over ssh the agents that do not answer."""
        return self._insist("start")

    def kill(self) -> dict[str, Answer]:
        """Kill the workers of all hosts; over ssh with the agent where that does not answer."""
        return self._insist("kill")

    def restart(self) -> dict[str, Answer]:
        """Kill the workers and let all hosts take tasks."""
        self.kill()
        return self.start()

    def _insist(self, word: remote.Word) -> dict[str, Answer]:
        answers = self.ask(word)
        silent = {host: text for host, text in answers.items() if isinstance(text, str)}
        failures = remote.tell(list(silent), word)
        reached = [host for host, failure in failures.items() if not failure]
        if word == "start":
            answers |= self.ask("status", reached)
        else:
            answers |= {host: _killed(host) for host in reached}
        for host, failure in failures.items():
            if failure:
                answers[host] = f"{silent[host]} {failure}"
        return answers

    def wait(self, seconds: float) -> dict[str, Answer]:
        """Wait until every host answers; raises NoWorkers naming those that do not in time."""
        deadline_s = time.monotonic() + seconds
        while True:
            answers = self.ask("status")
            missing = {host: text for host, text in answers.items() if isinstance(text, str)}
            if not missing:
                return answers
            if time.monotonic() > deadline_s:
                detail = "; ".join(f"{host}: {text}" for host, text in missing.items())
                raise NoWorkers(f"after {seconds:g} s: {detail}")
            time.sleep(0.2)

    def measure(self, host: str) -> Speed | None:
        """Measure the way to a host, for about a second; None when it does not answer."""
        context: zmq.Context[Any] = zmq.Context()
        line = self._line(context, host)
        try:
            trips = [_ping(line, 1, b"") for _ in range(PINGS)]
            if not all(trips):
                return None
            sent, began_s = 0, time.monotonic()
            while sent < LOAD_BYTES and time.monotonic() - began_s < ANSWER_SECS / 2:
                if not _ping(line, PIECES, bytes(PIECE_BYTES)):
                    return None
                sent += PIECES * PIECE_BYTES
            return Speed(min(trips), sent / (time.monotonic() - began_s))
        finally:
            _close(context, [line])

    def _line(self, context: zmq.Context[Any], host: str) -> Line:
        return Line(context, self.cluster.control_url(host), self.keys)


def triples(answers: dict[str, Answer]) -> list[tuple[str, int, int]]:
    """Return ``[(host, busy, slots), ...]`` of the hosts that answer, as ``oq workers``."""
    return [
        (host, answer.busy, answer.slots)
        for host, answer in answers.items()
        if isinstance(answer, protocol.AgentStatus)
    ]


def answering(answers: dict[str, Answer]) -> list[str]:
    """Return the hosts that answer, or that were reached over ssh."""
    return [host for host, answer in answers.items() if isinstance(answer, protocol.AgentStatus)]


def _killed(host: str) -> protocol.AgentStatus:
    return protocol.AgentStatus(
        host=host, pid=0, slots=0, busy=0, jobs=[], memory=0.0, engine="", state="killed"
    )


def _ping(line: Line, times: int, payload: bytes) -> float:
    """Return the seconds until so many pings have come back, 0 when they do not in time."""
    began_s = time.monotonic()
    for _ in range(times):
        transport.send(line.socket, protocol.Ping(), payload)
    left = times
    while left and line.socket.poll(round(ANSWER_SECS * 1000)):
        left -= isinstance(line.answer(), protocol.Ping)
    return 0.0 if left else time.monotonic() - began_s


def _close(context: zmq.Context[Any], lines: Iterable[Line]) -> None:
    for line in lines:
        line.monitor.close()
    context.destroy(linger=0)
