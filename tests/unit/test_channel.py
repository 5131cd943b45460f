"""Whole messages over a stream, whatever it is cut into."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.node.channel import PREFIX, Channel

MESSAGES = st.lists(st.binary(max_size=20_000), max_size=5)


def pair(*, waits: bool = False) -> tuple[Channel, Channel]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(waits)
    return Channel(ends[0]), Channel(ends[1])


def close(*channels: Channel) -> None:
    for channel in channels:
        channel.close()


@given(MESSAGES)
def test_messages_arrive_whole_and_in_order(messages: list[bytes]) -> None:
    ours, theirs = pair()
    found: list[bytes] = []
    for message in messages:
        ours.send(message)
    while ours.unsent or len(found) < len(messages):
        while (received := theirs.receive()) is not None:
            found.append(received)
        ours.flush()
    assert found == messages and theirs.receive() is None
    close(ours, theirs)


@given(MESSAGES, st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_a_stream_may_be_cut_anywhere(messages: list[bytes], cuts: list[int]) -> None:
    ends = socket.socketpair()
    ends[1].setblocking(False)
    theirs, found = Channel(ends[1]), []
    messages = [message[:300] for message in messages]
    stream, at = b"".join(PREFIX.pack(len(message)) + message for message in messages), 0
    while stream:
        size = cuts[at % len(cuts)]
        ends[0].sendall(stream[:size])
        stream, at = stream[size:], at + 1
        while (received := theirs.receive()) is not None:
            found.append(received)
    assert found == messages
    ends[0].close()
    theirs.close()


def test_what_does_not_fit_waits_for_its_turn() -> None:
    ours, theirs = pair()
    big = bytes(4 << 20)
    ours.send(big)
    ours.send(b"small")
    assert ours.unsent
    found: list[bytes] = []
    while len(found) < 2:
        ours.flush()
        if received := theirs.receive():
            found.append(received)
    assert found == [big, b"small"] and not ours.unsent
    close(ours, theirs)


def test_an_end_that_waits_sends_all_and_hears_the_end() -> None:
    ours, theirs = pair(waits=True)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.extend(theirs))
    reader.start()
    ours.send(bytes(1 << 20))
    assert not ours.unsent
    ours.close()
    reader.join(10)
    assert not reader.is_alive() and found == [bytes(1 << 20)]
    theirs.close()


def test_a_message_that_was_cut_off_by_death_is_none() -> None:
    ours, theirs = pair()
    ours.send(b"last words")
    ours.socket.sendall(PREFIX.pack(100) + b"half")
    ours.close()
    assert theirs.receive() == b"last words"
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.send(b"to nobody")
    assert not theirs.unsent
    theirs.close()
