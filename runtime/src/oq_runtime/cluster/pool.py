"""The agents of the cluster as an administrator sees them: ask all, or tell all, in two seconds."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import zmq

from oq_runtime.cluster import remote
from oq_runtime.config import Cluster, has_ipv4
from oq_runtime.errors import NoWorkers, ProtocolError
from oq_runtime.text import grouped
from oq_runtime.wire import protocol, security, tcp, transport
from oq_runtime.wire.calls import Calls
from oq_runtime.wire.monitor import Change
from oq_runtime.wire.protocol import PROBE_BYTES

#: seconds for a host to answer
ANSWER_SECS = 2.0
#: seconds between two calls of a host that does not listen
AGAIN_SECS = 0.1
#: small messages for the round trip
PINGS = 5
#: seconds for the bandwidth; bytes of a message then, and how many are under way
LOAD_SECS, PIECE_BYTES, PIECES = 1.0, 256 * 1024, 16
#: messages that are read before the time is looked at: a host may send without an end
AT_ONCE = 500
#: bytes that may come over a call besides pings that were asked for
MOST_BYTES = 16 << 20
Action = Literal["status", "start", "stop", "kill"]
SILENT = f"no answer in {ANSWER_SECS:g} s; is its openquake-worker service running?"
TOO_MUCH = f"it sends more than {MOST_BYTES >> 20} MiB for an answer; no agent does"
NAMELESS = "its name has no IPv4 address here; see /etc/hosts, or give its address in host_cores"


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
        self.descriptors: dict[str, int] = {}  # of the connections
        self.pinged: Counter[str] = Counter()  # bytes of pings that have come over them
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

    def send_tracked(self, host: str, message: protocol.Message, payload: bytes) -> Any:
        return transport.send_tracked(self.calls.socket, self.names[host], message, payload)

    def hear(self) -> list[tuple[str, Any]]:
        """Wait for AGAIN_SECS; return per host a message, or Unreachable if none will come."""
        self.poller.poll(round(AGAIN_SECS * 1000))
        found: list[tuple[str, Any]] = []
        if time.monotonic() >= self.again_s:
            found += [(host, Unreachable(TOO_MUCH)) for host in self._end_bombs()]
            self._call(self.closed - self.refused)
        for event in self.calls.events():
            host = self.hosts[event.url]
            if event.change is Change.OPENED:
                self.descriptors[host], self.pinged[host] = event.descriptor, 0
            elif event.change is Change.REFUSED:
                self.refused.add(host)
                found.append((host, Unreachable(event.reason)))
            elif event.change is Change.CLOSED:
                self.closed.add(host)
        hosts = {name: host for host, name in self.names.items()}
        for _ in range(AT_ONCE):
            if not (frames := transport.receive(self.calls.socket)):
                break
            try:
                message = protocol.decode(frames[1])
            except ProtocolError as exc:
                message = Unreachable(str(exc))
            if sender := hosts.get(frames[0]):
                found.append((sender, message))
                if isinstance(message, protocol.Ping):
                    self.pinged[sender] += sum(map(len, frames[1:]))
        return found

    def _end_bombs(self) -> list[str]:
        """End the calls to hosts that send more than they have to say; return those hosts.

        libzmq hands over a message when its last frame is there, and may wait for it for ever.
        """
        found = []
        for host, descriptor in self.descriptors.items():
            with contextlib.suppress(OSError), tcp.borrowed(descriptor) as connection:
                _, received = tcp.counters(connection)
                if received - self.pinged[host] > MOST_BYTES:
                    found.append(host)
        for host in found:
            del self.descriptors[host]
            self.calls.hang_up(self.urls[host])
            self.refused.add(host)
        return found

    def _call(self, hosts: Iterable[str]) -> None:
        for host in hosts:
            self.calls.hang_up(self.urls[host])
            self.names[host] = self.calls.call(self.urls[host])
            self.send(host, self.opening)
        self.closed = set()
        self.again_s = time.monotonic() + AGAIN_SECS


def silent(hosts: Iterable[str]) -> dict[str, Answer]:
    """Return why hosts that were called in time say nothing.

    A name server may be silent as well: no look-up begins after ANSWER_SECS.
    """
    deadline_s = time.monotonic() + ANSWER_SECS
    return {
        host: Unreachable(SILENT if time.monotonic() > deadline_s or has_ipv4(host) else NAMELESS)
        for host in hosts
    }


class Pool:
    """The hosts of a cluster, all asked or told at once.

    :param cluster: whose hosts they are

    Raises ConfigError when the authkey cannot be used.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.keys = security.Keys.derive(security.read_secret(cluster.authkey))

    def ask(self, action: Action, hosts: Iterable[str] | None = None) -> dict[str, Answer]:
        """Return what each host says, by default of all; takes ANSWER_SECS, name servers aside."""
        answers: dict[str, Answer] = {}
        with self._lines(self.cluster.hosts if hosts is None else hosts, action) as lines:
            deadline_s = time.monotonic() + ANSWER_SECS
            while len(answers) < len(lines.urls) and time.monotonic() < deadline_s:
                for host, heard in lines.hear():
                    match heard:
                        case protocol.AgentStatus() | Unreachable():
                            answers[host] = heard
                        case protocol.Refused(reason=reason):
                            answers[host] = Unreachable(reason)
        told = silent(host for host in lines.urls if host not in answers)
        return {host: answers.get(host) or told[host] for host in lines.urls}

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

    def wait(self, seconds: float, hosts: Iterable[str] | None = None) -> dict[str, Answer]:
        """Wait until hosts answer, by default all; NoWorkers names those that do not in time."""
        deadline_s = time.monotonic() + seconds
        while True:
            answers = self.ask("status", hosts)
            missing = unreachable(answers)
            if not missing:
                return answers
            if not time.monotonic() < deadline_s:  # nan, too
                detail = "; ".join(grouped((host, answer.reason) for host, answer in missing))
                raise NoWorkers(f"after {seconds:g} s: {detail}")
            time.sleep(0.2)

    def measure(self, host: str) -> Way:
        """Measure the way to a host, in some seconds; takes at most PINGS + 3 times ANSWER_SECS."""
        with self._line(host) as line:
            trips = [_ping(line, host) for _ in range(PINGS)]
        known = [trip for trip in trips if trip is not None]
        if len(known) < len(trips):
            return Way(lost=f"{len(trips) - len(known)} of {len(trips)} small messages get lost")
        ways = {
            f"from here to {host}": (PROBE_BYTES, 0),
            f"from {host} to here": (0, PROBE_BYTES),
        }
        lost = []
        for name, (there, back) in ways.items():
            # on a connection of its own: what is lost holds up all behind it
            with self._line(host) as line:
                if _ping(line, host, bytes(there), want=back) is None:
                    lost.append(name)
        if lost:
            return Way(min(known), lost=f"large messages get lost {' and '.join(lost)}")
        with self._line(host) as line:
            return Way(min(known), _load(line, host))

    def _line(self, host: str) -> Lines:
        return self._lines([host], "status")

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
    return [host for host, answer in answers.items() if not isinstance(answer, Unreachable)]


