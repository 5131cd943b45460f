"""The engine's side of blobs: big arguments, written once and named by their digest.

``Blobs.add`` returns the reference that travels instead of the argument. An argument that is the
same object as before is pickled again, since its owner may have changed it; it is written and named
again only when its bytes differ, all of which are compared. XXH3-128, which takes a twentieth of
the time of BLAKE2b, tells which blob another object may be equal to. Not covered: blobs on the
nodes (``agent``).
"""

from __future__ import annotations

import ctypes
import hashlib
import secrets
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from oq_runtime.files import store
from oq_runtime.wire import payload
from oq_runtime.wire.payload import Buffer
from oq_runtime.wire.protocol import Blob

#: bytes of blobs in shared memory, and of blobs kept after the last task that needed them
MEMORY_BYTES, KEEP_BYTES = 1 << 30, 256 << 20
#: seven times as fast as numpy, which makes an array of what is equal; memoryviews are slower still
memcmp = ctypes.CDLL(None).memcmp
memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@dataclass(slots=True)
class Known:
    """A blob that exists: its bytes, to compare with, and how many tasks need it.

    :param check: its XXH3-128 digest
    """

    name: str
    blob: Blob
    check: bytes
    body: memoryview
    needed: int = 0
    objects: set[int] = field(default_factory=set)  # ids that had these bytes


class Blobs:
    """The big arguments of this process, each in a file.

    :param memory: directory in shared memory
    :param disk: directory on the local disk
    """

    def __init__(self, memory: Path, disk: Path) -> None:
        self.store = store.Store(memory, disk, memory_bytes=MEMORY_BYTES)
        self.known: dict[bytes, Known] = {}  # in the order of their last use
        self.by_object: dict[int, bytes] = {}  # id of an object -> digest that it had
        self.by_check: dict[bytes, bytes] = {}  # XXH3-128 -> digest
        # jobs that one engine process runs side by side, each in a process, share the directories
        self.prefix, self.written = secrets.token_hex(8), 0
        self.needed_bytes = 0  # of the blobs that a task needs

    def add(self, frames: Sequence[Buffer], obj: object) -> Blob:
        """Return the blob of these frames, which one more task needs.

        :param frames: of an argument; they may refer to memory that changes afterwards
        :param obj: the argument, by whose identity a repeat is recognised
        :raises OSError: when there is no room for it
        """
        pieces = payload.lay_out(frames)
        digest = self.by_object.get(id(obj))
        if digest is None or not self._same(digest, pieces):
            check = _digest(xxhash.xxh3_128(), pieces)
            digest = self.by_check.get(check)
            if digest is None or not self._same(digest, pieces):
                digest = self._write(check, pieces)
            self._remember(digest, id(obj))
        return self.again(digest)

    def again(self, digest: bytes) -> Blob:
        """Return a blob that one more task needs."""
        known = self.known.pop(digest)
        self.known[digest] = known
        self.needed_bytes += 0 if known.needed else known.blob.nbytes
        known.needed += 1
        return known.blob

    def done(self, digests: Counter[bytes]) -> None:
        """Tasks that needed these blobs have ended; a little of what nobody needs is kept."""
        for digest, times in digests.items():
            known = self.known[digest]
            known.needed -= times
            self.needed_bytes -= 0 if known.needed else known.blob.nbytes
        idle = [digest for digest, known in self.known.items() if not known.needed]
        kept = sum(self.known[digest].blob.nbytes for digest in idle)
        for digest in idle:
            if kept <= KEEP_BYTES:
                return
            kept -= self.known[digest].blob.nbytes
            self._forget(digest)

    def _same(self, digest: bytes, pieces: Sequence[Buffer]) -> bool:
        """Whether the known blob of this digest has these bytes."""
        at, known = 0, np.frombuffer(self.known[digest].body, np.uint8)
        for piece in pieces:
            other = np.frombuffer(piece, np.uint8)  # for its address
            if at + len(other) > len(known) or memcmp(
                known[at:].ctypes.data, other.ctypes.data, len(other)
            ):
                return False
            at += len(other)
        return at == len(known)

    def _write(self, check: bytes, pieces: Sequence[Buffer]) -> bytes:
        """Write a new blob, and find its name meanwhile: neither holds Python's lock."""
        self.written += 1
        name, nbytes = f"{self.prefix}-{self.written}", payload.nbytes(pieces)
        with ThreadPoolExecutor(1) as beside:
            # a host in FIPS mode refuses it for security
            new = hashlib.blake2b(digest_size=32, usedforsecurity=False)
            hashed = beside.submit(_digest, new, pieces)
            with open(self.store.create(name, nbytes), "wb") as file:
                store.write(file.fileno(), pieces)
            digest = hashed.result()
        self.by_check[check] = digest
        if digest in self.known:  # and another one had the same checksum since
            self.store.remove(name)
            return digest
        path = self.store.path(name)
        body = payload.map_file(path, private=True)
        self.known[digest] = Known(name, Blob(digest, nbytes, str(path)), check, body)
        return digest

    def _remember(self, digest: bytes, identity: int) -> None:
        if (before := self.by_object.get(identity)) is not None:
            self.known[before].objects.discard(identity)
        self.by_object[identity] = digest
        self.known[digest].objects.add(identity)

    def _forget(self, digest: bytes) -> None:
        known = self.known.pop(digest)
        for identity in known.objects:
            del self.by_object[identity]
        if self.by_check.get(known.check) == digest:
            del self.by_check[known.check]
        known.body.release()
        self.store.remove(known.name)


def _digest(hash: Any, pieces: Sequence[Buffer]) -> bytes:
    """Return the digest of all pieces by a new object of ``hashlib`` or ``xxhash``."""
    for piece in pieces:
        hash.update(piece)
    digest: bytes = hash.digest()
    return digest
