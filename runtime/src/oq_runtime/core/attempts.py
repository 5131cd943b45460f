"""The pure core of an attempt's life on a node: from the task that is given to the results sent.

``Attempts.handle(event, now)`` returns effects for the shell (``agent``). Nothing here reads,
writes or waits. The state of an attempt is changed by the table TRANSITIONS; a pair that it does
not know raises TransitionError and changes nothing. An attempt that has come to an end is forgotten
at once, by ``_end`` alone, and all those of a job that ends by ``_end_job``. What ``slots`` decides
on an attempt is an event here, what is decided here on its slot is one there.

Not covered: which worker runs an attempt, and when (``slots``); files and bytes (``agent``).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from oq_runtime.core import slots
from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.errors import TransitionError

#: seconds after which an attempt that still runs is told to have started
STARTED_SECS = 0.2
#: how often a big argument is asked for before the attempts that wait for it fail
MOST_ASKS = 2

#: job, task, attempt
Key = tuple[str, int, int]
#: job, digest
BlobKey = tuple[str, bytes]


class State(Enum):
    """Where an attempt is; the value is for people."""

    FETCHING = "its big arguments are on their way"
    PENDING = "waits for a worker"
    RUNNING = "a worker has it"
    SPOOLED = "its results are whole"
    UPLOADING = "its results are on their way"
    ENDED = "its results are the broker's"
    FAILED = "the broker knows that it came to nothing"
    DROPPED = "nobody wants it any more"


WAITING = (State.FETCHING, State.PENDING)
FINAL = (State.ENDED, State.FAILED, State.DROPPED)

# {state: {transition: next state}}
TRANSITIONS: dict[State, dict[str, State]] = {
    State.FETCHING: {"fetched": State.PENDING, "fail": State.FAILED, "drop": State.DROPPED},
    State.PENDING: {"run": State.RUNNING, "fail": State.FAILED, "drop": State.DROPPED},
    State.RUNNING: {
        "spool": State.SPOOLED,
        "end": State.ENDED,
        "fail": State.FAILED,
        "drop": State.DROPPED,
    },
    State.SPOOLED: {"upload": State.UPLOADING, "fail": State.FAILED, "drop": State.DROPPED},
    State.UPLOADING: {"sent": State.ENDED, "fail": State.FAILED, "drop": State.DROPPED},
    State.ENDED: {},
    State.FAILED: {},
    State.DROPPED: {},
}


@dataclass(slots=True)
class Attempt:
    """An attempt at a task, from its call until its results are sent.

    ``blobs``: digests of its big arguments; ``missing``: of those that have not come yet.
    """

    job: str
    task: int
    attempt: int
    alone: bool
    firm: bool = False
    blobs: frozenset[bytes] = frozenset()
    missing: set[bytes] = field(default_factory=set)
    state: State = State.FETCHING

    @property
    def key(self) -> Key:
        return self.job, self.task, self.attempt

    def __str__(self) -> str:
        return f"attempt {self.attempt} of task {self.task} of {self.job}"


@dataclass(slots=True)
class Blob:
    """A big argument on this node, or on its way; ``users``: the attempts that need it."""

    nbytes: int
    here: bool = False
    asks: int = 1
    users: dict[Key, None] = field(default_factory=dict)


@dataclass(slots=True)
class Fetches:
    """What a job's broker was asked for, in that order, and when the last of it came."""

    heard_s: float
    asked: dict[bytes, None] = field(default_factory=dict)


# ---- events


@dataclass(frozen=True, slots=True)
class Given:
    """An attempt; ``blobs``: digest and bytes of what this node has to have for it.

    ``free_bytes``: how much more may lie in shared memory. ``alone``, ``firm``: see
    ``slots.TaskGiven``.
    """

    job: str
    task: int
    attempt: int
    blobs: tuple[tuple[bytes, int], ...] = ()
    alone: bool = False
    free_bytes: int = 0
    firm: bool = False


