"""The engine's side of a session, under a scripted broker."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(("limit_s", "waited_s"), [(0.1, "0"), (1.0, "1")])
def test_nodes_that_say_nothing(
    limit_s: float, waited_s: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine waits for them as long as the cluster may be without, and a while at least."""
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
                if isinstance(protocol.decode(frames[1]), protocol.Hello):
                    answer = protocol.Welcome(pid=os.getpid(), no_nodes_limit_s=limit_s)
                    transport.send_to(socket, frames[0], answer)
                transport.send_to(socket, frames[0], protocol.Status(phases=[], nodes=[silent]))
        said = f"after {waited_s} s: no agent has answered"
        with pytest.raises(NoWorkers, match=re.escape(said)):
            session.result()
    context.destroy(linger=0)
    private.remove(directory)
