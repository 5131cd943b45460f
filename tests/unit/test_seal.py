"""Sealed connections: what was sent comes out, in its order, and nothing else ever does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.errors import ProtocolError
from oq_runtime.wire import protocol, seal
from oq_runtime.wire.protocol import Suite, Terms
from oq_runtime.wire.seal import Seal
from tests.conftest import Attacks

SECRET = bytes(range(32))
TERMS = Terms(Suite.AES_256_GCM, SECRET, "192.0.2.2")

suites = st.sampled_from(list(Suite))
messages = st.lists(st.lists(st.binary(max_size=200), min_size=1, max_size=2), max_size=8)
Sealed = list[list[bytes]]


@dataclasses.dataclass
class Ends:
    """A broker and an agent, by default of one connection."""

    terms: Terms = TERMS
    job: str = "oq-run-1"
    epoch: int = 3

    def __post_init__(self) -> None:
        self.broker = Seal(self.terms, self.job, self.epoch, broker=True)
        self.agent = Seal(self.terms, self.job, self.epoch, broker=False)


def opened(end: Seal, sealed: list[bytes]) -> list[bytes] | None:
    try:
        return [bytes(frame) for frame in end.open(sealed)]
    except ProtocolError:
        return None


def taken(end: Seal, come: Sealed) -> list[list[bytes]]:
    """What is read of all messages that come."""
    return [frames for sealed in come if (frames := opened(end, sealed)) is not None]


@given(suites, messages, messages)
def test_what_is_sealed_at_one_end_opens_at_the_other(
    suite: Suite, down: list[list[bytes]], up: list[list[bytes]]
) -> None:
    ends = Ends(msgspec.structs.replace(TERMS, suite=suite))
    for frames in down:
        assert opened(ends.agent, ends.broker.seal(frames)) == frames
    assert taken(ends.broker, [ends.agent.seal(frames) for frames in up]) == up


@pytest.mark.parametrize("suite", Suite)
@pytest.mark.parametrize("nbytes", [0, 1, protocol.CHUNK_BYTES, 4 * protocol.CHUNK_BYTES - 16])
def test_sizes(suite: Suite, nbytes: int) -> None:
    ends = Ends(msgspec.structs.replace(TERMS, suite=suite))
    sealed = ends.agent.seal([b"header", memoryview(bytes(nbytes))])
    assert [len(frame) for frame in sealed] == [6 + 16, nbytes + 16]
    assert opened(ends.broker, sealed) == [b"header", bytes(nbytes)]


def test_nothing_is_sealed_alike_twice_nor_can_be_read() -> None:
    ends = Ends()
    sealed = [frame for _ in range(100) for frame in ends.agent.seal([b"secret words", b"words"])]
    assert len(set(sealed)) == 200 and not any(b"words" in frame for frame in sealed)


# ---- attacks


def flip(sealed: Sealed, at: int, where: int) -> Sealed:
    frames = [bytearray(frame) for frame in sealed[at]]
    frame = frames[where % len(frames)]
    frame[where % len(frame)] ^= 1 << where % 8
    return [*sealed[:at], [bytes(one) for one in frames], *sealed[at + 1 :]]


def drop(sealed: Sealed, at: int, _: int) -> Sealed:
    return [*sealed[:at], *sealed[at + 1 :]]


def repeat(sealed: Sealed, at: int, _: int) -> Sealed:
    return [*sealed[: at + 1], *sealed[at:]]


def swap(sealed: Sealed, at: int, _: int) -> Sealed:
    return [*sealed[:at], sealed[at + 1], sealed[at], *sealed[at + 2 :]]


def cut(sealed: Sealed, at: int, where: int) -> Sealed:
    whole = sealed[at][-1]
    return [*sealed[:at], [*sealed[at][:-1], whole[: where % len(whole)]], *sealed[at + 1 :]]


def longer(sealed: Sealed, at: int, _: int) -> Sealed:
    return [*sealed[:at], [*sealed[at][:-1], sealed[at][-1] + b"\0"], *sealed[at + 1 :]]


def join(sealed: Sealed, at: int, _: int) -> Sealed:
    """Two messages become one of as many frames."""
    return [*sealed[:at], [*sealed[at], *sealed[at + 1]], *sealed[at + 2 :]]


def part(sealed: Sealed, at: int, _: int) -> Sealed:
    """A message and its payload come apart; one that has none gets one."""
    header, *payload = sealed[at]
    apart = [[header], payload] if payload else [[header, b""]]
    return [*sealed[:at], *apart, *sealed[at + 1 :]]


def more(sealed: Sealed, at: int, _: int) -> Sealed:
    return [*sealed[:at], [*sealed[at], b"", b""], *sealed[at + 1 :]]


@pytest.mark.attack
@pytest.mark.parametrize("tamper", [flip, drop, repeat, swap, cut, longer, join, part, more])
@given(suites, messages.filter(lambda found: len(found) > 2), st.data())
def test_from_what_was_tampered_with_on_nothing_opens(
    tamper: Callable[[Sealed, int, int], Sealed],
    suite: Suite,
    sent: list[list[bytes]],
    data: st.DataObject,
) -> None:
    ends = Ends(msgspec.structs.replace(TERMS, suite=suite))
    sealed = [ends.agent.seal(frames) for frames in sent]
    at = data.draw(st.integers(0, len(sealed) - 2))
    come = tamper(sealed, at, data.draw(st.integers(0, 1000)))
    # a message that is repeated has come once before
    assert taken(ends.broker, come) == sent[: at + (tamper is repeat)]
    for frames in sealed:  # nor does it go on from where it was
        assert opened(ends.broker, frames) is None


@pytest.mark.attack
@pytest.mark.parametrize(
    "other",
    [
        Ends(job="oq-run-2"),
        Ends(epoch=4),
        Ends(msgspec.structs.replace(TERMS, node="192.0.2.3")),
        Ends(msgspec.structs.replace(TERMS, secret=bytes(32))),
        Ends(msgspec.structs.replace(TERMS, suite=Suite.CHACHA20_POLY1305)),
    ],
    ids=["session", "epoch", "node", "secret", "suite"],
)
@pytest.mark.parametrize("after", [0, 2])
def test_chunks_of_another_connection(other: Ends, after: int, attacks: Attacks) -> None:
    """They are spliced in at the place that they had there."""
    for broker in (True, False):
        mine, theirs = Ends(), Ends(other.terms, other.job, other.epoch)
        ours, foreign, reader = mine.broker, theirs.broker, mine.agent
        if not broker:
            ours, foreign, reader = mine.agent, theirs.agent, mine.broker
        for _ in range(after):
            assert opened(reader, ours.seal([b"h", b"p"])) == [b"h", b"p"]
            foreign.seal([b"h", b"p"])
        attacks.tried(1, opened(reader, foreign.seal([b"h", b"p"])) is not None)
        attacks.tried(1, opened(reader, ours.seal([b"h", b"p"])) is not None)


@pytest.mark.attack
def test_chunks_of_the_other_direction(attacks: Attacks) -> None:
    for whose in ("broker", "agent"):
        end = getattr(Ends(), whose)
        attacks.tried(1, opened(end, end.seal([b"h", b"p"])) is not None)


# ---- keys


@pytest.mark.parametrize("suite", Suite)
def test_keys_are_changed_and_the_old_ones_open_nothing(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "KEY_RECORDS", 5)
    ends = Ends(msgspec.structs.replace(TERMS, suite=suite))
    first = ends.agent.theirs.secret
    sealed = [ends.broker.seal([b"%d" % n, b"payload"]) for n in range(20)]
    assert len({frame for frames in sealed for frame in frames}) == 40
    assert taken(ends.agent, sealed) == [[b"%d" % n, b"payload"] for n in range(20)]
    assert ends.agent.theirs.secret == ends.broker.ours.secret != first
    behind = Ends(msgspec.structs.replace(TERMS, suite=suite))
    behind.agent.theirs.records = 4
    behind.broker.ours.records = 5  # so the next has the number 0 again, of another key
    assert opened(behind.agent, sealed[0]) is None
    assert opened(Ends(behind.terms).agent, behind.broker.seal([b"0"])) is None


def test_keys_are_changed_long_before_the_limit_of_the_cipher() -> None:
    blocks_of_tls = 2**24.5 * 2**14 / 16  # RFC 8446, 5.5
    assert blocks_of_tls >= seal.KEY_RECORDS * (4 << 20) / 16
    assert blocks_of_tls / 4 > seal.KEY_RECORDS * protocol.CHUNK_BYTES / 16


def test_keys_are_derived_as_tls_does() -> None:
    """The keys of the server's handshake in RFC 8448, section 3."""
    secret = bytes.fromhex("b67b7d690cc16c4e75e54213cb2d37b4e9c912bcded9105d42befd59d391ad38")
    key = bytes.fromhex("3fce516009c21727d0f2e4e86ee403bc")
    assert seal.expand(secret, b"tls13 key", b"", 16) == key
    assert seal.expand(secret, b"tls13 iv", b"", 12) == bytes.fromhex("5d313eb2671276ee13000b30")
    info = b"\x00\x20\x05label\x07context"
    expected = HKDFExpand(hashes.SHA256(), 32, info).derive(secret)
    assert seal.expand(secret, b"label", b"context", 32) == expected


def test_a_secret_is_not_shown() -> None:
    lease = protocol.Lease(ticket=b"t", data_url="tcp://x:1", terms=TERMS)
    assert repr(SECRET)[2:-1] not in repr(lease) and "192.0.2.2" in repr(lease)


def test_the_fastest_suite_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    suite, rates = seal.fastest()
    assert set(rates) == set(Suite) and rates[suite] == max(rates.values()) > 0

    class Slow:
        """As a processor without instructions for AES has it."""

        def encrypt(self, *_: bytes) -> bytes:
            return b"".join(bytes(1) for _ in range(1_000_000))

    cipher = seal._cipher
    monkeypatch.setattr(
        seal, "_cipher", lambda s, key: Slow() if s is Suite.AES_256_GCM else cipher(s, key)
    )
    assert seal.fastest()[0] is Suite.CHACHA20_POLY1305
