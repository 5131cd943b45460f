"""Which node gets what: by free slots, by memory for tasks that run alone, by room on its disk.

Pure data, owned by the scheduler, which says what is to be placed and what has become of it. Not
covered: which task comes first, and what a task goes through (``scheduler``).
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from oq_runtime.core.limits import Limits

#: part of the most memory that any node has to give with which a node is as good for a task alone
NEARLY = 0.9
#: attempts per slot, at most, that a node may hold of kinds whose tasks are short: the next one
#: is there when the last one ends, which hides the way to the broker and back, and messages of many
#: tasks travel together (8 instead of 2: a tenth more of tasks that do nothing per second)
AHEAD = 8.0
#: mean seconds from assignment to end, waiting included, below which the tasks of a kind are
#: short; the nearer to it, the fewer wait
SHORT_S = 0.05
#: ended tasks of a kind from which its usual time is taken
USUAL_TASKS = 1000


@dataclass(frozen=True, slots=True)
class Speculation:
    """When a straggler gets a second attempt: nothing waits, and it has run ``factor`` times longer
    than the tasks of its kind usually do per weight, known once ``least_done`` of them (a part of
    one) and of at least ``least_tasks`` have ended.
    """

    factor: float = 3.0
    least_tasks: int = 10
    least_done: float = 0.5


@dataclass(slots=True)
class Kind:
    """Tasks that are alike, of one function in one job: their counts, and how long they take.

    ``mean_s`` is a moving mean of seconds from assignment to end; ``paces`` are seconds per weight.
    """

    tasks: int = 0
    busy: int = 0
    ended: int = 0
    retries: int = 0
    preempted: int = 0
    mean_s: float = SHORT_S
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=USUAL_TASKS))

    def measure(self, took_s: float, weight: float) -> None:
        """Note how long an attempt took (s)."""
        self.mean_s = 0.8 * self.mean_s + 0.2 * took_s if self.ended else took_s
        self.ended += 1
        if weight > 0:
            self.paces.append(took_s / weight)

    @property
    def ahead(self) -> float:
        """The load below which a node may get one more of them."""
        short = self.mean_s * AHEAD <= SHORT_S
        return AHEAD if short else max(1.0, SHORT_S / self.mean_s)

    def usual_pace(self, when: Speculation) -> float | None:
        """Return what a task usually takes (s per weight), once that is known."""
        known = self.tasks >= when.least_tasks and self.ended >= when.least_done * self.tasks
        return statistics.median(self.paces) if known and self.paces else None


@dataclass(slots=True)
class Node:
    """A node that has slots for the session.

    ``running`` tasks have a slot each, or wait for one here; of ``ended`` ones only the results
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
    offers: set[float] = field(default_factory=set)  # loads with which it is in Placement.free

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
    def crowded(self) -> bool:
        """Whether some of what it has waits for a slot."""
        return len(self.running) > self.width

    @property
    def load(self) -> float:
        """The part of its slots that is taken; above 1 with attempts that wait for a slot."""
        width = self.width
        return len(self.running) / width if width else AHEAD

    @property
    def has_room(self) -> bool:
        """Whether it may get an attempt, be it one that waits for a slot."""
        return self.kept_for is None and self.load < AHEAD


