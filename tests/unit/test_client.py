"""The engine's side of a session, under a scripted broker."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from oq_runtime.errors import NoWorkers
from oq_runtime.files import private
from oq_runtime.session import client
from oq_runtime.wire import protocol, transport


def test_nodes_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "READY_SECS", 0.5)
    directory = private.make(tmp_path, "oq-run-")
    private.add_memory(directory, private.memory_name(directory))
    silent = protocol.Node(host="n", slots=0, busy=0, state=protocol.NodeState.CALLING)
    context: zmq.Context[Any] = zmq.Context()
    monkeypatch.setattr(zmq, "Context", lambda: context)  # to be ended with what is in it
    socket = transport.router(context, f"ipc://{directory}/engine")
    with ThreadPoolExecutor() as other:
        session = other.submit(client.Session, directory)
        while not session.done():
            if socket.poll(100) and (frames := transport.receive(socket)):
                transport.send_to(socket, frames[0], protocol.Status(phases=[], nodes=[silent]))
        with pytest.raises(NoWorkers, match=re.escape("after 0 s: no agent has answered")):
            session.result()
    context.destroy(linger=0)
    private.remove(directory)
