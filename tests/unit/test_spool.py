"""The spool: a body is whole wherever it lies, and a full place is left for the next one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.node.spool import Spool
from oq_runtime.wire import payload

parts = st.lists(st.lists(st.binary(max_size=200), min_size=1, max_size=3), max_size=8)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    yield memory, disk


def body(spool: Spool) -> bytes:
    path, inline = spool.finish()
    return Path(path).read_bytes() if path else inline


@given(parts, st.integers(0, 600), st.integers(0, 2000))
def test_a_body_is_whole_wherever_it_lies(
    parts: list[list[bytes]], inline: int, memory: int
) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        places = Path(one), Path(two)
        spool = Spool("a", places, inline_bytes=inline, memory_bytes=memory)
        for frames in parts:
            spool.add(frames)
        found = body(spool)
        assert [[bytes(frame) for frame in frames] for frames in payload.parts(found)] == parts
        assert (spool.parts, spool.nbytes) == (len(parts), len(found))
        files = [len(list(place.iterdir())) for place in places]
        if len(found) <= inline:
            assert files == [0, 0]
        else:
            assert files == ([1, 0] if len(found) <= memory else [0, 1])


@pytest.mark.parametrize("small", [True, False])
def test_without_shared_memory_it_goes_to_the_disk(places: tuple[Path, Path], small: bool) -> None:
    places[0].rmdir()
    spool = Spool("a", places, inline_bytes=0, memory_bytes=10_000)
    spool.add([b"x" * (10 if small else 100_000)])
    assert spool.finish()[0] == str(places[1] / "a")


def test_no_room_is_an_oserror_and_leaves_nothing(places: tuple[Path, Path]) -> None:
    places[1].rmdir()
    spool = Spool("a", places, inline_bytes=0, memory_bytes=1000)
    spool.add([b"x" * 300])
    with pytest.raises(OSError):
        spool.add([b"y" * 3000])
    spool.discard()
    assert list(places[0].iterdir()) == []
    spool.add([b"z"])
    assert [bytes(frames[0]) for frames in payload.parts(body(spool))] == [b"z"]