class Placement:
    """The nodes of one broker.

    :param limits: of silence
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.nodes: dict[str, Node] = {}
        # (load, node), the emptiest first; an entry whose load is not the node's any more is void
        self.free: list[tuple[float, str]] = []

    # ---- what is heard of nodes

    def join(self, name: str, slots: int, now: float) -> None:
        """Take a new node."""
        self.nodes[name] = Node(name, slots, now)
        self.offer(self.nodes[name])

    def resize(self, name: str, slots: int) -> None:
        """Note the slots that a node has for this job from now on."""
        if node := self.nodes.get(name):
            node.slots = slots
            self.offer(node)

    def beat(self, name: str, closed: bool | None, free_bytes: int | None) -> None:
        """Note what a node says of itself; None: as before."""
        if node := self.nodes.get(name):
            node.closed = node.closed if closed is None else closed
            node.free_bytes = node.free_bytes if free_bytes is None else free_bytes
            self.offer(node)

    def hear(self, name: str, now: float) -> None:
        """Note a sign of life."""
        if node := self.nodes.get(name):
            was_silent, node.seen_s = self._silent(node, now), now
            if was_silent:
                self.offer(node)

    def lost(self, now: float) -> list[tuple[str, str]]:
        """Return the nodes that have been silent for too long, each with the reason in words."""
        return [
            (node.name, f"silent for {now - node.seen_s:.0f} s")
            for node in self.nodes.values()
            if now - node.seen_s > self.limits.lost_s
        ]

    # ---- what becomes of tasks there

    def run(self, node: Node, task: int) -> None:
        """Give a node a task."""
        node.running.add(task)
        self.offer(node)

    def end(self, name: str, task: int) -> None:
        """A task has ended on a node, where its results stay."""
        node = self.nodes[name]
        node.running.discard(task)
        node.ended.add(task)
        self.offer(node)

    def leave(self, name: str, task: int) -> None:
        """A task has nothing more on a node, if that is still there."""
        if node := self.nodes.get(name):
            node.running.discard(task)
            node.ended.discard(task)
            self.offer(node)

    def narrow(self, name: str) -> None:
        """Give a node that had no room for the data of a task fewer at a time."""
        node = self.nodes[name]
        node.most = max(1, node.busy - 1)

    def widen(self, name: str) -> None:
        """Try one more task at a time on a node that was short of room."""
        node = self.nodes[name]
        if node.most is not None:
            node.most = node.most + 1 if node.most + 1 < node.slots else None
            self.offer(node)

    # ---- the choice

    def offer(self, node: Node) -> None:
        """Put a node that has room where ``take`` finds it, under its load of now."""
        load = node.load
        if node.kept_for is None and load < AHEAD and load not in node.offers:
            node.offers.add(load)
            heapq.heappush(self.free, (load, node.name))

    def take(self, now: float, avoid: str, barred: Collection[str], below: float) -> Node | None:
        """Take the relatively emptiest node that may get a task, with a load below ``below``.

        A node that is closed or silent falls out here and is offered again with its next beat.

        :param avoid: a node that is taken only if no other is free
        :param barred: nodes that are not taken
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
                self.offer(node)
        return found

    def take_other(self, now: float, than: str) -> Node | None:
        """Take a node with a free slot that is not the named one."""
        node = self.take(now, than, (), 1.0)
        if node is not None and node.name == than:
            self.offer(node)
            return None
        return node

    def barred(self, no_room: Collection[str], died: str, slow: str) -> Collection[str]:
        """Return the nodes that may not get a task as long as there are others.

        :param no_room: those that had no room for its data
        :param died: where its worker died, if this would be its last attempt
        :param slow: where it did not start, which is no other node
        """
        full = set(no_room)
        choices = (full | {died}, full)
        takes = {node.name for node in self.nodes.values() if node.slots and not node.closed}
        return next((names for names in choices if takes - {*names, slow}), ())

    def has_other(self, names: Collection[str]) -> bool:
        """Whether there is a node with slots beside these."""
        return any(node.slots and node.name not in names for node in self.nodes.values())

    def take_empty(self, task: int, now: float, avoid: str = "") -> Node | None:
        """Keep the node with most free memory for a task that runs alone; take it once it is empty.

        One that drains, or falls silent meanwhile, is given up for another.

        :param avoid: a node that is taken only if there is no other
        """
        # a node that is full with what runs there opens again, one that drains has nothing to give
        usable = [
            n
            for n in self.nodes.values()
            if n.slots and not self._silent(n, now) and (n.free_bytes or not n.closed)
        ]
        usable = [n for n in usable if n.name != avoid] or usable
        kept = [n for n in usable if n.kept_for == task]
        if not kept:
            self.give_back(task)
            least = NEARLY * max((n.free_bytes for n in usable), default=0)
            kept = [n for n in usable if n.kept_for is None and n.free_bytes >= least]
        if not kept:
            return None
        node = min(kept, key=lambda n: (-n.free_bytes, n.name))
        node.kept_for = task
        return None if node.running or node.closed else node

    def give_back(self, task: int) -> None:
        """Open to all the node that was kept for the task."""
        for node in self.nodes.values():
            if node.kept_for == task:
                node.kept_for = None
                self.offer(node)

    def unused(self, now: float) -> dict[str, int]:
        """Return the free slots of the nodes that take tasks and have some."""
        nodes = self.nodes.values()
        return {n.name: n.credit for n in nodes if n.credit and self._takes_tasks(n, now)}

    def _takes_tasks(self, node: Node, now: float) -> bool:
        return not node.closed and not self._silent(node, now)

    def _silent(self, node: Node, now: float) -> bool:
        return now - node.seen_s > self.limits.suspect_s

    def check_invariants(self) -> None:
        """Raise AssertionError when the state contradicts itself; called by the tests."""
        for node in self.nodes.values():
            assert 0 <= node.credit <= node.slots, node
            assert not node.running & node.ended, node
            offered = {load for load, name in self.free if name == node.name}
            assert node.offers <= offered, node
