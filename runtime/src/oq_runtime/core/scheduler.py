"""The pure scheduling core of the broker: tasks, attempts, nodes, and the byte window.

``Scheduler.handle(event, now)`` returns effects for the shell to carry out. No socket, clock,
process or random number is used here. All state of a task is changed here and nowhere else, by the
table TRANSITIONS; a pair that it does not know raises TransitionError and changes nothing. An event
of an attempt that is not the task's current one is stale: it never reaches the table, and its
sender is told to abort.
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.errors import TransitionError

#: attempts of a task that may run out of memory: one beside others, one alone on its node
MAX_OOMS = 2
#: part of the most memory that any node has to give with which a node is as good for a task alone
NEARLY = 0.9
#: attempts that may be lost with their nodes, or damaged on the way, before the task is given up
MAX_NODE_LOSSES = 10
#: bytes of results that may be staged in the broker; one larger attempt is let through alone
WINDOW_BYTES = 1 << 30
#: attempts per slot, at most, that a node may hold of functions whose tasks are short: the next one
#: is there when the last one ends, which hides the way to the broker and back, and messages of many
#: tasks travel together (8 instead of 2: a tenth more of tasks that do nothing per second)
AHEAD = 8.0
#: mean seconds from assignment to end, waiting included, below which the tasks of a function are
#: short; the nearer to it, the fewer wait
SHORT_S = 0.05
#: seconds after which an attempt that has not started waits for a slot, for agents tell of a start
#: after 0.2 s; it is taken back when another node has a slot that nobody wants
WAITED_S = 1.0
#: ended tasks of a function from which its usual time is taken
USUAL_TASKS = 1000
#: history lines kept of a task
HISTORY_LINES = 50


class State(Enum):
    QUEUED = "queued"
    ASSIGNED = "assigned"
    RUNNING = "running"
    WAITING = "waiting for the window"
    UPLOADING = "uploading"
    COMMITTED = "committed"
    POISONED = "poisoned"
    FAILED_OOM = "out of memory"
    CANCELLED = "cancelled"


#: in these a task takes a slot
BUSY = (State.ASSIGNED, State.RUNNING)
FINAL = (State.COMMITTED, State.POISONED, State.FAILED_OOM, State.CANCELLED)

# {state: {transition: next state}}; "retry", "give up" and "fail oom" are the outcomes of a failed
# attempt, decided by the budgets in _retry
TRANSITIONS: dict[State, dict[str, State]] = {
    State.QUEUED: {
        "assign": State.ASSIGNED,
        "cancel": State.CANCELLED,
        "give up": State.POISONED,
    },
    State.ASSIGNED: {
        "start": State.RUNNING,
        "end": State.WAITING,
        "retry": State.QUEUED,
        "give up": State.POISONED,
        "fail oom": State.FAILED_OOM,
        "cancel": State.CANCELLED,
    },
    State.RUNNING: {
        "end": State.WAITING,
        "retry": State.QUEUED,
        "give up": State.POISONED,
        "fail oom": State.FAILED_OOM,
        "cancel": State.CANCELLED,
    },
    State.WAITING: {
        "grant": State.UPLOADING,
        "retry": State.QUEUED,
        "give up": State.POISONED,
        "fail oom": State.FAILED_OOM,
        "cancel": State.CANCELLED,
    },
    State.UPLOADING: {
        "commit": State.COMMITTED,
        "retry": State.QUEUED,
        "give up": State.POISONED,
        "fail oom": State.FAILED_OOM,
        "cancel": State.CANCELLED,
    },
    State.COMMITTED: {},
    State.POISONED: {},
    State.FAILED_OOM: {},
    State.CANCELLED: {},
}


# ---- events


@dataclass(frozen=True, slots=True)
class NodeJoined:
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
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Submitted:
    task: int
    group: int
    func: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Started:
    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Ended:
    node: str
    task: int
    attempt: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Uploaded:
    node: str
    task: int
    attempt: int
    intact: bool


@dataclass(frozen=True, slots=True)
class Died:
    """The attempt has failed; ``oom``: for lack of memory, ``no_room``: of disk for its data."""

    node: str
    task: int
    attempt: int
    reason: str
    oom: bool = False
    no_room: bool = False


@dataclass(frozen=True, slots=True)
class Unusable:
    """The task cannot be done for a reason that lies on this side: it is given up at once."""

    task: int
    error: str
    reason: str


@dataclass(frozen=True, slots=True)
class Consumed:
    task: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nothing of the group is wanted any more: neither its tasks nor results of them."""

    group: int


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = (
    NodeJoined | NodeResized | NodeSeen | NodeGone | Submitted | Started | Ended | Uploaded | Died
    | Unusable | Consumed | Cancelled | Tick
)  # fmt: skip


