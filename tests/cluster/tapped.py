"""Run in place of ``oq_runtime.node.daemon``: an agent, and somebody on the way of its data.

    tapped.py WAY NOTES [options of oq-agent]

He has no key, and on each of the first connections does one of HOWS to a message as long as a
chunk, in one direction (``to node``, ``to broker``). Each time he appends its name to the file
NOTES, and then passes on what comes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from oq_runtime.node import daemon
from oq_runtime.wire import protocol, transport

HOWS = {
    "flip": "one bit of it",
    "cut": "its last byte is left out",
    "drop": "it is left out",
    "repeat": "it comes twice",
    "swap": "it comes after the next one",
    "old": "in its place that of the connection before comes, sealed with its key",
    "mirror": "in its place one of the other direction comes",
    "header": "it comes without its payload",
    "hello": "in its place an opening comes that is not sealed",
}
#: which of the long messages of a connection: some tasks are done by then
WHICH = 48
LONG_BYTES = 500_000
#: RFC 23
GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4

#: a message as it is on the wire: its frames, each with its flags
Message = list[tuple[int, bytes]]


class Way:
    """One direction of a connection, in a thread."""

    def __init__(self, source: socket.socket, target: socket.socket, tap: Tap | None) -> None:
        self.source, self.target, self.tap = source, target, tap
        self.longest: Message = []  # the last long one
        self.thread = threading.Thread(target=self.run, daemon=True)

    def take(self, nbytes: int) -> bytes:
        taken = bytearray()
        while len(taken) < nbytes:
            if not (piece := self.source.recv(min(nbytes - len(taken), 1 << 20))):
                raise EOFError
            taken += piece
        return bytes(taken)

    def message(self) -> Message:
        """The next command or message (RFC 23)."""
        frames: Message = []
        while not frames or frames[-1][0] & MORE:
            flags = self.take(1)[0]
            size = struct.unpack(">Q", self.take(8))[0] if flags & LONG else self.take(1)[0]
            frames.append((flags, self.take(size)))
        return frames

    def messages(self) -> Iterator[Message]:
        number = 0
        while True:
            found = self.message()
            if len(found[-1][1]) < LONG_BYTES or found[0][0] & COMMAND:
                yield found
                continue
            number += 1
            self.longest = found
            if self.tap is None or number != WHICH:
                yield found
            else:
                yield from self.tap.tamper(self, found)

    def run(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            for _ in range(GREETING_BYTES):  # each side waits for parts of the other's
                self.target.sendall(self.take(1))
            for message in self.messages():
                self.target.sendall(b"".join(map(wire, message)))
        for sock in (self.source, self.target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def wire(frame: tuple[int, bytes]) -> bytes:
    flags, body = frame
    return bytes([flags]) + struct.pack(">Q" if flags & LONG else ">B", len(body)) + body


class Tap:
    """Passes on what goes to a data port, except for what it does to it."""

    def __init__(self, way: str, notes: str) -> None:
        self.way, self.notes = way, notes
        self.left = list(HOWS)
        self.old: Message = []
        self.other: Way | None = None

    def through(self, url: str) -> str:
        """The URL to which the agent is to connect for this one."""
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, args=(listener, host, int(port)), daemon=True).start()
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    def serve(self, listener: socket.socket, host: str, port: int) -> None:
        with listener:
            node, _ = listener.accept()
        broker = socket.create_connection((host, port))
        mine = self if self.left else None
        up = Way(node, broker, mine if self.way == "to broker" else None)
        down = Way(broker, node, mine if self.way == "to node" else None)
        self.other = down if self.way == "to broker" else up
        for each in (up, down):
            each.thread.start()

    def tamper(self, way: Way, message: Message) -> Iterator[Message]:
        """What comes in the place of a message; where the connection ends before, it is next."""
        (flags, header), (last, payload) = message
        match how := self.left[0]:
            case "flip":
                yield [(flags, header), (last, flipped(payload))]
            case "cut":
                yield [(flags, header), (last, payload[:-1])]
            case "drop":
                pass
            case "repeat":
                yield message
                yield message
            case "swap":
                yield way.message()
                yield message
            case "old":
                yield self.old
            case "mirror":
                assert self.other and self.other.longest
                yield self.other.longest
            case "header":
                yield [(flags & ~MORE, header)]
            case "hello":
                hello = protocol.encode(protocol.Hello(pid=1, role="agent", ticket=bytes(16)))
                yield [(MORE, hello), (LONG, bytes(protocol.PROBE_BYTES))]
        self.left.remove(how)
        self.old = message
        with open(self.notes, "a") as file:
            print(how, file=file)


def flipped(piece: bytes) -> bytes:
    return piece[:-100] + bytes([piece[-100] ^ 16]) + piece[-99:]


def main() -> None:
    way, notes = sys.argv[1:3]
    del sys.argv[1:3]
    tap = Tap(way, notes)
    dealer: Callable[..., Any] = transport.dealer

    def tapped(context: Any, url: str, **options: Any) -> Any:
        return dealer(context, tap.through(url), **options)

    transport.dealer = tapped
    daemon.daemon()


if __name__ == "__main__":
    main()
