"""TCP connections that libzmq has made, as the kernel sees them. They stay libzmq's."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: tcpi_bytes_acked and tcpi_bytes_received of struct tcp_info: unsigned numbers of 64 bits, see
#: <linux/tcp.h>
COUNTERS = struct.Struct("=120xQQ")


@contextmanager
def borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Lend the connection of a descriptor; calls on it raise OSError if it is none (any more)."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
    try:
        yield found
    finally:
        found.detach()


def counters(connection: socket.socket) -> tuple[int, int]:
    """Return the bytes that were sent and have arrived, and those that were received."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, COUNTERS.size)
    acked, received = COUNTERS.unpack(info)
    return acked, received


def peer(descriptor: int) -> tuple[Any, ...]:
    """Return the address and the port at the other end; nothing when it is there no more."""
    if descriptor < 0:
        return ()
    with contextlib.suppress(OSError), borrowed(descriptor) as connection:
        return tuple(connection.getpeername())
    return ()


def end(descriptor: int, known: tuple[Any, ...]) -> None:
    """End the connection of a descriptor, which may belong to something else by now.

    :param known: of its ``peer``: the address, or that and the port
    """
    if descriptor < 0:
        return
    with contextlib.suppress(OSError), borrowed(descriptor) as connection:
        if connection.getpeername()[: len(known)] == known:
            connection.shutdown(socket.SHUT_RDWR)
