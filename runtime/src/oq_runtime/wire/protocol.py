"""The wire: message kinds, their fields, and how they become frames. Nothing else knows it.

A message is a header frame; chunks, pings and what opens a lease have a payload frame behind it.
The header is msgpack of one of the structs below, tagged by ``kind``, with the protocol version in
``v``. Calls, bodies and payload frames are opaque bytes (pickles that only the engine and the
workers open); they are forwarded, never decoded. What is small is in the header: each frame is
encrypted by itself. What goes over the data connection on TCP is sealed, see ``seal``.

    engine  --Hello, Title, Submit, Consumed, Cancel, StatusQuery, AttemptsQuery-->  broker
    engine  <--Welcome, Delivered, Failed, Status, Attempts--  broker
    broker  --Hello, Lease, Task, Grant, Abort, Release, Beat-->  agent  (control)
    broker  <--Welcome, Refused, Leased, NoLease, Beat--  agent
    broker  <--Started, Ended, Placed, Died, Preempted--  agent
    broker  <--Hello, Fetch, Chunk, Beat--  agent  (data)
    broker  --BlobChunk, Beat-->  agent            (data)
    agent   --Run-->  worker             agent  <--Ready, Ended, NoRoom--  worker   (channel)

    oq-workers  --Command, Ping-->  agent    oq-workers <--AgentStatus, Ping--  agent

Between broker and agent each call of the broker opens an epoch. ``epoch`` and ``seq`` number the
messages of either direction of either socket, so that one that was lost shows as a gap; then the
epoch is over, and what it had under way is void.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from oq_runtime.errors import ProtocolError, VersionError
from oq_runtime.priority import Priority
from oq_runtime.text import clean

PROTOCOL_VERSION = 9
#: bytes of a body, or of the arguments in a call, that travel in a header
INLINE_BYTES = 64 * 1024
#: bytes of the payload that shows that long messages come through, not only short ones: more than a
#: packet of Ethernet holds, jumbo frames (9,000) included
PROBE_BYTES = 16 * 1024
#: bytes of one chunk on the data socket; a ZMTP heartbeat cuts much larger messages on slow links
CHUNK_BYTES = 1024 * 1024
#: bytes of the largest header that is decoded, and of the largest call: what is around it is small
HEADER_BYTES = 4 * 1024 * 1024
CALL_BYTES = HEADER_BYTES // 2


#: the name becomes part of file names
JobName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]*\Z", max_length=64)]
#: bytes of the largest body: a pebibyte
MOST_BYTES = 1 << 50
#: of slots or processes of a node
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
#: seconds of the longest age: a year
MOST_AGE_S = 366 * 86400.0
#: page faults that are counted
MOST_FAULTS = (1 << 32) - 1
#: an age, or a time that is left (s)
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MOST_AGE_S)]
#: a number of tasks
Tasks = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
#: a size or an offset
Size = Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)]

if TYPE_CHECKING:
    Words = str
else:

    class Words(str):
        """Words for people: any text may be sent, what is received has gone through ``clean``."""

        __slots__ = ()


class Message(
    msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True, kw_only=True
):
    """Fields of every header: protocol version, the session's job name, epoch, sequence number."""

    v: int = PROTOCOL_VERSION
    job: JobName = ""
    epoch: int = 0
    seq: int = 0


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What broker and agent must have in common, see ``facts``."""

    engine: str = ""
    python: str = ""
    numpy: str = ""
    dbserver: str = ""
    shared_dir: str = ""
    beat_s: str = ""
    suspect_s: str = ""
    lost_s: str = ""
    urgent_group: str = ""


class Hello(Message, frozen=True, tag="hello"):
    """The first message on a connection: who calls.

    ``user``: who runs the job, for people; nothing is decided by it.

    ``ticket``: on the data socket, that of the lease.
    """

    pid: int
    role: str
    facts: Facts = Facts()
    user: Words = ""
    ticket: bytes = b""


class Welcome(Message, frozen=True, tag="welcome"):
    """The answer to Hello: who it is that was called, and what is to be compared.

    ``no_nodes_limit_s``: the broker's, for the engine that waits for its first node.
    """

    pid: int
    host: Words = ""
    slots: int = 0
    facts: Facts = Facts()
    no_nodes_limit_s: Seconds = 0.0


class Refused(Message, frozen=True, tag="refused"):
    """The agent takes no work of this broker."""

    reason: Words


class Blob(msgspec.Struct, frozen=True):
    """An argument too big for a message: BLAKE2b digest, size, its file if on the same host."""

    digest: bytes
    nbytes: Size
    path: str = ""


class Submit(Message, frozen=True, tag="submit"):
    """A task for the broker.

    ``call`` refers to ``blobs`` by their positions; ``number`` is the engine's of the task.
    """

    task: int
    map: int
    func: str
    call: bytes
    weight: float = 1.0
    blobs: list[Blob] = []
    number: int = 0


class Consumed(Message, frozen=True, tag="consumed"):
    """The engine has the results of these tasks, or has been told that there are none."""

    tasks: list[int]


class Cancel(Message, frozen=True, tag="cancel"):
    """Forget one map, or all maps of the sender (-1): its tasks, and results not consumed yet."""

    map: int = -1


class Delivered(Message, frozen=True, tag="delivered"):
    """A committed attempt: its body, or the file ``path`` with it, the receiver's own."""

    task: int
    map: int
    path: str = ""
    body: bytes = b""


