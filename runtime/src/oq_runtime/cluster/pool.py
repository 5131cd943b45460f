"""The agents of the cluster as an administrator sees them: ask all, or tell all, in two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import zmq

from oq_runtime.cluster import remote
from oq_runtime.config import Cluster
from oq_runtime.errors import NoWorkers, ProtocolError
from oq_runtime.wire import protocol, security, transport
from oq_runtime.wire.calls import Calls
from oq_runtime.wire.monitor import Change

#: seconds for a host to answer
ANSWER_SECS = 2.0
#: seconds between two calls of a host that does not listen
AGAIN_SECS = 0.1
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


class Lines:
    """Calls to the agents of some hosts; one that does not listen is called again.

    :param urls: control URL of each host
    :param opening: what is said at the beginning of each call
    """

    def __init__(
        self, urls: Mapping[str, str], keys: security.Keys, opening: protocol.Message
    ) -> None:
        self.urls, self.opening = urls, opening
        self.context: zmq.Context[Any] = zmq.Context()
        self.calls = Calls(self.context, keys)
        self.poller = zmq.Poller()
        for source in (self.calls.socket, self.calls.monitor.socket):
            self.poller.register(source, zmq.POLLIN)
        self.hosts = {url: host for host, url in urls.items()}
        self.names: dict[str, bytes] = {}  # of the calls
        self.closed: set[str] = set()
        self.refused: set[str] = set()
        self.again_s = 0.0
        self._call(urls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.close()
        self.context.destroy(linger=0)

    def send(self, host: str, message: protocol.Message, *frames: Any) -> None:
        transport.send_to(self.calls.socket, self.names[host], message, *frames)

    def hear(self) -> list[tuple[str, Any]]:
        """Wait for AGAIN_SECS; return per host a message, or in words why none will come."""
        self.poller.poll(round(AGAIN_SECS * 1000))
        if time.monotonic() >= self.again_s:
            self._call(self.closed - self.refused)
        found: list[tuple[str, Any]] = []
        for event in self.calls.events():
            host = self.hosts[event.url]
            if event.change is Change.REFUSED:
                self.refused.add(host)
                found.append((host, event.reason))
            elif event.change is Change.CLOSED:
                self.closed.add(host)
        hosts = {name: host for host, name in self.names.items()}
        while frames := transport.receive(self.calls.socket):
            try:
                message = protocol.decode(frames[1])
            except ProtocolError as exc:
                message = str(exc)
            if sender := hosts.get(frames[0]):
                found.append((sender, message))
        return found

    def _call(self, hosts: Iterable[str]) -> None:
        for host in hosts:
            self.calls.hang_up(self.urls[host])
            self.names[host] = self.calls.call(self.urls[host])
            self.send(host, self.opening)
        self.closed = set()
        self.again_s = time.monotonic() + AGAIN_SECS


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
        answers: dict[str, Answer] = {}
        with self._lines(self.cluster.hosts if hosts is None else hosts, action) as lines:
            deadline_s = time.monotonic() + ANSWER_SECS
            while len(answers) < len(lines.urls) and time.monotonic() < deadline_s:
                for host, heard in lines.hear():
                    match heard:
                        case protocol.AgentStatus() | str():
                            answers[host] = heard
                        case protocol.Refused(reason=reason):
                            answers[host] = reason
        return {host: answers.get(host, SILENT) for host in lines.urls}

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
        with self._lines([host], "status") as lines:
            trips = [_ping(lines, host, 1, b"") for _ in range(PINGS)]
            if not all(trips):
                return None
            sent, began_s = 0, time.monotonic()
            while sent < LOAD_BYTES and time.monotonic() - began_s < ANSWER_SECS / 2:
                if not _ping(lines, host, PIECES, bytes(PIECE_BYTES)):
                    return None
                sent += PIECES * PIECE_BYTES
            return Speed(min(trips), sent / (time.monotonic() - began_s))

    def _lines(self, hosts: Iterable[str], action: Action) -> Lines:
        urls = {host: self.cluster.control_url(host) for host in hosts}
        return Lines(urls, self.keys, protocol.Command(action=action))


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


def _ping(lines: Lines, host: str, times: int, payload: bytes) -> float:
    """Return the seconds until so many pings have come back, 0 when they do not in time."""
    began_s = time.monotonic()
    for _ in range(times):
        lines.send(host, protocol.Ping(), payload)
    left = times
    while left and time.monotonic() - began_s < ANSWER_SECS:
        left -= sum(isinstance(heard, protocol.Ping) for _, heard in lines.hear())
    return 0.0 if left else time.monotonic() - began_s
