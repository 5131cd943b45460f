"""Who is refused and what each side says of it: a real agent and a real broker over ipc sockets.

The test plays the other side, which may be of another version.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from oq_runtime import facts
from oq_runtime.files import private
from oq_runtime.wire import protocol, transport
from oq_runtime.wire.protocol import PROTOCOL_VERSION, Facts, Hello
from tests.leftovers import wait_for

LIMIT_MS = 10_000
OTHER = PROTOCOL_VERSION + 1
BOTH = rf"protocol {PROTOCOL_VERSION}\D.*{OTHER}|protocol {OTHER}\D.*{PROTOCOL_VERSION}"

MODULES = {"agent": "node.daemon", "broker": "session.broker"}


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@contextmanager
def running(name: str, directory: Path, *args: str) -> Iterator[Path]:
    """Run an agent or a broker of this test process; yields the file of its stderr."""
    private.add_memory(private.own(directory), private.memory_name(directory))
    log = directory.parent / f"{name}.log"
    common = ["--directory", str(directory), "--owner", str(os.getpid())]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", f"oq_runtime.{MODULES[name]}", *common, *args], stderr=stream
        )
    try:
        yield log
    finally:
        process.kill()
        process.wait()
        private.remove(directory)


@contextmanager
def agent(tmp_path: Path, context: zmq.Context[Any]) -> Iterator[tuple[zmq.Socket[Any], Path]]:
    """A private agent without slots, a socket to its control, and its log."""
    directory = tmp_path / "s"
    url = f"ipc://{directory}/control"
    with running("agent", directory, "--control-url", url, "--slots", "0") as log:
        yield transport.dealer(context, url), log


def ask(socket: zmq.Socket[Any], header: bytes) -> Any:
    """Send a header; return the answer, of whatever version, as a dictionary."""
    socket.send(header)
    assert socket.poll(LIMIT_MS), "no answer"
    return msgspec.msgpack.decode(socket.recv())


def test_agent_refuses_a_broker_of_another_version(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    with agent(tmp_path, context) as (socket, log):
        hello = Hello(v=OTHER, pid=1, role="broker", facts=facts.own())
        answer = ask(socket, protocol.encode(hello))
        assert answer["kind"] == "refused" and re.search(BOTH, answer["reason"]), answer
        [line] = log.read_text().splitlines()
        assert re.search(BOTH, line), line
        same = ask(socket, protocol.encode(Hello(pid=1, role="broker", facts=facts.own())))
        assert same["kind"] == "welcome", "it serves the others"


def test_agent_refuses_a_broker_with_other_facts(tmp_path: Path, context: zmq.Context[Any]) -> None:
    with agent(tmp_path, context) as (socket, log):
        other = msgspec.structs.replace(facts.own(), engine="3.99.0")
        answer = ask(socket, protocol.encode(Hello(pid=1, role="broker", facts=other)))
        assert answer["kind"] == "refused"
        for value in ("3.99.0", facts.own().engine):
            assert value in answer["reason"] and value in log.read_text()


def node_of(context: zmq.Context[Any], directory: Path) -> protocol.Node:
    """What a broker tells its engine of its only node, once it has decided."""
    engine = transport.dealer(context, f"ipc://{directory}/engine")
    found: list[protocol.Node] = []

    def decided() -> bool:
        transport.send(engine, protocol.StatusQuery())
        assert engine.poll(LIMIT_MS), "the broker does not answer"
        found[:] = protocol.decode(engine.recv()).nodes
        return found[0].state != "calling"

    assert wait_for(decided, 10), found
    return found[0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (protocol.Welcome(v=OTHER, pid=1, slots=1, facts=facts.own()), BOTH),
        (protocol.Welcome(pid=1, slots=1, facts=Facts(engine="3.99.0")), r"3\.99\.0 on the node"),
        (protocol.Refused(reason="its own words"), "its own words"),
    ],
    ids=["version", "facts", "refused"],
)
def test_broker_refuses_a_node_and_says_why(
    tmp_path: Path, context: zmq.Context[Any], answer: protocol.Message, words: str
) -> None:
    directory = tmp_path / "s"
    pid = str(os.getpid())
    with running("broker", directory, "--agent-pid", pid, "--window-bytes", "1") as log:
        control = transport.router(context, f"ipc://{directory}/control")
        assert control.poll(LIMIT_MS), log.read_text()
        sender, frame = control.recv_multipart()
        hello = protocol.decode(frame)
        reply = msgspec.structs.replace(answer, job=hello.job, epoch=hello.epoch)
        control.send_multipart([sender, protocol.encode(reply)])
        node = node_of(context, directory)
        assert node.state == "refused" and re.search(words, node.reason), node
        assert re.search(words, log.read_text())
