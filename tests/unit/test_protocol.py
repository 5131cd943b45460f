"""The wire: every kind survives the round trip, and nothing but ProtocolError comes out of junk."""

from __future__ import annotations

import enum
import itertools
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oq_runtime.errors import ProtocolError
from oq_runtime.text import MOST_CHARACTERS, clean
from oq_runtime.wire import protocol

KINDS: tuple[type[protocol.Message], ...] = typing.get_args(protocol.AnyMessage)
SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(st.characters(exclude_categories=["Cs"])),
    bytes: st.binary(max_size=64),
    bool: st.booleans(),
    types.NoneType: st.none(),
}
#: words as they are received
CLEAN = SIMPLE[str].map(clean)


def values(hint: Any, words: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    if hint is protocol.Words:
        return words
    if hint in SIMPLE:
        return SIMPLE[hint]
    if typing.get_origin(hint) is typing.Annotated:
        base, meta = hint.__origin__, hint.__metadata__[0]
        if base is str:
            return st.from_regex(meta.pattern).filter(lambda text: len(text) <= meta.max_length)
        if base is bytes:
            return st.binary(min_size=meta.min_length, max_size=meta.max_length)
        if base is float:
            return st.floats(meta.ge, meta.le)
        if typing.get_origin(base) is list:
            return values(base, words)
        return st.integers(meta.ge, 2**63 - 1 if meta.le is None else meta.le)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of([values(one, words) for one in typing.get_args(hint)])
    if typing.get_origin(hint) is list:
        return st.lists(values(typing.get_args(hint)[0], words), max_size=3)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    return structs(hint, words)


def structs(kind: Any, words: st.SearchStrategy[str] = CLEAN) -> st.SearchStrategy[Any]:
    """Messages of a kind, or structs in them, with such words for people."""
    fields = {
        name: values(hint, words)
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
    }
    if issubclass(kind, protocol.Message):
        fields["v"] = st.just(protocol.PROTOCOL_VERSION)
    fields = {name: fields[name] for name in kind.__struct_fields__}
    return st.builds(kind, **fields)


MESSAGES = st.one_of([structs(kind) for kind in KINDS])


def test_all_kinds_are_in_the_union() -> None:
    assert set(KINDS) == set(protocol.Message.__subclasses__())
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[protocol.Message]) -> None:
    @settings(max_examples=25)
    @given(structs(kind))
    def check(message: protocol.Message) -> None:
        frame = protocol.encode(message)
        for received in (frame, memoryview(frame)):
            decoded = protocol.decode(received)
            assert type(decoded) is kind and decoded == message

    check()


#: escapes, marks that turn the direction of writing, new lines, and more of it than a line holds
HOSTILE = ("\x1b[2J\x1b]0;owned\x07", "up\u202e0/46", "a\nforged 0/64", "\x9b31m", "x" * 10_000)


def words(received: Any) -> Iterator[protocol.Words]:
    """Yield all words for people that are in a message."""
    if isinstance(received, protocol.Words):
        yield received
    elif isinstance(received, msgspec.Struct):
        yield from words([getattr(received, name) for name in received.__struct_fields__])
    elif isinstance(received, list):
        yield from itertools.chain.from_iterable(map(words, received))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_words_for_people_are_clean_and_bounded(kind: type[protocol.Message]) -> None:
    @settings(max_examples=25)
    @given(structs(kind, st.sampled_from(HOSTILE)))
    def check(message: protocol.Message) -> None:
        for shown in words(protocol.decode(protocol.encode(message))):
            assert shown.isprintable() and len(shown) <= MOST_CHARACTERS

    check()


def test_an_attempt_without_parts_is_refused() -> None:
    # every attempt ends with the engine's end of task; none would never be whole
    frame = protocol.encode(protocol.Ended(task=1, attempt=1, parts=0, nbytes=0))
    with pytest.raises(ProtocolError, match="parts"):
        protocol.decode(frame)


@given(st.binary(max_size=300))
def test_random_bytes(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode(frame)


@settings(max_examples=300)
@given(MESSAGES, st.data())
def test_mutated_bytes(message: protocol.Message, data: st.DataObject) -> None:
    frame = bytearray(protocol.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(frame))))
    try:
        decoded = protocol.decode(bytes(frame[:cut]))
    except ProtocolError:
        return
    assert isinstance(decoded, KINDS)


JSON_LIKE: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
)


@given(
    st.sampled_from([kind.__struct_config__.tag for kind in KINDS]),
    st.dictionaries(st.sampled_from(["task", "attempt", "pid", "v", "job", "map"]), JSON_LIKE),
)
def test_wrong_fields(tag: str, fields: dict[str, Any]) -> None:
    try:
        decoded = protocol.decode(msgspec.msgpack.encode({"kind": tag, **fields}))
    except ProtocolError:
        return
    assert decoded.__struct_config__.tag == tag


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x80",
        msgspec.msgpack.encode({"kind": "no such", "v": 1}),
        msgspec.msgpack.encode({"kind": "beat", "surplus": 1}),
        msgspec.msgpack.encode({"kind": "hello", "pid": 1}),
        msgspec.msgpack.encode({"kind": "beat", "busy": "1"}),
        protocol.encode(protocol.Beat()) + b"\x00",
        b"\x91" * 100_000,
        b"\x82\xa4kind\xa4beat\xa3job\xa1\xff",
        b"\x00" * (protocol.HEADER_BYTES + 1),
    ],
    ids=["empty", "map", "kind", "surplus", "lacking", "type", "tail", "deep", "utf-8", "large"],
)
def test_no_header(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode(frame)


@given(MESSAGES, st.integers(-5, 1000).filter(lambda v: v != protocol.PROTOCOL_VERSION))
def test_wrong_version_names_both(message: protocol.Message, version: int) -> None:
    frame = protocol.encode(msgspec.structs.replace(message, v=version))
    with pytest.raises(ProtocolError) as caught:
        protocol.decode(frame)
    text = str(caught.value)
    assert f"protocol {version}," in text and f"this is {protocol.PROTOCOL_VERSION}" in text


@pytest.mark.parametrize(
    "fields", [{"kind": "beat", "new": 1}, {"kind": "new"}], ids=["field", "kind"]
)
def test_later_version_with_other_fields_names_both(fields: dict[str, Any]) -> None:
    ours, later = protocol.PROTOCOL_VERSION, protocol.PROTOCOL_VERSION + 1
    with pytest.raises(ProtocolError, match=f"peer speaks protocol {later}, this is {ours}"):
        protocol.decode(msgspec.msgpack.encode({"v": later, **fields}))


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_chunks_reassemble(n: int, extra: int) -> None:
    size = max(0, n * protocol.CHUNK_BYTES + extra)
    part = bytes(range(251)) * (size // 251 + 1)
    part = part[:size]
    chunks = list(protocol.chunks(part))
    assert all(len(chunk) <= protocol.CHUNK_BYTES for _, chunk in chunks)
    ends = [offset + len(chunk) for offset, chunk in chunks]
    assert [offset for offset, _ in chunks] == [0, *ends][: len(chunks)]
    assert b"".join(chunk for _, chunk in chunks) == part


@pytest.mark.parametrize("name", ["../x", "a/b", "a\n", "x" * 65])
def test_a_job_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="job"):
        protocol.decode(protocol.encode(protocol.Release(job=name)))
