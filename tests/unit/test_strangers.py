"""Connections that show no key: few stay open, whatever comes; members come and stay."""

from __future__ import annotations

import functools
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from oq_runtime import descriptors
from oq_runtime.wire import protocol, security, transport
from oq_runtime.wire.strangers import MOST, Strangers
from tests.leftovers import wait_for

LIMIT_S = 20.0
KEYS = security.Keys.derive(b"a secret of this test")
Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


@pytest.fixture(autouse=True)
def gate(context: Context) -> Iterator[security.Gate]:
    gate = security.Gate(context, KEYS)
    yield gate
    gate.stop()


@pytest.fixture
def server(context: Context) -> Iterator[zmq.Socket[bytes]]:
    """A socket that is watched."""
    yield from watched_socket(context, functools.partial(security.secure_server, keys=KEYS))


@pytest.fixture
def data(context: Context) -> Iterator[zmq.Socket[bytes]]:
    """One that asks for tickets."""
    yield from watched_socket(context, security.ask_for_tickets)


def watched_socket(context: Context, secured: transport.Secure) -> Iterator[zmq.Socket[bytes]]:
    watched: list[Strangers] = []

    def secure(sock: zmq.Socket[bytes]) -> None:
        secured(sock)
        watched.append(Strangers(sock))

    sock = transport.router(context, "tcp://127.0.0.1:*", secure=secure)
    yield sock
    watched[0].close()
    assert not watched[0].thread.is_alive()


def url(server: zmq.Socket[bytes]) -> str:
    return server.getsockopt_string(zmq.LAST_ENDPOINT)


def member(context: Context, server: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    secure = functools.partial(security.secure_client, keys=KEYS)
    return transport.dealer(context, url(server), secure=secure)


def hears(server: zmq.Socket[bytes], sock: zmq.Socket[bytes]) -> bool:
    transport.send(sock, protocol.Beat())
    return bool(server.poll(int(LIMIT_S * 1000))) and bool(transport.receive(server))


def stranger(server: zmq.Socket[bytes], says: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", int(url(server).rpartition(":")[2])), LIMIT_S)
    sock.sendall(says)
    sock.setblocking(False)
    return sock


def ended(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("says", [b"", b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)])
def test_the_oldest_strangers_are_closed_and_no_member(
    context: Context, server: zmq.Socket[bytes], says: bytes
) -> None:
    early = member(context, server)
    assert hears(server, early)
    with ExitStack() as stack:
        come = [stack.enter_context(stranger(server, says)) for _ in range(MOST + 100)]
        assert wait_for(lambda: sum(map(ended, come)) >= 100, LIMIT_S)
        assert all(map(ended, come[:50])), "the oldest ones"
        assert sum(map(ended, come)) <= 110
        assert hears(server, early), "it was there before them"
        assert hears(server, member(context, server)), "there is room for another one"


def test_a_ticket_alone_makes_no_member(
    context: Context, gate: security.Gate, data: zmq.Socket[bytes]
) -> None:
    """Who was answered over its connection has shown more: a record that opens."""
    ends = []
    for ticket in (b"of a member", b"seen on the way"):
        gate.tickets.add(ticket)
        sock = transport.dealer(
            context,
            url(data),
            again=False,
            secure=functools.partial(security.show_ticket, ticket=ticket),
        )
        sock.send(ticket)
        ends.append(sock)
        assert data.poll(int(LIMIT_S * 1000))
        sender, said = data.recv_multipart()
        if said == b"of a member":
            data.send_multipart([sender, bytes(60)])  # a beat
    assert ends[0].poll(int(LIMIT_S * 1000)), "as broker and agent do with their first records"
    ends[0].send(b"and so it has come")
    assert data.poll(int(LIMIT_S * 1000))
    with ExitStack() as stack:
        come = [stack.enter_context(stranger(data, b"")) for _ in range(MOST + 100)]
        assert wait_for(lambda: sum(map(ended, come)) >= 90, LIMIT_S)
        assert wait_for(lambda: not ends[1].poll(0, zmq.POLLOUT), LIMIT_S), "closed with them"
        assert ends[0].poll(0, zmq.POLLOUT)


def test_a_port_in_use_leaves_nobody_watching(context: Context, server: zmq.Socket[bytes]) -> None:
    watched: list[Strangers] = []
    with pytest.raises(zmq.ZMQError):
        transport.router(context, url(server), secure=lambda s: watched.append(Strangers(s)))
    watched[0].thread.join(LIMIT_S)
    assert not watched[0].thread.is_alive() and watched[0].monitor.socket.closed


def test_the_soft_limit_becomes_the_hard_one() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = "import resource; from oq_runtime import descriptors; descriptors.raise_limit(); "
    script += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    done = subprocess.run(
        ["sh", "-c", 'ulimit -Sn 256; exec "$@"', "sh", sys.executable, "-c", script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(most)] * 2


def test_what_is_opened_waits_for_a_descriptor() -> None:
    tries = []

    def make() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(24, "Too many open files")
        return 7

    assert descriptors.patiently(make) == 7
    with pytest.raises(FileNotFoundError):
        descriptors.patiently(Path("/nowhere").read_text)
