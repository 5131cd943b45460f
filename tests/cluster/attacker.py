"""Run on a node: send to a port of the cluster what no member of it would send.

    attacker.py HOW HOST PORT COUNT

    strangers   COUNT frames over plain TCP, a hundred to a connection, after all kinds of greetings
    members     COUNT frames by the keys of the cluster: noise, and messages with bytes changed
    tickets     COUNT frames over connections for which a ticket is made up
    deaf        COUNT questions by the keys of the cluster, of which no answer is read
    idle        COUNT connections that say nothing; ends with its stdin
    silent      COUNT connections that say nothing; those that are closed are opened again
    huge        a frame of 1 GiB, announced by a stranger
    large       a frame of 1 GiB, sent by a member
    bomb        a message of COUNT frames of 1 MiB, sent by a member
    half        a job of its own whose task has no call
    boast       a job of its own with a user and a title that forge a table; ends with its stdin

Prints one JSON object when it has done so: how much of it could be sent.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from oq_runtime import config, facts
from oq_runtime.wire import protocol, security, transport
from tests.cluster.liar import WORDS, flood

#: RFC 23/ZMTP: signature, version 3.1, mechanism CURVE, as a client
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
#: the same with mechanism PLAIN, and what its client says
PLAIN = GREETING.replace(b"CURVE", b"PLAIN")
FRAMES_PER_CONNECTION, FRAMES_AT_ONCE = 100, 10_000
HUGE = 1 << 30
TIMEOUT_S = 10.0
#: what a broker asks for
LEASE = protocol.Lease(
    ticket=b"t" * 16,
    data_url="tcp://192.0.2.99:1912",
    terms=protocol.Terms(protocol.Suite.AES_256_GCM, bytes(32), "node"),
)
#: of an attack by silence
SILENT_S = 12.0

#: one message of each kind that goes over TCP, but no command and no release: those would be obeyed
SAMPLES = [
    protocol.Hello(job="x", pid=1, role="broker"),
    protocol.Welcome(pid=1, host="h", slots=3),
    protocol.Refused(reason="r"),
    protocol.Lease(job="x", ticket=b"t" * 16, data_url="tcp://192.0.2.9:1912"),
    protocol.Leased(slots=3),
    protocol.NoLease(job="x"),
    protocol.Task(job="x", task=1, attempt=1, func="f", call=b"c"),
    protocol.Fetch(digest=b"d" * 32),
    protocol.BlobChunk(digest=b"d" * 32, offset=0),
    protocol.Chunk(task=1, attempt=1, offset=0),
    protocol.Started(task=1, attempt=1),
    protocol.Ended(task=1, attempt=1, parts=1, nbytes=1),
    protocol.Grant(job="x", task=1, attempt=1),
    protocol.Abort(job="x", task=1, attempt=1),
    protocol.Died(task=1, attempt=1, reason="r"),
    protocol.Preempted(task=1, attempt=1, by="b"),
    protocol.Beat(job="x", wanted=3),
]
ENCODED = [protocol.encode(message) for message in SAMPLES]


def mutated(rng: random.Random) -> bytes:
    """A frame of noise, or a message of which some bytes are changed, cut off or doubled."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(300))
    frame = bytearray(rng.choice(ENCODED))
    if kind == 1:
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
    elif kind == 2:
        del frame[rng.randrange(len(frame)) :]
    elif kind == 3:
        frame += frame[rng.randrange(len(frame)) :]
    return bytes(frame)  # kind 4: a true message that comes out of the blue


def zmtp(frame: bytes, flags: int) -> bytes:
    """A frame as RFC 23 puts it on the wire; with bit 2 of the flags it is a command."""
    long = len(frame) > 255
    size = struct.pack(">Q", len(frame)) if long else bytes([len(frame)])
    return bytes([flags & ~2 | (2 if long else 0)]) + size + frame


def connect(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), TIMEOUT_S)


def strangers(host: str, port: int, count: int) -> int:
    rng = random.Random(1)
    sent = 0
    greetings = [b"", GREETING, GREETING[:20], rng.randbytes(64), b"GET / HTTP/1.1\r\n\r\n"]
    while sent < count:
        with contextlib.suppress(OSError), connect(host, port) as sock:
            sock.sendall(rng.choice(greetings))
            for _ in range(FRAMES_PER_CONNECTION):
                sent += 1
                sock.sendall(zmtp(mutated(rng), rng.choice([0, 1, 4, rng.randrange(256)])))
    return sent


def tickets(host: str, port: int, count: int) -> int:
    rng = random.Random(3)
    sent = 0
    while sent < count:
        ticket = rng.randbytes(16).hex().encode()
        shown = bytes([len(ticket)]) + ticket
        initiate = b"\x08INITIATE\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        said = zmtp(b"\x05HELLO" + shown * 2, 4) + zmtp(initiate, 4)
        frames = b"".join(
            zmtp(rng.randbytes(rng.randrange(300)), rng.randrange(2)) for _ in range(FRAMES_AT_ONCE)
        )
        with contextlib.suppress(OSError), connect(host, port) as sock:
            sock.sendall(PLAIN + said + frames)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        sent += FRAMES_AT_ONCE
    return sent