# ---- effects


@dataclass(frozen=True, slots=True)
class Assign:
    """``alone``: nothing else may run on the node at the same time."""

    node: str
    task: int
    attempt: int
    alone: bool = False


@dataclass(frozen=True, slots=True)
class GrantUpload:
    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class AbortAttempt:
    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Commit:
    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class DropStaged:
    node: str
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """``attempts``: how many there were."""

    task: int
    error: str
    history: tuple[str, ...]
    attempts: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The task was cancelled."""

    task: int


@dataclass(frozen=True, slots=True)
class NodeLost:
    """It has been silent for too long."""

    node: str
    reason: str


Effect = Assign | GrantUpload | AbortAttempt | Commit | DropStaged | GiveUp | Forget | NodeLost


@dataclass(frozen=True, slots=True)
class Speculation:
    """When a straggler gets a second attempt: nothing waits, and it has run ``factor`` times longer
    than the tasks of its function usually do per weight, known once ``least_done`` of them (a part
    of one) and of at least ``least_tasks`` have ended.
    """

    factor: float = 3.0
    least_tasks: int = 10
    least_done: float = 0.5


STRAGGLERS = Speculation()


@dataclass(slots=True)
class Function:
    """What is known of the tasks of one function; paces are seconds per weight."""

    tasks: int = 0
    ended: int = 0
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=USUAL_TASKS))


@dataclass(slots=True)
class Rival:
    """A second attempt at a task, while neither of the two has ended."""

    attempt: int
    node: str
    state: State
    assigned_s: float


@dataclass(slots=True)
class Task:
    """``attempt`` on ``node`` is in ``state``; its rival, if any, is ASSIGNED or RUNNING, too."""

    id: int
    group: int
    func: str
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
    assigned_s: float = 0.0
    avoid: str = ""
    no_room: tuple[str, ...] = ()  # the node of each attempt that had no room for its data
    history: tuple[str, ...] = ()  # while it is live: a job may have millions of tasks

    @property
    def alone(self) -> bool:
        """Whether the next attempt, or the one under way, has a node for itself."""
        return self.ooms > 0

    def swap(self) -> None:
        """Make the rival the attempt whose state counts, and that one the rival."""
        if rival := self.rival:
            self.rival = Rival(self.attempt, self.node, self.state, self.assigned_s)
            self.attempt, self.node = rival.attempt, rival.node
            self.state, self.assigned_s = rival.state, rival.assigned_s


@dataclass(slots=True)
class Node:
    """``running`` tasks have a slot each, or wait for one here; of ``ended`` ones only the results
    are still here.

    ``free_bytes`` of memory has a task that is alone here. ``kept_for``: the task that has this
    node for itself, or waits until it is empty. ``most``: tasks at a time for whose data there has
    been room lately; with each that ends well one more is tried.
    """

    name: str
    slots: int
    seen_s: float
    closed: bool = False
    free_bytes: int = 0
    kept_for: int | None = None
    most: int | None = None
    running: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    offers: set[float] = field(default_factory=set)  # loads with which it is in Scheduler.free

    @property
    def credit(self) -> int:
        """Slots that are free; never negative, also when the share has shrunk below what runs."""
        return 0 if self.kept_for is not None else max(0, self.width - len(self.running))

    @property
    def width(self) -> int:
        """Tasks that may run at a time."""
        return self.slots if self.most is None else min(self.slots, self.most)

    @property
    def busy(self) -> int:
        """Slots that are taken; the other running tasks wait for one."""
        return min(self.slots, len(self.running))

    @property
    def load(self) -> float:
        """The part of its slots that is taken; above 1 with attempts that wait for a slot."""
        width = self.width
        return len(self.running) / width if width else AHEAD

    @property
    def has_room(self) -> bool:
        """Whether it may get an attempt, be it one that waits for a slot."""
        return self.kept_for is None and self.load < AHEAD


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
        # live, or committed and not consumed: a job may have millions of others
        self.tasks: dict[int, Task] = {}
        self.staged_of: dict[int, set[int]] = {}  # group -> its tasks that are committed and staged
        self.nodes: dict[str, Node] = {}
        self.queue: list[tuple[float, int]] = []  # (-weight, task)
        self.alone: list[int] = []  # queued for a node of their own, in order of arrival
        # (load, node), the emptiest first; an entry whose load is not the node's any more is void
        self.free: list[tuple[float, str]] = []
        # ended, in order of arrival, not granted yet
        self.waiting: OrderedDict[int, None] = OrderedDict()
        self.staged: dict[int, int] = {}  # granted or committed and not consumed: task -> bytes
        self.staged_bytes = 0
        self.live: set[int] = set()
        self.submitted = self.committed = self.cancelled = self.given_up = 0
        self.retries: Counter[str] = Counter()  # per function, as is the next
        self.busy: Counter[str] = Counter()
        self.live_of: Counter[int] = Counter()  # per group
        self.functions: dict[str, Function] = {}
        self.no_nodes_since_s: float | None = None
        self.mean_s: dict[str, float] = {}  # per function, see SHORT_S
        self.lost: list[str] = []

    # ---- the one entry

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, monotonic) and return what is to be done.

        Raises TransitionError, with the state unchanged, for an event of a current attempt that
        its state does not allow.
        """
        effects: list[Effect] = []
        match event:
            case NodeJoined(node, slots):
                if node in self.nodes:
                    self._lose(node, "it joined again", effects)
                self.nodes[node] = Node(node, slots, now)
                self._offer(self.nodes[node])
            case NodeResized(node, slots):
                if node in self.nodes:
                    self.nodes[node].slots = slots
                    self._offer(self.nodes[node])
            case NodeSeen(node, closed, free_bytes):
                if node in self.nodes:
                    if closed is not None:
                        self.nodes[node].closed = closed
                    if free_bytes is not None:
                        self.nodes[node].free_bytes = free_bytes
                    self._offer(self.nodes[node])
            case NodeGone(node, reason):
                self._lose(node, reason, effects)
            case Submitted(task, group, func, weight):
                if task in self.tasks:
                    raise TransitionError(f"task {task} was submitted before")
                self.tasks[task] = Task(task, group, func, weight)
                self.submitted += 1
                self.live.add(task)
                self.live_of[group] += 1
                self.functions.setdefault(func, Function()).tasks += 1
                heapq.heappush(self.queue, (-weight, task))
            case Started(node, task, attempt):
                if current := self._current(node, task, attempt, "start", effects):
                    self._move(current, "start", f"started on {node}")
            case Ended(node, task, attempt, nbytes):
                if current := self._current(node, task, attempt, "end", effects):
                    self._move(current, "end", f"ended on {node}, {nbytes} bytes")
                    self._drop_rival(current, effects)
                    self._measure(current, now)
                    current.nbytes = nbytes
                    self.nodes[node].running.discard(task)
                    self.nodes[node].ended.add(task)
                    self._offer(self.nodes[node])
                    self._give_back(current)
                    self.waiting[task] = None
            case Uploaded(node, task, attempt, intact):
                if current := self._current(node, task, attempt, "commit", effects):
                    if current.state is not State.UPLOADING:
                        raise TransitionError(f"task {task} is {current.state.value}: no upload")
                    if intact:
                        self._move(current, "commit", f"committed from {node}")
                        self.nodes[node].ended.discard(task)
                        self._widen(self.nodes[node])
                        self._end(current, effects)
                        self.committed += 1
                        self.staged_of.setdefault(current.group, set()).add(task)
                        effects.append(Commit(node, task, attempt))
                    else:
                        current.node_losses += 1  # charged like a loss: the task did no harm
                        self._retry(current, f"damaged on the way from {node}", effects)
            case Died(node, task, attempt, reason, oom, no_room):
                if current := self._current(node, task, attempt, "retry", effects):
                    if oom:
                        current.ooms += 1
                    elif no_room:
                        current.no_room += (node,)
                        self.nodes[node].most = max(1, self.nodes[node].busy - 1)
                    else:
                        current.deaths += 1
                        current.avoid = node
                    self._retry(current, f"{reason} on {node}", effects)
            case Unusable(task, error, reason):
                if task in self.live:
                    self._withdraw(self.tasks[task], effects)
                    self._give_up(self.tasks[task], error, reason, effects)
            case Consumed(task):
                if task in self.tasks and self.tasks[task].state is State.COMMITTED:
                    self._consume(self.tasks[task])
            case Cancelled(group):
                if self.live_of[group]:
                    for task in [t for t in self.live if self.tasks[t].group == group]:
                        self._cancel(self.tasks[task], effects)
                for task in list(self.staged_of.get(group, ())):
                    self._consume(self.tasks[task])
            case Tick():
                self._lose_silent(now, effects)
        sender = self.nodes.get(getattr(event, "node", ""))
        if sender and not isinstance(event, Uploaded):  # which may be of what came long ago
            # whatever comes of a node is a sign of life
            was_silent, sender.seen_s = self._silent(sender, now), now
            if was_silent:
                self._offer(sender)
        self._give_up_without_nodes(now, effects)
        self._grant(effects)
        self._dispatch(now, effects)
        if isinstance(event, Tick):
            self._take_back(now, effects)
            if self.limits.speculation:
                self._speculate(now, effects)
        return effects

    # ---- parts

    def _current(
        self, node: str, task: int, attempt: int, transition: str, effects: list[Effect]
    ) -> Task | None:
        """The task, if this attempt at it counts; of two attempts this one becomes the first."""
        found = self.tasks.get(task)
        if found and (rival := found.rival) and (rival.node, rival.attempt) == (node, attempt):
            if transition not in TRANSITIONS[rival.state]:
                raise TransitionError(f"task {task} is {rival.state.value}: no {transition}")
            found.swap()
        if (
            found is None
            or found.attempt != attempt
            or found.node != node
            or found.state in (State.COMMITTED, State.QUEUED)
        ):
            effects.append(AbortAttempt(node, task, attempt))
            return None
        return found

    def _move(self, task: Task, transition: str, note: str) -> None:
        try:
            state = TRANSITIONS[task.state][transition]
        except KeyError:
            text = f"task {task.id} is {task.state.value}: no {transition}"
            raise TransitionError(text) from None
        self.busy[task.func] += (state in BUSY) - (task.state in BUSY)
        task.state = state
        self._note(task, note)
        if state is State.COMMITTED:
            task.history = ()

    def _note(self, task: Task, note: str) -> None:
        line = f"attempt {task.attempt}: {note}"
        task.history = (*task.history, line)[-HISTORY_LINES:]

    def _free(self, task: Task, effects: list[Effect]) -> None:
        """Take the task from its node and drop what was staged of its attempt."""
        if node := self.nodes.get(task.node):
            node.running.discard(task.id)
            node.ended.discard(task.id)
            self._offer(node)
        self._give_back(task)
        if task.state is State.WAITING:
            del self.waiting[task.id]
        if task.state in (State.WAITING, State.UPLOADING):
            self._unstage(task.id)
            effects.append(DropStaged(task.node, task.id, task.attempt))

    def _unstage(self, task: int) -> None:
        self.staged_bytes -= self.staged.pop(task, 0)

    def _end(self, task: Task, effects: list[Effect]) -> None:
        self._drop_rival(task, effects)
        self.live.discard(task.id)
        self.live_of[task.group] -= 1
        if not self.live_of[task.group]:
            del self.live_of[task.group]
        if task.state is not State.COMMITTED:
            del self.tasks[task.id]

    def _consume(self, task: Task) -> None:
        """Its bytes leave the window."""
        self._unstage(task.id)
        group = self.staged_of[task.group]
        group.discard(task.id)
        if not group:
            del self.staged_of[task.group]
        del self.tasks[task.id]

    def _withdraw(self, task: Task, effects: list[Effect]) -> None:
        """Take the task from its node, which is to drop the attempt."""
        self._free(task, effects)
        if task.node:
            effects.append(AbortAttempt(task.node, task.id, task.attempt))

    def _retry(self, task: Task, note: str, effects: list[Effect]) -> None:
        self._free(task, effects)
        if task.ooms >= MAX_OOMS:
            self._give_up(task, "OutOfMemory", note, effects, "fail oom")
        elif task.deaths >= self.limits.max_attempts or (
            len(task.no_room) >= self.limits.max_attempts and not self._has_other(task.no_room)
        ):
            self._give_up(task, "WorkerDied", note, effects)
        elif task.node_losses >= MAX_NODE_LOSSES:
            self._give_up(task, "NodeLost", note, effects)
        elif task.rival and not task.alone:
            self._note(task, note)
            self.retries[task.func] += 1
            task.swap()  # it may still end well
            task.rival = None
            self.busy[task.func] -= 1
        else:
            self._drop_rival(task, effects)
            self._move(task, "retry", note)
            self.retries[task.func] += 1
            task.node = ""
            if task.alone:
                self.alone.append(task.id)
            else:
                heapq.heappush(self.queue, (-task.weight, task.id))

    def _give_up(
        self, task: Task, error: str, note: str, effects: list[Effect], move: str = "give up"
    ) -> None:
        self._move(task, move, note)
        self._end(task, effects)
        self.given_up += 1
        effects.append(GiveUp(task.id, error, task.history, task.attempts))

    def _cancel(self, task: Task, effects: list[Effect]) -> None:
        self._withdraw(task, effects)
        self._move(task, "cancel", "cancelled")
        self._end(task, effects)
        self.cancelled += 1
        effects.append(Forget(task.id))

    def _lose(self, name: str, reason: str, effects: list[Effect]) -> None:
        node = self.nodes.pop(name, None)
        if node is None:
            return
        self.lost.append(f"{name}: {reason}")
        for task_id in sorted(node.running | node.ended):
            task = self.tasks[task_id]
            if task.node != name:
                task.swap()
            task.node_losses += 1
            self._retry(task, f"node {name} lost ({reason})", effects)

    def _lose_silent(self, now: float, effects: list[Effect]) -> None:
        # only on a tick, which comes after all waiting beats were read
        for node in list(self.nodes.values()):
            if now - node.seen_s > self.limits.lost_s:
                reason = f"silent for {now - node.seen_s:.0f} s"
                self._lose(node.name, reason, effects)
                effects.append(NodeLost(node.name, reason))

    def _give_up_without_nodes(self, now: float, effects: list[Effect]) -> None:
        if not self.live or self.nodes:
            self.no_nodes_since_s = None
        elif self.no_nodes_since_s is None:
            self.no_nodes_since_s = now
        if (
            self.no_nodes_since_s is not None
            and self.live
            and now - self.no_nodes_since_s >= self.no_nodes_limit_s
        ):
            gone = "; ".join(self.lost[-5:]) or "none ever joined"
            note = f"no node left for {now - self.no_nodes_since_s:.0f} s ({gone})"
            for task_id in sorted(self.live):
                self._free(self.tasks[task_id], effects)
                self._give_up(self.tasks[task_id], "NoWorkers", note, effects)

    def _grant(self, effects: list[Effect]) -> None:
        while self.waiting:
            task = self.tasks[next(iter(self.waiting))]
            if self.staged and self.staged_bytes + task.nbytes > self.window_bytes:
                return
            del self.waiting[task.id]
            self._move(task, "grant", f"upload of {task.nbytes} bytes")
            self.staged[task.id] = task.nbytes
            self.staged_bytes += task.nbytes
            effects.append(GrantUpload(task.node, task.id, task.attempt))

    def _dispatch(self, now: float, effects: list[Effect]) -> None:
        if self.alone:
            self._dispatch_alone(now, effects)
        picky: list[tuple[float, int]] = []  # those that may not go to the nodes that are free
        while self.queue and self.free:
            task = self.tasks.get(self.queue[0][1])
            if task is not None and task.state is State.QUEUED:
                mean_s = self.mean_s.get(task.func, SHORT_S)
                below = max(1.0, SHORT_S / mean_s) if mean_s * AHEAD > SHORT_S else AHEAD
                barred = self._barred(task)
                node = self._take_node(now, task.avoid, barred, below)
                if node is not None:
                    self._assign(task, node, now, effects)
                elif barred:
                    picky.append(self.queue[0])
                else:
                    break
            heapq.heappop(self.queue)  # assigned, or cancelled or given up while it was queued
        for item in picky:
            heapq.heappush(self.queue, item)

    def _dispatch_alone(self, now: float, effects: list[Effect]) -> None:
        """Keep the node with most free memory for each task that needs one; start it when empty."""
        self.alone = [t for t in self.alone if t in self.live and self._queued(t)]
        # a node that is full with what runs there opens again, one that drains has nothing to give
        usable = [
            n
            for n in self.nodes.values()
            if n.slots and not self._silent(n, now) and (n.free_bytes or not n.closed)
        ]
        for task_id in list(self.alone):
            task = self.tasks[task_id]
            kept = [n for n in usable if n.kept_for == task_id]
            if not kept:
                self._give_back(task)  # a node that drains or fell silent meanwhile
                least = NEARLY * max((n.free_bytes for n in usable), default=0)
                kept = [n for n in usable if n.kept_for is None and n.free_bytes >= least]
            if not kept:
                continue
            node = min(kept, key=lambda n: (-n.free_bytes, n.name))
            node.kept_for = task_id
            if not node.running and not node.closed:
                self.alone.remove(task_id)
                self._assign(task, node, now, effects)

    def _queued(self, task: int) -> bool:
        return self.tasks[task].state is State.QUEUED

    def _assign(self, task: Task, node: Node, now: float, effects: list[Effect]) -> None:
        task.attempts += 1
        task.attempt = task.attempts
        task.assigned_s = now
        task.node = node.name
        self._move(task, "assign", f"assigned to {node.name}{', alone' if task.alone else ''}")
        node.running.add(task.id)
        self._offer(node)
        effects.append(Assign(node.name, task.id, task.attempt, task.alone))

    def _measure(self, task: Task, now: float) -> None:
        """Note how long the attempt took, as a moving mean of its function and for its median."""
        took_s = now - task.assigned_s
        function = self.functions[task.func]
        function.ended += 1
        if task.weight > 0:
            function.paces.append(took_s / task.weight)
        mean_s = self.mean_s.get(task.func, took_s)
        self.mean_s[task.func] = 0.8 * mean_s + 0.2 * took_s

    def _give_back(self, task: Task) -> None:
        """Open to all the node that was kept for the task."""
        if task.alone:
            for node in self.nodes.values():
                if node.kept_for == task.id:
                    node.kept_for = None
                    self._offer(node)

    def _takes_tasks(self, node: Node, now: float) -> bool:
        return not node.closed and not self._silent(node, now)

    def _silent(self, node: Node, now: float) -> bool:
        return now - node.seen_s > self.limits.suspect_s

    def _barred(self, task: Task) -> Collection[str]:
        """The nodes that may not get the task as long as there are others.

        Those that had no room for its data; for its last attempt, that of the last death.
        """
        if not task.no_room and not task.deaths:
            return ()
        full, nodes = set(task.no_room), set(task.no_room)
        if task.deaths and task.deaths == self.limits.max_attempts - 1:
            nodes.add(task.avoid)
        return next((names for names in (nodes, full) if self._has_other(names)), ())

    def _has_other(self, nodes: Collection[str]) -> bool:
        return any(n.slots and n.name not in nodes for n in self.nodes.values())

    def _widen(self, node: Node) -> None:
        """Try one more task at a time on a node that was short of room."""
        if node.most is not None:
            node.most = node.most + 1 if node.most + 1 < node.slots else None
            self._offer(node)

    def _offer(self, node: Node) -> None:
        """Put a node that has room where _take_node finds it, under its load of now."""
        load = node.load
        if node.kept_for is None and load < AHEAD and load not in node.offers:
            node.offers.add(load)
            heapq.heappush(self.free, (load, node.name))

    def _take_node(
        self, now: float, avoid: str, barred: Collection[str], below: float
    ) -> Node | None:
        """Take the relatively emptiest node that may get a task, with a load below ``below``.

        ``avoid`` only if no other is free, and none of those that are ``barred``.

        A node that is closed or silent falls out here and is offered again with its next beat.
        """
        found, passed = None, []
        while self.free and found is None and self.free[0][0] < below:
            load, name = heapq.heappop(self.free)
            node = self.nodes.get(name)
            if node is None:
                continue
            node.offers.discard(load)
            if load != node.load or not node.has_room or not self._takes_tasks(node, now):
                continue
            if name == avoid or name in barred:
                passed.append(node)
            else:
                found = node
        if found is None:
            found = next((node for node in passed if node.name not in barred), None)
        for node in passed:
            if node is not found:
                self._offer(node)
        return found

    def _take_back(self, now: float, effects: list[Effect]) -> None:
        """Give to free slots what waits for one elsewhere: tasks that seemed short and are not."""
        if self.queue or self.alone:
            return
        free = sum(node.credit for node in self.nodes.values() if self._takes_tasks(node, now))
        crowded = {name for name, node in self.nodes.items() if len(node.running) > node.width}
        for task_id in sorted(self.live) if free and crowded else ():
            task = self.tasks[task_id]
            waits = task.state is State.ASSIGNED and now - task.assigned_s > WAITED_S
            if free and waits and task.node in crowded and not task.rival and not task.alone:
                free -= 1
                effects.append(AbortAttempt(task.node, task.id, task.attempt))
                self._free(task, effects)
                self._move(task, "retry", f"waited on {task.node}")
                task.node = ""
                heapq.heappush(self.queue, (-task.weight, task.id))
        self._dispatch(now, effects)

    # ---- second attempts

    def _speculate(self, now: float, effects: list[Effect]) -> None:
        """Give each straggler a second attempt on another node, once in its life."""
        when = self.speculation
        if self.queue or self.alone or not self.free:
            return
        usual = {
            name: statistics.median(f.paces)
            for name, f in self.functions.items()
            if f.tasks >= when.least_tasks and f.ended >= when.least_done * f.tasks and f.paces
        }
        for task_id in sorted(self.live) if usual else ():
            task = self.tasks[task_id]
            if task.state is not State.RUNNING or task.attempts > 1 or task.func not in usual:
                continue
            usual_s = usual[task.func] * task.weight
            if task.weight <= 0 or now - task.assigned_s <= when.factor * usual_s:
                continue
            node = self._take_node(now, task.node, (), 1.0)
            if node is None:
                return
            if node.name == task.node:
                self._offer(node)
                continue
            task.attempts += 1
            task.rival = Rival(task.attempts, node.name, State.ASSIGNED, now)
            self._note(task, f"is slow; attempt {task.attempts} at it on {node.name}")
            self.busy[task.func] += 1
            node.running.add(task.id)
            self._offer(node)
            effects.append(Assign(node.name, task.id, task.attempts))

    def _drop_rival(self, task: Task, effects: list[Effect]) -> None:
        if rival := task.rival:
            task.rival = None
            self.busy[task.func] -= 1
            node = self.nodes[rival.node]
            node.running.discard(task.id)
            self._offer(node)
            effects.append(AbortAttempt(rival.node, task.id, rival.attempt))

    def check_invariants(self) -> None:
        """Raise AssertionError when the state contradicts itself; called by the tests."""
        assert self.committed + self.given_up + self.cancelled + len(self.live) == self.submitted
        for node in self.nodes.values():
            assert 0 <= node.credit <= node.slots, node
            for task_id in node.running | node.ended:
                task = self.tasks[task_id]
                assert node.name in (task.node, task.rival and task.rival.node)
            if any(self.tasks[task_id].alone for task_id in node.running):
                assert node.running == {node.kept_for}, node
            assert node.kept_for is None or node.kept_for in self.live, node
        assert all(
            task.state not in FINAL or task.id in self.staged for task in self.tasks.values()
        )
        staged_of: dict[int, set[int]] = {}
        for task_id in self.staged:
            if self.tasks[task_id].state is State.COMMITTED:
                staged_of.setdefault(self.tasks[task_id].group, set()).add(task_id)
        assert staged_of == self.staged_of
        assert self.live_of == Counter(self.tasks[task_id].group for task_id in self.live)
        busy = [self.tasks[task_id].func for n in self.nodes.values() for task_id in n.running]
        assert +self.busy == Counter(busy)
        for task in self.tasks.values():
            assert task.deaths <= self.limits.max_attempts and task.ooms <= MAX_OOMS
            assert task.node_losses <= MAX_NODE_LOSSES
            assert (task.id in self.live) == (task.state not in FINAL)
            in_upload = task.state is State.UPLOADING
            assert not in_upload or task.id in self.staged
            assert (task.id in self.waiting) == (task.state is State.WAITING)
            if task.id in self.live and task.state is not State.QUEUED:
                node = self.nodes[task.node]
                runs = task.state in (State.ASSIGNED, State.RUNNING)
                assert (task.id in node.running, task.id in node.ended) == (runs, not runs), task
            if task.rival:
                assert task.state in BUSY and task.rival.state in BUSY, task
                assert task.node != task.rival.node and task.attempt != task.rival.attempt, task
                assert task.id in self.nodes[task.rival.node].running, task
        staged = sorted(self.staged.values())
        assert sum(staged) == self.staged_bytes
        assert sum(staged) <= self.window_bytes or len(staged) == 1, staged
