"""An agent as the broker knows it: its sockets, and what has become of the calls to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import zmq

from oq_runtime.wire import protocol, security, transport

#: seconds between two calls of an agent that does not answer, at first; then up to a beat
CALL_SECS = 0.05
#: a control socket, and on TCP what watches its handshakes
Connection = tuple["zmq.Socket[Any]", security.HandshakeMonitor | None]


class Peer:
    """An agent as the broker knows it, over the calls that it took to reach it.

    ``state``: ``calling`` until it has granted a lease, ``leased``, or ``refused``. At most
    ``most_s`` seconds are between two calls.
    """

    def __init__(self, name: str, connect: Callable[[], Connection], most_s: float) -> None:
        self.name = name
        self.most_s = most_s
        self.connect = connect
        self.socket, self.monitor = connect()
        self.state = "calling"
        self.reason = "no answer yet"
        self.host = name
        self.slots = 0  # all of the node's
        self.link = transport.Link(self.socket, "", 0)
        self.data: transport.Link | None = None
        self.next_call_s = 0.0
        self.pause_s = CALL_SECS

    def call(self, job: str, hello: protocol.Hello, now: float) -> None:
        """Open a new epoch; what comes of earlier ones is ignored from now on."""
        self.link = transport.Link(self.socket, job, self.link.epoch + 1)
        self.data = None
        sent = self.link.send(hello)
        self.pause_s = self.most_s if sent else min(self.pause_s * 1.5, self.most_s)
        self.next_call_s = now + self.pause_s

    def hang_up(self, state: str, reason: str) -> None:
        """End the epoch and drop the connection with whatever it may still hold."""
        self.state, self.reason = state, reason
        self.close()
        self.socket, self.monitor = self.connect()
        self.link = transport.Link(self.socket, self.link.job, self.link.epoch + 1)
        self.data = None
        self.pause_s = CALL_SECS if state == "calling" else self.most_s
        self.next_call_s = time.monotonic() + self.pause_s

    def close(self, linger_ms: int = 0) -> None:
        if self.monitor is not None:
            self.monitor.close()
        self.socket.close(linger=linger_ms)
