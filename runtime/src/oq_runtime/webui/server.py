"""The HTTP server of the site: waitress, which would wait for ever for whoever is slow.

Who reaches the port need not have an account. So each connection has to move, or makes room; what
comes in large of whoever has not logged in is read and dropped; and no thread waits for a client.
Not covered: what a request may do (``access``).
"""

from __future__ import annotations

import fcntl
import io
import resource
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, TransferEncodingNotImplemented
from waitress.receiver import FixedStreamReceiver
from waitress.server import MultiSocketServer, TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher

#: seconds that a connection may rest, or be slower than so many bytes a second
PATIENCE_S, BYTES_PER_S = 60.0, 1024
#: seconds between two looks at all of them
LOOK_SECS = 1
#: connections at a time: files that each of them may have open, and what the rest of the site needs
MOST, FILES_EACH, FILES_OF_SITE = 200, 3, 64
#: bytes of a body that is taken of anybody: a login
SMALL_BYTES = 1 << 20
HEADER_BYTES = 64 << 10
#: bytes of an answer that wait for a client, in a file, before a thread waits as well: any number
UNBOUNDED = 1 << 62


class Bounds(Adjustments):  # type: ignore[misc]
    """What waitress is to know of the site.

    :param has_logged_in: whether a request with these cookies is of an account
    """

    def __init__(self, *, has_logged_in: Callable[[str], bool], **options: Any) -> None:
        most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.has_logged_in = has_logged_in
        self.most = max(1, min(MOST, (most_files - FILES_OF_SITE) // FILES_EACH))
        super().__init__(
            # where all are at work; sockets that listen count as well
            connection_limit=self.most + self.most // 10 + 8,
            cleanup_interval=LOOK_SECS,
            asyncore_use_poll=True,
            max_request_header_size=HEADER_BYTES,
            outbuf_high_watermark=UNBOUNDED,
            log_socket_errors=False,
            ident=None,
            clear_untrusted_proxy_headers=True,
            **options,
        )


class Nowhere:
    """Takes the place of the buffer of a body that is dropped as it comes."""

    def append(self, data: bytes) -> None:
        pass

    def getfile(self) -> io.BytesIO:
        return io.BytesIO()

    def close(self) -> None:
        pass


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """A request, whose body is kept where it is small, or an account's.

    What is dropped is received nevertheless: a client that is cut off would not read the answer.
    """

    of_account = False

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.chunked:  # waitress has no bound for what may stand between the chunks
            raise TransferEncodingNotImplemented("give Content-Length, not Transfer-Encoding")
        if self.content_length > SMALL_BYTES:
            self.of_account = self.adj.has_logged_in(self.headers.get("COOKIE", ""))
            if not self.of_account:
                self.body_rcv = FixedStreamReceiver(self.content_length, Nowhere())


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection, and how long it is still waited for."""

    parser_class = Parser

    def __init__(self, *args: Any, **options: Any) -> None:
        self.moved_bytes = self.kernel_bytes = 0
        self.looked_s = time.monotonic()
        self.patience_s = PATIENCE_S
        super().__init__(*args, **options)

    @property
    def at_work(self) -> bool:
        """Whether it is the site that has not answered yet."""
        return bool(self.requests) and not self.total_outbufs_len

    @property
    def of_account(self) -> bool:
        """Whether an account's upload comes over it."""
        return self.request is not None and self.request.of_account

    def look(self, now: float) -> None:
        """Reckon how long it is still waited for; close it when that is over."""
        passed_s, self.looked_s = now - self.looked_s, now
        before_bytes, self.kernel_bytes = self.kernel_bytes, self._in_kernel()
        # the kernel takes an answer in pieces of a megabyte, each of which may last for minutes
        # (another thread may have sent one just now: then the next look counts it)
        moved_bytes, self.moved_bytes = self.moved_bytes, 0
        moved_bytes = max(0, moved_bytes + before_bytes - self.kernel_bytes)
        left_s = self.patience_s - passed_s + moved_bytes / BYTES_PER_S
        self.patience_s = PATIENCE_S if self.at_work else min(PATIENCE_S, left_s)
        if self.patience_s < 0:
            self.handle_close()  # not later: it may never be ready to be written to

    def _in_kernel(self) -> int:
        """Return the bytes that wait in the kernel for the client to take them."""
        try:
            answer = fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
        except OSError:
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def recv(self, buffer_size: int) -> bytes:
        data: bytes = super().recv(buffer_size)
        self.moved_bytes += len(data)
        return data

    def send(self, data: bytes, do_close: bool = True) -> int:
        sent: int = super().send(data, do_close)
        self.moved_bytes += sent
        return sent

    def handle_expt(self) -> None:
        """End what sends urgent data: nobody would read them, and the loop would not rest."""
        self.handle_close()


class Server(TcpWSGIServer):  # type: ignore[misc]
    """A socket that listens."""

    channel_class = Channel

    def readable(self) -> bool:
        # before the wait, in which a descriptor that is closed must not be another one's already
        if len(self.active_channels) > self.adj.most:
            self._make_room()
        return bool(super().readable())

    def maintenance(self, now: float) -> None:
        for channel in list(self.active_channels.values()):
            channel.look(time.monotonic())

    def _make_room(self) -> None:
        """Close the connection that has moved least, an account's after all others."""
        resting = [one for one in self.active_channels.values() if not one.at_work]
        if resting:
            min(resting, key=lambda one: (one.of_account, one.patience_s)).handle_close()


def make(app: Any, bounds: Bounds) -> MultiSocketServer:
    """Return what serves an application when it is run; raises OSError where it cannot listen."""
    sockets: dict[int, Any] = {}
    threads = ThreadedTaskDispatcher()
    threads.set_thread_count(bounds.threads)
    for address in bounds.listen:
        Server(app, sockets, dispatcher=threads, adj=bounds, sockinfo=address)
    return MultiSocketServer(sockets, bounds, dispatcher=threads)
