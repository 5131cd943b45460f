"""The agents of a broker: the calls to them, their leases, and the connections for their results.

    calls --control--> agents       one socket for all, see ``calls``
    data  <==========  agents       one socket for all

Whether and when to call is ``peer``'s decision. A node is there when it has granted a lease, and
has opened its data connection with the ticket of that lease; both ways a message longer than any
packet has come through by then. On TCP that connection is sealed with keys of the lease, and
accepted at its first record that opens; with one that does not it ends, and so does the lease. Not
covered: what the messages of a lease mean (``broker``).
"""

from __future__ import annotations

import functools
import heapq
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import zmq

from oq_runtime import facts
from oq_runtime.core import scheduler as core
from oq_runtime.core.limits import Limits
from oq_runtime.errors import ConfigError, ProtocolError, TransitionError, VersionError
from oq_runtime.logs import about
from oq_runtime.priority import Priority
from oq_runtime.session.peer import ANSWERS, RESTS, Event, Peer, State
from oq_runtime.wire import protocol, seal, security, tcp, transport
from oq_runtime.wire.calls import Calls
from oq_runtime.wire.monitor import Change
from oq_runtime.wire.strangers import Strangers

log = logging.getLogger(__name__)

#: messages that are read from the agents before others have their turn
AT_ONCE = 500
#: calls that wait for an answer at a time: each handshake takes the two hosts a millisecond, and
#: with 2,000 at once the last would be given up before it has had its turn
CALLS = 100
#: nodes that get their beats together: those of 2,000 would hold up the rest for some 50 ms
BEAT_NODES = 100
TICKET_BYTES, SECRET_BYTES = 16, 32
#: chunks of a node that wait to be read
DATA_HWM = 32
#: chunks of blobs that are sealed and not sent yet, of a node and of all
FED, FED_ALL = 32, 256
#: seconds between two looks whether they are sent
FEED_SECS = 0.002
PROBE = bytes(protocol.PROBE_BYTES)


@dataclass(slots=True)
class Line:
    """An agent and the connections to it.

    :param name: in ``host_cores``; ``host`` is what it calls itself
    :param slots: all of the node's; ``share`` is what it has granted to this job
    :param terms: of the lease
    :param data: the connection for its results, over which it was heard at ``heard_s`` (monotonic)
    :param feed: chunks of blobs that are still to be sent over it
    :param fed: of those that were sent: what tells when they need no memory any more
    """

    name: str
    url: str
    peer: Peer
    link: transport.Link
    host: str = ""
    slots: int = 0
    share: int | None = None
    ticket: bytes = b""
    terms: protocol.Terms | None = None
    data: transport.Link | None = None
    heard_s: float = 0.0
    feed: deque[Iterator[tuple[protocol.BlobChunk, memoryview]]] = field(default_factory=deque)
    fed: deque[zmq.MessageTracker] = field(default_factory=deque)