def member(context: zmq.Context[Any], host: str, port: int) -> zmq.Socket[Any]:
    cluster = config.Config.from_sections(config.read()).cluster
    assert cluster is not None
    keys = security.Keys.derive(security.read_secret(cluster.authkey))

    def secure(sock: zmq.Socket[Any]) -> None:
        security.secure_client(sock, keys)

    sock = transport.dealer(context, f"tcp://{host}:{port}", secure=secure)
    sock.setsockopt(zmq.SNDTIMEO, round(TIMEOUT_S * 1000))
    return sock


def members(host: str, port: int, count: int) -> int:
    rng = random.Random(2)
    sent = 0
    with zmq.Context() as context, member(context, host, port) as sock:
        for _ in range(count):
            frames = [mutated(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
            sock.send_multipart(frames)
            sent += len(frames)
            while sock.poll(0):
                sock.recv_multipart()
        sock.setsockopt(zmq.LINGER, 10_000)
    return sent


def deaf(host: str, port: int, count: int) -> int:
    with zmq.Context() as context, member(context, host, port) as sock:
        sock.setsockopt(zmq.RCVHWM, 1)
        question = protocol.encode(protocol.Command(action="status"))
        for number in range(count):
            try:
                sock.send(question)
            except zmq.Again:  # its answers have to wait, and so have its questions
                return number
        sock.setsockopt(zmq.LINGER, 10_000)
    return count


def idle(host: str, port: int, count: int) -> int:
    connections = [connect(host, port) for _ in range(count)]
    print(json.dumps({"open": len(connections)}), flush=True)
    sys.stdin.read()
    return len(connections)


def silent(host: str, port: int, count: int) -> int:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    opened = 0
    connections: list[socket.socket] = []
    end_s = time.monotonic() + SILENT_S
    while time.monotonic() < end_s:
        while len(connections) < count and time.monotonic() < end_s:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((host, port))
            connections.append(sock)
            opened += 1
        time.sleep(0.02)
        connections = [sock for sock in connections if not ended(sock)]
    return opened


def ended(sock: socket.socket) -> bool:
    """Whether a connection was closed at the other end, and now is at this one."""
    try:
        if sock.recv(4096):
            return False
    except BlockingIOError:
        return False
    except OSError:
        pass
    sock.close()
    return True


def huge(host: str, port: int, count: int) -> int:
    sent = 0
    with contextlib.suppress(OSError), connect(host, port) as sock:
        sock.sendall(GREETING + b"\x02" + struct.pack(">Q", HUGE))
        for _ in range(HUGE >> 20):
            sock.sendall(bytes(1 << 20))
            sent += 1 << 20
    return sent


def large(host: str, port: int, count: int) -> int:
    return message(host, port, [HUGE])


def bomb(host: str, port: int, count: int) -> int:
    return message(host, port, [1 << 20] * count)


def message(host: str, port: int, sizes: list[int]) -> int:
    """Send one message of such frames; returns when the other end has closed the connection."""
    with zmq.Context() as context, member(context, host, port) as sock:
        flood(sock, sizes)
    return sum(sizes)


def half(host: str, port: int, count: int) -> int:
    cluster = config.Config.from_sections(config.read()).cluster
    assert cluster is not None
    own = facts.own(cluster.dbserver, cluster.shared_dir)
    answers = 0
    with zmq.Context() as context:
        for number in range(count):
            with member(context, host, port) as sock:
                link = transport.Link(sock, f"oq-run-half-{number}", 1)
                link.send(protocol.Hello(pid=1, role="broker", facts=own))
                answers += bool(sock.poll(5000))
                link.send(LEASE)
                answers += bool(sock.poll(5000))
                task = protocol.Task(
                    job=link.job, epoch=1, seq=2, task=1, attempt=1, func="f", call=b""
                )
                fields = msgspec.msgpack.decode(protocol.encode(task))
                del fields["call"]
                sock.send(msgspec.msgpack.encode(fields))
                link.send(protocol.Release())
                link.send(protocol.Ping())  # comes back when the release was read
                while sock.poll(5000):
                    if isinstance(protocol.decode(sock.recv()), protocol.Ping):
                        break
    return answers


def boast(host: str, port: int, count: int) -> int:
    cluster = config.Config.from_sections(config.read()).cluster
    assert cluster is not None
    own = facts.own(cluster.dbserver, cluster.shared_dir)
    with zmq.Context() as context, member(context, host, port) as sock:
        link = transport.Link(sock, "oq-run-boast", 1)
        link.send(protocol.Hello(pid=1, role="broker", facts=own, user=WORDS))
        link.send(LEASE)
        while not select.select([sys.stdin], [], [], 0.5)[0]:
            link.send(protocol.Beat(title=WORDS))
    return count


def main() -> None:
    how, host, port, count = sys.argv[1:5]
    ways: dict[str, Callable[[str, int, int], int]] = {
        "strangers": strangers, "members": members, "tickets": tickets, "deaf": deaf,
        "idle": idle, "silent": silent, "huge": huge, "large": large, "bomb": bomb, "half": half,
        "boast": boast,
    }  # fmt: skip
    print(json.dumps({"sent": ways[how](host, int(port), int(count))}))


if __name__ == "__main__":
    main()
