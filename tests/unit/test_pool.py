"""What an administrator's commands make of agents that say nothing, or never stop."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from oq_runtime.cluster import pool as pools
from oq_runtime.cluster.pool import (
    ANSWER_SECS,
    NAMELESS,
    SILENT,
    TOO_MUCH,
    Pool,
    Unreachable,
    silent,
)
from oq_runtime.config import Cluster
from oq_runtime.wire import protocol, security, transport

pytestmark = pytest.mark.timeout(60)

HOST, SECRET = "127.0.0.1", "a secret of this test"
#: as long as it lasts they would not end; a machine that is busy takes its time
LATE_S = 10 * ANSWER_SECS
#: takes much longer to read than to send
STATUS = protocol.AgentStatus(
    host="h", pid=1, slots=1, busy=0, jobs=["j"] * 1000, memory=0.5, engine="e",
    state=protocol.AgentState.UP,
)  # fmt: skip


@contextmanager
def flooding(*messages: protocol.Message, frames: int = 0) -> Iterator[Pool]:
    """A cluster of one agent that says this again and again to whoever has called it.

    :param frames: of a chunk each, that it says first, in one message
    """
    keys = security.Keys.derive(SECRET.encode())
    context: zmq.Context[Any] = zmq.Context()
    gate = security.Gate(context, keys)
    secure = functools.partial(security.secure_server, keys=keys)
    control = transport.router(context, f"tcp://{HOST}:*", secure=secure)
    port = int(control.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    encoded = [protocol.encode(message) for message in messages]
    bomb = [bytes(protocol.CHUNK_BYTES)] * frames
    over = threading.Event()

    def flood() -> None:
        peers: set[bytes] = set()
        while not over.is_set():
            if control.poll(0 if peers else 100):
                peers.add(peer := control.recv_multipart()[0])
                if bomb:
                    control.send_multipart([peer, encoded[0], *bomb], copy=False)
            for peer in list(peers):
                try:
                    for frame in encoded:
                        control.send_multipart([peer, frame], zmq.DONTWAIT)
                except zmq.Again:
                    pass
                except zmq.ZMQError:  # that call is over
                    peers.remove(peer)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield Pool(Cluster({HOST: 1}, port, HOST, HOST, range(1, 2), "", SECRET))
    finally:
        over.set()
        thread.join()
        gate.stop()
        context.destroy(linger=0)


@pytest.mark.attack
def test_questions_end_in_time() -> None:
    with flooding(protocol.Refused(reason="r"), STATUS) as pool:
        began_s = time.monotonic()
        # whichever has come when it looks
        answer = pool.ask("status")[HOST]
        assert isinstance(answer, protocol.AgentStatus) or answer == Unreachable("r")
        assert time.monotonic() - began_s < LATE_S
    with flooding(protocol.Ping(), STATUS) as pool:
        began_s = time.monotonic()
        assert pool.measure(HOST).bytes_per_s
        assert time.monotonic() - began_s < LATE_S


@pytest.mark.attack
def test_an_answer_without_an_end_is_not_waited_for() -> None:
    """All its frames would be in memory before it is seen."""
    with flooding(protocol.Ping(), frames=500) as pool:
        assert pool.ask("status")[HOST] == Unreachable(TOO_MUCH)


def test_a_host_without_an_address_is_not_called_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = "192.0.2.9", "fd00::2"
    assert silent(hosts) == {
        "192.0.2.9": Unreachable(SILENT),
        "fd00::2": Unreachable(NAMELESS),
    }
    monkeypatch.setattr(pools, "ANSWER_SECS", -1)  # a name server has taken them
    assert silent(hosts) == dict.fromkeys(hosts, Unreachable(SILENT))
