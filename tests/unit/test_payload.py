"""Bodies: what is laid out comes back, aligned, and arrays may be changed where they lie."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.errors import ProtocolError
from oq_runtime.wire import payload

parts = st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=5), max_size=5)


def body_of(parts: list[list[bytes]]) -> bytes:
    return b"".join(piece for frames in parts for piece in payload.lay_out(frames))


@given(parts)
def test_parts_come_back(parts: list[list[bytes]]) -> None:
    body = body_of(parts)
    assert len(body) % payload.ALIGN == 0
    assert [[bytes(frame) for frame in frames] for frames in payload.parts(body)] == parts


@given(parts, st.data())
def test_a_body_that_was_cut_is_refused(parts: list[list[bytes]], data: st.DataObject) -> None:
    body = body_of(parts)
    ends = list(itertools.accumulate((len(body_of([frames])) for frames in parts), initial=0))
    length = data.draw(st.integers(0, len(body)))
    whole = max(number for number, end in enumerate(ends) if end <= length)
    try:
        found = [[bytes(frame) for frame in frames] for frames in payload.parts(body[:length])]
    except ProtocolError:
        assert length != ends[whole], "it was cut between two parts"
        return
    assert found == parts[: len(found)]
    if len(found) > whole:  # of the last one only what fills it up is missing
        assert len(found) == whole + 1 and ends[whole + 1] - length < payload.ALIGN
    else:
        assert length == ends[whole], "bytes of a part were passed over"


def test_big_arrays_travel_beside_the_pickle_and_small_ones_in_it() -> None:
    big, small = np.arange(10_000.0), np.arange(10.0)
    frames = payload.dump({"big": big, "small": small})
    assert len(frames) == 2 and len(frames[0]) < 1000
    assert np.shares_memory(np.frombuffer(frames[1]), big)


@pytest.mark.parametrize("private", [True, False])
def test_arrays_lie_in_the_file_and_can_be_changed(tmp_path: Path, private: bool) -> None:
    array = np.arange(10_000.0)
    path = tmp_path / "body"
    path.write_bytes(body_of([[bytes(frame) for frame in payload.dump([array, array[:5].copy()])]]))
    before = path.read_bytes()
    [frames] = payload.parts(payload.map_file(path, private=private))
    one, two = payload.load(frames)
    assert (one == array).all() and one.flags.aligned
    one += 1
    two += 1
    assert (one == array + 1).all()
    assert (path.read_bytes() == before) is private


def test_pickled_travels_without_a_second_pickle() -> None:
    array = np.arange(10_000.0)
    pickled = payload.Pickled({"a": array})
    assert len(pickled) > array.nbytes
    frames = payload.dump(["head", pickled])
    assert any(np.shares_memory(np.frombuffer(frame), array) for frame in frames[1:])
    body = payload.writable(body_of([[bytes(frame) for frame in frames]]))
    [received] = payload.parts(body)
    head, again = payload.load(received)
    assert head == "head" and (again.clsname, len(again)) == ("dict", len(pickled))
    assert (again.unpickle()["a"] == array).all()


def test_pickled_survives_an_ordinary_pickle() -> None:
    array = np.arange(10_000.0)
    again = pickle.loads(pickle.dumps(payload.Pickled(array), pickle.HIGHEST_PROTOCOL))
    result = again.unpickle()
    result += 1
    assert (result == array + 1).all()


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(TypeError, match="generator"):
        payload.Pickled(iter(()) for _ in ())