class Peers:
    """The agents of one broker; to be polled by their ``sources``.

    :param job: name of the session, in every header
    :param agents: name of each agent and its control URL
    :param data_urls: where to receive results: the first that is free
    :param limits: of silence
    :param own_facts: what the agents must have in common with this host
    :param user: who runs the job, for people
    :param priority: of the job
    :param keys: of the cluster, where the agents are reached over TCP
    :param tickets: of the gate there, which admits their data connections
    :param watched: whether somebody waits for the ends of the agents' processes, to ``lose`` them
    :param tell: has the scheduler take an event
    :param read_control: takes a message of a node that has a lease
    :param read_data: takes one of its data connection, with the payload frames
    :raises ConfigError: when the host of ``data_urls`` is not this one
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        *,
        job: str,
        agents: Mapping[str, str],
        data_urls: list[str],
        limits: Limits,
        own_facts: protocol.Facts,
        user: str,
        priority: Priority,
        keys: security.Keys | None,
        tickets: security.Tickets | None,
        watched: bool,
        tell: Callable[[core.Event], None],
        read_control: Callable[[Line, Any], None],
        read_data: Callable[[Line, Any, list[memoryview]], None],
    ) -> None:
        self.context, self.job, self.keys, self.watched = context, job, keys, watched
        self.limits, self.priority = limits, priority
        self.hello = protocol.Hello(pid=os.getpid(), role="broker", facts=own_facts, user=user)
        self.tell, self.read_control, self.read_data = tell, read_control, read_data
        self.calls = Calls(context, keys)
        self.door, self.suite = tickets, _suite() if tickets else None
        self.data_urls, self.data_url = data_urls, ""
        self.data: zmq.Socket[Any] | None = None
        self.strangers: Strangers | None = None
        now = time.monotonic()
        self.lines = {
            name: Line(name, url, Peer(limits, now), transport.Link(self.calls.socket, job, 0))
            for name, url in agents.items()
        }
        self.by_url = {line.url: line for line in self.lines.values()}
        self.callers: dict[bytes, Line] = {}  # by the name of the call, as long as it lasts
        self.tickets: dict[bytes, Line] = {}  # of leases whose data connection is still to come
        self.senders: dict[bytes, Line] = {}  # by what comes in front of their data
        self.feeding: deque[Line] = deque()  # those with blobs to be sent, and on their way
        self.fed: dict[str, Line] = {}
        # (s, name), the first to come; void when it is not the peer's due time any more
        self.due = [(now, name) for name in self.lines]
        self.ready: deque[Line] = deque()  # to be called as soon as fewer than CALLS are open
        self.calling: set[str] = set()  # names of those that were called and have no lease yet
        self.beating = deque(self.lines.values())
        self.slices = math.ceil(len(self.lines) / BEAT_NODES)
        self.next_beat_s = now
        self.bind()

    def bind(self) -> None:
        """Take the first free data URL; with none free no agent is called."""
        for url in self.data_urls:
            try:
                self.data = transport.router(
                    self.context, url, receive_hwm=DATA_HWM, secure=self._secure_data
                )
            except zmq.ZMQError as exc:
                if exc.errno != zmq.EADDRINUSE:
                    raise ConfigError(
                        f"{url}: {exc.strerror}; set [dbserver] receiver_host to an address of "
                        "this host"
                    ) from exc
            else:
                self.data_url = url
                return

    def _secure_data(self, socket: zmq.Socket[Any]) -> None:
        if self.door is not None:
            security.ask_for_tickets(socket)
            self.strangers = Strangers(socket)

    def sources(self) -> dict[Any, Callable[[], None]]:
        """Return what is to be polled, and what is to be called when it is readable."""
        found: dict[Any, Callable[[], None]] = {
            self.calls.monitor.socket: self._watch,
            self.calls.socket: self._read_control,
        }
        if self.data is not None:
            found[self.data] = self._read_data
        return found

    @property
    def due_s(self) -> float:
        """When ``step`` has something to do (s, monotonic)."""
        if self.data is None:
            return math.inf
        due_s = min(self.next_beat_s, self.due[0][0]) if self.due else self.next_beat_s
        return min(due_s, time.monotonic() + FEED_SECS) if self.feeding else due_s

    def step(self, now: float, beat: protocol.Beat) -> None:
        """Make the calls that are due, and send the beats that are."""
        if self.data is None:
            return
        if self.due and self.due[0][0] <= now:
            self._watch()  # what is left of earlier calls must not be taken for the next ones'
        while self.due and self.due[0][0] <= now:
            due_s, name = heapq.heappop(self.due)
            line = self.lines[name]
            if line.peer.due_s == due_s:
                self._time_is_up(line)
        while self.ready and len(self.calling) < CALLS:
            line = self.ready.popleft()
            if line.peer.state in RESTS:
                self._change(line, Event.DUE, now)
                self._call(line)
        if now >= self.next_beat_s:
            self.next_beat_s = now + self.limits.beat_s / self.slices
            for _ in range(math.ceil(len(self.beating) / self.slices)):
                line = self.beating[0]
                self.beating.rotate(-1)
                self.send(line, beat)
                if line.data is not None:
                    self._beat_data(line, now)
        self._feed()

    def _beat_data(self, line: Line, now: float) -> None:
        """Beats on the control connection do not show that results still come through."""
        assert line.data is not None
        if not line.data.send(protocol.Beat()):
            self.broken(line, "its data connection broke")
        elif line.peer.state is State.LEASED and now - line.heard_s > self.limits.lost_s:
            reason = f"nothing has come over its connection for results for {self.limits.lost_s:g}"
            self.lose(line, f"{reason} s; check the MTU of all that is on the way")

    def feed(self, line: Line, digest: bytes, blob: memoryview) -> None:
        """Have a blob sent to a node, as fast as its connection takes it."""
        if not line.feed:
            self.feeding.append(line)
        line.feed.append(
            (protocol.BlobChunk(digest=digest, offset=offset), chunk)
            for offset, chunk in protocol.chunks(blob)
        )
        self._feed()

    def _feed(self) -> None:
        """Send chunks of blobs, a few to each node: what is sealed and not sent takes memory."""
        if not self.feeding:
            return
        for name, line in list(self.fed.items()):
            while line.fed and line.fed[0].done:
                line.fed.popleft()
            if not line.fed:
                del self.fed[name]
        room = FED_ALL - sum(len(line.fed) for line in self.fed.values())
        for _ in range(len(self.feeding)):
            line = self.feeding.popleft()
            while line.feed and line.data and len(line.fed) < FED and room > 0:
                if (chunk := next(line.feed[0], None)) is None:
                    line.feed.popleft()
                elif sent := line.data.send_tracked(*chunk):
                    line.fed.append(sent)
                    self.fed[line.name] = line
                    room -= 1
                else:
                    self.broken(line, "its data connection broke")
                    line.feed.clear()
            if line.feed:
                self.feeding.append(line)

    def send(self, line: Line, message: protocol.Message) -> None:
        """Send to a node that has a lease; one that cannot take it is lost: it would never know."""
        if line.peer.state is State.LEASED and not line.link.send(message):
            self.broken(line, "its connection broke")

    def send_all(self, message: protocol.Message) -> None:
        """Send to all nodes that have a lease."""
        for line in self.lines.values():
            self.send(line, message)

    def broken(self, line: Line, reason: str) -> None:
        """Lose an agent whose connection has ended, unless its process is going to say why."""
        if not (self.watched and line.peer.state is State.LEASED):
            self.lose(line, reason)

    def lose(self, line: Line, reason: str, event: Event = Event.LOST) -> None:
        """End the epoch of an agent, and drop the connection with whatever it may still hold."""
        if event is Event.LOST and not line.peer.open:
            return
        state, told = line.peer.state, line.peer.told
        self._change(line, event, time.monotonic(), reason)
        if state is State.LEASED or told is not line.peer.told:
            log.info(f"{line.host or line.name}: {reason}")
        self.callers.pop(line.link.peer or b"", None)
        self.tickets.pop(line.ticket, None)
        if self.door is not None:
            self.door.discard(line.ticket)
        if line.data is not None:
            self.senders.pop(line.data.peer or b"", None)
            tcp.end(line.data.descriptor, line.data.at)
        line.data = line.share = None
        line.feed.clear()
        line.fed.clear()
        self.calls.hang_up(line.url)
        if state is State.LEASED:
            self.tell(core.NodeGone(line.name, reason))

    def leave_out(self, line: Line, seconds: float, reason: str) -> None:
        """Do without an agent that was lost just now, and call it again after so many seconds."""
        line.peer.leave_out(time.monotonic(), seconds, reason)
        heapq.heappush(self.due, (line.peer.due_s, line.name))
        log.info(f"{line.host or line.name} is left out: {reason}")

    def close(self, linger_ms: int) -> None:
        """Release the nodes, and close the sockets; those of the context have to be waited for."""
        self.send_all(protocol.Release())
        if self.data is not None and self.strangers is not None:
            self.strangers.close()
        self.calls.close(linger_ms)

    # ---- calls

    def _change(self, line: Line, event: Event, now: float, reason: str = "") -> None:
        line.peer.take(event, now, reason)
        if line.peer.due_s < math.inf:
            heapq.heappush(self.due, (line.peer.due_s, line.name))
        if line.peer.state in ANSWERS:
            self.calling.add(line.name)
        else:
            self.calling.discard(line.name)

    def _time_is_up(self, line: Line) -> None:
        """Have an agent called, or give up one that takes too long to answer."""
        match line.peer.state:
            case State.CALLED:
                self.lose(line, f"no answer in {self.limits.suspect_s:g} s", Event.DUE)
            case State.ASKED if line.share is None:
                size = f"{protocol.PROBE_BYTES >> 10} KiB"
                reason = f"messages of {size} do not come through to it, only short ones; check the"
                self.lose(line, f"{reason} MTU of all that is on the way", Event.DUE)
            case State.ASKED:
                reason = f"its results do not come through to {self.data_url}; open that port in"
                reason += " the firewall here, and check the MTU of all that is on the way"
                self.lose(line, reason, Event.DUE)
            case _:
                self.ready.append(line)

    def _call(self, line: Line) -> None:
        """Open a new epoch; what comes of earlier ones is ignored from now on."""
        try:
            name = self.calls.call(line.url)
        except zmq.ZMQError as exc:
            self.lose(line, f"{line.url}: {exc.strerror}", Event.REFUSED)
            return
        line.link = transport.Link(self.calls.socket, self.job, line.link.epoch + 1, name)
        self.callers[name] = line
        line.link.send(self.hello)

    def _watch(self) -> None:
        """See what has become of the calls."""
        for event in self.calls.events():
            line = self.by_url[event.url]
            if not line.peer.open:
                continue
            if event.change is Change.REFUSED:
                self.lose(line, event.reason, Event.REFUSED)
            elif event.change is Change.CLOSED:
                closed = "the connection to its agent was closed"
                called = line.peer.state is State.CALLED
                self.broken(line, f"no connection to {line.url}" if called else closed)

    # ---- messages in

    def _read_control(self) -> None:
        for _ in range(AT_ONCE):
            if not (frames := transport.receive(self.calls.socket)):
                return
            if line := self.callers.get(frames[0]):
                self._dispatch(line, frames[1], functools.partial(self._from_agent, line))

    def _read_data(self) -> None:
        assert self.data is not None
        for _ in range(AT_ONCE):
            if not (frames := transport.receive_frames(self.data)):
                return
            if opened := self._opened(frames):
                link, (header, *rest) = opened
                self._dispatch(None, header, functools.partial(self._from_data, link, rest))

    def _opened(self, frames: list[zmq.Frame]) -> tuple[transport.Link, list[memoryview]] | None:
        """Return what has come on the data socket, and over which link, which may be a new one.

        None when it does not open; then its connection is closed.
        """
        assert self.data is not None
        sender = frames[0].bytes
        line = self.senders.get(sender)
        link = line.data if line is not None else None
        if link is None:
            if self.door is None:
                link = transport.Link(self.data, self.job, 0, sender)
            elif opening := self.tickets.get(security.ticket_of(frames[0])):
                assert opening.terms is not None
                epoch = opening.link.epoch
                sealed = seal.Seal(opening.terms, self.job, epoch, broker=True)
                link = transport.Link(self.data, self.job, epoch, sender, sealed)
                link.descriptor = frames[0].get(transport.SRCFD)
                link.at = tcp.peer(link.descriptor)
        if link is not None:
            try:
                return link, link.open([frame.buffer for frame in frames[1:]])
            except ProtocolError as exc:
                if line is not None:
                    self.lose(line, f"its data cannot be read: {exc}")
        tcp.end(frames[0].get(transport.SRCFD), (frames[0].get("Peer-Address"),))
        return None

    def _dispatch(
        self, line: Line | None, header: bytes | memoryview, take: Callable[[Any], None]
    ) -> None:
        """Have a message taken; one that cannot be decoded, or does not fit here, is refused."""
        try:
            take(protocol.decode(header))
        except (ProtocolError, TransitionError) as exc:
            if line is not None and isinstance(exc, VersionError):
                self.lose(line, f"refused: {exc}", Event.REFUSED)
            else:
                log.warning(f"refused a message: {exc}", extra=about("message"))

    def _from_agent(self, line: Line, message: Any) -> None:
        if message.epoch != line.link.epoch or message.job != self.job:
            return  # of an epoch that is over
        if isinstance(message, protocol.NoLease):
            self.lose(line, message.reason or "its agent was started anew")
        elif not line.link.accepts(message):
            self.lose(line, "messages were lost on the way")
        elif line.peer.state is State.LEASED:
            self.read_control(line, message)
        else:
            self._answered(line, message)

    def _answered(self, line: Line, message: Any) -> None:
        """Take the next step to a lease."""
        match message:
            case protocol.Welcome(host=host, slots=slots) if line.peer.state is State.CALLED:
                line.host, line.slots = host, slots
                if different := facts.difference(self.hello.facts, message.facts):
                    self.lose(line, f"refused: {different}", Event.REFUSED)
                elif slots == 0:
                    self.lose(line, "it has no slots", Event.REFUSED)
                else:
                    self._ask(line)
            case protocol.Refused(reason=reason):
                self.lose(line, f"it refused this job: {reason}", Event.REFUSED)
            case protocol.Leased(slots=slots) if line.peer.state is State.ASKED:
                line.share = slots
                self._join(line)

    def _ask(self, line: Line) -> None:
        self._change(line, Event.WELCOMED, time.monotonic())
        line.ticket = secrets.token_bytes(TICKET_BYTES)
        self.tickets[line.ticket] = line
        if self.door is not None and self.suite is not None:
            self.door.add(line.ticket)
            line.terms = protocol.Terms(self.suite, secrets.token_bytes(SECRET_BYTES), line.name)
        lease = protocol.Lease(
            ticket=line.ticket, data_url=self.data_url, priority=self.priority, terms=line.terms
        )
        line.link.send(lease, PROBE)

    def _join(self, line: Line) -> None:
        """Tell of the node once it has granted a lease and its data connection is open."""
        if line.share is not None and line.data is not None:
            self._change(line, Event.LEASED, time.monotonic())
            self.tell(core.NodeJoined(line.name, line.share))

    def _from_data(self, link: transport.Link, rest: list[memoryview], message: Any) -> None:
        sender = link.peer or b""
        if isinstance(message, protocol.Hello) and (opened := self.tickets.get(message.ticket)):
            if link.seal is not None and link.seal.terms is not opened.terms:
                return  # of another node, which has seen the ticket
            self.senders[sender] = self.tickets.pop(message.ticket)
            opened.data, link.epoch = link, opened.link.epoch
            # by that the other end is known, see ``strangers``
            link.send(protocol.Beat())
        line = self.senders.get(sender)
        if line is None or line.data is None or message.epoch != line.data.epoch:
            return  # of an epoch that is over
        line.heard_s = time.monotonic()
        if not line.data.accepts(message):
            self.lose(line, "results were lost on the way")
        elif line.peer.state is State.ASKED:
            self._join(line)
        else:
            self.read_data(line, message, rest)


def _suite() -> protocol.Suite:
    """Return the cipher for the data connections, and say so."""
    suite, rates = seal.fastest()
    measured = ", ".join(f"{one} {rate / 1e6:,.0f} MB/s" for one, rate in rates.items())
    log.info(f"data connections are sealed with {suite}; here {measured}")
    return suite
