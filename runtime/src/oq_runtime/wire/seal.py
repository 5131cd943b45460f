"""What goes over a data connection on TCP, sealed: the record layer of TLS 1.3, with keys of ours.

Each frame is a record, encrypted and authenticated by an AEAD cipher (RFC 8446, 5.2). Its nonce is
the number of the record, which is never sent, mixed with a secret start (5.3); its place in the
message and its length are authenticated too. So a record that is changed, cut, left out, repeated,
or that comes at another place or from another connection, does not open. Then nothing more does:
the connection is to be closed, and a new one has new keys. Each direction has a key of its own,
derived with the names of session and node (7.1), which is changed long before the cipher has to be
spared (5.5, 7.2).

Not covered: who is told the secret (``peers``, ``agent``), and who may connect (``security``).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from oq_runtime.errors import ProtocolError
from oq_runtime.wire.payload import Buffer
from oq_runtime.wire.protocol import Suite, Terms

#: frames of the longest message: a header, and a payload
MOST_FRAMES = 2
#: records of a key. At 4 MiB each they are 2^34 blocks of AES-GCM, of which RFC 8446, 5.5, allows
#: 2^34.5; with chunks of 1 MiB, a quarter
KEY_RECORDS = 1 << 16
KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
#: authenticated with a record: its place in the message, the frames of that, the record's length
PLACE = struct.Struct("!BBI")
#: bytes of a sample, and how often it is sealed, to see which cipher is faster
SAMPLE_BYTES, SAMPLES = 256 * 1024, 4
DOES_NOT_OPEN = (
    "a record does not open: it was changed, left out or repeated on the way, or is not of this "
    "connection"
)


def fastest() -> tuple[Suite, dict[Suite, float]]:
    """Return the suite that is the fastest on this processor, and the bytes/s of each."""
    sample, rates = bytes(SAMPLE_BYTES), dict.fromkeys(Suite, 0.0)
    for _ in range(SAMPLES):  # in turns, so that other work hits all alike
        for suite in Suite:
            cipher = _cipher(suite, bytes(KEY_BYTES))
            began_s = time.perf_counter()
            cipher.encrypt(bytes(NONCE_BYTES), sample, b"")
            took_s = time.perf_counter() - began_s
            rates[suite] = max(rates[suite], len(sample) / took_s)
    return max(Suite, key=rates.__getitem__), rates


class Seal:
    """One end of a connection.

    :param job: name of the session
    :param epoch: of its call to the node
    :param broker: whether this is the broker's end; else the agent's
    """

    def __init__(self, terms: Terms, job: str, epoch: int, *, broker: bool) -> None:
        self.terms = terms
        names = msgspec.msgpack.encode((job, epoch, terms.node))
        down, up = (_Way(terms, label, names) for label in (b"to node", b"to broker"))
        self.ours, self.theirs = (down, up) if broker else (up, down)
        self.broken = False

    def seal(self, frames: Sequence[Buffer]) -> list[bytes]:
        """Return the frames of the next message sealed, which must be sent: it has its numbers."""
        sealed = []
        for at, frame in enumerate(frames):
            cipher, nonce = self.ours.next()
            place = PLACE.pack(at, len(frames), len(frame) + TAG_BYTES)
            sealed.append(cipher.encrypt(nonce, frame, place))
        return sealed

    def open(self, frames: Sequence[Buffer]) -> list[memoryview]:
        """Return what is in the frames of the next message.

        Raises ProtocolError when this is not what the other end has sent next, and ever after.
        """
        from cryptography.exceptions import InvalidTag

        try:
            if self.broken or len(frames) > MOST_FRAMES:
                raise InvalidTag
            opened = []
            for at, frame in enumerate(frames):
                cipher, nonce = self.theirs.next()
                place = PLACE.pack(at, len(frames), len(frame))
                opened.append(memoryview(cipher.decrypt(nonce, frame, place)))
            return opened
        except InvalidTag:
            self.broken = True
            raise ProtocolError(DOES_NOT_OPEN) from None


class _Way:
    """One direction: its keys, and which record is the next."""

    def __init__(self, terms: Terms, label: bytes, names: bytes) -> None:
        self.suite = terms.suite
        context = hashlib.sha256(names).digest()
        self.secret = expand(terms.secret, b"oq-data " + label, context, KEY_BYTES)
        self._take_key()

    def _take_key(self) -> None:
        self.cipher = _cipher(self.suite, expand(self.secret, b"oq-data key", b"", KEY_BYTES))
        self.start = int.from_bytes(expand(self.secret, b"oq-data iv", b"", NONCE_BYTES), "big")
        self.records = 0

    def next(self) -> tuple[Any, bytes]:
        """Return the cipher and the nonce for the next record."""
        if self.records == KEY_RECORDS:
            self.secret = expand(self.secret, b"oq-data upd", b"", KEY_BYTES)
            self._take_key()
        nonce = (self.start ^ self.records).to_bytes(NONCE_BYTES, "big")
        self.records += 1
        return self.cipher, nonce


def expand(secret: bytes, label: bytes, context: bytes, nbytes: int) -> bytes:
    """HKDF-Expand-Label of RFC 8446, 7.1, with SHA-256, for at most 32 bytes: one block of it.

    :param label: with its prefix
    """
    info = struct.pack("!H", nbytes)
    for part in (label, context):
        info += bytes([len(part)]) + part
    return hmac.digest(secret, info + b"\x01", "sha256")[:nbytes]


def _cipher(suite: Suite, key: bytes) -> Any:
    # not above: a job on one machine has no use for it, and it takes 30 ms
    from cryptography.hazmat.primitives.ciphers import aead

    return (aead.AESGCM if suite is Suite.AES_256_GCM else aead.ChaCha20Poly1305)(key)
