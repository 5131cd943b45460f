"""Light stand-ins for agents, hundreds in a process: they answer a broker and run nothing.

    python -m benchmarks.standins FIRST COUNT PORT HOLD_S < secret

Agent number N listens on the loopback address of ``address(N)``, with one slot. A task ends when it
has been held for HOLD_S seconds, with a body that the engine's side can read. All messages are
those of the protocol, over sockets as agents have them; what an agent does with processes, memory
and files is left out. Prints a line of JSON when all sockets are bound, and one per agent with the
time (s, monotonic) when its first task came. Ends with its stdin.
"""

from __future__ import annotations

import functools
import heapq
import json
import os
import select
import sys
import time
from dataclasses import dataclass
from typing import Any

import zmq

from oq_runtime import descriptors, facts
from oq_runtime.core.limits import DEFAULTS
from oq_runtime.wire import payload, protocol, security, transport
from oq_runtime.wire.seal import Seal

#: sockets of a context: libzmq's own limit is 1,023
MAX_SOCKETS = 20_000


def address(number: int) -> str:
    """The loopback address of an agent."""
    return f"127.1.{number // 250}.{number % 250 + 1}"


def body() -> bytes:
    """A body of one part: an object that the client can load."""
    return b"".join(bytes(piece) for piece in payload.lay_out(payload.dump("done")))


@dataclass
class StandIn:
    """One agent: its control socket, and per broker the links of the present epoch."""

    number: int
    control: zmq.Socket[Any]
    link: transport.Link | None = None
    data: transport.Link | None = None
    first_s: float | None = None


class Crowd:
    """
    Agents that share a context, a gate and a loop.

    :param numbers: of the agents
    :param port: where they listen
    :param hold_s: how long a task takes (s)
    """

    def __init__(self, numbers: range, port: int, hold_s: float, keys: security.Keys) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self.gate = security.Gate(self.context, keys)
        self.keys = keys
        self.hold_s = hold_s
        self.own = facts.own()
        self.held: list[tuple[float, int, int, int]] = []  # due, agent, task, attempt
        self.agents: dict[int, StandIn] = {}
        self.epoll = select.epoll()
        self.by_fd: dict[int, StandIn] = {}
        self.body = body()
        for number in numbers:
            url = f"tcp://{address(number)}:{port}"
            control = transport.router(self.context, url, secure=self._server)
            agent = self.agents[number] = StandIn(number, control)
            # the descriptor of a socket tells of changes, see zmq_getsockopt(3), ZMQ_FD
            descriptor = int(control.getsockopt(zmq.FD))
            self.by_fd[descriptor] = agent
            self.epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)
        self.epoll.register(sys.stdin.fileno(), select.EPOLLIN)

    def _server(self, socket: zmq.Socket[Any]) -> None:
        security.secure_server(socket, self.keys)

    def run(self) -> None:
        next_beat_s = time.monotonic()
        while True:
            now = time.monotonic()
            due_s = min([next_beat_s, *(item[0] for item in self.held[:1])])
            for descriptor, _ in self.epoll.poll(max(0.0, due_s - now)):
                if descriptor == sys.stdin.fileno():
                    return
                self._read(self.by_fd[descriptor])
            now = time.monotonic()
            while self.held and self.held[0][0] <= now:
                _, number, task, attempt = heapq.heappop(self.held)
                self._end(self.agents[number], task, attempt)
            if now >= next_beat_s:
                next_beat_s = now + DEFAULTS.beat_s
                for agent in self.agents.values():
                    self._beat(agent)

    def _beat(self, agent: StandIn) -> None:
        if agent.data and agent.link:
            agent.link.send(protocol.Beat(free_bytes=1 << 30))
            agent.data.send(protocol.Beat())
            while transport.receive(agent.data.socket):
                pass  # beats of the broker
        self._read(agent)

    def _read(self, agent: StandIn) -> None:
        while frames := transport.receive(agent.control):
            peer, message = frames[0], protocol.decode(frames[1])
            if isinstance(message, protocol.Hello):
                self._close(agent)
                agent.link = transport.Link(agent.control, message.job, message.epoch, peer)
                agent.link.accepts(message)
                agent.link.send(
                    protocol.Welcome(
                        pid=os.getpid(), host=f"n{agent.number}", slots=1, facts=message.facts
                    )
                )
                continue
            link = agent.link
            if link is None or (message.job, message.epoch) != (link.job, link.epoch):
                continue
            assert link.accepts(message), message
            match message:
                case protocol.Lease(ticket=ticket, data_url=url, terms=terms):
                    assert terms is not None, "not encrypted"
                    show = functools.partial(security.show_ticket, ticket=ticket)
                    data = transport.dealer(self.context, url, again=False, secure=show)
                    seal = Seal(terms, link.job, link.epoch, broker=False)
                    agent.data = transport.Link(data, link.job, link.epoch, seal=seal)
                    opening = protocol.Hello(pid=os.getpid(), role="agent", ticket=ticket)
                    agent.data.send(opening, bytes(protocol.PROBE_BYTES))
                    link.send(protocol.Leased(slots=1))
                case protocol.Task(task=task, attempt=attempt):
                    if agent.first_s is None:
                        agent.first_s = time.monotonic()
                        print(json.dumps({"agent": agent.number, "first_s": agent.first_s}))
                        sys.stdout.flush()
                    due_s = time.monotonic() + self.hold_s
                    heapq.heappush(self.held, (due_s, agent.number, task, attempt))
                case protocol.Release():
                    self._close(agent)

    def _end(self, agent: StandIn, task: int, attempt: int) -> None:
        if agent.link is not None:
            agent.link.send(
                protocol.Ended(
                    task=task,
                    attempt=attempt,
                    parts=1,
                    nbytes=len(self.body),
                    body=self.body,
                )
            )

    def _close(self, agent: StandIn) -> None:
        if agent.data is not None:
            agent.data.socket.close(linger=0)
        agent.link = agent.data = None
        self.held = [item for item in self.held if item[1] != agent.number]
        heapq.heapify(self.held)


def main() -> None:
    first, count, port, hold_s = sys.argv[1:5]
    descriptors.raise_limit()
    keys = security.Keys.derive(sys.stdin.readline().strip().encode())
    numbers = range(int(first), int(first) + int(count))
    crowd = Crowd(numbers, int(port), float(hold_s), keys)
    print(json.dumps({"bound": len(numbers)}), flush=True)
    crowd.run()
    os._exit(0)  # closing thousands of sockets one by one takes long


if __name__ == "__main__":
    main()
