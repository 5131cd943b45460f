"""One socket that calls many: each call is a connection of its own, and nothing is sent twice.

A socket per callee would need three of libzmq's 1,023 for each, and a look at all of them whenever
one has something to say.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import zmq

from oq_runtime.wire import security, transport
from oq_runtime.wire.monitor import Event, Monitor


class Calls:
    """A socket that is connected to any number of URLs.

    Messages to a callee begin with the name of its call, and so do those that come from it. A call
    that fails or ends is not made again by itself.

    :param keys: of the cluster; None over ipc
    """

    def __init__(self, context: zmq.Context[Any], keys: security.Keys | None) -> None:
        secure = functools.partial(security.secure_client, keys=keys) if keys else None
        self.socket = transport.caller(context, secure=secure)
        self.monitor = Monitor(self.socket)
        self.numbers = itertools.count()

    def call(self, url: str) -> bytes:
        """Open a connection, which is not waited for; return its name.

        Raises zmq.ZMQError for what is not the URL of a host.
        """
        name = b"call-%d" % next(self.numbers)
        self.socket.setsockopt(zmq.CONNECT_ROUTING_ID, name)
        self.socket.connect(url)
        return name

    def hang_up(self, url: str) -> None:
        """Close the connection to a URL, with whatever is still queued for it or has come of it."""
        with contextlib.suppress(zmq.ZMQError):  # it has been closed at the other end
            self.socket.disconnect(url)

    def events(self) -> list[Event]:
        """Return what has become of the calls, never waiting."""
        return self.monitor.events()

    def close(self, linger_ms: int = 0) -> None:
        self.monitor.close()
        self.socket.close(linger=linger_ms)
