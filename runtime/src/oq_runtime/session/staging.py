"""The bodies of ended attempts, from the word of their node until they are the engine's.

    announce -> grant -> receive, chunk by chunk, or place -> deliver
                    any of these -> drop

One owner: whatever file is made or taken over here is handed on by ``deliver`` or removed by
``drop``. Not covered: which attempt gets its turn (``scheduler``), and the wire (``broker``).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from oq_runtime.errors import NoRoom
from oq_runtime.files.store import AHEAD_BYTES, Reception, Store, mount_of
from oq_runtime.wire import protocol

#: node, task and attempt
Key = tuple[str, int, int]


@dataclass(slots=True)
class Body:
    """What an attempt has left: in the message that ended it, in its node's file, or on its way."""

    ended: protocol.Ended
    granted: bool = False
    reception: Reception | None = None

    @property
    def name(self) -> str:
        return f"{self.ended.task}-{self.ended.attempt}"


class Staging:
    """The bodies of ended attempts that are not the engine's yet.

    :param store: where bodies are kept that do not fit into a message; this object's own
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.bodies: dict[Key, Body] = {}

    def announce(self, node: str, ended: protocol.Ended) -> None:
        """Note that an attempt has ended; a second word on the same one changes nothing."""
        self.bodies.setdefault((node, ended.task, ended.attempt), Body(ended))

    def grant(self, key: Key) -> bool | None:
        """Let a body come; return whether one that is here already is whole, else None."""
        body = self.bodies[key]
        if inline := body.ended.body:
            return len(inline) == body.ended.nbytes
        body.granted = not body.ended.path
        return None

    def receive(self, key: Key, offset: int, chunk: memoryview) -> bool | None:
        """Write the next chunk of a body; return whether it is whole, once that is known.

        False when this is not the next chunk, or goes beyond the end. The file is made with the
        first chunk, not when the node is told to send: by then the engine may have given back the
        file of an earlier one. Raises NoRoom.
        """
        body = self.bodies.get(key)
        if body is None or not body.granted:
            return None
        nbytes = body.ended.nbytes
        try:
            if body.reception is None:
                descriptor = self.store.create(body.name, nbytes, AHEAD_BYTES)
                body.reception = Reception(descriptor, nbytes)
            in_order = body.reception.take(offset, chunk)
        except OSError as exc:
            where = mount_of(self.store.disk)
            remedy = "free space there, or set TMPDIR to a directory on another device"
            if exc.errno == errno.EFBIG:
                remedy = "raise the limit of the size of a file (ulimit -f)"
            raise NoRoom(
                f"no room on {where} of this machine for {nbytes:,} bytes of results in "
                f"{self.store.disk}: {exc.strerror}; {remedy}"
            ) from exc
        return None if in_order and not body.reception.whole else in_order

    def place(self, key: Key, path: Path) -> bool:
        """Take over the file of a body from its node; False, and it is gone, if nobody wants it."""
        if body := self.bodies.get(key):
            self.store.adopt(body.name, path, body.ended.nbytes)
            return True
        path.unlink(missing_ok=True)
        return False

    def deliver(self, key: Key) -> tuple[protocol.Ended, str]:
        """Hand a whole body over: the message that ended it, and its file, if it has one."""
        body = self._pop(key)
        path = "" if body.ended.body else str(self.store.release(body.name)[0])
        return body.ended, path

    def drop(self, key: Key) -> None:
        """Forget a body and what there is of it."""
        if key in self.bodies:
            self.store.remove(self._pop(key).name)

    def _pop(self, key: Key) -> Body:
        body = self.bodies.pop(key)
        if body.reception is not None:
            body.reception.close()
        return body
