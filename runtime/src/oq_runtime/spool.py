"""The agent's spool: the parts of one attempt, in memory up to a limit and then on local disk."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: bytes of one attempt that are kept in memory before it goes to disk
MEMORY_BYTES = 64 * 1024 * 1024


class Spool:
    """Parts of an attempt in order of arrival.

    :param directory: where the file goes once the parts outgrow ``memory_bytes``
    """

    def __init__(self, directory: Path, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115  closed by close()
            max_size=memory_bytes, dir=str(directory)
        )
        self._digest = hashlib.blake2b(digest_size=32)
        self.sizes: list[int] = []
        self.nbytes = 0

    def add(self, part: bytes | memoryview) -> None:
        """Append one part; raises OSError when the disk is full."""
        self._file.write(part)
        self._digest.update(part)
        self.sizes.append(len(part))
        self.nbytes += len(part)

    @property
    def digest(self) -> bytes:
        """BLAKE2b-256 of all parts, one after the other."""
        return self._digest.digest()

    def read(self, chunk_bytes: int) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield ``(part, offset, bytes of the part, chunk)`` from the first part to the last."""
        self._file.seek(0)
        for index, size in enumerate(self.sizes):
            for offset in range(0, max(size, 1), chunk_bytes):
                yield index, offset, size, self._file.read(min(chunk_bytes, size - offset))

    def close(self) -> None:
        self._file.close()
