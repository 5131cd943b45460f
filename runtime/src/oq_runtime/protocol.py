"""The wire: message kinds, their fields, and how they become frames. Nothing else knows it.

A message is a header frame followed by any number of payload frames. The header is msgpack of one
of the structs below, tagged by ``kind``, with the protocol version in ``v``. Payload frames are
opaque bytes (pickles that only the engine and the workers open); they are forwarded, never decoded.

    engine  --Hello, Submit, Consumed, Cancel, StatusQuery-->  broker
    engine  <--Welcome, Delivered, Failed, Status--            broker
    broker  --Hello, Lease, Task, Grant, Abort, Release, Beat-->                agent  (control)
    broker  <--Welcome, Refused, Leased, NoLease, Started, Ended, Died, Beat--  agent  (control)
    broker  <--Hello, Fetch, Chunk, Beat--  agent  (data)    broker --Chunk, Beat-->  agent  (data)
    agent   --Run-->  worker             agent  <--Ready, Started, Part, Ended--  worker

    oq-workers  --Command-->  agent      oq-workers <--AgentStatus--  agent

Between broker and agent each call of the broker opens an epoch. ``epoch`` and ``seq`` number the
messages of either direction of either socket, so that one that was lost shows as a gap; then the
epoch is over, and what it had under way is void.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from oq_runtime.errors import ProtocolError, VersionError

PROTOCOL_VERSION = 1
#: bytes of a payload that may travel with its header on the control socket
INLINE_BYTES = 64 * 1024
#: bytes of one chunk on the data socket; a ZMTP heartbeat cuts much larger messages on slow links
CHUNK_BYTES = 1024 * 1024
#: bytes of the largest header that is decoded
HEADER_BYTES = 4 * 1024 * 1024


class Message(
    msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True, kw_only=True
):
    """Fields of every header: protocol version, the session's job name, epoch, sequence number."""

    v: int = PROTOCOL_VERSION
    job: str = ""
    epoch: int = 0
    seq: int = 0


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What broker and agent must have in common, see ``facts``."""

    engine: str = ""
    python: str = ""
    numpy: str = ""
    dbserver: str = ""
    shared_dir: str = ""


class Hello(Message, frozen=True, tag="hello"):
    pid: int
    role: str
    facts: Facts = Facts()


class Welcome(Message, frozen=True, tag="welcome"):
    pid: int
    host: str = ""
    slots: int = 0
    facts: Facts = Facts()


class Refused(Message, frozen=True, tag="refused"):
    """The agent takes no work of this broker."""

    reason: str


class Submit(Message, frozen=True, tag="submit"):
    task: int
    map: int
    func: str
    weight: float = 1.0


class Consumed(Message, frozen=True, tag="consumed"):
    task: int


class Cancel(Message, frozen=True, tag="cancel"):
    """Cancel the tasks of one map, or of all maps of the sender (-1)."""

    map: int = -1


class Delivered(Message, frozen=True, tag="delivered"):
    """One partial result of a committed attempt, in order; ``last`` closes the task."""

    task: int
    map: int
    index: int
    last: bool


class Failed(Message, frozen=True, tag="failed"):
    task: int
    map: int
    error: str
    text: str


class StatusQuery(Message, frozen=True, tag="status?"):
    pass


class Phase(msgspec.Struct, kw_only=True):
    """Counters of the tasks of one function."""

    name: str
    total: int = 0
    done: int = 0
    running: int = 0
    retries: int = 0
    received_bytes: int = 0


class Node(msgspec.Struct, kw_only=True):
    host: str
    slots: int
    busy: int
    state: str
    reason: str = ""


class Status(Message, frozen=True, tag="status"):
    """``note``: what the session waits for, if anything."""

    phases: list[Phase]
    nodes: list[Node]
    note: str = ""


class Lease(Message, frozen=True, tag="lease"):
    """Ask for a share of the slots; results go to ``data_url``, as those of node ``node``."""

    node: str
    data_url: str


class Leased(Message, frozen=True, tag="leased"):
    """The share of the slots, at first and whenever it changes."""

    slots: Annotated[int, msgspec.Meta(ge=0)]


class NoLease(Message, frozen=True, tag="nolease"):
    """The agent does not know this job and epoch (any more)."""

    reason: str = ""


class Release(Message, frozen=True, tag="release"):
    pass


class Task(Message, frozen=True, tag="task"):
    """Payload inline when there is one frame behind the header, else to be fetched."""

    task: int
    attempt: int
    func: str
    nbytes: int


class Fetch(Message, frozen=True, tag="fetch"):
    task: int
    attempt: int


class Chunk(Message, frozen=True, tag="chunk"):
    """``offset`` within part ``index`` of ``part_bytes`` bytes; its bytes are the next frame."""

    task: int
    attempt: int
    index: int
    offset: int
    part_bytes: int


class Started(Message, frozen=True, tag="started"):
    task: int
    attempt: int
    pid: int


class Ended(Message, frozen=True, tag="ended"):
    """A whole attempt is spooled: its parts, bytes and BLAKE2b digest."""

    task: int
    attempt: int
    parts: Annotated[int, msgspec.Meta(ge=1)]
    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    digest: bytes = b""


class Grant(Message, frozen=True, tag="grant"):
    task: int
    attempt: int


class Abort(Message, frozen=True, tag="abort"):
    task: int
    attempt: int


class Died(Message, frozen=True, tag="died"):
    task: int
    attempt: int
    reason: str
    started: bool


class Beat(Message, frozen=True, tag="beat"):
    """Sent every 2 s each way. ``wanted``: live tasks; ``closed``: no new tasks, please."""

    wanted: int = 0
    busy: int = 0
    closed: bool = False


class Command(Message, frozen=True, tag="command"):
    """From ``oq-workers``: answered with AgentStatus once it is carried out."""

    action: Literal["status", "start", "stop", "kill"]


class AgentStatus(Message, frozen=True, tag="agentstatus"):
    """One node: ``memory`` is the part in use, ``jobs`` the names of the leases."""

    host: str
    pid: int
    slots: int
    busy: int
    jobs: list[str]
    memory: float
    engine: str
    state: str


class Ready(Message, frozen=True, tag="ready"):
    pid: int


class Run(Message, frozen=True, tag="run"):
    task: int
    attempt: int


class Part(Message, frozen=True, tag="part"):
    task: int
    attempt: int


AnyMessage = (
    Hello | Welcome | Refused | Submit | Consumed | Cancel | Delivered | Failed | StatusQuery
    | Status | Lease | Leased | NoLease | Release | Task | Fetch | Chunk | Started | Ended | Grant
    | Abort | Died | Beat | Command | AgentStatus | Ready | Run | Part
)  # fmt: skip


class _Version(msgspec.Struct):
    """The one field that headers of all versions share."""

    v: int


_encoder = msgspec.msgpack.Encoder()
_versions = msgspec.msgpack.Decoder(_Version)
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Return the header frame of a message."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> Any:
    """Return the message of a header frame.

    Raises ProtocolError for bytes that are no header, an unknown kind or a field of the wrong type,
    and its VersionError for a header of another version.
    """
    if len(frame) > HEADER_BYTES:
        raise ProtocolError(f"header of {len(frame)} bytes; at most {HEADER_BYTES}")
    try:
        message = _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        _check_version(frame)
        raise ProtocolError(f"not a message of protocol {PROTOCOL_VERSION}: {exc}") from exc
    if message.v != PROTOCOL_VERSION:
        _check_version(frame)
    return message


def _check_version(frame: bytes | memoryview) -> None:
    """Raise VersionError when the frame is a header of another version, whatever its fields."""
    try:
        version = _versions.decode(frame).v
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if version != PROTOCOL_VERSION:
        raise VersionError(f"peer speaks protocol {version}, this is {PROTOCOL_VERSION}")


def chunks(part: bytes | memoryview) -> Sequence[tuple[int, memoryview]]:
    """Cut a part into ``(offset, bytes)`` of at most CHUNK_BYTES; an empty part is one chunk."""
    view = memoryview(part)
    return [(i, view[i : i + CHUNK_BYTES]) for i in range(0, max(len(view), 1), CHUNK_BYTES)]
