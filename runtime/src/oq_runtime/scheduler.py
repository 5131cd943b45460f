"""The pure scheduling core of the broker: tasks, attempts, nodes, and the byte window.

``Scheduler.handle(event, now)`` returns effects for the shell to carry out. No socket, clock,
process or random number is used here. All state of a task is changed here and nowhere else, by the
table TRANSITIONS; a pair that it does not know raises TransitionError and changes nothing. An event
of an attempt that is not the task's current one is stale: it never reaches the table, and its
sender is told to abort.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum

from oq_runtime.errors import TransitionError

#: seconds without a beat after which a node gets no new tasks
SUSPECT_AFTER_S = 10.0
#: seconds without a beat after which a node is lost and its attempts void
LOST_AFTER_S = 30.0
#: attempts of a task that may end with the death of its worker process
MAX_DEATHS = 3
#: attempts that may be lost with their nodes, or damaged on the way, before the task is given up
MAX_NODE_LOSSES = 10
#: bytes of results that may be staged in the broker; one larger attempt is let through alone
WINDOW_BYTES = 1 << 30
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
    CANCELLED = "cancelled"


FINAL = frozenset({State.COMMITTED, State.POISONED, State.CANCELLED})

# {state: {transition: next state}}; "refused" and "poisoned" are the two outcomes of a failed
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
        "cancel": State.CANCELLED,
    },
    State.RUNNING: {
        "end": State.WAITING,
        "retry": State.QUEUED,
        "give up": State.POISONED,
        "cancel": State.CANCELLED,
    },
    State.WAITING: {
        "grant": State.UPLOADING,
        "retry": State.QUEUED,
        "give up": State.POISONED,
        "cancel": State.CANCELLED,
    },
    State.UPLOADING: {
        "commit": State.COMMITTED,
        "retry": State.QUEUED,
        "give up": State.POISONED,
        "cancel": State.CANCELLED,
    },
    State.COMMITTED: {},
    State.POISONED: {},
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
    """A sign of life; ``closed`` (None: as before) says that the node takes no new tasks."""

    node: str
    closed: bool | None = None


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
    node: str
    task: int
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Consumed:
    task: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    group: int


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = (
    NodeJoined | NodeResized | NodeSeen | NodeGone | Submitted | Started | Ended | Uploaded | Died
    | Consumed | Cancelled | Tick
)  # fmt: skip


# ---- effects


@dataclass(frozen=True, slots=True)
class Assign:
    node: str
    task: int
    attempt: int


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
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    task: int
    error: str
    history: tuple[str, ...]


Effect = Assign | GrantUpload | AbortAttempt | Commit | DropStaged | GiveUp


@dataclass(slots=True)
class Task:
    id: int
    group: int
    func: str
    weight: float
    state: State = State.QUEUED
    attempt: int = 0
    node: str = ""
    nbytes: int = 0
    deaths: int = 0
    node_losses: int = 0
    avoid: str = ""
    history: deque[str] = field(default_factory=lambda: deque(maxlen=HISTORY_LINES))


@dataclass(slots=True)
class Node:
    name: str
    slots: int
    seen_s: float
    closed: bool = False
    running: set[int] = field(default_factory=set)

    @property
    def credit(self) -> int:
        """Slots that are free; never negative, also when the share has shrunk below what runs."""
        return max(0, self.slots - len(self.running))


class Scheduler:
    """State of one broker.

    :param window_bytes: results staged at a time, see WINDOW_BYTES
    :param max_deaths: see MAX_DEATHS
    :param no_nodes_limit_s: seconds without any node after which the live tasks are given up
    """

    def __init__(
        self,
        *,
        window_bytes: int = WINDOW_BYTES,
        max_deaths: int = MAX_DEATHS,
        no_nodes_limit_s: float = 60.0,
    ) -> None:
        self.window_bytes = window_bytes
        self.max_deaths = max_deaths
        self.no_nodes_limit_s = no_nodes_limit_s
        self.tasks: dict[int, Task] = {}
        self.nodes: dict[str, Node] = {}
        self.queue: list[tuple[float, int]] = []  # (-weight, task)
        self.waiting: list[int] = []  # ended, in order of arrival, not granted yet
        self.staged: dict[int, int] = {}  # granted or committed and not consumed: task -> bytes
        self.live: set[int] = set()
        self.submitted = self.committed = self.cancelled = self.given_up = 0
        self.retries: Counter[str] = Counter()  # per function
        self.no_nodes_since_s: float | None = None
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
            case NodeResized(node, slots):
                if node in self.nodes:
                    self.nodes[node].slots = slots
            case NodeSeen(node, closed):
                if node in self.nodes:
                    self.nodes[node].seen_s = now
                    if closed is not None:
                        self.nodes[node].closed = closed
            case NodeGone(node, reason):
                self._lose(node, reason, effects)
            case Submitted(task, group, func, weight):
                if task in self.tasks:
                    raise TransitionError(f"task {task} was submitted before")
                self.tasks[task] = Task(task, group, func, weight)
                self.submitted += 1
                self.live.add(task)
                heapq.heappush(self.queue, (-weight, task))
            case Started(node, task, attempt):
                if current := self._current(node, task, attempt, effects):
                    self._move(current, "start", f"started on {node}")
            case Ended(node, task, attempt, nbytes):
                if current := self._current(node, task, attempt, effects):
                    self._move(current, "end", f"ended on {node}, {nbytes} bytes")
                    current.nbytes = nbytes
                    self.nodes[node].running.discard(task)
                    self.waiting.append(task)
            case Uploaded(node, task, attempt, intact):
                if current := self._current(node, task, attempt, effects):
                    if current.state is not State.UPLOADING:
                        raise TransitionError(f"task {task} is {current.state.value}: no upload")
                    if intact:
                        self._move(current, "commit", f"committed from {node}")
                        self.live.discard(task)
                        self.committed += 1
                        effects.append(Commit(node, task, attempt))
                    else:
                        current.node_losses += 1  # charged like a loss: the task did no harm
                        self._retry(current, f"damaged on the way from {node}", effects)
            case Died(node, task, attempt, reason):
                if current := self._current(node, task, attempt, effects):
                    current.deaths += 1
                    current.avoid = node
                    self._retry(current, f"{reason} on {node}", effects)
            case Consumed(task):
                if task in self.tasks and self.tasks[task].state is State.COMMITTED:
                    self.staged.pop(task, None)
            case Cancelled(group):
                for task in [t for t in self.live if self.tasks[t].group == group]:
                    self._cancel(self.tasks[task], effects)
            case Tick():
                self._lose_silent(now, effects)
        self._give_up_without_nodes(now, effects)
        self._grant(effects)
        self._dispatch(now, effects)
        return effects

    # ---- parts

    def _current(self, node: str, task: int, attempt: int, effects: list[Effect]) -> Task | None:
        found = self.tasks.get(task)
        if (
            found is None
            or found.attempt != attempt
            or found.node != node
            or found.state in FINAL
            or found.state is State.QUEUED
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
        task.state = state
        task.history.append(f"attempt {task.attempt}: {note}")

    def _free(self, task: Task, effects: list[Effect]) -> None:
        """Take the task from its node and drop what was staged of its attempt."""
        if task.node in self.nodes:
            self.nodes[task.node].running.discard(task.id)
        if task.state is State.WAITING:
            self.waiting.remove(task.id)
        if task.state in (State.WAITING, State.UPLOADING):
            self.staged.pop(task.id, None)
            effects.append(DropStaged(task.id, task.attempt))

    def _retry(self, task: Task, note: str, effects: list[Effect]) -> None:
        self._free(task, effects)
        if task.deaths >= self.max_deaths or task.node_losses >= MAX_NODE_LOSSES:
            error = "WorkerDied" if task.deaths >= self.max_deaths else "NodeLost"
            self._give_up(task, error, note, effects)
            return
        self._move(task, "retry", note)
        self.retries[task.func] += 1
        task.node = ""
        heapq.heappush(self.queue, (-task.weight, task.id))

    def _give_up(self, task: Task, error: str, note: str, effects: list[Effect]) -> None:
        self._move(task, "give up", note)
        self.live.discard(task.id)
        self.given_up += 1
        effects.append(GiveUp(task.id, error, tuple(task.history)))

    def _cancel(self, task: Task, effects: list[Effect]) -> None:
        self._free(task, effects)
        if task.node:
            effects.append(AbortAttempt(task.node, task.id, task.attempt))
        self._move(task, "cancel", "cancelled")
        self.live.discard(task.id)
        self.cancelled += 1

    def _lose(self, name: str, reason: str, effects: list[Effect]) -> None:
        node = self.nodes.pop(name, None)
        if node is None:
            return
        self.lost.append(f"{name}: {reason}")
        for task_id in sorted(self.live):
            task = self.tasks[task_id]
            if task.node == name and task.state is not State.QUEUED:
                task.node_losses += 1
                self._retry(task, f"node {name} lost ({reason})", effects)

    def _lose_silent(self, now: float, effects: list[Effect]) -> None:
        # only on a tick, which comes after all waiting beats were read
        for node in list(self.nodes.values()):
            if now - node.seen_s > LOST_AFTER_S:
                self._lose(node.name, f"silent for {now - node.seen_s:.0f} s", effects)

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
            task = self.tasks[self.waiting[0]]
            staged = sum(self.staged.values())
            if self.staged and staged + task.nbytes > self.window_bytes:
                return
            self.waiting.pop(0)
            self._move(task, "grant", f"upload of {task.nbytes} bytes")
            self.staged[task.id] = task.nbytes
            effects.append(GrantUpload(task.node, task.id, task.attempt))

    def _dispatch(self, now: float, effects: list[Effect]) -> None:
        healthy = [
            n for n in self.nodes.values() if not n.closed and now - n.seen_s <= SUSPECT_AFTER_S
        ]
        while self.queue:
            free = [n for n in healthy if n.credit > 0]
            if not free:
                return
            _, task_id = heapq.heappop(self.queue)
            task = self.tasks[task_id]
            if task.state is not State.QUEUED:
                continue  # cancelled or given up while it was queued
            # the relatively emptiest node; one on which the task killed its worker comes last
            node = min(free, key=lambda n: (n.name == task.avoid, -n.credit / n.slots, n.name))
            task.attempt += 1
            task.node = node.name
            self._move(task, "assign", f"assigned to {node.name}")
            node.running.add(task_id)
            effects.append(Assign(node.name, task_id, task.attempt))

    def check_invariants(self) -> None:
        """Raise AssertionError when the state contradicts itself; called by the tests."""
        assert self.committed + self.given_up + self.cancelled + len(self.live) == self.submitted
        for node in self.nodes.values():
            assert 0 <= node.credit <= node.slots, node
            for task_id in node.running:
                assert self.tasks[task_id].node == node.name
        for task in self.tasks.values():
            assert task.deaths <= self.max_deaths
            assert task.node_losses <= MAX_NODE_LOSSES
            assert (task.id in self.live) == (task.state not in FINAL)
            in_upload = task.state is State.UPLOADING
            assert not in_upload or task.id in self.staged
        staged = sorted(self.staged.values())
        assert sum(staged) <= self.window_bytes or len(staged) == 1, staged
