"""The pure scheduling core of the broker: the life of a task, and the byte window.

``Scheduler.handle(event, now)`` returns effects for the shell to carry out. No socket, clock,
process or random number is used here. All state of a task is changed here and nowhere else, by the
table TRANSITIONS; a pair that it does not know raises TransitionError and changes nothing. An event
of an attempt that is not the task's current one is stale: it never reaches the table, and its
sender is told to abort. A task that has ended is forgotten. Not covered: which node gets a task
(``placement``).
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from oq_runtime import errors
from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.core.placement import Kind, Node, Placement, Speculation
from oq_runtime.errors import TransitionError

#: attempts of a task that may run out of memory: one beside others, one alone on its node
MAX_OOMS = 2
#: attempts that may be lost with their nodes, or damaged on the way, before the task is given up
MAX_NODE_LOSSES = 10
#: attempts that may be interrupted for jobs of higher priority; the next one is firm
MAX_PREEMPTIONS = 2
#: leases of a node, one after the other, that end before any result of their tasks has come; from
#: there on the job does without the node for so many seconds, doubled each time up to the second
MOST_BARREN, LEFT_OUT_S, MOST_LEFT_OUT_S = 3, 60, 3600
#: bytes of results that may be staged in the broker; beyond it, one attempt per group
WINDOW_BYTES = 1 << 30
#: seconds after which an attempt that has not started waits for a slot, for agents tell of a start
#: after 0.2 s; it is taken back when another node has a slot that nobody wants
WAITED_S = 1.0
#: the same on a node that has a slot for it: its workers do not start, since the engine cannot be
#: read there; twice as long each time, for the task may also wait for its arguments
UNSTARTED_S = 60.0
#: history lines kept of a task, and losses of nodes that are told when none is left
HISTORY_LINES, LOSSES = 50, 5


class State(StrEnum):
    """Where a task is; the value is for people."""

    QUEUED = "queued"
    ASSIGNED = "assigned"
    RUNNING = "running"
    WAITING = "waiting for the window"
    UPLOADING = "uploading"
    COMMITTED = "committed"
    POISONED = "poisoned"
    FAILED_OOM = "out of memory"
    CANCELLED = "cancelled"


class Move(StrEnum):
    """RETRY, GIVE_UP and FAIL_OOM are the outcomes of a failed attempt, as its budgets decide."""

    ASSIGN = "assign"
    START = "start"
    END = "end"
    GRANT = "grant"
    COMMIT = "commit"
    RETRY = "retry"
    GIVE_UP = "give up"
    FAIL_OOM = "fail oom"
    CANCEL = "cancel"


#: in these a task takes a slot
BUSY = (State.ASSIGNED, State.RUNNING)
FINAL = (State.COMMITTED, State.POISONED, State.FAILED_OOM, State.CANCELLED)

TRANSITIONS: dict[State, dict[Move, State]] = {
    State.QUEUED: {
        Move.ASSIGN: State.ASSIGNED,
        Move.CANCEL: State.CANCELLED,
        Move.GIVE_UP: State.POISONED,
    },
    State.ASSIGNED: {
        Move.START: State.RUNNING,
        Move.END: State.WAITING,
        Move.RETRY: State.QUEUED,
        Move.GIVE_UP: State.POISONED,
        Move.FAIL_OOM: State.FAILED_OOM,
        Move.CANCEL: State.CANCELLED,
    },
    State.RUNNING: {
        Move.END: State.WAITING,
        Move.RETRY: State.QUEUED,
        Move.GIVE_UP: State.POISONED,
        Move.FAIL_OOM: State.FAILED_OOM,
        Move.CANCEL: State.CANCELLED,
    },
    State.WAITING: {
        Move.GRANT: State.UPLOADING,
        Move.RETRY: State.QUEUED,
        Move.GIVE_UP: State.POISONED,
        Move.FAIL_OOM: State.FAILED_OOM,
        Move.CANCEL: State.CANCELLED,
    },
    State.UPLOADING: {
        Move.COMMIT: State.COMMITTED,
        Move.RETRY: State.QUEUED,
        Move.GIVE_UP: State.POISONED,
        Move.FAIL_OOM: State.FAILED_OOM,
        Move.CANCEL: State.CANCELLED,
    },
    State.COMMITTED: {},
    State.POISONED: {},
    State.FAILED_OOM: {},
    State.CANCELLED: {},
}


# ---- events


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node has granted a lease of so many slots."""

    node: str
    slots: int