@dataclass(frozen=True, slots=True)
class BlobCame:
    """The file of a big argument is whole."""

    job: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class BlobRefused:
    """There is no room for it."""

    job: str
    digest: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """The worker has all its results; in a file, or they are small and the broker has been told."""

    job: str
    task: int
    attempt: int
    in_file: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """Its results are lost, or have no room (``no_room``)."""

    job: str
    task: int
    attempt: int
    reason: str
    no_room: bool = False


@dataclass(frozen=True, slots=True)
class Granted:
    """The broker has room for its results."""

    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Sent:
    """So are all its results."""

    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class AbortAsked:
    """The broker does not want the attempt any more."""

    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class JobEnded:
    """Nothing of the job is here any more."""

    job: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed.

    ``moved``: jobs of which bytes of big arguments have come since the last time.
    """

    moved: frozenset[str] = frozenset()


Event = (
    Given | BlobCame | BlobRefused | slots.RunOn | slots.Died | slots.Preempted | Done | Failed
    | Granted | Sent | AbortAsked | JobEnded | Tick
)  # fmt: skip


# ---- effects; besides slots.TaskGiven and slots.TaskTaken


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask the broker for a big argument, for which there is room to be made if it is new."""

    job: str
    digest: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class DropBlob:
    """It is not needed, whole or not."""

    job: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class TellStarted:
    """Tell the broker that a worker has had the attempt for a while."""

    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TellDied:
    """Tell the broker why there are no results; the rest as in ``wire.protocol.Died``."""

    job: str
    task: int
    attempt: int
    reason: str
    oom: bool = False
    no_room: bool = False


@dataclass(frozen=True, slots=True)
class TellPreempted:
    """Tell the broker that it was interrupted for the job ``by``, whose priority is higher."""

    job: str
    task: int
    attempt: int
    by: str