class Failed(Message, frozen=True, tag="failed"):
    """The task was given up; ``error`` is the name of a class of ``errors``."""

    task: int
    map: int
    error: str
    text: str


class Title(Message, frozen=True, tag="title"):
    """What people call the job: ``calculation 42``."""

    text: Words


class StatusQuery(Message, frozen=True, tag="status?"):
    """Ask for a Status."""


class Phase(msgspec.Struct, kw_only=True):
    """Counters of the tasks of one function in one job, named as in Title.

    ``took_s``, ``left_s``: those of ``core.pace.Pace`` (s).
    """

    name: Words
    job: Words = ""
    took_s: Seconds = 0.0
    left_s: Seconds | None = None
    total: int = 0
    done: int = 0
    running: int = 0
    retries: int = 0
    preempted: int = 0
    received_bytes: int = 0


class NodeState(enum.StrEnum):
    """Of a node as its broker sees it."""

    CALLING = "calling"
    LEASED = "leased"
    REFUSED = "refused"


class Node(msgspec.Struct, kw_only=True):
    """What a broker knows of a node.

    ``reason``: why it has no lease; ``unstarted``: it begins with none of its tasks.
    """

    host: Words
    slots: int
    busy: int
    state: NodeState
    reason: Words = ""
    unstarted: bool = False


class Status(Message, frozen=True, tag="status"):
    """How far a session is.

    ``note``: what the session waits for, if anything.
    """

    phases: list[Phase]
    nodes: list[Node]
    note: Words = ""


class Share(msgspec.Struct, frozen=True, array_like=True):
    """See ``core.ledger``."""

    at_s: float
    node: int
    slots: int
    reason: int


class AttemptsQuery(Message, frozen=True, tag="attempts?"):
    """Ask for what became of the attempts of a job, named as in Title."""

    of: Words


class Attempts(Message, frozen=True, tag="attempts"):
    """The next ``rows`` of these attempts, see ``core.ledger``; ``more`` are to be asked for.

    ``functions``, ``nodes``, ``reasons``: the names whose numbers are in rows and shares. Rows are
    told once, the rest each time.
    """

    rows: bytes
    more: bool
    functions: list[Words]
    nodes: list[Words]
    reasons: list[Words]
    shares: list[Share]


class Suite(enum.StrEnum):
    """The ciphers with which data connections are sealed."""

    AES_256_GCM = "AES-256-GCM"
    CHACHA20_POLY1305 = "ChaCha20-Poly1305"


class Terms(msgspec.Struct, frozen=True):
    """How a data connection is sealed: ``node`` is its name at the broker, see ``seal``."""

    suite: Suite
    secret: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    node: str

    def __repr__(self) -> str:  # a secret is in no log
        return f"Terms({self.suite}, {self.node})"