@dataclass(frozen=True, slots=True)
class NodeResized:
    """The node's share for this job has changed; what runs there goes on."""

    node: str
    slots: int


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A sign of life; ``closed`` says that the node takes no new tasks. None: as before."""

    node: str
    closed: bool | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NodeGone:
    """A node has no lease any more."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """The engine has a task to be done.

    ``group``: of tasks whose results one reader takes; ``kind``: of tasks that are alike.
    """

    task: int
    group: int
    kind: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """A worker of the node has it."""

    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """Whole; its results, of so many bytes, are on the node."""

    node: str
    task: int
    attempt: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class AttemptDied:
    """It has failed; ``oom``: for lack of memory, ``no_room``: of disk for its data."""

    node: str
    task: int
    attempt: int
    reason: str
    oom: bool = False
    no_room: bool = False


@dataclass(frozen=True, slots=True)
class AttemptPreempted:
    """It was interrupted for a job of higher priority: ``by``, in words."""

    node: str
    task: int
    attempt: int
    by: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    """All bytes of its body have come; ``intact``: they are those that the node has announced."""

    node: str
    task: int
    attempt: int
    intact: bool


@dataclass(frozen=True, slots=True)
class NotStored:
    """The results have no room on this host."""

    node: str
    task: int
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unrunnable:
    """What the task needs is not to be had any more, on any node."""

    task: int
    reason: str


@dataclass(frozen=True, slots=True)
class Consumed:
    """The reader has the results."""

    task: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nothing of the group is wanted any more, nor will be."""

    group: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed, and all that had come by then was read."""


Event = (
    NodeJoined | NodeResized | NodeSeen | NodeGone | Submitted | AttemptStarted | AttemptEnded
    | AttemptDied | AttemptPreempted | Uploaded | NotStored | Unrunnable | Consumed | Cancelled
    | Tick
)  # fmt: skip


# ---- effects


@dataclass(frozen=True, slots=True)
class Assign:
    """Have a node make an attempt.

    ``alone``: nothing else may run on the node at the same time.

    ``firm``: it is not to be interrupted for a job of higher priority.
    """

    node: str
    task: int
    attempt: int
    alone: bool = False
    firm: bool = False


@dataclass(frozen=True, slots=True)
class GrantUpload:
    """There is room for the body: let the node send it."""

    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class AbortAttempt:
    """Nothing of it is wanted, here or on its node, which may be gone."""

    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The body is whole: it is the result of the task."""

    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The task has failed, after so many attempts; the last line of the history says why."""

    task: int
    error: str
    attempts: int
    history: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """The task has been cancelled."""

    task: int


@dataclass(frozen=True, slots=True)
class NodeLost:
    """It has been silent for too long."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """It takes tasks and loses them: the job goes on with other nodes, so many seconds at least."""

    node: str
    seconds: int
    reason: str


Effect = Assign | GrantUpload | AbortAttempt | Commit | GiveUp | Forget | NodeLost | LeftOut

STRAGGLERS = Speculation()


@dataclass(slots=True)
class Group:
    """Tasks whose results one reader takes, in the order in which they come to it.

    ``live`` tasks have not ended, ``staged`` ones are in the window, ``waiting`` ones ended and are
    not, in the order of their ends.
    """

    live: int = 0
    staged: int = 0
    waiting: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class Rival:
    """A second attempt at a task, while neither of the two has ended."""

    attempt: int
    node: str
    state: State
    assigned_s: float


@dataclass(slots=True)
class Task:
    """A task from its submission until its results are committed, or it is given up.

    ``attempt`` on ``node`` is in ``state``; its rival, if any, is ASSIGNED or RUNNING, too.
    """

    id: int
    group: Group
    kind: Kind
    weight: float
    state: State = State.QUEUED
    attempt: int = 0
    attempts: int = 0
    node: str = ""
    rival: Rival | None = None
    nbytes: int = 0
    deaths: int = 0
    ooms: int = 0
    node_losses: int = 0
    preemptions: int = 0
    assigned_s: float = 0.0
    avoid: str = ""
    no_room: tuple[str, ...] = ()  # the node of each attempt that had no room for its data
    unstarted: int = 0  # attempts that a node did not begin with in time, at last ``slow``
    slow: str = ""
    history: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether the next attempt, or the one under way, has a node for itself."""
        return self.ooms > 0

    @property
    def firm(self) -> bool:
        """Whether it has been interrupted so often that its next attempt must not be."""
        return self.preemptions >= MAX_PREEMPTIONS

    def swap(self) -> None:
        """Make the rival the attempt whose state counts, and that one the rival."""
        rival = self.rival
        assert rival is not None
        self.rival = Rival(self.attempt, self.node, self.state, self.assigned_s)
        self.attempt, self.node = rival.attempt, rival.node
        self.state, self.assigned_s = rival.state, rival.assigned_s