@dataclass(frozen=True, slots=True)
class Upload:
    """Send the results to the broker, which has room for them."""

    job: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The attempt is over: what there is of it is of no use any more."""

    job: str
    task: int
    attempt: int


Effect = (
    Fetch | DropBlob | TellStarted | TellDied | TellPreempted | Upload | Forget | slots.TaskGiven
    | slots.TaskTaken
)  # fmt: skip


class Attempts:
    """The attempts that an agent holds.

    :param limits: ``lost_s``: seconds of silence after which a big argument is asked for again
    """

    def __init__(self, limits: Limits = DEFAULTS) -> None:
        self.limits = limits
        self.attempts: dict[Key, Attempt] = {}
        self.blobs: dict[BlobKey, Blob] = {}
        self.idle: dict[BlobKey, None] = {}  # that are here, and need not: the longest idle first
        self.fetches: dict[str, Fetches] = {}  # of jobs that wait for some
        self.waiting: Counter[str] = Counter()  # attempts of each job that no worker has had
        # attempts that run, of which the broker has not been told that; the oldest first
        self.untold: dict[Key, float] = {}

    @property
    def due_s(self) -> float:
        """When the next ``Tick`` has a start to tell; infinity if there is none."""
        for since_s in self.untold.values():
            return since_s + STARTED_SECS
        return math.inf

    def coming(self, job: str) -> int:
        """Return how many big arguments of a job are yet to come."""
        return len(self.fetches[job].asked) if job in self.fetches else 0

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, monotonic); return what is to be done.

        Raises TransitionError, and nothing has changed, for one that makes no sense. One on an
        attempt that is not here (any more) does nothing.
        """
        effects: list[Effect] = []
        match event:
            case Given():
                self._take(event, now, effects)
            case BlobCame(job, digest):
                self._come(job, digest, effects)
            case BlobRefused(job, digest, reason):
                if blob := self.blobs.get((job, digest)):
                    self._fail(blob, f"no room for its arguments: {reason}", effects, no_room=True)
            case Tick(moved):
                self._tick(moved, now, effects)
            case JobEnded(job):
                self._end_job(job)
            case _:
                if found := self.attempts.get((event.job, event.task, event.attempt)):
                    self._go_on(found, event, now, effects)
        return effects

    def _go_on(self, attempt: Attempt, event: Event, now: float, effects: list[Effect]) -> None:
        key = attempt.key
        match event:
            case slots.RunOn():
                self._change(attempt, "run")
                self.untold[key] = now
            case Done(in_file=True):
                self._change(attempt, "spool")
                self.untold.pop(key, None)
            case Done():
                self._end(attempt, "end", effects)
            case Granted():
                self._change(attempt, "upload")
                effects.append(Upload(*key))
            case Sent():
                self._end(attempt, "sent", effects)
            case slots.Died(reason=reason, oom=oom):
                effects.append(TellDied(*key, reason, oom=oom))
                self._end(attempt, "fail", effects)
            case slots.Preempted(by=by):
                effects.append(TellPreempted(*key, by))
                self._end(attempt, "drop", effects)
            case Failed(reason=reason, no_room=no_room):
                effects.append(TellDied(*key, reason, no_room=no_room))
                self._end(attempt, "fail", effects)
            case AbortAsked():
                if attempt.state in (State.PENDING, State.RUNNING):
                    effects.append(slots.TaskTaken(*key))
                self._end(attempt, "drop", effects)

    def _change(self, attempt: Attempt, transition: str) -> None:
        to = TRANSITIONS[attempt.state].get(transition)
        if to is None:
            raise TransitionError(f"{transition!r} of {attempt}, which is {attempt.state.name}")
        self.waiting[attempt.job] += (to in WAITING) - (attempt.state in WAITING)
        attempt.state = to

    def _end(self, attempt: Attempt, transition: str, effects: list[Effect]) -> None:
        """Forget an attempt that has come to an end, and the blobs that only it waited for."""
        self._change(attempt, transition)
        key = attempt.key
        del self.attempts[key]
        self.untold.pop(key, None)
        for digest in attempt.blobs:
            blob = self.blobs[attempt.job, digest]
            del blob.users[key]
            if blob.here and not blob.users:
                self.idle[attempt.job, digest] = None
            elif not blob.users:
                del self.blobs[attempt.job, digest]
                self._asked_no_more(attempt.job, digest)
                effects.append(DropBlob(attempt.job, digest))
        effects.append(Forget(*key))

    # ---- big arguments

    def _take(self, given: Given, now: float, effects: list[Effect]) -> None:
        """Hold an attempt until its blobs are here; each is fetched once, however many wait."""
        key = job, *_ = given.job, given.task, given.attempt
        if key in self.attempts:
            raise TransitionError(f"{self.attempts[key]} is given twice")
        digests = frozenset(digest for digest, _ in given.blobs)
        attempt = Attempt(*key, given.alone, given.firm, digests)
        self.attempts[key] = attempt
        self.waiting[job] += 1
        free_bytes = given.free_bytes
        for digest, nbytes in given.blobs:
            self.idle.pop((job, digest), None)
            blob = self.blobs.get((job, digest))
            if blob is None:
                free_bytes = self._make_room(nbytes, free_bytes, effects)
                blob = self.blobs[job, digest] = Blob(nbytes)
                self.fetches.setdefault(job, Fetches(now)).asked[digest] = None
                effects.append(Fetch(job, digest, nbytes))
            blob.users[key] = None
            if not blob.here:
                attempt.missing.add(digest)
        if not attempt.missing:
            self._fetched(attempt, effects)

    def _fetched(self, attempt: Attempt, effects: list[Effect]) -> None:
        self._change(attempt, "fetched")
        effects.append(slots.TaskGiven(*attempt.key, attempt.alone, attempt.firm))

    def _make_room(self, nbytes: int, free_bytes: int, effects: list[Effect]) -> int:
        """Drop blobs that nobody needs until there is room; return what is left for others."""
        while free_bytes < nbytes and self.idle:
            job, digest = name = next(iter(self.idle))
            del self.idle[name]
            free_bytes += self.blobs.pop(name).nbytes
            effects.append(DropBlob(job, digest))
        return free_bytes - nbytes if free_bytes >= nbytes else free_bytes

    def _come(self, job: str, digest: bytes, effects: list[Effect]) -> None:
        blob = self.blobs.get((job, digest))
        if blob is None or blob.here:
            return
        blob.here = True
        # answers come in the order of the questions: those before it will get none
        asked = list(self.fetches[job].asked)
        self._asked_no_more(job, digest)
        for passed_over in asked[: asked.index(digest)]:
            self._ask_again(job, passed_over, effects)
        for key in blob.users:
            attempt = self.attempts[key]
            attempt.missing.discard(digest)
            if not attempt.missing:
                self._fetched(attempt, effects)

    def _ask_again(self, job: str, digest: bytes, effects: list[Effect]) -> None:
        blob = self.blobs.get((job, digest))
        if blob is None:
            return  # those that waited for it have just failed for want of another one
        if blob.asks >= MOST_ASKS:
            reason = f"a big argument of {blob.nbytes:,} bytes was asked for twice and did not come"
            self._fail(blob, reason, effects)
            return
        blob.asks += 1
        asked = self.fetches[job].asked
        del asked[digest]
        asked[digest] = None
        effects.append(Fetch(job, digest, blob.nbytes))

    def _fail(
        self, blob: Blob, reason: str, effects: list[Effect], *, no_room: bool = False
    ) -> None:
        """Fail the attempts that wait for a blob."""
        for key in list(blob.users):
            effects.append(TellDied(*key, reason, no_room=no_room))
            self._end(self.attempts[key], "fail", effects)

    def _asked_no_more(self, job: str, digest: bytes) -> None:
        del self.fetches[job].asked[digest]
        if not self.fetches[job].asked:
            del self.fetches[job]

    # ---- time, and the end of jobs

    def _tick(self, moved: frozenset[str], now: float, effects: list[Effect]) -> None:
        for job, fetches in list(self.fetches.items()):
            if job in moved:
                fetches.heard_s = now
            elif now - fetches.heard_s > self.limits.lost_s:
                fetches.heard_s = now
                for digest in list(fetches.asked):
                    self._ask_again(job, digest, effects)
        for key, since_s in list(self.untold.items()):
            if now - since_s < STARTED_SECS:
                break
            del self.untold[key]
            effects.append(TellStarted(*key))

    def _end_job(self, job: str) -> None:
        """Forget all attempts of a job, and its blobs."""
        for key in [key for key in self.attempts if key[0] == job]:
            del self.attempts[key]
            self.untold.pop(key, None)
        for name in [name for name in self.blobs if name[0] == job]:
            del self.blobs[name]
            self.idle.pop(name, None)
        self.fetches.pop(job, None)
        del self.waiting[job]

    def check_invariants(self) -> None:
        """Raise AssertionError when the state contradicts itself; called by the tests."""
        for key, attempt in self.attempts.items():
            assert key == attempt.key and attempt.state not in FINAL, attempt
            assert (attempt.state is State.FETCHING) == bool(attempt.missing), attempt
            assert attempt.missing <= attempt.blobs, attempt
            for digest in attempt.blobs:
                blob = self.blobs[attempt.job, digest]
                assert key in blob.users and blob.here == (digest not in attempt.missing), attempt
        for (job, digest), blob in self.blobs.items():
            assert all(digest in self.attempts[key].blobs and key[0] == job for key in blob.users)
            assert blob.here or (blob.users and blob.asks <= MOST_ASKS), blob
        idle = {name for name, blob in self.blobs.items() if blob.here and not blob.users}
        assert self.idle.keys() == idle
        asked = {(job, digest) for job, fetches in self.fetches.items() for digest in fetches.asked}
        assert asked == {name for name, blob in self.blobs.items() if not blob.here}
        assert all(fetches.asked for fetches in self.fetches.values())
        assert +self.waiting == Counter(a.job for a in self.attempts.values() if a.state in WAITING)
        for key in self.untold:
            assert self.attempts[key].state is State.RUNNING, key
        assert list(self.untold.values()) == sorted(self.untold.values())
