"""The agents of a broker: real sockets with encryption, against agents that follow a script.

Both ends are here, in one thread: ``Bench.turn`` lets the peers have their turn, and reads what has
come for the agents.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from oq_runtime import facts
from oq_runtime.core import scheduler as core
from oq_runtime.core.limits import Limits
from oq_runtime.priority import Priority
from oq_runtime.session.peer import Event, State
from oq_runtime.session.peers import FED, Peers
from oq_runtime.wire import protocol, security, transport
from oq_runtime.wire.monitor import Change, Monitor
from oq_runtime.wire.protocol import NodeState
from oq_runtime.wire.seal import Seal
from tests.conftest import Attacks
from tests.leftovers import wait_for

KEYS = security.Keys.derive(b"of the cluster and nobody else")
OTHER_KEYS = security.Keys.derive(b"of somebody who is no member")
LIMITS = Limits(beat_s=0.2, suspect_s=0.6, lost_s=2.0)
FACTS = facts.own()


def bound(socket: zmq.Socket[Any], url: str) -> bool:
    with contextlib.suppress(zmq.ZMQError):
        socket.bind(url)
        return True
    return False


class Agent:
    """An agent that answers as it is told, on a port of its own.

    :param keys: None: over ipc
    """

    def __init__(self, context: zmq.Context[Any], url: str, keys: security.Keys | None) -> None:
        self.context, self.keys = context, keys
        self.control = context.socket(zmq.ROUTER)
        self.control.linger = 0
        if keys:
            security.secure_server(self.control, keys)
        assert wait_for(lambda: bound(self.control, url)), "the one before it is closed by now"
        self.url = self.control.last_endpoint.decode()
        self.link: transport.Link | None = None
        self.data: transport.Link | None = None
        self.heard: list[Any] = []
        self.payloads: list[bytes] = []

    def read(self) -> None:
        while frames := transport.receive(self.control):
            message = protocol.decode(frames[1])
            if isinstance(message, protocol.Hello):
                self.link = transport.Link(self.control, message.job, message.epoch, frames[0])
            assert self.link and self.link.accepts(message), message
            self.heard.append(message)
            self.payloads += frames[2:]
        while self.data and (views := transport.receive(self.data.socket, copy=False)):
            self.data.open(views)

    def last(self, kind: type[Any]) -> Any:
        """The last message, if it is of this kind."""
        return self.heard[-1] if self.heard and isinstance(self.heard[-1], kind) else None

    def say(self, message: protocol.Message) -> None:
        assert self.link and self.link.send(message)

    def welcome(self, **fields: Any) -> None:
        self.say(msgspec.structs.replace(protocol.Welcome(pid=1, slots=3, facts=FACTS), **fields))

    def open_data(self, ticket: bytes | None = None) -> transport.Link:
        lease, stolen = self.last(protocol.Lease), ticket is not None
        ticket = lease.ticket if ticket is None else ticket
        show = functools.partial(security.show_ticket, ticket=ticket) if self.keys else None
        opened = transport.dealer(
            self.context, lease.data_url, receive_hwm=8, again=False, secure=show
        )
        seal = Seal(lease.terms, lease.job, lease.epoch, broker=False) if lease.terms else None
        self.data = link = transport.Link(opened, lease.job, lease.epoch, seal=seal)
        hello = protocol.Hello(pid=1, role="agent", ticket=ticket)
        sent = wait_for(
            lambda: link.send(hello, bytes(protocol.PROBE_BYTES)), 0.2 if stolen else 30
        )
        assert sent or stolen, "one that is not its own may be refused before it says hello"
        return link

    def grant(self) -> None:
        """The whole way from the call to the lease, once it was called."""
        self.open_data()
        self.say(protocol.Leased(slots=3))


class Bench:
    """Peers and the agents that they call.

    :param names: of the agents
    :param directory: of ipc sockets; None: TCP on loopback
    """

    def __init__(self, names: str, limits: Limits = LIMITS, directory: Path | None = None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        keys = None if directory else KEYS
        self.gate = security.Gate(self.context, KEYS) if keys else None
        place = f"ipc://{directory}/" if directory else "tcp://127.0.0.1:"
        self.agents = {
            name: Agent(self.context, place + (name if directory else "*"), keys) for name in names
        }
        self.told: list[core.Event] = []
        self.read: list[tuple[str, Any]] = []
        self.peers = Peers(
            self.context,
            job="job",
            agents={name: agent.url for name, agent in self.agents.items()},
            data_urls=[f"{place}{'data' if directory else free_port()}"],
            limits=limits,
            own_facts=FACTS,
            user="me",
            priority=Priority.NORMAL,
            keys=keys,
            tickets=self.gate.tickets if self.gate else None,
            watched=directory is not None,
            tell=self.told.append,
            read_control=lambda line, message: self.read.append((line.name, message)),
            read_data=lambda line, message, _: self.read.append((line.name, message)),
        )
        self.poller = zmq.Poller()
        for source in self.peers.sources():
            self.poller.register(source, zmq.POLLIN)

    def turn(self, now: float | None = None) -> None:
        for source, _ in self.poller.poll(0):
            self.peers.sources()[source]()
        self.peers.step(time.monotonic() if now is None else now, protocol.Beat(wanted=7))
        for agent in self.agents.values():
            agent.read()

    def until(self, condition: Callable[[], object], limit_s: float = 10.0) -> None:
        assert wait_for(lambda: (self.turn(), condition())[1], limit_s, 0.002), self.states()

    def states(self) -> dict[str, tuple[State, str]]:
        return {n: (line.peer.state, line.peer.reason) for n, line in self.peers.lines.items()}

    def state(self, name: str = "a") -> State:
        return self.peers.lines[name].peer.state

    def is_leased(self, name: str) -> bool:
        return self.state(name) is State.LEASED

    def reason(self, name: str = "a") -> str:
        return self.peers.lines[name].peer.reason

    def lease(self, *names: str) -> None:
        """Bring agents to a lease."""
        for name in names:
            agent = self.agents[name]
            self.until(functools.partial(agent.last, protocol.Hello))
            agent.welcome()
            self.until(functools.partial(agent.last, protocol.Lease))
            agent.grant()
            self.until(functools.partial(self.is_leased, name))

    def close(self) -> None:
        self.peers.close(0)
        if self.gate:
            self.gate.stop()
        self.context.destroy(linger=0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def bench(names: str = "a", **options: Any) -> Iterator[Bench]:
    made = Bench(names, **options)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("over", ["tcp", "ipc"])
def test_the_way_to_a_lease(over: str, tmp_path: Path) -> None:
    with bench("ab", directory=tmp_path if over == "ipc" else None) as b:
        b.lease("a", "b")
        assert b.told == [core.NodeJoined("a", 3), core.NodeJoined("b", 3)]
        for agent in b.agents.values():
            assert agent.payloads == [bytes(protocol.PROBE_BYTES)], "a long message came first"
        tickets = {agent.heard[1].ticket for agent in b.agents.values()}
        assert len(tickets) == 2 and all(len(ticket) >= 16 for ticket in tickets)


def test_a_node_is_there_only_when_its_data_connection_is() -> None:
    with bench() as b:
        agent = b.agents["a"]
        b.until(lambda: agent.last(protocol.Hello))
        agent.welcome()
        b.until(lambda: agent.last(protocol.Lease))
        agent.say(protocol.Leased(slots=3))
        b.until(lambda: b.peers.lines["a"].share == 3)
        assert b.state() is State.ASKED and not b.told
        b.until(lambda: b.state() is State.SHUN)
        assert "its results do not come through" in b.reason() and b.peers.data_url in b.reason()


def test_long_messages_that_do_not_come_through() -> None:
    with bench() as b:
        agent = b.agents["a"]
        b.until(lambda: agent.last(protocol.Hello))
        agent.welcome()
        b.until(lambda: b.state() is State.SHUN)  # as if the lease were lost on its way
        assert "16 KiB do not come through" in b.reason() and "MTU" in b.reason()
        assert b.peers.lines["a"].peer.told is NodeState.REFUSED


def test_a_data_connection_without_the_ticket_takes_nobodys_place() -> None:
    with bench("ab") as b:
        b.lease("a")
        thief = b.agents["b"]
        b.until(lambda: thief.last(protocol.Hello))
        thief.welcome()
        b.until(lambda: thief.last(protocol.Lease))
        known = b.agents["a"].heard[1].ticket
        for ticket in (b"a", bytes(16), known):
            thief.open_data(ticket)
        for _ in range(20):
            b.turn()
            assert thief.data and thief.data.socket.poll(5) == 0
        data = b.agents["a"].data
        assert data and data.send(protocol.Fetch(digest=b"d"))
        b.until(lambda: b.read)
        assert b.read == [("a", protocol.Fetch(job="job", epoch=1, seq=1, digest=b"d"))]
        assert b.state("b") is not State.LEASED


def test_a_data_connection_that_breaks_ends_the_lease() -> None:
    with bench() as b:
        b.lease("a")
        data = b.agents["a"].data
        assert data
        b.agents["a"].data = None
        data.socket.close(linger=0)
        b.until(lambda: b.told[1:])
        assert b.told[1:] == [core.NodeGone("a", "its data connection broke")]


def test_a_node_that_is_heard_on_the_control_connection_alone() -> None:
    with bench() as b:
        b.lease("a")
        spoken_s = time.monotonic()
        b.agents["a"].data.send(protocol.Beat())  # type: ignore[union-attr]
        b.until(lambda: (b.agents["a"].say(protocol.Beat()), b.told[1:])[1])
        assert LIMITS.lost_s <= time.monotonic() - spoken_s < LIMITS.lost_s + 5
        [gone] = b.told[1:]
        assert isinstance(gone, core.NodeGone)
        assert gone.reason.startswith("nothing has come over its connection for results for 2 s")


def test_an_agent_that_goes_away_is_called_again() -> None:
    with bench() as b:
        b.lease("a")
        old = b.agents.pop("a")
        old.control.close(linger=0)
        b.until(lambda: len(b.told) == 2)
        assert b.told[1] == core.NodeGone("a", "the connection to its agent was closed")
        b.agents["a"] = Agent(b.context, old.url, KEYS)
        b.until(lambda: b.agents["a"].last(protocol.Hello))
        assert b.agents["a"].heard[0].epoch > 1


def test_an_agent_that_is_left_out_is_called_in_its_time() -> None:
    with bench() as b:
        b.lease("a")
        b.agents["a"].say(protocol.NoLease(reason="gone"))
        b.until(lambda: b.state() is State.RESTING)
        b.peers.leave_out(b.peers.lines["a"], 600.0, "it brings nothing")
        for later_s, state in ((590.0, State.SHUN), (610.0, State.CALLED)):
            b.turn(time.monotonic() + later_s)
            assert (b.state(), b.reason()) == (state, "it brings nothing")


def test_a_private_agent_is_lost_with_its_process_and_for_its_reason(tmp_path: Path) -> None:
    with bench(directory=tmp_path) as b:
        b.lease("a")
        b.agents.pop("a").control.close(linger=0)
        line = b.peers.lines["a"]
        b.until(lambda: not line.link.send(protocol.Beat()))  # the connection has ended
        b.peers.send(line, protocol.Beat())
        assert not b.told[1:]
        b.peers.lose(line, "its process ended: why", Event.ENDED)
        assert b.told[1:] == [core.NodeGone("a", "its process ended: why")]


def test_what_was_queued_for_a_connection_is_gone_with_it() -> None:
    with bench() as b:
        b.lease("a")
        line = b.peers.lines["a"]
        epoch = line.link.epoch
        for task in range(100):
            b.peers.send(line, protocol.Task(task=task, attempt=1, func="f", call=b"c"))
        b.peers.lose(line, "as the test wants it")
        agent = b.agents["a"]
        b.until(lambda: agent.last(protocol.Hello) and agent.heard[-1].epoch == epoch + 1)
        agent.say(protocol.Welcome(epoch=epoch, pid=1, slots=3, facts=FACTS))
        assert b.state() is State.CALLED


def test_a_wrong_key_is_no_reason_to_hurry() -> None:
    with bench() as b:
        agent = b.agents["a"]
        agent.control.close(linger=0)
        b.agents["a"] = Agent(b.context, agent.url, OTHER_KEYS)
        calls: list[str] = []
        call = b.peers.calls.call
        b.peers.calls.call = lambda url: (calls.append(url), call(url))[1]  # type: ignore[method-assign]
        b.until(lambda: b.state() is State.SHUN)
        assert "wrong authkey" in b.reason()
        assert b.peers.lines["a"].peer.told is NodeState.REFUSED
        wait_for(lambda: b.turn(), 1.0, 0.002)
        assert len(calls) <= 6, "in a second, with rests of 0.2 to 0.6 s"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (protocol.Refused(reason="its own words"), "it refused this job: its own words"),
        (protocol.Welcome(pid=1, slots=0, facts=FACTS), "it has no slots"),
        (protocol.Welcome(pid=1, slots=1), "OpenQuake engine is not set on the node"),
        (protocol.Welcome(v=99, pid=1), "protocol 99"),
    ],
)
def test_refusals(answer: protocol.Message, reason: str) -> None:
    with bench() as b:
        agent = b.agents["a"]
        b.until(lambda: agent.last(protocol.Hello))
        agent.say(answer)
        b.until(lambda: b.state() is State.SHUN)
        assert reason in b.reason()
        assert not b.told


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (protocol.NoLease(reason="called again"), "called again"),
        (protocol.NoLease(), "its agent was started anew"),
        (protocol.Beat(seq=50), "messages were lost on the way"),
    ],
)
def test_the_end_of_a_lease(message: protocol.Message, reason: str) -> None:
    with bench() as b:
        b.lease("a")
        agent = b.agents["a"]
        assert agent.link
        agent.link.sent = message.seq or agent.link.sent
        agent.say(message)
        b.until(lambda: b.told[1:])
        assert b.told[1:] == [core.NodeGone("a", reason)]
        b.until(lambda: agent.last(protocol.Hello))


def test_no_answer_in_time() -> None:
    with bench() as b:
        b.until(lambda: b.agents["a"].last(protocol.Hello))
        b.until(lambda: b.state() is State.RESTING)
        assert b.reason() == "no answer in 0.6 s"


def test_nobody_listens(tmp_path: Path) -> None:
    with bench(directory=tmp_path) as b:
        agent = b.agents["a"]
        b.until(lambda: agent.last(protocol.Hello))
        agent.control.close(linger=0)
        b.agents.clear()
        b.until(lambda: b.reason().startswith("no connection to ipc://"))


def test_beats_go_to_all_within_one_interval_and_not_at_once() -> None:
    names = "abcdefghijkl"
    with bench(names, limits=Limits(beat_s=1.0, suspect_s=20.0, lost_s=30.0)) as b:
        b.peers.slices = 4
        b.lease(*names)
        now, sent = b.peers.next_beat_s, []
        for agent in b.agents.values():
            agent.heard.clear()
        for number in range(4):
            before = sum(line.link.sent for line in b.peers.lines.values())
            b.turn(now + number / 4 + 0.001)
            sent.append(sum(line.link.sent for line in b.peers.lines.values()) - before)
        assert sent == [3, 3, 3, 3]
        b.until(lambda: all(agent.last(protocol.Beat) for agent in b.agents.values()))
        assert {agent.heard[0].wanted for agent in b.agents.values()} == {7}


def test_noise_changes_nothing() -> None:
    with bench() as b:
        b.lease("a")
        agent = b.agents["a"]
        assert agent.link and agent.link.peer and agent.data
        agent.control.send_multipart([agent.link.peer, os.urandom(100)])
        agent.control.send_multipart([agent.link.peer, b""])
        assert agent.data.seal
        agent.data.socket.send_multipart(agent.data.seal.seal([b"\xc1noise"]))
        agent.say(protocol.Started(task=1, attempt=1))
        b.until(lambda: b.read)
        assert b.state() is State.LEASED and len(b.told) == 1


# ---- the data connection, sealed


def opening(lease: protocol.Lease, terms: protocol.Terms | None) -> list[bytes]:
    """What an agent says first, sealed on these terms."""
    hello = protocol.Hello(
        job=lease.job, epoch=lease.epoch, pid=1, role="agent", ticket=lease.ticket
    )
    frames = [protocol.encode(hello), bytes(protocol.PROBE_BYTES)]
    return Seal(terms, lease.job, lease.epoch, broker=False).seal(frames) if terms else frames


def come(b: Bench, ticket: bytes, url: str, frames: list[bytes]) -> list[Change]:
    """What becomes of a connection with a ticket over which such a message comes, in the end."""
    sock = b.context.socket(zmq.DEALER)
    sock.linger = 0
    sock.setsockopt(zmq.RECONNECT_IVL, -1)
    security.show_ticket(sock, ticket)
    monitor = Monitor(sock)
    sock.connect(url)
    with contextlib.suppress(zmq.Again):  # it has been refused already
        sock.send_multipart(frames, zmq.DONTWAIT)
    seen: list[Change] = []
    b.until(lambda: (seen.extend(e.change for e in monitor.events()), Change.CLOSED in seen)[1])
    monitor.close()
    sock.close()
    return seen


@pytest.mark.attack
@pytest.mark.parametrize("how", ["not sealed", "noise", "other key", "other node", "repeated"])
def test_a_seen_ticket_opens_nothing_and_is_used_up(how: str, attacks: Attacks) -> None:
    """An attacker is there with the ticket of a node before the node is, and after it."""
    with bench("ab") as b:
        b.lease("a")
        agent = b.agents["b"]
        b.until(lambda: agent.last(protocol.Hello))
        agent.welcome()
        b.until(lambda: agent.last(protocol.Lease))
        known, lease = b.agents["a"].heard[1], agent.last(protocol.Lease)
        assert known.terms.secret != lease.terms.secret
        replace = msgspec.structs.replace
        forged = {
            "not sealed": opening(lease, None),
            "noise": [os.urandom(100), os.urandom(16400)],
            "other key": opening(lease, replace(lease.terms, secret=os.urandom(32))),
            "other node": opening(lease, known.terms),
            "repeated": opening(known, known.terms),
        }[how]
        seen = come(b, lease.ticket, lease.data_url, forged)
        assert Change.ADMITTED in seen, "the ticket was good, what came was not"
        attacks.tried(1, b.peers.lines["b"].data is not None)
        for ticket in (lease.ticket, known.ticket):
            seen = come(b, ticket, lease.data_url, opening(lease, lease.terms))
            attacks.tried(1, Change.ADMITTED in seen)
        assert b.is_leased("a") and b.told == [core.NodeJoined("a", 3)]
        b.lease("b")  # it is called again, since its connection did not come
        assert agent.heard[-1].terms.secret != lease.terms.secret


@pytest.mark.attack
def test_a_node_that_sees_the_ticket_of_another_is_still_itself(attacks: Attacks) -> None:
    with bench("ab") as b:
        b.lease("a")
        agent, thief = b.agents["b"], b.agents["a"].data
        b.until(lambda: agent.last(protocol.Hello))
        agent.welcome()
        b.until(lambda: agent.last(protocol.Lease))
        ticket = agent.last(protocol.Lease).ticket
        assert thief and thief.send(protocol.Hello(pid=1, role="agent", ticket=ticket))
        thief.sent -= 1  # it was no message of its own connection
        assert thief.send(protocol.Fetch(digest=b"d"))
        b.until(lambda: b.read)
        attacks.tried(1, b.peers.lines["b"].data is not None)
        assert [name for name, _ in b.read] == ["a"]
        agent.grant()
        b.until(lambda: b.is_leased("b"))
        assert b.is_leased("a")


@pytest.mark.attack
@pytest.mark.parametrize("how", ["not sealed", "changed", "repeated", "left out"])
def test_a_record_that_does_not_open_ends_the_lease_and_the_next_has_new_keys(
    how: str, attacks: Attacks
) -> None:
    with bench() as b:
        b.lease("a")
        agent = b.agents["a"]
        first, data = agent.heard[1], agent.data
        assert data and data.seal
        plain = [protocol.encode(protocol.Beat(job="job", epoch=1, seq=data.sent)), b"payload"]
        sealed = data.seal.seal(plain)
        match how:
            case "not sealed":
                sealed = [bytes(frame) for frame in plain]
            case "changed":
                sealed[0] = bytes([sealed[0][0] ^ 1]) + sealed[0][1:]
            case "repeated":
                data.socket.send_multipart(sealed)
            case "left out":
                sealed = data.seal.seal(plain)
        data.socket.send_multipart(sealed)
        b.until(lambda: b.told[1:])
        [gone] = b.told[1:]
        assert isinstance(gone, core.NodeGone) and "does not open" in gone.reason
        b.until(lambda: not data.socket.poll(0, zmq.POLLOUT))  # its connection is closed as well
        agent.data = None
        b.lease("a")
        again = agent.heard[-1]
        assert (again.ticket, again.terms.secret) != (first.ticket, first.terms.secret)
        attacks.tried(1, len(b.read) > (how == "repeated"))


def test_a_blob_waits_until_its_node_reads() -> None:
    """What is sealed takes memory, which the blob itself, in its file, does not."""
    with bench() as b:
        b.lease("a")
        agent, line = b.agents["a"], b.peers.lines["a"]
        data, agent.data = agent.data, None  # it reads nothing
        assert data
        body = os.urandom(1 << 20) * 96
        b.peers.feed(line, b"d", memoryview(body))
        b.until(lambda: line.data and line.data.sent > FED)
        assert not wait_for(lambda: (b.turn(), not line.feed)[1], 0.3)
        assert 0 < len(line.fed) <= FED
        assert b.peers.due_s < time.monotonic() + 0.1
        got = 0

        def read() -> bool:
            nonlocal got
            while frames := transport.receive(data.socket, copy=False):
                header, *payload = data.open(frames)
                message = protocol.decode(header)
                if isinstance(message, protocol.BlobChunk):
                    assert message.offset == got and payload[0] == body[: 1 << 20]
                    got += len(payload[0])
            return got == len(body)

        b.until(read)
        assert not b.peers.feeding