class Scheduler:
    """State of one broker.

    :param limits: of silence and of attempts
    :param window_bytes: results staged at a time, see WINDOW_BYTES
    :param speculation: when a straggler gets a second attempt, if ``limits`` allow it at all; safe,
        because only whole attempts count
    """

    def __init__(
        self,
        limits: Limits = DEFAULTS,
        *,
        window_bytes: int = WINDOW_BYTES,
        speculation: Speculation = STRAGGLERS,
    ) -> None:
        self.limits = limits
        self.speculation = speculation
        self.window_bytes = window_bytes
        self.no_nodes_limit_s = limits.no_nodes_limit_s
        self.tasks: dict[int, Task] = {}  # that have not ended
        self.groups: dict[int, Group] = {}  # that were not cancelled
        self.kinds: dict[int, Kind] = {}
        self.placement = Placement(limits)
        self.queue: list[tuple[float, int]] = []  # (-weight, task)
        self.alone: list[int] = []  # queued for a node of their own, in order of arrival
        self.waiting = 0  # tasks, in their groups
        self.staged: dict[int, tuple[Group, int]] = {}  # task -> its group, bytes
        self.staged_bytes = 0
        self.submitted = self.committed = self.cancelled = self.given_up = 0
        self.no_nodes_since_s: float | None = None
        self.losses: deque[str] = deque(maxlen=LOSSES)  # of nodes, in words
        self.barren: Counter[str] = Counter()  # leases of each node since it has brought something

    @property
    def nodes(self) -> dict[str, Node]:
        return self.placement.nodes

    # ---- the one entry

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, monotonic) and return what is to be done.

        Raises TransitionError, with the state unchanged, for an event of a current attempt that
        its state does not allow.
        """
        effects: list[Effect] = []
        match event:
            case NodeJoined(node, slots):
                self._lose(node, "it joined again", effects)
                self.placement.join(node, slots, now)
            case NodeResized(node, slots):
                self.placement.resize(node, slots)
            case NodeSeen(node, closed, free_bytes):
                self.placement.beat(node, closed, free_bytes)
            case NodeGone(node, reason):
                if self._lose(node, reason, effects):
                    self._leave_out(node, reason, effects)
            case Submitted():
                self._submit(event)
            case AttemptStarted(node, task, attempt):
                if current := self._current(node, task, attempt, Move.START, effects):
                    self._move(current, Move.START, f"started on {node}")
            case AttemptEnded(node, task, attempt, nbytes):
                if current := self._current(node, task, attempt, Move.END, effects):
                    self._move(current, Move.END, f"ended on {node}, {nbytes} bytes")
                    self._drop_rival(current, effects)
                    current.kind.measure(now - current.assigned_s, current.weight)
                    current.nbytes = nbytes
                    self.placement.end(node, task)
                    if current.alone:
                        self.placement.give_back(task)
                    current.group.waiting[task] = None
                    self.waiting += 1
            case AttemptDied(node, task, attempt, reason, oom, no_room):
                if current := self._current(node, task, attempt, Move.RETRY, effects):
                    if oom:
                        current.ooms += 1
                    elif no_room:
                        current.no_room += (node,)
                        self.placement.narrow(node)
                    else:
                        current.deaths += 1
                        current.avoid = node
                    self._retry(current, f"{reason} on {node}", effects)
            case AttemptPreempted(node, task, attempt, by):
                if current := self._current(node, task, attempt, Move.RETRY, effects):
                    note = f"interrupted on {node} for {by}"
                    if current.firm:  # by a node that would do so for ever
                        current.node_losses += 1
                        self._retry(current, note, effects)
                    else:
                        current.preemptions += 1
                        current.kind.preempted += 1
                        self._free(current, effects)
                        self._again(current, note, effects)
            case Uploaded(node, task, attempt, intact):
                if current := self._uploading(node, task, attempt, effects):
                    if intact:
                        self._commit(current, effects)
                    else:
                        current.node_losses += 1  # charged like a loss: the task did no harm
                        self._retry(current, f"damaged on the way from {node}", effects)
            case NotStored(node, task, attempt, reason):
                if current := self._uploading(node, task, attempt, effects):
                    if current.group.staged > 1:  # what is read of them makes room
                        others_bytes = self.staged_bytes - current.nbytes
                        self.window_bytes = min(self.window_bytes, others_bytes)
                        self._retry(current, reason, effects)
                    else:
                        self._free(current, effects)
                        self._give_up(current, "NoRoom", reason, effects)
            case Unrunnable(task, reason):
                if found := self.tasks.get(task):
                    self._abort(found, effects)
                    self._give_up(found, errors.ArgumentLost.__name__, reason, effects)
            case Consumed(task):
                if task in self.staged and task not in self.tasks:
                    self._unstage(task)
            case Cancelled(group):
                if found_group := self.groups.pop(group, None):
                    self._cancel(found_group, effects)
            case Tick():
                # only on a tick, which comes after all waiting beats were read
                barren = []
                for node, reason in self.placement.lost(now):
                    if self._lose(node, reason, effects):
                        barren.append((node, reason))
                    effects.append(NodeLost(node, reason))
                for node, reason in barren:
                    self._leave_out(node, reason, effects)
        if not isinstance(event, Uploaded):  # which may be of what came long ago
            # whatever else comes of a node is a sign of life
            self.placement.hear(getattr(event, "node", ""), now)
        self._give_up_without_nodes(now, effects)
        if self.waiting:
            self._grant(effects)
        self._dispatch(now, effects)
        if isinstance(event, Tick):
            self._take_back(now, effects)
            if self.limits.speculation:
                self._speculate(now, effects)
        return effects

    # ---- the life of a task

    def _submit(self, new: Submitted) -> None:
        if new.task in self.tasks or new.task in self.staged:
            raise TransitionError(f"task {new.task} was submitted before")
        group = self.groups.setdefault(new.group, Group())
        kind = self.kinds.setdefault(new.kind, Kind())
        self.tasks[new.task] = Task(new.task, group, kind, new.weight)
        self.submitted += 1
        group.live += 1
        kind.tasks += 1
        heapq.heappush(self.queue, (-new.weight, new.task))

    def _current(
        self, node: str, task: int, attempt: int, move: Move, effects: list[Effect]
    ) -> Task | None:
        """The task, if this attempt at it counts; of two attempts this one becomes the first."""
        found = self.tasks.get(task)
        if found and (rival := found.rival) and (rival.node, rival.attempt) == (node, attempt):
            if move not in TRANSITIONS[rival.state]:
                raise TransitionError(f"task {task} is {rival.state}: no {move}")
            found.swap()
        if found is None or (found.attempt, found.node) != (attempt, node):
            effects.append(AbortAttempt(node, task, attempt))
            return None
        return found

    def _uploading(self, node: str, task: int, attempt: int, effects: list[Effect]) -> Task | None:
        """The task, if this attempt at it counts, which then has to be on its way."""
        found = self._current(node, task, attempt, Move.COMMIT, effects)
        if found and found.state is not State.UPLOADING:
            raise TransitionError(f"task {task} is {found.state}: no upload")
        return found

    def _move(self, task: Task, move: Move, note: str) -> None:
        if (state := TRANSITIONS[task.state].get(move)) is None:
            raise TransitionError(f"task {task.id} is {task.state}: no {move}")
        task.kind.busy += (state in BUSY) - (task.state in BUSY)
        task.state = state
        self._note(task, note)

    def _note(self, task: Task, note: str) -> None:
        line = f"attempt {task.attempt}: {note}" if task.attempt else note
        task.history = (*task.history, line)[-HISTORY_LINES:]

    def _commit(self, task: Task, effects: list[Effect]) -> None:
        self._move(task, Move.COMMIT, f"committed from {task.node}")
        self.placement.leave(task.node, task.id)
        self.placement.widen(task.node)
        self._end(task, effects)
        self.committed += 1
        self.barren.pop(task.node, None)
        effects.append(Commit(task.node, task.id, task.attempt))

    def _retry(self, task: Task, note: str, effects: list[Effect]) -> None:
        self._free(task, effects)
        most = self.limits.max_attempts
        if task.ooms >= MAX_OOMS:
            self._give_up(task, errors.OutOfMemory.__name__, note, effects, Move.FAIL_OOM)
        elif task.deaths >= most or (
            len(task.no_room) >= most and not self.placement.has_other(task.no_room)
        ):
            self._give_up(task, errors.WorkerDied.__name__, note, effects)
        elif task.node_losses >= MAX_NODE_LOSSES:
            self._give_up(task, errors.NodeLost.__name__, note, effects)
        else:
            task.kind.retries += 1
            self._again(task, note, effects)

    def _again(self, task: Task, note: str, effects: list[Effect]) -> None:
        """Go on with the other attempt at a task, if there is one, or make another."""
        if task.rival and not task.alone:
            self._note(task, note)
            task.kind.busy -= 1
            task.swap()  # it may still end well
            task.rival = None
        else:
            self._drop_rival(task, effects)
            self._requeue(task, note)

    def _requeue(self, task: Task, note: str) -> None:
        self._move(task, Move.RETRY, note)
        task.node = ""
        if task.alone:
            self.alone.append(task.id)
        else:
            heapq.heappush(self.queue, (-task.weight, task.id))

    def _give_up(
        self,
        task: Task,
        error: str,
        note: str,
        effects: list[Effect],
        move: Move = Move.GIVE_UP,
    ) -> None:
        self._move(task, move, note)
        self._end(task, effects)
        self.given_up += 1
        effects.append(GiveUp(task.id, error, task.attempts, task.history))

    def _cancel(self, group: Group, effects: list[Effect]) -> None:
        for task in [t for t in self.tasks.values() if t.group is group] if group.live else ():
            self._abort(task, effects)
            self._move(task, Move.CANCEL, "cancelled")
            self._end(task, effects)
            self.cancelled += 1
            effects.append(Forget(task.id))
        for task_id in [t for t, (g, _) in self.staged.items() if g is group]:
            self._unstage(task_id)  # committed, and not consumed

    def _end(self, task: Task, effects: list[Effect]) -> None:
        self._drop_rival(task, effects)
        task.group.live -= 1
        del self.tasks[task.id]

    def _abort(self, task: Task, effects: list[Effect]) -> None:
        """End the attempt that is under way, if there is one."""
        if task.state in BUSY:
            effects.append(AbortAttempt(task.node, task.id, task.attempt))
        self._free(task, effects)

    def _free(self, task: Task, effects: list[Effect]) -> None:
        """Take the task from its node and drop what was staged of its attempt."""
        self.placement.leave(task.node, task.id)
        if task.alone:
            self.placement.give_back(task.id)
        if task.state is State.WAITING:
            del task.group.waiting[task.id]
            self.waiting -= 1
        elif task.state is State.UPLOADING:
            self._unstage(task.id)
        else:
            return
        effects.append(AbortAttempt(task.node, task.id, task.attempt))

    # ---- nodes that are lost

    def _lose(self, name: str, reason: str, effects: list[Effect]) -> bool:
        """Have the tasks of a node run elsewhere; return whether it had some."""
        node = self.nodes.pop(name, None)
        if node is None:
            return False
        tasks = sorted(node.running | node.ended)
        self.barren[name] += bool(tasks)
        self.losses.append(f"{name}: {reason}")
        for task_id in tasks:
            task = self.tasks[task_id]
            if task.node != name:
                task.swap()
            task.node_losses += 1
            if not task.deaths:
                task.avoid = name
            self._retry(task, f"node {name} lost ({reason})", effects)
        return bool(tasks)

    def _leave_out(self, name: str, reason: str, effects: list[Effect]) -> None:
        """Do without a node that was lost before it brought anything, and before, and before."""
        times = self.barren[name] - MOST_BARREN
        if times >= 0 and any(node.slots for node in self.nodes.values()):
            seconds = min(LEFT_OUT_S << min(times, 10), MOST_LEFT_OUT_S)
            told = f"it was lost {self.barren[name]} times before it brought any result, at last: "
            told += f"{reason}; it is asked again in {seconds} s"
            effects.append(LeftOut(name, seconds, told))

    def _give_up_without_nodes(self, now: float, effects: list[Effect]) -> None:
        if self.nodes or not self.tasks:
            self.no_nodes_since_s = None
            return
        if self.no_nodes_since_s is None:
            self.no_nodes_since_s = now
        waited_s = now - self.no_nodes_since_s
        if waited_s >= self.no_nodes_limit_s:
            gone = "; ".join(self.losses) or "none ever joined"
            note = f"no node is left ({gone})"
            if self.no_nodes_limit_s:
                note = f"no node left for {waited_s:.0f} s ({gone})"
            for task in list(self.tasks.values()):
                self._give_up(task, errors.NoWorkers.__name__, note, effects)

    # ---- the window

    def _grant(self, effects: list[Effect]) -> None:
        """Let in what the window holds, and one of each group that has nothing in it.

        The newest group first: its reader is the one that older ones wait for. The one beyond the
        window may be of any size, and nothing that is not read can stop a group that is.
        """
        for group in reversed(self.groups.values()):
            while group.waiting:
                task = self.tasks[next(iter(group.waiting))]
                if group.staged and self.staged_bytes + task.nbytes > self.window_bytes:
                    break
                del group.waiting[task.id]
                self.waiting -= 1
                group.staged += 1
                self.staged[task.id] = group, task.nbytes
                self.staged_bytes += task.nbytes
                self._move(task, Move.GRANT, f"upload of {task.nbytes} bytes")
                effects.append(GrantUpload(task.node, task.id, task.attempt))

    def _unstage(self, task: int) -> None:
        group, nbytes = self.staged.pop(task)
        group.staged -= 1
        self.staged_bytes -= nbytes

    # ---- from the queue to the nodes

    def _dispatch(self, now: float, effects: list[Effect]) -> None:
        if self.alone:
            self._dispatch_alone(now, effects)
        placement = self.placement
        picky: list[tuple[float, int]] = []  # those that may not go to the nodes that are free
        while self.queue and placement.free:
            task = self.tasks.get(self.queue[0][1])
            if task is not None and task.state is State.QUEUED:
                barred = self._barred(task) if task.no_room or task.deaths else ()
                node = placement.take(now, task.slow or task.avoid, barred, task.kind.ahead)
                if node is not None:
                    self._assign(task, node, now, effects)
                elif barred:
                    picky.append(self.queue[0])
                else:
                    break
            heapq.heappop(self.queue)  # assigned, or cancelled or given up while it was queued
        for item in picky:
            heapq.heappush(self.queue, item)

    def _barred(self, task: Task) -> Collection[str]:
        last = task.deaths and task.deaths == self.limits.max_attempts - 1
        return self.placement.barred(task.no_room, task.avoid if last else "", task.slow)

    def _dispatch_alone(self, now: float, effects: list[Effect]) -> None:
        """Keep a node for each task that needs one for itself; start it when that is empty."""
        waiting, self.alone = self.alone, []
        for task_id in waiting:
            if (task := self.tasks.get(task_id)) is None:
                continue  # cancelled, or given up
            if node := self.placement.take_empty(task_id, now, task.slow):
                self._assign(task, node, now, effects)
            else:
                self.alone.append(task_id)

    def _assign(self, task: Task, node: Node, now: float, effects: list[Effect]) -> None:
        task.attempts += 1
        task.attempt = task.attempts
        task.assigned_s = now
        task.node = node.name
        self._move(task, Move.ASSIGN, f"assigned to {node.name}{', alone' if task.alone else ''}")
        self.placement.run(node, task.id)
        effects.append(Assign(node.name, task.id, task.attempt, task.alone, task.firm))

    def _take_back(self, now: float, effects: list[Effect]) -> None:
        """Give to free slots what waits elsewhere: for a slot, or for a worker that does not start.

        The first are tasks that seemed short and are not. What is in the queue may not go to the
        slots that are free.
        """
        unused = self.placement.unused(now)
        free = sum(unused.values())
        for node in list(self.nodes.values()) if free else ():
            elsewhere = free - unused.get(node.name, 0)
            for task in [self.tasks[task_id] for task_id in sorted(node.running)]:
                if elsewhere <= 0 or task.state is not State.ASSIGNED or task.rival:
                    continue
                waited_s = now - task.assigned_s
                if node.crowded and not task.alone:
                    late = waited_s > WAITED_S
                elif late := waited_s > UNSTARTED_S * 2 ** min(task.unstarted, 10):
                    task.unstarted, task.slow = task.unstarted + 1, node.name
                if late:
                    free, elsewhere = free - 1, elsewhere - 1
                    self._abort(task, effects)
                    self._requeue(task, f"waited {waited_s:.0f} s on {node.name}")
        self._dispatch(now, effects)

    def unstarted(self, now: float) -> list[str]:
        """Return the nodes that have had tasks for a long time and begin with none of them."""
        return [
            node.name
            for node in self.nodes.values()
            if node.running
            and not node.crowded
            and all(self._waits(self.tasks[t], node.name, now) for t in node.running)
        ]

    def _waits(self, task: Task, node: str, now: float) -> bool:
        attempt = task if task.node == node or task.rival is None else task.rival
        return attempt.state is State.ASSIGNED and now - attempt.assigned_s > UNSTARTED_S

    # ---- second attempts

    def _speculate(self, now: float, effects: list[Effect]) -> None:
        """Give each straggler a second attempt on another node, once in its life."""
        when = self.speculation
        if self.queue or self.alone or not self.placement.free:
            return
        usual = {id(kind): kind.usual_pace(when) for kind in self.kinds.values()}
        for task in list(self.tasks.values()):
            pace = usual[id(task.kind)]
            if pace is None or task.state is not State.RUNNING or task.attempts > 1:
                continue
            late = now - task.assigned_s > when.factor * pace * task.weight
            if task.weight > 0 and late:
                node = self.placement.take_other(now, task.node)
                if node is not None:
                    self._assign_rival(task, node, now, effects)

    def _assign_rival(self, task: Task, node: Node, now: float, effects: list[Effect]) -> None:
        task.attempts += 1
        task.rival = Rival(task.attempts, node.name, State.ASSIGNED, now)
        self._note(task, f"is slow; attempt {task.attempts} at it on {node.name}")
        task.kind.busy += 1
        self.placement.run(node, task.id)
        effects.append(Assign(node.name, task.id, task.attempts, firm=task.firm))

    def _drop_rival(self, task: Task, effects: list[Effect]) -> None:
        if rival := task.rival:
            task.rival = None
            task.kind.busy -= 1
            self.placement.leave(rival.node, task.id)
            effects.append(AbortAttempt(rival.node, task.id, rival.attempt))

    def check_invariants(self) -> None:
        """Raise AssertionError when the state contradicts itself; called by the tests."""
        self.placement.check_invariants()
        ended = self.committed + self.given_up + self.cancelled
        assert ended + len(self.tasks) == self.submitted
        for node in self.nodes.values():
            for task_id in node.running | node.ended:
                task = self.tasks[task_id]
                assert node.name in (task.node, task.rival and task.rival.node)
            if any(self.tasks[task_id].alone for task_id in node.running):
                assert node.running == {node.kept_for}, node
            assert node.kept_for is None or node.kept_for in self.tasks, node
        for task in self.tasks.values():
            assert task.state not in FINAL
            assert task.deaths <= self.limits.max_attempts and task.ooms <= MAX_OOMS
            assert task.node_losses <= MAX_NODE_LOSSES
            assert task.preemptions <= task.attempts, task
            assert (task.id in self.staged) == (task.state is State.UPLOADING)
            assert (task.id in task.group.waiting) == (task.state is State.WAITING)
            assert task.group in self.groups.values()
            if task.state is not State.QUEUED:
                node = self.nodes[task.node]
                runs = task.state in BUSY
                assert (task.id in node.running, task.id in node.ended) == (runs, not runs), task
            if task.rival:
                assert task.state in BUSY and task.rival.state in BUSY, task
                assert task.node != task.rival.node and task.attempt != task.rival.attempt, task
                assert task.id in self.nodes[task.rival.node].running, task
        for kind in self.kinds.values():
            running = [t for n in self.nodes.values() for t in n.running]
            assert kind.busy == sum(self.tasks[t].kind is kind for t in running), kind
        for group in self.groups.values():
            assert group.live == sum(task.group is group for task in self.tasks.values()), group
            assert group.staged == sum(g is group for g, _ in self.staged.values()), group
        assert self.waiting == sum(len(group.waiting) for group in self.groups.values())
        assert self.staged_bytes == sum(nbytes for _, nbytes in self.staged.values())
        # beyond the window there is at most one per group, which had nothing else in it
        largest = [
            max((n for g, n in self.staged.values() if g is group), default=0)
            for group in self.groups.values()
        ]
        assert self.staged_bytes - sum(largest) <= self.window_bytes
