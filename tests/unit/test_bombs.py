"""A message without an end is cut off with its connection; of others there may be any number."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
import zmq

from oq_runtime.wire import bombs, transport
from oq_runtime.wire.monitor import Change, Monitor
from tests.leftovers import wait_for

LIMIT_S = 20.0
MIB = bytes(1 << 20)
#: what a DEALER says before its first message, without encryption (RFC 23)
OPENING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
MORE_LONG = b"\x03"
Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    """One whose process looks at its connections all the time."""
    monkeypatch.setattr(bombs, "GROWTH_BYTES", -(1 << 40))
    monkeypatch.setattr(bombs, "MOST_BYTES", 8 << 20)
    # what earlier tests read over descriptors that are used again here
    monkeypatch.setattr(transport, "heard", set())
    watching = bombs.Bombs(1 << 30)
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)
    watching.close()
    assert not watching.thread.is_alive()


def connect(url: str) -> socket.socket:
    """Return a connection to a router over which a message can begin."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), LIMIT_S)
    connection.sendall(OPENING + b"\x04" + bytes([len(READY)]) + READY)
    return connection


def test_what_came_before_the_first_look_counts(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bombs, "GROWTH_BYTES", 1 << 40)  # no look yet
    server = transport.router(context, "tcp://127.0.0.1:*")
    with connect(server.getsockopt_string(zmq.LAST_ENDPOINT)) as bad:
        for _ in range(20):  # far more than the buffers of the two ends hold
            bad.sendall(MORE_LONG + struct.pack(">Q", len(MIB)) + MIB)
        monkeypatch.setattr(bombs, "GROWTH_BYTES", -(1 << 40))
        with contextlib.suppress(ConnectionError):
            while bad.recv(1 << 16):  # what the router says at the beginning
                pass


def test_a_message_must_end(context: Context) -> None:
    server = transport.router(context, "tcp://127.0.0.1:*")
    url = server.getsockopt_string(zmq.LAST_ENDPOINT)
    good = transport.dealer(context, url)
    monitor = Monitor(good)
    good.send(MIB)
    sent = 0

    def cut_off() -> bool:
        nonlocal sent
        good.send(MIB)
        assert server.poll(int(LIMIT_S * 1000)), "messages that end come through"
        assert transport.receive(server)
        try:
            bad.sendall(MORE_LONG + struct.pack(">Q", len(MIB)) + MIB)
        except ConnectionError:
            return True
        sent += 1
        return False

    with connect(url) as bad:
        assert wait_for(cut_off, LIMIT_S)
    assert 8 <= sent < 100
    assert Change.CLOSED not in [event.change for event in monitor.events()]
    monitor.close()