class Lease(Message, frozen=True, tag="lease"):
    """Ask for a share of the slots; results go to ``data_url``.

    ``ticket``: what only this agent is told, so that nobody else can open its data connection,
    which is good for one; ``terms`` on TCP. A payload of PROBE_BYTES comes behind it, and behind
    the Hello on the data socket.
    """

    ticket: bytes
    data_url: str
    priority: Priority = Priority.NORMAL
    terms: Terms | None = None


class Leased(Message, frozen=True, tag="leased"):
    """The share of the slots, at first and whenever it changes."""

    slots: Annotated[int, msgspec.Meta(ge=0)]


class NoLease(Message, frozen=True, tag="nolease"):
    """The agent does not know this job and epoch (any more)."""

    reason: Words = ""


class Release(Message, frozen=True, tag="release"):
    """The job does not need the node any more."""


class Task(Message, frozen=True, tag="task"):
    """An attempt; blobs that the node lacks, and has no path of, it fetches.

    ``alone``: nothing else may run on the node at the same time. ``firm``: it is not to be
    interrupted for a job of higher priority. ``number`` is the one that people know: the engine's,
    of the function ``func``.
    """

    task: int
    attempt: int
    func: str
    call: bytes
    blobs: list[Blob] = []
    alone: bool = False
    firm: bool = False
    number: int = 0


class Fetch(Message, frozen=True, tag="fetch"):
    """Ask for the bytes of a blob, which come as chunks."""

    digest: bytes


class BlobChunk(Message, frozen=True, tag="blob"):
    """The bytes of a blob from ``offset`` on are the next frame."""

    digest: bytes
    offset: Size


class Chunk(Message, frozen=True, tag="chunk"):
    """The bytes of an attempt's body from ``offset`` on are the next frame."""

    task: int
    attempt: int
    offset: Size


class Started(Message, frozen=True, tag="started"):
    """The attempt has been running for a while; short ones only end."""

    task: int
    attempt: int


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """What an attempt has taken, see ``core.ledger``; seconds, and bytes."""

    slot: Count = 0
    ran_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_AGE_S)] = 0.0
    cpu_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_AGE_S)] = 0.0
    queued_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_AGE_S)] = 0.0
    faults: Annotated[int, msgspec.Meta(ge=0, le=MOST_FAULTS)] = 0
    peak_bytes: Size = 0


class Ended(Message, frozen=True, tag="ended"):
    """A whole attempt: its parts, and the bytes of its body.

    A small ``body`` is here, another one in the file ``path``, which no other host is told.
    """

    task: int
    attempt: int
    parts: Annotated[int, msgspec.Meta(ge=1)]
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=MOST_BYTES)]
    path: str = ""
    body: bytes = b""
    usage: Usage = Usage()


class Placed(Message, frozen=True, tag="placed"):
    """The file of an attempt on the same host, which from now on is the broker's."""

    task: int
    attempt: int
    path: str


class Grant(Message, frozen=True, tag="grant"):
    """The results of this attempt may be sent."""

    task: int
    attempt: int


class Abort(Message, frozen=True, tag="abort"):
    """The attempt is not wanted any more."""

    task: int
    attempt: int


class Died(Message, frozen=True, tag="died"):
    """An attempt has failed; ``oom``: killed for lack of memory, ``no_room``: of disk."""

    task: int
    attempt: int
    reason: Words
    oom: bool = False
    no_room: bool = False


class Preempted(Message, frozen=True, tag="preempted"):
    """An attempt was interrupted for a job of higher priority, whose name for people is ``by``."""

    task: int
    attempt: int
    by: Words


class Beat(Message, frozen=True, tag="beat"):
    """Sent every 2 s each way. ``wanted``: live tasks; ``closed``: no new tasks, please.

    ``free_bytes``: of memory for a task that is alone on the node, 0 when it drains.
    ``title``: of the job, see Title; ``done`` of its ``total`` tasks so far have ended, and the
    rest takes about ``left_s`` (s; None: not known).
    """

    wanted: int = 0
    done: Tasks = 0
    total: Tasks = 0
    left_s: Seconds | None = None
    busy: int = 0
    closed: bool = False
    free_bytes: int = 0
    title: Words = ""


