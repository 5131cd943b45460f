"""The WebUI's server: strangers who say nothing, go slowly, or send much, and those who do not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waitress import wasyncore

from oq_runtime.webui import server
from tests.conftest import Attacks
from tests.leftovers import wait_for

pytestmark = [pytest.mark.timeout(60), pytest.mark.attack]

HEAD = b"Host: x\r\nConnection: close\r\n"
#: bytes of an answer at /big: more than waitress lets a thread put aside
BIG_BYTES = 20 << 20
MOST = 10


def application(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/big":
        return [bytes(BIG_BYTES), b"end"]
    return [b"%d bytes" % len(environ["wsgi.input"].read())]


class Site:
    """A server with two threads in this process, and the clients that are to be closed."""

    def __init__(self) -> None:
        bounds = server.Bounds(
            listen="127.0.0.1:0", threads=2, has_logged_in=lambda cookies: cookies == "k=alice"
        )
        self.server = server.make(application, bounds)
        [self.listening] = [s for s in self.server.map.values() if isinstance(s, server.Server)]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.clients: list[socket.socket] = []

    def _run(self) -> None:
        while not self.ended.is_set():
            wasyncore.loop(timeout=0.05, use_poll=True, map=self.server.map, count=1)

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        for client in self.clients:
            client.close()
        self.server.close()

    def call(self, said: bytes = b"") -> socket.socket:
        client = socket.create_connection(self.listening.socket.getsockname(), 20)
        self.clients.append(client)
        client.sendall(said)
        return client

    def get(self) -> bytes:
        return answer(self.call(b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n"))

    def is_closed(self, client: socket.socket) -> bool:
        """Whether the server has ended a connection, which may be full of what was not read."""
        ports = [one.socket.getpeername()[1] for one in self.channels if one.socket]
        return client.getsockname()[1] not in ports

    @property
    def channels(self) -> list[server.Channel]:
        return list(self.listening.active_channels.values())


def answer(client: socket.socket) -> bytes:
    """Return the last line of what comes until the end."""
    data = b""
    while more := client.recv(65536):
        data += more
    return data.rpartition(b"\n")[2]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(server, "MOST", MOST)
    site = Site()
    yield site
    site.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE_S", 0.5)
    monkeypatch.setattr(server, "LOOK_SECS", 0)


def upload(nbytes: int, cookies: bytes = b"") -> bytes:
    head = b"POST / HTTP/1.1\r\n" + HEAD
    return head + b"Cookie: %s\r\nContent-Length: %d\r\n\r\n" % (cookies, nbytes)


def test_silent_connections_make_room(site: Site, attacks: Attacks) -> None:
    uploading = site.call(upload(4 << 20, b"k=alice") + bytes(1 << 20))
    assert wait_for(lambda: any(one.of_account for one in site.channels), 5)
    for _ in range(5 * MOST):
        site.call(b"GET / HTTP/1.1\r\n")
        attacks.tried(1, site.get() != b"0 bytes")
    assert len(site.channels) <= MOST + 1
    uploading.sendall(bytes(3 << 20))
    assert answer(uploading) == b"%d bytes" % (4 << 20)


def test_answers_that_nobody_reads_hold_no_thread(site: Site, attacks: Attacks) -> None:
    for _ in range(4):  # on two threads
        site.call(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        attacks.tried(1, site.get() != b"0 bytes")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n", upload(1 << 20), b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["nothing", "a part of a head", "a head", "a whole request, and reads nothing"],
)
def test_what_rests_is_closed(site: Site, said: bytes) -> None:
    client = site.call(said)
    assert wait_for(lambda: site.is_closed(client), 10)


@pytest.mark.usefixtures("impatient")
def test_what_is_too_slow_is_closed(site: Site) -> None:
    client = site.call(upload(1 << 20))

    def sends_a_byte() -> bool:
        try:
            client.sendall(b"x")
        except ConnectionError:
            return False
        return True

    assert wait_for(lambda: not sends_a_byte(), 10)


def test_a_slow_reader_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes an answer in pieces of a megabyte, each of which may last for minutes."""
    monkeypatch.setattr(server, "LOOK_SECS", 10_000)  # the test looks
    slow = Site()
    try:
        client = slow.call(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wait_for(lambda: any(one.total_outbufs_len for one in slow.channels), 10)
        [channel] = slow.channels
        now = channel.looked_s
        for _ in range(30):
            assert client.recv(128 << 10, socket.MSG_WAITALL)
            channel.look(now := now + 10)
            assert not slow.is_closed(client)
    finally:
        slow.close()


def test_urgent_data_end_a_connection(site: Site) -> None:
    client = site.call()
    client.send(b"!", socket.MSG_OOB)
    assert wait_for(lambda: site.is_closed(client), 10)


def test_a_large_body_is_kept_of_an_account_alone(site: Site, attacks: Attacks) -> None:
    nbytes = server.SMALL_BYTES + 1
    for cookies, kept in ((b"k=alice", nbytes), (b"k=mallory", 0), (b"", 0)):
        said = answer(site.call(upload(nbytes, cookies) + bytes(nbytes)))
        attacks.tried(1, said != b"%d bytes" % kept)
    assert answer(site.call(upload(1000) + bytes(1000))) == b"1000 bytes"


def test_chunks_are_not_taken(site: Site) -> None:
    head = b"POST / HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    client = site.call(head + b"0" * 5000)
    with client.makefile("rb") as said:
        assert said.readline().startswith(b"HTTP/1.1 501")
        assert b"give Content-Length" in said.read()
