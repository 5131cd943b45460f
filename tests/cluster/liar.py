"""Run in place of ``oq_runtime.node.daemon``: an agent with the key that says what no agent would.

    liar.py HOW --address ADDRESS

    status    answers everybody who asks what it does
    refuse    takes no work of any broker, for a reason
    die       takes tasks, of which each attempt ends with the death of its worker, for a reason
    huge      shows its ticket, and then sends a frame of 1 GiB over that connection
    bomb      the same with a message of 1024 frames of 1 MiB

Of the last two a line "sent" in the log says that the broker has closed the connection. What it
says of itself, and its reasons, are ``WORDS``.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import msgspec
import zmq

from oq_runtime import config
from oq_runtime.priority import Priority
from oq_runtime.wire import protocol, security, transport
from oq_runtime.wire.seal import Seal

#: a row of a table and a line of a log that nobody wrote
FORGED = "192.0.2.9"
#: clear the screen, set the title, more escapes (C1), turn the direction of writing, new lines
MARKS = ("\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "\u202e", f"\n{FORGED}", f"\r{FORGED}")
#: bytes of each frame of a message
FRAMES = {"huge": [1 << 30], "bomb": [1 << 20] * 1024}
WORDS = "".join(MARKS) + "  0/64  up" + "y" * 1_000_000


def main() -> None:
    how, _, address = sys.argv[1:4]
    cluster = config.Config.from_sections(config.read()).cluster
    assert cluster is not None
    keys = security.Keys.derive(security.read_secret(cluster.authkey))
    context: zmq.Context[Any] = zmq.Context()
    gate = security.Gate(context, keys)

    def server(socket: zmq.Socket[Any]) -> None:
        security.secure_server(socket, keys)

    control = transport.router(context, cluster.control_url(address), secure=server)
    links: dict[bytes, transport.Link] = {}
    data: list[transport.Link] = []
    while True:
        control.poll()
        frames = transport.receive(control)
        if not frames:
            continue
        peer, message = frames[0], protocol.decode(frames[1])
        if isinstance(message, protocol.Command):
            control.send_multipart([peer, status()])
            continue
        if isinstance(message, protocol.Hello):
            links[peer] = transport.Link(control, message.job, message.epoch, peer)
            if how == "refuse":
                links[peer].send(protocol.Refused(reason=WORDS))
            else:
                links[peer].send(
                    protocol.Welcome(pid=os.getpid(), host=WORDS, slots=1, facts=message.facts)
                )
            continue
        link = links[peer]
        match message:
            case protocol.Lease(ticket=ticket, data_url=url, terms=terms) if terms:
                show = functools.partial(security.show_ticket, ticket=ticket)
                sock = transport.dealer(context, url, again=False, secure=show)
                seal = Seal(terms, link.job, link.epoch, broker=False)
                data.append(transport.Link(sock, link.job, link.epoch, seal=seal))
                opening = protocol.Hello(pid=os.getpid(), role="agent", ticket=ticket)
                data[-1].send(opening, bytes(protocol.PROBE_BYTES))
                if how in FRAMES:
                    flood(sock, FRAMES[how])
                    continue
                link.send(protocol.Leased(slots=1))
            case protocol.Task(task=task, attempt=attempt):
                link.send(protocol.Died(task=task, attempt=attempt, reason=WORDS))
            case protocol.Beat():
                link.send(protocol.Beat(free_bytes=1 << 30))
                for each in data:
                    each.send(protocol.Beat())
    gate.stop()


def flood(sock: zmq.Socket[Any], sizes: list[int]) -> None:
    """Send one message of such frames; returns when the other end has closed the connection."""
    monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    for size in sizes[:-1]:
        sock.send(bytes(size), zmq.SNDMORE, copy=False)
    sock.send(bytes(sizes[-1]), copy=False)
    assert monitor.poll(60_000), "the connection was not closed"
    sock.disable_monitor()
    print(f"sent {sum(sizes)} bytes", flush=True)


def status() -> bytes:
    """What it says that it does: a state that there is not would be refused, so that is right."""
    lease = protocol.LeaseStatus(
        name="oq-run-1", user=WORDS[:9999], title=WORDS[:9999],  # the message has a limit
        priority=Priority.LOW, age_s=1.0, slots=1, busy=0,
    )  # fmt: skip
    said = protocol.AgentStatus(
        host=WORDS, pid=1, slots=1, busy=0, jobs=[WORDS], leases=[lease], memory=0.5, engine=WORDS,
        state=protocol.AgentState.UP,
    )  # fmt: skip
    return msgspec.msgpack.encode(said)


if __name__ == "__main__":
    main()
