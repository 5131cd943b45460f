"""Bodies as files: in shared memory while there is room, beyond that on the local disk.

A ``Store`` belongs to one process, which counts what it keeps there; others map the files by their
paths. Not covered: the layout of a body (``payload``), attempts that are still growing (``spool``),
and files that are used again (``spares``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from oq_runtime.files import spares
from oq_runtime.wire.payload import Buffer

#: buffers that one writev(2) takes
IOV_MAX = 1024
#: bytes for which there is room on the disk before they come
AHEAD_BYTES = 64 << 20


def write(descriptor: int, buffers: Sequence[Buffer]) -> None:
    """Write all buffers at the position of a descriptor; raises OSError when there is no room."""
    waiting = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    while waiting:
        written = os.writev(descriptor, waiting[:IOV_MAX])
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if written:
            waiting[0] = waiting[0][written:]


def mount_of(path: Path) -> Path:
    """Return where the file system of a path is mounted."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.is_mount())


class Reception:
    """A body that arrives in chunks, in order, and is written as they come.

    Room is reserved as it comes, a little ahead: what its sender says of its size is only words.

    :param descriptor: of its file; closed here
    :param nbytes: how much is to come
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.descriptor = descriptor
        self.nbytes = nbytes
        self.received = 0
        self.reserved = os.fstat(descriptor).st_size

    def take(self, offset: int, chunk: memoryview) -> bool:
        """Write the next chunk; False when it is not the next one, or goes beyond the end.

        Raises OSError when there is no room for it.
        """
        end = offset + len(chunk)
        if offset != self.received or end > self.nbytes:
            return False
        if end > self.reserved:
            self.reserved = min(self.nbytes, end + AHEAD_BYTES)
            os.posix_fallocate(self.descriptor, 0, self.reserved)  # full now, not in the middle
        write(self.descriptor, [chunk])
        self.received += len(chunk)
        return True

    @property
    def whole(self) -> bool:
        return self.received == self.nbytes

    def close(self) -> None:
        os.close(self.descriptor)


class Store:
    """Files in shared memory, or on the disk where that has no room.

    :param memory: directory in shared memory
    :param disk: directory on the local disk
    :param memory_bytes: how much may lie in shared memory at a time
    """

    def __init__(self, memory: Path, disk: Path, *, memory_bytes: int) -> None:
        self.memory = memory
        self.disk = disk
        self.memory_bytes = memory_bytes
        self.files: dict[str, tuple[Path, int]] = {}
        self.used_bytes = 0  # in shared memory

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def path(self, name: str) -> Path:
        return self.files[name][0]

    @property
    def free_bytes(self) -> int:
        """Return what may still be put into shared memory."""
        return max(0, self.memory_bytes - self.used_bytes)

    def create(self, name: str, nbytes: int, reserve_bytes: int | None = None) -> int:
        """Return the descriptor of a new file for so many bytes.

        :param reserve_bytes: for which there is to be room at once, by default all of them

        Raises OSError when there is no room anywhere; then there is no file.
        """
        reserve_bytes = nbytes if reserve_bytes is None else min(nbytes, reserve_bytes)
        places = [self.memory] if nbytes <= self.free_bytes else []
        for place in (*places, self.disk):
            path = place / name
            descriptor = -1
            try:
                descriptor = spares.open_file(path)
                if os.fstat(descriptor).st_size < reserve_bytes:
                    os.posix_fallocate(descriptor, 0, reserve_bytes)  # full now, not in the middle
                elif os.fstat(descriptor).st_size > nbytes:
                    os.ftruncate(descriptor, nbytes)
            except OSError:
                if descriptor >= 0:
                    os.close(descriptor)
                    path.unlink(missing_ok=True)
                if place is self.disk:
                    raise
            else:
                self.adopt(name, path, nbytes)
                return descriptor
        raise AssertionError("the disk is the last place")

    def adopt(self, name: str, path: Path, nbytes: int) -> None:
        """Take over a file that is complete."""
        self.files[name] = path, nbytes
        if path.parent == self.memory:
            self.used_bytes += nbytes

    def release(self, name: str) -> tuple[Path, int]:
        """Forget a file, which now belongs to the caller, and return its path and size."""
        path, nbytes = self.files.pop(name)
        if path.parent == self.memory:
            self.used_bytes -= nbytes
        return path, nbytes

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        if name in self.files:
            self.release(name)[0].unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all files."""
        for name in list(self.files):
            self.remove(name)