def unreachable(answers: dict[str, Answer]) -> list[tuple[str, Unreachable]]:
    """Return the hosts that say nothing of themselves, each with its answer."""
    return [(host, answer) for host, answer in answers.items() if isinstance(answer, Unreachable)]


def _ping(line: Lines, host: str, payload: bytes = b"", want: int | None = None) -> float | None:
    """Return the seconds until a ping comes back, None when it does not in ANSWER_SECS.

    :param want: bytes that shall come back instead of the payload
    """
    began_s = time.monotonic()
    line.send(host, protocol.Ping(want=want), payload)
    return time.monotonic() - began_s if _returned(line, began_s + ANSWER_SECS) else None


def _load(line: Lines, host: str) -> float:
    """Return the bytes per second that come back while PIECES messages are under way."""
    began_s = time.monotonic()
    nbytes, returned = 0, PIECES
    waiting: list[zmq.MessageTracker] = []  # to be sent; a host may return more than it was sent
    while returned:
        waiting = [one for one in waiting if not one.done]
        for _ in range(min(returned, PIECES - len(waiting))):
            if sent := line.send_tracked(host, protocol.Ping(), bytes(PIECE_BYTES)):
                waiting.append(sent)
        if returned := _returned(line, began_s + LOAD_SECS):
            nbytes += returned * PIECE_BYTES
    return nbytes / (time.monotonic() - began_s)


def _returned(line: Lines, deadline_s: float) -> int:
    """Return how many pings have come back, at least one, or 0 when none does in time."""
    while time.monotonic() < deadline_s:
        if found := sum(isinstance(heard, protocol.Ping) for _, heard in line.hear()):
            return found
    return 0
