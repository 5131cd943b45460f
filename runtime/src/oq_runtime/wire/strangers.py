"""Keeps low the number of connections whose other end has not shown that it has the keys.

libzmq accepts whoever comes, and closes a connection that says nothing after seconds only: some
thousands would take all descriptors of the process. Beyond MOST the oldest is closed. In a thread,
since its process may be busy, and must not find itself without a descriptor. Not covered: who has
the keys (``security``).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import zmq

from oq_runtime.logs import about
from oq_runtime.wire import tcp
from oq_runtime.wire.monitor import Change, Monitor

log = logging.getLogger(__name__)

#: connections that have not shown keys yet, of one socket
MOST = 200
#: bytes that were sent to the other end, and have arrived, from which on it has the keys: all get a
#: greeting, 64, and who knows the key of the server then gets 170 more (RFC 23, RFC 26). A ticket
#: brings 53 (RFC 24), so that it takes an answer of its broker as well
KNOWN_BYTES = 128


class Strangers:
    """Watches a socket that is going to be bound to a TCP port, until it is closed.

    :param closed: called in another thread whenever a connection has ended
    :param keys: whether the other ends have any; else they stay strangers
    """

    def __init__(
        self,
        watched: zmq.Socket[Any],
        closed: Callable[[], object] = lambda: None,
        keys: bool = True,
    ) -> None:
        self.closed = closed
        self.keys = keys
        self.monitor = Monitor(watched)
        self.waiting: dict[int, None] = {}  # descriptors; the first has waited for the longest time
        self.thread = threading.Thread(target=self._watch, name="strangers", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Watch no more; to be called before the socket is closed."""
        self.monitor.stop()
        self.thread.join()

    def _watch(self) -> None:
        while True:
            self.monitor.socket.poll()
            for event in self.monitor.events():
                match event.change:
                    case Change.OPENED:
                        self.waiting.pop(event.descriptor, None)
                        self.waiting[event.descriptor] = None
                    case Change.CLOSED:
                        self.waiting.pop(event.descriptor, None)
                        self.closed()
                    case Change.REFUSED:
                        what = f"refused a connection: {event.reason}"
                        log.warning(what, extra=about("connection"))
                    case Change.STOPPED:  # or the socket could not be bound
                        self.monitor.socket.close(linger=0)
                        return
                while len(self.waiting) > MOST:
                    self._judge(next(iter(self.waiting)), event.url)

    def _judge(self, descriptor: int, url: str) -> None:
        """Close a connection, unless its other end has shown the keys; it is not watched any more.

        The number may belong to something else by now: a connection to another port, or none.
        """
        del self.waiting[descriptor]
        with contextlib.suppress(OSError), tcp.borrowed(descriptor) as connection:
            port = connection.getsockname()[1]
            acked, _ = tcp.counters(connection)
            if not url.endswith(f":{port}") or (self.keys and acked >= KNOWN_BYTES):
                return
            address = connection.getpeername()[0]
            connection.shutdown(socket.SHUT_RDWR)
            log.warning(
                f"closed a connection from {address}, which has shown no key: more than {MOST} "
                f"such are open to {url}; let the firewall admit the hosts of the cluster alone",
                extra=about("strangers"),
            )
