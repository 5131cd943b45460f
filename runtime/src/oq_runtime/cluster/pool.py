"""The agents of the cluster as an administrator sees them: ask all, or tell all, in two seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import zmq

from oq_runtime.cluster import remote
from oq_runtime.config import Cluster
from oq_runtime.errors import NoWorkers, ProtocolError
from oq_runtime.wire import protocol, security, transport

#: seconds for a host to answer
ANSWER_SECS = 2.0
#: small messages for the round trip; bytes of one that needs many packets, also on a slow way
PINGS, LARGE_BYTES = 5, 64 * 1024
#: seconds for the bandwidth; bytes of a message then, and how many are under way
LOAD_SECS, PIECE_BYTES, PIECES = 1.0, 256 * 1024, 16
T = TypeVar("T")
Action = Literal["status", "start", "stop", "kill"]
SILENT = f"no answer in {ANSWER_SECS:g} s; is its openquake-worker service running?"


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A host that says nothing of itself, and in words why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Killed:
    """A host whose service was killed over ssh."""


#: what is known of a host after it was asked or told
Answer = protocol.AgentStatus | Unreachable | Killed


@dataclass(frozen=True, slots=True)
class Way:
    """The way to a node and back, as far as it was measured.

    :param round_trip_s: the least of PINGS, None when one got lost
    :param bytes_per_s: that go each way at the same time
    :param lost: in words, which messages do not arrive; empty when all do
    """

    round_trip_s: float | None = None
    bytes_per_s: float | None = None
    lost: str = ""


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
        """Return a message, or Unreachable; None as long as nothing comes."""
        for kind, reason in self.monitor.events():
            if kind == "refused":
                return Unreachable(reason)
        if frames := transport.receive(self.socket):
            try:
                return protocol.decode(frames[0])
            except ProtocolError as exc:
                return Unreachable(str(exc))
        return None

    def ping(self, payload: bytes = b"", want: int | None = None) -> float | None:
        """Return the seconds until a ping comes back, None when it does not in ANSWER_SECS.

        :param want: bytes that shall come back instead of the payload
        """
        began_s = time.monotonic()
        transport.send(self.socket, protocol.Ping(want=want), payload)
        return time.monotonic() - began_s if self._returned(began_s + ANSWER_SECS) else None

    def load(self) -> float:
        """Return the bytes per second that come back while PIECES messages are under way."""
        began_s = time.monotonic()
        for _ in range(PIECES):
            transport.send(self.socket, protocol.Ping(), bytes(PIECE_BYTES))
        nbytes = 0
        while self._returned(began_s + LOAD_SECS):
            transport.send(self.socket, protocol.Ping(), bytes(PIECE_BYTES))
            nbytes += PIECE_BYTES
        return nbytes / (time.monotonic() - began_s)

    def _returned(self, deadline_s: float) -> bool:
        """Whether a ping comes back in time, whatever else comes."""
        while (left_s := deadline_s - time.monotonic()) > 0:
            self.socket.poll(math.ceil(left_s * 1000))
            if isinstance(self.answer(), protocol.Ping):
                return True
        return False


class Pool:
    """The hosts of a cluster, all asked or told at once.

    :param cluster: whose hosts they are

    Raises ConfigError when the authkey cannot be used.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.keys = security.Keys.derive(security.read_secret(cluster.authkey))

    def ask(self, action: Action, hosts: Iterable[str] | None = None) -> dict[str, Answer]:
        """Return what each host says, by default of all; takes at most ANSWER_SECS."""
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
                        case protocol.AgentStatus() | Unreachable() as answer:
                            answers[host] = answer
                        case protocol.Refused(reason=reason):
                            answers[host] = Unreachable(reason)
        finally:
            _close(context, lines.values())
        return {host: answers.get(host, Unreachable(SILENT)) for host in lines}

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
        failures = remote.tell([host for host, _ in unreachable(answers)], word)
        reached = [host for host, failure in failures.items() if not failure]
        for host, answer in unreachable(answers):
            if failures[host]:
                answers[host] = Unreachable(f"{answer.reason} {failures[host]}")
        if word == "start":
            return answers | self.ask("status", reached)
        return answers | dict.fromkeys(reached, Killed())

    def wait(self, seconds: float) -> dict[str, Answer]:
        """Wait until every host answers; raises NoWorkers naming those that do not in time."""
        deadline_s = time.monotonic() + seconds
        while True:
            answers = self.ask("status")
            missing = unreachable(answers)
            if not missing:
                return answers
            if time.monotonic() > deadline_s:
                detail = "; ".join(f"{host}: {answer.reason}" for host, answer in missing)
                raise NoWorkers(f"after {seconds:g} s: {detail}")
            time.sleep(0.2)

    def measure(self, host: str) -> Way:
        """Measure the way to a host, in some seconds; takes at most PINGS + 3 times ANSWER_SECS."""
        trips = self._on_a_line(host, lambda line: [line.ping() for _ in range(PINGS)])
        known = [trip for trip in trips if trip is not None]
        if len(known) < len(trips):
            return Way(lost=f"{len(trips) - len(known)} of {len(trips)} small messages get lost")
        # each on a connection of its own: what is lost holds up all behind it
        ways: list[tuple[str, Callable[[Line], float | None]]] = [
            (f"from here to {host}", lambda line: line.ping(bytes(LARGE_BYTES), want=0)),
            (f"from {host} to here", lambda line: line.ping(want=LARGE_BYTES)),
        ]
        if lost := [name for name, attempt in ways if self._on_a_line(host, attempt) is None]:
            return Way(min(known), lost=f"large messages get lost {' and '.join(lost)}")
        return Way(min(known), self._on_a_line(host, Line.load))

    def _line(self, context: zmq.Context[Any], host: str) -> Line:
        return Line(context, self.cluster.control_url(host), self.keys)

    def _on_a_line(self, host: str, use: Callable[[Line], T]) -> T:
        context: zmq.Context[Any] = zmq.Context()
        line = self._line(context, host)
        try:
            return use(line)
        finally:
            _close(context, [line])


def triples(answers: dict[str, Answer]) -> list[tuple[str, int, int]]:
    """Return ``[(host, busy, slots), ...]`` of the hosts that answer, as ``oq workers``."""
    return [
        (host, answer.busy, answer.slots)
        for host, answer in answers.items()
        if isinstance(answer, protocol.AgentStatus)
    ]


def answering(answers: dict[str, Answer]) -> list[str]:
    """Return the hosts that answer, or that were reached over ssh."""
    return [host for host, answer in answers.items() if not isinstance(answer, Unreachable)]


def unreachable(answers: dict[str, Answer]) -> list[tuple[str, Unreachable]]:
    """Return the hosts that say nothing of themselves, each with its answer."""
    return [(host, answer) for host, answer in answers.items() if isinstance(answer, Unreachable)]


def _close(context: zmq.Context[Any], lines: Iterable[Line]) -> None:
    for line in lines:
        line.monitor.close()
    context.destroy(linger=0)
