"""The worker's spool: the parts of one attempt, whole when it ends.

In memory while it is small enough to travel in a message, then in a file in shared memory, and
beyond the limit, or when that is full, on the local disk. The file belongs to the agent once the
attempt has ended, and is removed by the agent when the worker dies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from oq_runtime.files import spares, store
from oq_runtime.wire import payload
from oq_runtime.wire.payload import Buffer


class Spool:
    """The results of an attempt, in the order in which they are made.

    :param name: of the file, the same wherever it goes
    :param places: directories for the file: in shared memory, on the disk
    :param inline_bytes: bytes that stay in memory
    :param memory_bytes: bytes that may go to the first place
    """

    def __init__(
        self, name: str, places: tuple[Path, Path], *, inline_bytes: int, memory_bytes: int
    ) -> None:
        self.name, self.places = name, places
        self.inline_bytes = inline_bytes
        self.memory_bytes = memory_bytes
        self.inline: list[bytes] = []
        self.parts = 0
        self.nbytes = 0
        self._path: Path | None = None
        self._descriptor = -1

    @property
    def paths(self) -> list[Path]:
        return [place / self.name for place in self.places]

    def add(self, frames: Sequence[Buffer]) -> None:
        """Append one part; raises OSError when there is no room for it anywhere."""
        pieces = payload.lay_out(frames)
        total = self.nbytes + payload.nbytes(pieces)
        if self._path is None and total <= self.inline_bytes:
            self.inline += [bytes(piece) for piece in pieces]
        else:
            self._to_file(pieces, total)
        self.parts += 1
        self.nbytes = total

    def _to_file(self, pieces: Sequence[Buffer], total: int) -> None:
        if self._path is None:
            self._open(self.paths[0] if total <= self.memory_bytes else self.paths[1])
        elif total > self.memory_bytes and self._path == self.paths[0]:
            self._move_to_disk()
        try:
            store.write(self._descriptor, [*self.inline, *pieces])
        except OSError:
            if self._path != self.paths[0]:
                raise
            self._move_to_disk()
            store.write(self._descriptor, [*self.inline, *pieces])
        self.inline.clear()

    def _open(self, path: Path) -> None:
        try:
            self._descriptor, self._path = spares.open_file(path), path
        except OSError:
            if path == self.paths[1]:
                raise
            self._open(self.paths[1])

    def _move_to_disk(self) -> None:
        """Copy what is complete, which may be less than what a failed write has left."""
        at, written = 0, self.nbytes - payload.nbytes(self.inline)
        target = spares.open_file(self.paths[1])
        try:
            while at < written:
                at += os.sendfile(target, self._descriptor, at, written - at)
        except OSError:
            os.close(target)
            self.paths[1].unlink()
            raise
        os.close(self._descriptor)
        self.paths[0].unlink()
        self._descriptor, self._path = target, self.paths[1]

    def finish(self) -> tuple[str, bytes]:
        """Return where the body is: the path of its file and ``b""``, or ``""`` and the body."""
        if self._path is None:
            return "", b"".join(self.inline)
        os.ftruncate(self._descriptor, self.nbytes)  # a spare file may have been longer
        os.close(self._descriptor)
        return str(self._path), b""

    def discard(self) -> None:
        """Drop all parts: an attempt begins anew, or fails for want of room."""
        if self._path is not None:
            os.close(self._descriptor)
            self._path.unlink(missing_ok=True)
        self.inline.clear()
        self._path, self._descriptor, self.parts, self.nbytes = None, -1, 0, 0
