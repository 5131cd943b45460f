"""What became of each attempt: noted in the broker, kept in the datastore, read by ``explain``.

``Ledger.take`` is shown the scheduler's events and effects, and makes a row of each attempt that is
over. Rows are packed, since a job may have a hundred thousand; ROW and FIELDS say how. All times
are those of the broker's clock, so that no two clocks are compared: a worker tells only for how
long it has run. Not covered: how rows travel (``wire.protocol``) and are kept (``engine.kept``).
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass, field

from oq_runtime.core import scheduler as core

#: reasons that differ, of which rows tell, and their characters; later ones are the last
MOST_REASONS, REASON_CHARACTERS = 1000, 200
#: changes of the nodes' slots that are noted: a node may change them without an end
MOST_SHARES = 50_000
#: attempts at a task that are told apart, and slots of a node
MOST_ATTEMPTS, MOST_SLOTS = 0xFFFF, 0xFFFFFFFF
#: a process is another one each time; its number is in the log
PROCESS = re.compile(r"process \d+ ")
#: events that come for each task, or often, and of which nothing is noted
UNNOTED = frozenset({core.Submitted, core.Consumed, core.NodeSeen, core.Tick})
#: seconds after which a node tells of a start, see ``core.attempts``
STARTED_SECS = 0.2
#: a slot that is not known: the attempt did not end
NO_SLOT = -1


class Outcome(enum.IntEnum):
    """What became of an attempt; only one of a task can be COMMITTED."""

    COMMITTED = 0
    DIED = 1  # its worker did
    OUT_OF_MEMORY = 2
    NO_ROOM = 3  # for its data, on the node's disk
    NODE_LOST = 4
    DAMAGED = 5  # on the way
    DROPPED = 6  # not wanted: another attempt was first, or the job has ended
    PREEMPTED = 7  # interrupted for a job of higher priority


#: outcomes that are somebody's fault
FAULTS = frozenset(Outcome) - {Outcome.COMMITTED, Outcome.DROPPED, Outcome.PREEMPTED}

#: field -> its type, as numpy and, after the sign of little endian, ``struct`` have it. Times in
#: seconds; a step that an attempt did not come to has the time of the next one that it did
FIELDS = {
    "task": ("u4", "I"),  # the engine's number, within ``func``
    "func": ("u2", "H"),  # which of the functions
    "attempt": ("u2", "H"),  # at this task, from 1
    "node": ("u2", "H"),
    "slot": ("i4", "i"),
    "outcome": ("u1", "B"),
    "reason": ("u2", "H"),  # 0: none
    "weight": ("f8", "d"),  # as the engine has estimated it
    "submitted_s": ("f8", "d"),  # the task was
    "assigned_s": ("f8", "d"),  # to the node
    "started_s": ("f8", "d"),  # a worker had it, and its arguments
    "ended_s": ("f8", "d"),  # the worker had all results
    "granted_s": ("f8", "d"),  # the broker had room for them
    "over_s": ("f8", "d"),  # the broker had them, or knew that none would come
    "cpu_s": ("f4", "f"),  # on a CPU, of the time from start to end
    "queued_s": ("f4", "f"),  # waiting for a CPU, of the same
    "faults": ("u4", "I"),  # pages of memory that had to be read from a disk
    "peak_bytes": ("u8", "Q"),  # of memory (RSS) of the worker; 0: not known
    "in_bytes": ("u8", "Q"),  # of its arguments, wherever they were already
    "out_bytes": ("u8", "Q"),  # of its results
}
ROW = struct.Struct("<" + "".join(code for _, code in FIELDS.values()))


@dataclass(slots=True)
class Open:
    """An attempt that is not over. A time is 0 until it is known."""

    node: int
    assigned_s: float
    started_s: float = 0.0
    ended_s: float = 0.0
    granted_s: float = 0.0
    slot: int = NO_SLOT
    cpu_s: float = 0.0
    queued_s: float = 0.0
    faults: int = 0
    peak_bytes: int = 0
    out_bytes: int = 0


@dataclass(slots=True)
class Task:
    """A task that is not over.

    ``job``: as people call it; ``func``: the number of its function; ``open``: attempts.
    """

    job: str
    func: int
    number: int
    weight: float
    in_bytes: int
    submitted_s: float
    open: dict[int, Open] = field(default_factory=dict)


@dataclass(slots=True)
class Share:
    """From ``at_s`` on a node has so many slots for the session; ``reason``: why it has none."""

    at_s: float
    node: int
    slots: int
    reason: int = 0


@dataclass(slots=True)
class Ledger:
    """The attempts that are over, and the tasks that are not.

    ``rows``: by job, packed; ``nodes``, ``reasons``: numbers of names, in their order;
    ``shares``: in the order of time.
    """

    rows: dict[str, bytearray] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=lambda: {"": 0})
    shares: list[Share] = field(default_factory=list)
    tasks: dict[int, Task] = field(default_factory=dict)

    def submitted(self, task: int, found: Task) -> None:
        """Note a task before the scheduler is told of it."""
        self.tasks[task] = found

    def measured(
        self,
        task: int,
        attempt: int,
        now: float,
        *,
        slot: int,
        ran_s: float,
        cpu_s: float,
        queued_s: float,
        faults: int,
        peak_bytes: int,
    ) -> None:
        """Note what a worker says of an attempt that has ended just now."""
        if found := self._open(task, attempt):
            found.started_s = max(found.assigned_s, now - ran_s)
            found.slot, found.cpu_s, found.queued_s = slot, cpu_s, queued_s
            found.faults, found.peak_bytes = faults, peak_bytes

    def take(self, what: core.Event | core.Effect, now: float) -> None:
        """Note an event of the scheduler, or an effect, at time ``now`` (seconds, monotonic)."""
        if type(what) in UNNOTED:
            return
        match what:
            case core.Assign(node, task, attempt):
                self.tasks[task].open[attempt] = Open(self._node(node), now)
            case core.AttemptEnded(_, task, attempt, nbytes):
                if found := self._open(task, attempt):
                    found.ended_s, found.out_bytes = now, nbytes
            case core.GrantUpload(_, task, attempt):
                if found := self._open(task, attempt):
                    found.granted_s = now
            case core.Commit(_, task, attempt):
                self._close(task, attempt, Outcome.COMMITTED, "", now)
                self._forget(task, now)
            case core.AttemptStarted(_, task, attempt):
                if found := self._open(task, attempt):
                    found.started_s = max(found.assigned_s, now - STARTED_SECS)
            case core.AttemptDied(node, task, attempt, reason, oom, no_room):
                outcome = Outcome.NO_ROOM if no_room else Outcome.DIED
                outcome = Outcome.OUT_OF_MEMORY if oom else outcome
                self._close(task, attempt, outcome, reason, now)
            case core.AttemptPreempted(_, task, attempt, by):
                self._close(task, attempt, Outcome.PREEMPTED, f"interrupted for {by}", now)
            case core.Uploaded(_, task, attempt, False):
                self._close(task, attempt, Outcome.DAMAGED, "damaged on the way", now)
            case core.AbortAttempt(_, task, attempt):
                self._close(task, attempt, Outcome.DROPPED, "", now)
            case core.GiveUp(task) | core.Forget(task):
                self._forget(task, now)
            case core.NodeJoined(node, slots) | core.NodeResized(node, slots):
                self._share(Share(now, self._node(node), slots))
            case core.NodeGone(node, reason) | core.NodeLost(node, reason):
                number = self._node(node)
                self._share(Share(now, number, 0, self._reason(reason)))
                for task, of in self.tasks.items():
                    for attempt in [a for a, found in of.open.items() if found.node == number]:
                        self._close(task, attempt, Outcome.NODE_LOST, reason, now)

    def pop(self, job: str, most: int) -> bytes:
        """Return the next rows of a job, and forget them.

        :param most: rows
        """
        rows = self.rows.get(job, bytearray())
        taken = bytes(rows[: most * ROW.size])
        del rows[: most * ROW.size]
        return taken

    def _open(self, task: int, attempt: int) -> Open | None:
        return of.open.get(attempt) if (of := self.tasks.get(task)) else None

    def _node(self, name: str) -> int:
        return self.nodes.setdefault(name, len(self.nodes))

    def _share(self, share: Share) -> None:
        share.slots = min(share.slots, MOST_SLOTS)
        if len(self.shares) < MOST_SHARES:
            self.shares.append(share)

    def _reason(self, text: str) -> int:
        text = PROCESS.sub("process ", text)[:REASON_CHARACTERS]
        if text not in self.reasons and len(self.reasons) >= MOST_REASONS:
            text = "other reasons"
        return self.reasons.setdefault(text, len(self.reasons))

    def _forget(self, task: int, now: float) -> None:
        """Note that a task is over, and with it what there is of other attempts."""
        for attempt in list(self.tasks[task].open):
            self._close(task, attempt, Outcome.DROPPED, "", now)
        del self.tasks[task]

    def _close(self, task: int, attempt: int, outcome: Outcome, reason: str, now: float) -> None:
        of = self.tasks.get(task)
        found = of.open.pop(attempt, None) if of else None
        if of is None or found is None:
            return  # it was over before
        if not of.job:
            return  # of a session outside the engine's jobs: nobody would ask for it
        granted_s = found.granted_s or now
        ended_s = found.ended_s or granted_s
        started_s = found.started_s
        if not started_s:
            # one that died, or was interrupted, had a worker, but not for long
            recent_s = max(found.assigned_s, ended_s - STARTED_SECS)
            had_worker = outcome in (Outcome.DIED, Outcome.PREEMPTED)
            started_s = recent_s if had_worker else ended_s
        self.rows.setdefault(of.job, bytearray()).extend(
            ROW.pack(
                of.number & 0xFFFFFFFF,
                of.func,
                min(attempt, MOST_ATTEMPTS),
                found.node,
                found.slot,
                outcome,
                self._reason(reason),
                of.weight,
                of.submitted_s,
                found.assigned_s,
                started_s,
                ended_s,
                granted_s,
                now,
                found.cpu_s,
                found.queued_s,
                found.faults,
                found.peak_bytes,
                of.in_bytes,
                found.out_bytes,
            )
        )
