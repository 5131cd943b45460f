"""The spool: parts come back as they came, from memory and from disk."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.spool import Spool


@given(
    st.lists(st.binary(max_size=40), max_size=12),
    st.integers(1, 60),
    st.integers(1, 17),
    st.booleans(),
)
def test_parts_come_back(parts: list[bytes], limit: int, chunk_bytes: int, views: bool) -> None:
    spool = Spool(Path(tempfile.gettempdir()), memory_bytes=limit)
    for part in parts:
        spool.add(memoryview(part) if views else part)
    whole = b"".join(parts)
    assert spool.sizes == [len(part) for part in parts]
    assert spool.nbytes == len(whole)
    assert spool.digest == hashlib.blake2b(whole, digest_size=32).digest()
    for _ in range(2):  # an upload may be repeated
        received: list[bytearray] = []
        last = (-1, 0)
        for index, offset, size, chunk in spool.read(chunk_bytes):
            assert (index, offset) > last, "chunks come in order"
            last = (index, offset)
            if offset == 0:
                received.append(bytearray())
            assert index == len(received) - 1 and size == len(parts[index])
            assert offset == len(received[index]) and len(chunk) <= chunk_bytes
            received[index] += chunk
        assert received == parts
    spool.close()


@pytest.mark.parametrize(("sizes", "on_disk"), [([10, 10], False), ([10, 11], True)])
def test_memory_limit(tmp_path: Path, sizes: list[int], on_disk: bool) -> None:
    spool = Spool(tmp_path, memory_bytes=20)
    for size in sizes:
        spool.add(b"x" * size)
    assert spool._file._rolled is on_disk  # type: ignore[attr-defined]
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_empty_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert list(spool.read(10)) == []
    assert spool.digest == hashlib.blake2b(digest_size=32).digest()
    spool.add(b"")
    assert list(spool.read(10)) == [(0, 0, 0, b"")]


def test_full_disk_is_an_oserror(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "missing", memory_bytes=1)
    with pytest.raises(OSError):
        spool.add(b"xx")
