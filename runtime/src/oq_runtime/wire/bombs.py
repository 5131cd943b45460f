"""Ends connections that send more than a process can hold before it gets a message to judge.

libzmq bounds a frame, but hands over a message only when its last frame is there: one of a thousand
frames is in memory by then. So where the memory of the process grows, a thread looks at what each
TCP connection has received since a message of it was read. Not covered: connections of strangers,
of which nothing is kept (``strangers``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time

from oq_runtime.logs import about
from oq_runtime.wire import tcp, transport

log = logging.getLogger(__name__)

#: bytes that may come over a connection while no message of it is read: more than the queues of the
#: kernel and of this project's sockets hold for a peer that is well
MOST_BYTES = 96 << 20
#: how many times as long as a look the pause after it is at least: 2,000 connections take 16 ms
PAUSE = 10
#: seconds between two looks, and after one that saw much: plain frames come at 3 GB/s
LOOK_SECS, SOON_SECS = 0.02, 0.005
#: seconds that another thread of the process may keep the interpreter from this one
SWITCH_SECS = 0.0005
#: bytes by which the memory has grown when the connections are looked at
GROWTH_BYTES = 16 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Bombs:
    """A thread that watches all TCP connections of this process until it is closed.

    :param most_bytes: that may come over all connections together in the same way
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self.steady_bytes = self._memory()
        self.read: dict[int, int] = {}  # descriptor -> bytes received when a message was read last
        self.closing = threading.Event()
        sys.setswitchinterval(SWITCH_SECS)
        self.thread = threading.Thread(target=self._watch, name="bombs", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.thread.join()
        os.close(self.statm)

    def _memory(self) -> int:
        """Return the bytes that this process has for itself: its files are bounded by others."""
        _, resident, shared, *_ = map(int, os.pread(self.statm, 128, 0).split())
        return (resident - shared) * PAGE_BYTES

    def _watch(self) -> None:
        pause_s = LOOK_SECS
        while not self.closing.wait(pause_s):
            began_s, unread = time.thread_time(), 0
            memory = self._memory()
            self.steady_bytes = min(self.steady_bytes, memory)
            if memory > self.steady_bytes + GROWTH_BYTES:
                with contextlib.suppress(OSError):  # no descriptor is left: next time
                    unread = self._look(memory)
            pause_s = max(
                SOON_SECS if unread > MOST_BYTES // 3 else LOOK_SECS,
                PAUSE * (time.thread_time() - began_s),
            )

    def _look(self, memory: int) -> int:
        """Look at all connections; return the bytes that have come and were not read."""
        received = _received()
        heard, transport.heard = transport.heard, set()
        self.read = {  # of a new one, of which nothing was read, all that has come counts
            one: now if one in heard else min(now, self.read.get(one, 0))
            for one, now in received.items()
        }
        unread = {one: now - self.read[one] for one, now in received.items()}
        together = sum(unread.values())
        if together < GROWTH_BYTES:
            self.steady_bytes = memory  # it has grown for another reason
        for one, nbytes in sorted(unread.items(), key=lambda item: item[1], reverse=True):
            if nbytes > MOST_BYTES or together > self.most_bytes:
                _end(one, nbytes)
                together -= nbytes
        return together


def _received() -> dict[int, int]:
    """Return how many bytes have come over each TCP connection of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), tcp.borrowed(int(name)) as connection:
            _, found[int(name)] = tcp.counters(connection)
    return found


def _end(descriptor: int, nbytes: int) -> None:
    with contextlib.suppress(OSError), tcp.borrowed(descriptor) as connection:
        address = connection.getpeername()[0]
        connection.shutdown(socket.SHUT_RDWR)
        log.warning(
            f"closed a connection to {address}: {nbytes >> 20} MiB have come without the end of a "
            "message; no part of this cluster sends so much",
            extra=about("bombs"),
        )