class Command(Message, frozen=True, tag="command"):
    """From ``oq-workers``: answered with AgentStatus once it is carried out."""

    action: Literal["status", "start", "stop", "kill"]


class Ping(Message, frozen=True, tag="ping"):
    """Comes back with its payload, or so many bytes: how fast, and how well, the way to a node is.

    ``want``: bytes to come back instead of the payload.
    """

    want: Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES)] | None = None


class AgentState(enum.StrEnum):
    """Whether a node takes tasks: yes; no, and it still has some; no."""

    UP = "up"
    DRAINING = "draining"
    STOPPED = "stopped"


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a node knows of a job: the session's name, and in people's words whose and which it is.

    ``age_s``: of its lease; ``busy`` of its share of ``slots``; the rest as in Beat.
    """

    name: JobName
    user: Words
    title: Words
    priority: Priority
    age_s: Seconds
    slots: Count
    busy: Count
    done: Tasks = 0
    total: Tasks = 0
    left_s: Seconds | None = None


class AgentStatus(Message, frozen=True, tag="agentstatus"):
    """One node.

    ``memory`` is the part in use, ``jobs`` the leases in words, ``ready`` the workers that have
    imported the engine, ``beat_age_s`` the age of the oldest of the brokers' last beats (None: no
    lease), ``waiting`` the processes that wait for a device or a file server, ``stuck`` the workers
    that were killed and do not end, ``unstarted`` those that should have started long ago.
    """

    host: Words
    pid: int
    slots: Count
    busy: Count
    jobs: Annotated[list[Words], msgspec.Meta(max_length=1000)]
    memory: Annotated[float, msgspec.Meta(ge=0, le=10)]
    engine: Words
    state: AgentState
    leases: Annotated[list[LeaseStatus], msgspec.Meta(max_length=1000)] = []
    ready: Count = 0
    beat_age_s: Seconds | None = None
    waiting: Count = 0
    stuck: Count = 0
    unstarted: Count = 0


class Ready(Message, frozen=True, tag="ready"):
    """A worker is there for tasks."""

    pid: int


class Run(Message, frozen=True, tag="run"):
    """An attempt in a slot of the node; ``spool_bytes`` of its results may go to shared memory."""

    task: int
    attempt: int
    call: bytes
    paths: list[str] = []
    spool_bytes: int = 0
    slot: int = 0


class NoRoom(Message, frozen=True, tag="noroom"):
    """The results of this attempt fit nowhere on this node."""

    task: int
    attempt: int
    reason: Words


AnyMessage = (
    Hello | Welcome | Refused | Submit | Consumed | Cancel | Delivered | Failed | Title
    | StatusQuery | Status | AttemptsQuery | Attempts | Lease | Leased | NoLease | Release | Task
    | Fetch | BlobChunk | Chunk | Started | Ended | Placed | Grant | Abort | Died | Preempted | Beat
    | Command | Ping | AgentStatus | Ready | Run | NoRoom
)  # fmt: skip


class _Version(msgspec.Struct):
    """The one field that headers of all versions share."""

    v: int


def _cleaned(kind: type, words: str) -> Words:
    """Return what becomes of words that are received; nothing else needs to be changed."""
    if kind is not Words or not isinstance(words, str):
        raise ValueError("Expected words")
    return Words(clean(words))


_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # of Words that go on to the next
_versions = msgspec.msgpack.Decoder(_Version)
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage, dec_hook=_cleaned)


def encode(message: Message) -> bytes:
    """Return the header frame of a message."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> Any:
    """Return the message of a header frame.

    Raises ProtocolError for bytes that are no header, an unknown kind or a field of the wrong type,
    and VersionError, which names both versions, for a header of another version.
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


def chunks(body: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Cut a body into ``(offset, bytes)`` of at most CHUNK_BYTES."""
    view = memoryview(body)
    for offset in range(0, len(view), CHUNK_BYTES):
        yield offset, view[offset : offset + CHUNK_BYTES]
