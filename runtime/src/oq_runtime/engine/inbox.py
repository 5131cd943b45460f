"""The results of tasks that the engine runs by itself: no port is opened for them.

The engine would bind a socket on all addresses and unpickle whatever reaches it. Here the tasks of
this process hand their results over in memory; those of the engine's own pool go through a socket
in a directory that only its owner may enter.
"""

from __future__ import annotations

import itertools
import pickle
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from oq_runtime.files import private
from oq_runtime.session.client import Session

#: of the addresses that lead to nothing outside this process
SCHEME = "oq-runtime://"


class Inbox:
    """Both ends of the engine's socket for results, for tasks that run in this process."""

    numbers = itertools.count()
    by_url: weakref.WeakValueDictionary[str, Inbox] = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        self.url = f"{SCHEME}{next(self.numbers)}"
        self.results: deque[Any] = deque()
        self.by_url[self.url] = self

    def __enter__(self) -> Inbox:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, result: Any) -> None:
        # through pickle, as over a socket: what the task keeps must not change what was sent
        self.results.append(pickle.loads(pickle.dumps(result, pickle.HIGHEST_PROTOCOL)))

    def __iter__(self) -> Iterator[Any]:
        while self.results:
            yield self.results.popleft()


class PoolSockets:
    """Makes the sockets for the results of the engine's own pool of processes or threads.

    :param make: the engine's class ``Socket``
    """

    def __init__(self, make: Any) -> None:
        self.make = make
        self.numbers = itertools.count()
        self.own: Path | None = None

    def open(self) -> tuple[Any, str]:
        """Return a socket that takes results, and its address; raises ZMQError."""
        url = f"ipc://{self._directory()}/pool-{next(self.numbers)}"
        socket = self.make(url, zmq.PULL, "bind").__enter__()
        socket.port = 0  # the engine names it when it has waited for a minute
        return socket, url

    def _directory(self) -> Path:
        if session := Session.existing():
            return session.directory
        if self.own is None:
            self.own = private.make(Path(tempfile.gettempdir()), "oq-pool-")
            weakref.finalize(self, shutil.rmtree, self.own, ignore_errors=True)
        return self.own
