"""Files in shared memory while there is room, on the disk beyond; blobs written once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oq_runtime.files import store
from oq_runtime.files.store import Store
from oq_runtime.session import blobs
from oq_runtime.session.blobs import Blobs
from oq_runtime.wire import payload


def put(kept: Store, name: str, nbytes: int) -> Path:
    os.close(kept.create(name, nbytes))
    assert kept.path(name).stat().st_size == nbytes, "room is made at once"
    return kept.path(name).parent


def test_what_does_not_fit_into_memory_goes_to_the_disk(places: tuple[Path, Path]) -> None:
    memory, disk = places
    kept = Store(memory, disk, memory_bytes=100)
    assert [put(kept, "a", 60), put(kept, "b", 60), put(kept, "c", 40)] == [memory, disk, memory]
    assert kept.free_bytes == 0
    kept.remove("a")
    assert kept.free_bytes == 60 and put(kept, "d", 60) == memory
    kept.close()
    assert kept.free_bytes == 100 and not [*memory.iterdir(), *disk.iterdir()]


def test_a_released_file_stays_and_counts_no_more(places: tuple[Path, Path]) -> None:
    kept = Store(*places, memory_bytes=100)
    put(kept, "a", 60)
    path, nbytes = kept.release("a")
    assert path.exists() and nbytes == 60 and kept.free_bytes == 100 and "a" not in kept


def test_no_room_anywhere_is_an_oserror_and_leaves_no_file(places: tuple[Path, Path]) -> None:
    memory, disk = places
    disk.rmdir()
    kept = Store(memory, disk, memory_bytes=10)
    with pytest.raises(OSError):
        kept.create("a", 11)
    assert "a" not in kept and not list(memory.iterdir())


def test_many_buffers_are_written_in_order(tmp_path: Path) -> None:
    pieces = [bytes([n % 251]) * (n % 7) for n in range(3 * store.IOV_MAX)]
    with (tmp_path / "file").open("wb") as file:
        store.write(file.fileno(), pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


# ---- blobs


def frames(array: np.ndarray[Any, Any]) -> list[payload.Buffer]:
    return payload.dump(array)


def test_a_repeat_is_written_once_and_a_change_is_seen(places: tuple[Path, Path]) -> None:
    kept = Blobs(*places)
    array = np.ones(100_000)
    first = kept.add(frames(array), array)
    assert kept.add(frames(array), array) is first
    assert kept.add(frames(array.copy()), object()) is first, "equal bytes, another object"
    array[5] = 2
    changed = kept.add(frames(array), array)
    assert changed.digest != first.digest and len(list(places[0].iterdir())) == 2
    [received] = payload.parts(payload.map_file(changed.path, private=True))
    assert (payload.load(received) == array).all()
    assert kept.needed_bytes == first.nbytes + changed.nbytes


def test_bytes_with_the_same_checksum_are_different_blobs(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Constant:
        def update(self, _: object) -> None:
            pass

        def digest(self) -> bytes:
            return b"c" * 16

    monkeypatch.setattr("oq_runtime.session.blobs.xxhash.xxh3_128", Constant)
    kept = Blobs(*places)
    arrays = [np.full(100_000, float(n)) for n in range(2)]
    found = [kept.add(frames(array), array) for array in [*arrays, *arrays]]
    assert found[0] is found[2] and found[1] is found[3] and found[0].digest != found[1].digest
    for array, blob in zip(arrays, found, strict=False):
        [received] = payload.parts(payload.map_file(blob.path, private=True))
        assert (payload.load(received) == array).all()
    monkeypatch.setattr(blobs, "KEEP_BYTES", 0)
    kept.done(Counter(blob.digest for blob in found))
    assert not kept.known and not kept.by_check and not kept.by_object


def test_digests_are_had_on_a_host_in_fips_mode(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hashlib.blake2b

    def blake2b(*args: Any, usedforsecurity: bool = True, **kwargs: Any) -> Any:
        if usedforsecurity:
            raise ValueError("[digital envelope routines] unsupported")
        return real(*args, usedforsecurity=False, **kwargs)

    monkeypatch.setattr(hashlib, "blake2b", blake2b)
    array = np.full(100_000, 1.0)
    assert len(Blobs(*places).add(frames(array), array).digest) == 32


def test_what_nobody_needs_is_kept_while_it_is_little(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Blobs(*places)
    arrays = [np.full(100_000, float(n)) for n in range(4)]
    blob = [kept.add(frames(array), array) for array in arrays]
    monkeypatch.setattr(blobs, "KEEP_BYTES", 2 * blob[0].nbytes)
    kept.done(Counter(one.digest for one in blob[:3]))
    assert kept.needed_bytes == blob[3].nbytes
    assert list(kept.known) == [one.digest for one in blob[1:]], "the longest unused goes first"
    assert not Path(blob[0].path).exists()
    again = kept.add(frames(arrays[0]), arrays[0])
    assert again.digest == blob[0].digest and Path(again.path).exists()


def test_a_reception_takes_the_next_chunk_and_no_other(places: tuple[Path, Path]) -> None:
    kept = Store(*places, memory_bytes=100)
    reception = store.Reception(kept.create("a", 6), 6)
    assert reception.take(0, memoryview(b"abc"))
    assert not reception.take(0, memoryview(b"abc")), "it came before"
    assert not reception.take(4, memoryview(b"ef")), "one is missing"
    assert not reception.take(3, memoryview(b"defg")), "more than there is room for"
    assert not reception.whole
    assert reception.take(3, memoryview(b"def")) and reception.whole
    reception.close()
    assert kept.path("a").read_bytes() == b"abcdef"
