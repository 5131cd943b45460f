"""The scheduling core: a model-checked state machine over random faults, and table tests."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from oq_runtime.core.limits import Limits
from oq_runtime.core.placement import AHEAD, NEARLY, SHORT_S, Kind, Speculation
from oq_runtime.core.scheduler import (
    FINAL,
    MAX_NODE_LOSSES,
    MAX_OOMS,
    MAX_PREEMPTIONS,
    MOST_BARREN,
    TRANSITIONS,
    UNSTARTED_S,
    AbortAttempt,
    Assign,
    AttemptDied,
    AttemptEnded,
    AttemptPreempted,
    AttemptStarted,
    Cancelled,
    Commit,
    Consumed,
    Effect,
    Event,
    Forget,
    GiveUp,
    GrantUpload,
    Group,
    LeftOut,
    Move,
    NodeGone,
    NodeJoined,
    NodeLost,
    NodeResized,
    NodeSeen,
    NotStored,
    Scheduler,
    State,
    Submitted,
    Task,
    Tick,
    Unrunnable,
    Uploaded,
)
from oq_runtime.errors import TransitionError

WINDOW = 100
LIMITS = Limits()
LOST_AFTER_S, SUSPECT_AFTER_S = LIMITS.lost_s, LIMITS.suspect_s
MAX_DEATHS = LIMITS.max_attempts
NAMES = ["n1", "n2", "n3"]
# seconds of simulated time in which a healthy node must end everything: the other nodes are lost
# after LOST_AFTER_S, and then each round of the drain ends at least one task
DRAIN_ROUNDS = 400


def state_of(scheduler: Scheduler) -> dict[str, Any]:
    """All that it knows, to be compared."""
    return {**vars(scheduler), "placement": vars(scheduler.placement)}


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    return copy.deepcopy(state_of(scheduler))


# ---- the state machine


@dataclass
class Attempt:
    """What the simulated node knows of one attempt; it may outlive the scheduler's interest."""

    node: str
    task: int
    number: int
    phase: str = "assigned"  # assigned, running, waiting, uploading
    nbytes: int = 0


class Cluster(RuleBasedStateMachine):
    """Nodes, an engine and a network that follow the effects, and the model that checks them."""

    limits = LIMITS
    speculation = Speculation()

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(self.limits, window_bytes=WINDOW, speculation=self.speculation)
        self.now = 0.0
        self.next_task = 0
        self.submitted: set[int] = set()
        self.commits: dict[int, int] = {}
        self.failed: set[int] = set()  # given up or cancelled
        self.group: dict[int, int] = {}
        # task -> node and number of the attempts that count: one, or two with speculation
        self.last: dict[int, list[tuple[str, int]]] = {}
        self.attempts: dict[tuple[str, int, int], Attempt] = {}  # alive on the nodes
        self.slots: dict[str, int] = {}
        self.seen: dict[str, float] = {}
        self.taken: dict[int, int] = {}  # attempts that were taken back before they started
        self.deaths: dict[int, int] = {}
        self.ooms: dict[int, int] = {}
        self.losses: dict[int, int] = {}
        self.preemptions: dict[int, int] = {}
        self.no_room: dict[int, list[str]] = {}  # nodes without room for the data of a task
        self.staged: dict[int, int] = {}
        self.granted: dict[int, tuple[str, int]] = {}  # the last attempt that was let in
        self.unrunnable: set[int] = set()
        self.too_big: set[int] = set()  # alone of their groups, and this host had no room for them
        self.narrowed: dict[int, int] = {}  # attempts for which there was no room beside others
        self.unconsumed: set[int] = set()
        self.sent: list[Event] = []  # all messages of attempts, to be delivered again

    # ---- plumbing

    def current(self, node: str, task: int, number: int) -> bool:
        """Whether the model holds this attempt for the one that counts."""
        return (
            (node, number) in self.last.get(task, [])
            and node in self.slots
            and task not in self.failed
            and task not in self.commits
            and (node, task, number) in self.attempts
        )

    def has_elsewhere(self, task: int) -> bool:
        """Whether there is a node that may have room for the data of the task."""
        return any(n for name, n in self.slots.items() if name not in self.no_room.get(task, []))

    def takes_elsewhere(self, task: int) -> bool:
        """Whether one of those takes tasks, and has not kept this one waiting."""
        nodes, full = self.scheduler.nodes.values(), self.no_room.get(task, [])
        slow = self.scheduler.tasks[task].slow
        return any(n.slots and not n.closed and n.name not in [*full, slow] for n in nodes)

    def lose(self, node: str) -> None:
        del self.slots[node], self.seen[node]
        for task, attempts in list(self.last.items()):
            for where, number in list(attempts):
                if where == node and task not in self.failed and task not in self.commits:
                    self.losses[task] = self.losses.get(task, 0) + 1
                    self.forget(task, where, number)

    def forget(self, task: int, node: str, number: int) -> None:
        """The attempt does not count any more."""
        if (node, number) in self.last.get(task, []):
            self.last[task].remove((node, number))
            if not self.last[task]:
                del self.last[task]

    def send(self, event: Event) -> list[Effect]:
        over = False
        match event:
            case NodeJoined(node, slots):
                if node in self.slots:
                    self.lose(node)
                self.slots[node], self.seen[node] = slots, self.now
            case NodeGone(node, _):
                if node in self.slots:
                    self.lose(node)
            case AttemptDied(node, task, number, no_room=True) if self.current(node, task, number):
                full = self.no_room.setdefault(task, [])
                full.append(node)
                over = len(full) >= MAX_DEATHS and not self.has_elsewhere(task)
                self.forget(task, node, number)
            case AttemptDied(node, task, number, _, oom) if self.current(node, task, number):
                charged, most = (self.ooms, MAX_OOMS) if oom else (self.deaths, MAX_DEATHS)
                charged[task] = charged.get(task, 0) + 1
                over = charged[task] == most
                self.forget(task, node, number)
            case AttemptPreempted(node, task, number, _) if self.current(node, task, number):
                firm = self.preemptions.get(task, 0) >= MAX_PREEMPTIONS
                charged = self.losses if firm else self.preemptions
                charged[task] = charged.get(task, 0) + 1
                self.forget(task, node, number)
            case Uploaded(node, task, number, False) if self.current(node, task, number):
                self.losses[task] = self.losses.get(task, 0) + 1
                self.forget(task, node, number)
            case NotStored(node, task, number, _) if self.current(node, task, number):
                beside = [t for t in self.staged if self.group[t] == self.group[task]]
                if beside == [task]:
                    self.too_big.add(task)
                    over = True
                else:
                    self.narrowed[task] = self.narrowed.get(task, 0) + 1
                    self.forget(task, node, number)
                self.staged.pop(task)
            case Unrunnable(task, _):
                if task in self.submitted - self.failed - set(self.commits):
                    self.unrunnable.add(task)
                    over = True
                    self.staged.pop(task, None)
            case Consumed(task) if task in self.commits:
                self.staged.pop(task, None)
            case Cancelled(group):
                for task in [t for t in self.staged if self.group[t] == group]:
                    self.staged.pop(task)
                    self.unconsumed.discard(task)
        if isinstance(event, Tick):
            for node in [n for n, seen in self.seen.items() if self.now - seen > LOST_AFTER_S]:
                self.lose(node)
        effects = self.scheduler.handle(event, self.now)
        sender = getattr(event, "node", "")
        if sender in self.slots and not isinstance(event, Uploaded):
            self.seen[sender] = self.now
        assert not over or any(isinstance(e, GiveUp) for e in effects), "its budget is spent"
        assert set(self.scheduler.nodes) == set(self.slots)
        for effect in effects:
            self.follow(effect, event)
        if isinstance(event, AttemptEnded) and self.current(event.node, event.task, event.attempt):
            assert self.last[event.task] == [(event.node, event.attempt)], "the other goes on"
        return effects

    def follow(self, effect: Effect, cause: Event) -> None:
        match effect:
            case Assign(node, task, number, alone, firm):
                assert firm == (self.preemptions.get(task, 0) >= MAX_PREEMPTIONS)
                assert task in self.submitted and task not in self.failed | set(self.commits)
                assert alone == (task in self.ooms)
                beside = self.running(node)
                assert not beside or not (alone or beside & set(self.ooms)), "not alone"
                if task in self.last:
                    self.check_second_attempt(task, node, cause)
                assert node in self.slots, "assigned to a lost node"
                if not alone and node in self.no_room.get(task, []):
                    assert not self.takes_elsewhere(task), "assigned where it has no room"
                assert self.now - self.seen[node] <= SUSPECT_AFTER_S, "assigned to a suspect node"
                short = self.scheduler.kinds[0].mean_s < SHORT_S
                most = AHEAD * self.slots[node] if short else self.slots[node]
                assert self.busy(node) < most, "credit never negative"
                self.last.setdefault(task, []).append((node, number))
                self.attempts[node, task, number] = Attempt(node, task, number)
            case GrantUpload(node, task, number):
                assert self.current(node, task, number)
                attempt = self.attempts[node, task, number]
                assert attempt.phase == "waiting"
                attempt.phase = "uploading"
                self.staged[task] = attempt.nbytes
                self.granted[task] = node, number
            case AbortAttempt(node, task, number):
                if task not in self.commits and self.granted.get(task) == (node, number):
                    self.staged.pop(task, None)
                waited = self.attempts.pop((node, task, number), None)
                if isinstance(cause, Tick) and waited and waited.phase == "assigned":
                    self.taken[task] = self.taken.get(task, 0) + 1
                if task not in self.failed | set(self.commits):
                    self.forget(task, node, number)
            case Commit(node, task, number):
                assert cause == Uploaded(node, task, number, True)
                assert task not in self.failed
                assert self.current(node, task, number), "nothing of a stale attempt is delivered"
                assert self.attempts[node, task, number].phase == "uploading"
                self.commits[task] = self.commits.get(task, 0) + 1
                self.unconsumed.add(task)
            case Forget(task):
                assert task in self.failed and isinstance(cause, Cancelled)
            case NodeLost(node, reason):
                assert node not in self.slots and "silent" in reason
            case GiveUp(task, error, attempts, history):
                assert task not in self.failed | set(self.commits)
                spent = {
                    "NoWorkers": not any(self.slots.values()),
                    "OutOfMemory": self.ooms.get(task, 0) == MAX_OOMS,
                    "WorkerDied": self.deaths.get(task, 0) == MAX_DEATHS
                    or len(self.no_room.get(task, [])) >= MAX_DEATHS,
                    "NodeLost": self.losses.get(task, 0) == MAX_NODE_LOSSES,
                    "NoRoom": task in self.too_big,
                    "ArgumentLost": task in self.unrunnable,
                }
                assert spent[error], error
                assert history and attempts <= self.most_attempts(task)
                self.failed.add(task)

    def check_second_attempt(self, task: int, node: str, cause: Event) -> None:
        assert self.limits.speculation and isinstance(cause, Tick), "another one is still alive"
        [(where, number)] = self.last[task]
        assert where != node
        assert number == 1, "once in its life"
        assert self.attempts[where, task, number].phase == "running"
        assert not any(t.state is State.QUEUED for t in self.scheduler.tasks.values())

    def most_attempts(self, task: int) -> int:
        """How often the task may have been assigned, for what has become of it."""
        counts = (
            self.deaths, self.ooms, self.losses, self.preemptions, self.narrowed, self.taken
        )  # fmt: skip
        failed = sum(count.get(task, 0) for count in counts)
        return 1 + failed + len(self.no_room.get(task, [])) + self.limits.speculation

    def running(self, node: str) -> set[int]:
        """The tasks that hold a slot of the node."""
        return {
            a.task
            for a in self.attempts.values()
            if a.node == node
            and a.phase in ("assigned", "running")
            and self.current(a.node, a.task, a.number)
        }

    def busy(self, node: str) -> int:
        return len(self.running(node))

    def message(
        self,
        event: AttemptStarted
        | AttemptEnded
        | Uploaded
        | NotStored
        | AttemptDied
        | AttemptPreempted,
    ) -> None:
        """Deliver the message of an attempt; a stale one has no effect but an abort."""
        self.sent.append(event)
        node, task, number = event.node, event.task, event.attempt
        if self.current(node, task, number):
            self.send(event)
        else:
            self.stale(event)

    def stale(self, event: Any) -> None:
        before = snapshot(self.scheduler)["tasks"].get(event.task)
        aborted = AbortAttempt(event.node, event.task, event.attempt)
        effects = self.send(event)
        assert aborted in effects, "the sender of a stale message is told to abort"
        assert not any(isinstance(e, Commit | GrantUpload) for e in effects)
        after = self.scheduler.tasks.get(event.task)
        if before and not any(isinstance(e, Assign | GiveUp) for e in effects):
            assert after == before, "a stale message changed its task"

    def pick(self, data: st.DataObject, *phases: str) -> Attempt | None:
        keys = sorted(k for k, a in self.attempts.items() if a.phase in phases)
        return self.attempts[data.draw(st.sampled_from(keys))] if keys else None

    # ---- rules: the engine

    @rule(group=st.integers(0, 2), weight=st.sampled_from([0.0, 1.0, 7.5]), n=st.integers(1, 4))
    def submit(self, group: int, weight: float, n: int) -> None:
        for _ in range(n):
            task = self.next_task
            self.next_task += 1
            self.submitted.add(task)
            self.group[task] = group
            self.send(Submitted(task, group, 0, weight))

    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        if known := sorted({*self.scheduler.tasks, *self.staged}):
            self.refused(Submitted(data.draw(st.sampled_from(known)), 0, 0))

    @rule(data=st.data(), twice=st.booleans())
    def consume(self, data: st.DataObject, twice: bool) -> None:
        if self.unconsumed:
            task = data.draw(st.sampled_from(sorted(self.unconsumed)))
            self.unconsumed.discard(task)
            self.send(Consumed(task))
            if twice:
                self.send(Consumed(task))

    @rule(group=st.integers(0, 2))
    def cancel(self, group: int) -> None:
        ended = self.failed | set(self.commits)
        others = {t: n for t, n in self.staged.items() if self.group[t] != group}
        hit = {t for t in self.submitted - ended if self.group[t] == group}
        running = {(*attempt, t) for t in hit for attempt in self.last.get(t, [])}
        # the model ends the tasks first: time may also lose a node on this event
        self.failed |= hit
        effects = self.send(Cancelled(group))
        for node, number, task in running:
            assert AbortAttempt(node, task, number) in effects
        assert {e.task for e in effects if isinstance(e, Forget)} == hit
        assert others.items() <= self.staged.items(), "what others have stays"

    @rule(data=st.data())
    def lose_an_argument(self, data: st.DataObject) -> None:
        """What a task needs is gone, perhaps when it has ended by any name."""
        task = data.draw(st.integers(0, self.next_task))
        alive = task in self.scheduler.tasks
        effects = self.send(Unrunnable(task, "its argument is gone"))
        assert any(isinstance(e, GiveUp) for e in effects) == alive

    # ---- rules: nodes and time

    @rule(node=st.sampled_from(NAMES), slots=st.sampled_from([0, 1, 1, 2, 5]))
    def join(self, node: str, slots: int) -> None:
        self.send(NodeJoined(node, slots))

    @rule(node=st.sampled_from(NAMES), slots=st.sampled_from([1, 2, 5]))
    def join_unless_known(self, node: str, slots: int) -> None:
        if node not in self.slots:
            self.send(NodeJoined(node, slots))

    @rule(node=st.sampled_from(NAMES))
    def leave(self, node: str) -> None:
        self.send(NodeGone(node, "left"))

    @rule(
        seconds=st.sampled_from([0.0, 1.0, 5.0, 10.0, 11.0, 20.0, 30.0, 31.0, 61.0]),
        beating=st.sets(st.sampled_from(NAMES)),
        free=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    )
    def pass_time(self, seconds: float, beating: set[str], free: list[int]) -> None:
        """Time passes; nodes that do not beat are silent, the others tell their free memory."""
        steps = max(1, int(seconds // 5))
        for _ in range(steps):
            self.now += seconds / steps
            for node in sorted(beating):
                self.send(NodeSeen(node, None, free[NAMES.index(node)]))
        self.send(Tick())

    # ---- rules: attempts, current and stale ones alike

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        if attempt := self.pick(data, "assigned"):
            self.start_one(attempt)

    def start_one(self, attempt: Attempt) -> None:
        attempt.phase = "running"
        self.message(AttemptStarted(attempt.node, attempt.task, attempt.number))

    @rule(data=st.data(), nbytes=st.sampled_from([1, 10, 40, 60, WINDOW, WINDOW + 1, 5 * WINDOW]))
    def end(self, data: st.DataObject, nbytes: int) -> None:
        if attempt := self.pick(data, "assigned", "running"):  # short ones never say started
            self.end_one(attempt, nbytes)

    def end_one(self, attempt: Attempt, nbytes: int = 1) -> None:
        attempt.phase, attempt.nbytes = "waiting", nbytes
        self.message(AttemptEnded(attempt.node, attempt.task, attempt.number, nbytes))

    @rule(data=st.data(), intact=st.sampled_from([True, True, True, False]))
    def upload(self, data: st.DataObject, intact: bool) -> None:
        if attempt := self.pick(data, "uploading"):
            self.message(Uploaded(attempt.node, attempt.task, attempt.number, intact))
            self.attempts.pop((attempt.node, attempt.task, attempt.number), None)

    @rule(data=st.data())
    def find_no_room(self, data: st.DataObject) -> None:
        """This host has no room for results that it let come."""
        if attempt := self.pick(data, "uploading"):
            self.message(NotStored(attempt.node, attempt.task, attempt.number, "no room on sda1"))
            self.attempts.pop((attempt.node, attempt.task, attempt.number), None)

    @rule(data=st.data(), how=st.sampled_from([{}, {"oom": True}, {"no_room": True}]))
    def die(self, data: st.DataObject, how: dict[str, bool]) -> None:
        if attempt := self.pick(data, "assigned", "running", "waiting", "uploading"):
            self.message(AttemptDied(attempt.node, attempt.task, attempt.number, "signal 9", **how))
            self.attempts.pop((attempt.node, attempt.task, attempt.number), None)

    @rule(data=st.data())
    def interrupt(self, data: st.DataObject) -> None:
        """Its slot goes to a job of higher priority."""
        if attempt := self.pick(data, "assigned", "running"):
            self.message(AttemptPreempted(attempt.node, attempt.task, attempt.number, "another"))
            self.attempts.pop((attempt.node, attempt.task, attempt.number), None)

    @precondition(lambda self: self.ooms)
    @rule(ooms=st.lists(st.booleans(), min_size=1, max_size=3))
    def die_alone(self, ooms: list[bool]) -> None:
        """Tasks that ran out of memory before die again, of that or of something else."""
        for oom in ooms:
            alone = [
                a
                for a in self.attempts.values()
                if a.task in self.ooms and self.current(a.node, a.task, a.number)
            ]
            for attempt in alone[:1]:
                self.message(AttemptDied(attempt.node, attempt.task, attempt.number, "killed", oom))
                self.attempts.pop((attempt.node, attempt.task, attempt.number), None)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        """A message that was sent before: refused while its attempt counts, stale afterwards."""
        event: Any = self.sent[data.draw(st.integers(0, len(self.sent) - 1))]
        if self.current(event.node, event.task, event.attempt):
            self.refused(event)
        else:
            self.stale(event)

    @rule(data=st.data())
    def out_of_order(self, data: st.DataObject) -> None:
        attempt = self.pick(data, "assigned", "running", "waiting", "uploading")
        if attempt and self.current(attempt.node, attempt.task, attempt.number):
            where = attempt.node, attempt.task, attempt.number
            allowed: dict[str, tuple[type, ...]] = {
                "assigned": (AttemptStarted, AttemptEnded),
                "running": (AttemptEnded,),
                "uploading": (Uploaded, NotStored),
            }
            events: list[Any] = [AttemptStarted(*where), AttemptEnded(*where, 5)]
            events += [Uploaded(*where, True), NotStored(*where, "no room")]
            self.refused(
                data.draw(
                    st.sampled_from(
                        [e for e in events if not isinstance(e, allowed.get(attempt.phase, ()))]
                    )
                )
            )

    @rule(
        node=st.sampled_from([*NAMES, "nobody"]),
        task=st.integers(0, 12),
        number=st.integers(-1, 6),
        kind=st.sampled_from(
            ["started", "ended", "uploaded", "not stored", "died", "oom", "preempted"]
        ),
    )
    def forged(self, node: str, task: int, number: int, kind: str) -> None:
        """A message of an attempt that this node never had, or has no more."""
        if (node, task, number) in self.attempts:
            return
        where = node, task, number
        self.stale(
            {
                "started": AttemptStarted(*where),
                "ended": AttemptEnded(*where, 3),
                "uploaded": Uploaded(*where, True),
                "not stored": NotStored(*where, "no room"),
                "died": AttemptDied(*where, "forged"),
                "oom": AttemptDied(*where, "forged", oom=True),
                "preempted": AttemptPreempted(*where, "forged"),
            }[kind]
        )

    def refused(self, event: Event) -> None:
        before = snapshot(self.scheduler)
        with pytest.raises(TransitionError):
            self.scheduler.handle(event, self.now)
        assert state_of(self.scheduler) == before, "a refused event changed the state"

    # ---- invariants

    @invariant()
    def scheduler_does_not_contradict_itself(self) -> None:
        self.scheduler.check_invariants()

    @invariant()
    def a_task_commits_at_most_once(self) -> None:
        assert all(n == 1 for n in self.commits.values())
        assert not self.failed & set(self.commits)

    @invariant()
    def committed_failed_and_live_are_all_submitted(self) -> None:
        core = self.scheduler
        assert core.submitted == len(self.submitted)
        assert core.committed == len(self.commits)
        assert core.given_up + core.cancelled == len(self.failed)
        assert set(core.tasks) == self.submitted - self.failed - set(self.commits)

    @invariant()
    def credit_is_within_the_slots(self) -> None:
        for name, node in self.scheduler.nodes.items():
            assert node.slots == self.slots[name]
            free = max(0, node.width - self.busy(name))
            assert node.width == node.slots or any(name in full for full in self.no_room.values())
            assert node.credit == (free if node.kept_for is None else 0)
            assert 0 <= node.credit <= node.slots

    @invariant()
    def attempts_stay_within_budget(self) -> None:
        for task in self.scheduler.tasks.values():
            deaths, losses = self.deaths.get(task.id, 0), self.losses.get(task.id, 0)
            ooms = self.ooms.get(task.id, 0)
            assert (task.deaths, task.ooms, task.node_losses) == (deaths, ooms, losses)
            assert task.preemptions == self.preemptions.get(task.id, 0)
            assert deaths <= MAX_DEATHS and ooms <= MAX_OOMS and losses <= MAX_NODE_LOSSES
            assert task.attempt <= task.attempts
            assert list(task.no_room) == self.no_room.get(task.id, [])
            assert task.attempts <= self.most_attempts(task.id)

    @invariant()
    def staged_bytes_stay_within_the_window_and_one_attempt_per_group(self) -> None:
        assert {t: nbytes for t, (_, nbytes) in self.scheduler.staged.items()} == self.staged
        largest: dict[int, int] = {}
        for task, nbytes in self.staged.items():
            group = self.group[task]
            largest[group] = max(nbytes, largest.get(group, 0))
        assert sum(self.staged.values()) - sum(largest.values()) <= WINDOW

    @invariant()
    def what_waits_for_the_window_has_others_of_its_group_in_it(self) -> None:
        for task in self.scheduler.tasks.values():
            if task.state is State.WAITING:
                assert self.group[task.id] in {self.group[staged] for staged in self.staged}

    @invariant()
    def no_free_slot_beside_a_queued_task(self) -> None:
        fresh = [n for n in self.slots if self.now - self.seen[n] <= SUSPECT_AFTER_S]
        queued = {t.id for t in self.scheduler.tasks.values() if t.state is State.QUEUED}
        waiting = queued & set(self.ooms)  # for a node of their own
        kept = {n: self.scheduler.nodes[n].kept_for for n in fresh}
        width = {n: self.scheduler.nodes[n].width for n in fresh}
        free = {n for n in fresh if kept[n] is None and width[n] > self.busy(n)}
        for task in queued - waiting:
            full = set(self.no_room.get(task, []))
            last = self.deaths.get(task, 0) == MAX_DEATHS - 1
            died = {self.scheduler.tasks[task].avoid} if last else set()
            for barred in (full | died, full, set()):
                if any(slots for name, slots in self.slots.items() if name not in barred):
                    break
            assert free <= barred, "a free slot beside a queued task"
        if waiting:
            usable = [n for n in fresh if self.slots[n] > 0]
            memory = {n: self.scheduler.nodes[n].free_bytes for n in usable}
            good = [n for n in usable if memory[n] >= NEARLY * max(memory.values())]
            assert all(kept[n] is not None for n in good) or waiting <= set(kept.values())
            assert all(self.busy(n) for n in usable if kept[n] in waiting), "empty, and kept"

    # ---- the end

    def teardown(self) -> None:
        """Without faults and with one healthy node, every task ends."""
        self.send(NodeJoined("healthy", 2))
        for _ in range(DRAIN_ROUNDS):
            if not self.scheduler.tasks and not self.scheduler.staged:
                break
            self.now += 1.0
            self.send(NodeSeen("healthy"))
            self.send(Tick())
            for attempt in [a for a in self.attempts.values() if a.node == "healthy"]:
                where = attempt.node, attempt.task, attempt.number
                if attempt.phase == "assigned":
                    attempt.phase = "running"
                    self.message(AttemptStarted(*where))
                elif attempt.phase == "running":
                    attempt.phase, attempt.nbytes = "waiting", 60
                    self.message(AttemptEnded(*where, 60))
                elif attempt.phase == "uploading":
                    self.message(Uploaded(*where, True))
                    self.attempts.pop(where, None)
            for task in sorted(self.unconsumed):
                self.unconsumed.discard(task)
                self.send(Consumed(task))
            self.scheduler.check_invariants()
        assert not self.scheduler.tasks, "a task never ended"
        assert not self.scheduler.staged, "bytes stay in the window for ever"
        assert not self.scheduler.waiting
        for group in range(3):
            self.send(Cancelled(group))
        assert not self.scheduler.groups and len(self.scheduler.kinds) <= 1, "nothing is kept"
        assert self.submitted == self.failed | set(self.commits)


class SpeculatingCluster(Cluster):
    """The same with second attempts at whatever is slower than what came before."""

    limits = dataclasses.replace(LIMITS, speculation=True)
    speculation = Speculation(factor=1.0, least_tasks=1, least_done=0.0)

    @rule(ends=st.integers(0, 2))
    def leave_behind(self, ends: int) -> None:
        """Room everywhere; some tasks end, and those that run are soon slower than they were."""
        for node in NAMES:
            self.join_unless_known(node, 5)
            self.send(NodeSeen(node))
        self.submit(0, 1.0, 2)
        for phase, go_on in (("assigned", self.start_one), ("running", self.end_one)):
            count = len(self.attempts) if phase == "assigned" else ends
            for attempt in [a for a in self.attempts.values() if a.phase == phase][:count]:
                go_on(attempt)
        self.pass_time(5.0, set(NAMES), [1, 1, 1])


TestCluster = Cluster.TestCase
TestSpeculatingCluster = SpeculatingCluster.TestCase
TestCluster.settings = TestSpeculatingCluster.settings = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# ---- tables


def assigned(effects: list[Effect]) -> list[tuple[str, int, int]]:
    return [(e.node, e.task, e.attempt) for e in effects if isinstance(e, Assign)]


def only(effects: list[Effect], kind: type) -> Any:
    found = [e for e in effects if isinstance(e, kind)]
    assert len(found) == 1, effects
    return found[0]


def one_task(state: State) -> Scheduler:
    """A scheduler whose task 1 (attempt 1, on node "a") is in this state."""
    core = Scheduler(window_bytes=WINDOW)
    core.handle(Submitted(1, 0, 0), 0.0)
    if state is State.QUEUED:
        return core
    core.handle(NodeJoined("a", 1), 0.0)
    if state is State.CANCELLED:
        core.handle(Cancelled(0), 0.0)
    if state is State.POISONED:
        for number in range(1, MAX_DEATHS + 1):
            core.handle(AttemptDied("a", 1, number, "signal 9"), 0.0)
    if state is State.FAILED_OOM:
        for number in range(1, MAX_OOMS + 1):
            core.handle(AttemptDied("a", 1, number, "killed", oom=True), 0.0)
    if state in (State.RUNNING, State.WAITING, State.UPLOADING, State.COMMITTED):
        core.handle(AttemptStarted("a", 1, 1), 0.0)
    if state is State.WAITING:  # the window is full, with one of its group
        core.handle(Submitted(99, 0, 0), 0.0)
        core.handle(NodeResized("a", 2), 0.0)
        core.handle(AttemptEnded("a", 99, 1, WINDOW), 0.0)
    if state in (State.WAITING, State.UPLOADING, State.COMMITTED):
        core.handle(AttemptEnded("a", 1, 1, 10), 0.0)
    if state is State.COMMITTED:
        core.handle(Uploaded("a", 1, 1, True), 0.0)
    assert (1 in core.tasks) is (state not in FINAL)
    assert state in FINAL or core.tasks[1].state is state
    return core


@pytest.mark.parametrize(
    ("state", "move"), [(s, m) for s in State for m in Move if m not in TRANSITIONS[s]]
)
def test_unknown_pair_raises_and_changes_nothing(state: State, move: Move) -> None:
    core = Scheduler()
    task = Task(7, Group(), Kind(), 1.0, state=state)
    before = copy.deepcopy(task)
    with pytest.raises(TransitionError, match=f"task 7 is {state}: no {move}"):
        core._move(task, move, "note")
    assert task == before


ATTEMPT = ("a", 1, 1)


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (State.ASSIGNED, Uploaded(*ATTEMPT, True)),
        (State.ASSIGNED, Uploaded(*ATTEMPT, False)),
        (State.RUNNING, AttemptStarted(*ATTEMPT)),
        (State.RUNNING, Uploaded(*ATTEMPT, True)),
        (State.WAITING, AttemptStarted(*ATTEMPT)),
        (State.WAITING, AttemptEnded(*ATTEMPT, 5)),
        (State.WAITING, Uploaded(*ATTEMPT, True)),
        (State.UPLOADING, AttemptStarted(*ATTEMPT)),
        (State.UPLOADING, AttemptEnded(*ATTEMPT, 5)),
        (State.UPLOADING, Submitted(1, 0, 0)),
    ],
)
def test_event_that_the_state_forbids_changes_nothing(state: State, event: Event) -> None:
    core = one_task(state)
    before = snapshot(core)
    with pytest.raises(TransitionError, match="task 1"):
        core.handle(event, 1.0)
    assert state_of(core) == before


@pytest.mark.parametrize(
    "state", [State.COMMITTED, State.POISONED, State.FAILED_OOM, State.CANCELLED]
)
@pytest.mark.parametrize(
    "event",
    [
        AttemptStarted(*ATTEMPT),
        AttemptEnded(*ATTEMPT, 5),
        Uploaded(*ATTEMPT, True),
        Uploaded(*ATTEMPT, False),
        AttemptDied(*ATTEMPT, "late"),
        AttemptDied(*ATTEMPT, "late", oom=True),
        AttemptPreempted(*ATTEMPT, "late"),
    ],
)
def test_message_after_the_end_only_aborts(state: State, event: Event) -> None:
    core = one_task(state)
    before = snapshot(core)
    assert core.handle(event, 0.0) == [AbortAttempt(*ATTEMPT)]
    assert state_of(core) == before


def test_the_way_of_a_task() -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 1), 0.0)
    assert core.handle(Submitted(1, 0, 0), 0.0) == [Assign("a", 1, 1)]
    assert core.handle(AttemptStarted("a", 1, 1), 1.0) == []
    assert core.handle(AttemptEnded("a", 1, 1, 10), 2.0) == [GrantUpload("a", 1, 1)]
    assert core.handle(Uploaded("a", 1, 1, True), 3.0) == [Commit("a", 1, 1)]
    assert core.staged_bytes == 10 and not core.tasks
    assert core.handle(Consumed(1), 4.0) == []
    assert core.staged_bytes == 0 and not core.staged


def test_slot_is_free_while_the_results_wait() -> None:
    core = one_task(State.WAITING)
    assert core.handle(Submitted(2, 0, 0), 0.0) == [Assign("a", 2, 1)]


def test_window_grants_in_order_of_arrival_and_one_large_alone() -> None:
    core = Scheduler(window_bytes=WINDOW)
    core.handle(NodeJoined("a", 3), 0.0)
    for task, nbytes in [(1, 5 * WINDOW), (2, 1), (3, 1)]:
        core.handle(Submitted(task, 0, 0), 0.0)
        core.handle(AttemptStarted("a", task, 1), 0.0)
        effects = core.handle(AttemptEnded("a", task, 1, nbytes), 0.0)
        assert [e.task for e in effects if isinstance(e, GrantUpload)] == ([1] if task == 1 else [])
    assert core.handle(Uploaded("a", 1, 1, True), 0.0) == [Commit("a", 1, 1)]
    grants = [GrantUpload("a", 2, 1), GrantUpload("a", 3, 1)]
    assert core.handle(Consumed(1), 0.0) == grants


def two_groups() -> Scheduler:
    """Tasks 1 and 2 of group 0, of which the first fills the window, and 3 to 5 of group 1."""
    core = Scheduler(window_bytes=WINDOW)
    core.handle(NodeJoined("a", 9), 0.0)
    for task, group in [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]:
        core.handle(Submitted(task, group, 0), 0.0)
    assert core.handle(AttemptEnded("a", 1, 1, WINDOW), 0.0) == [GrantUpload("a", 1, 1)]
    assert core.handle(AttemptEnded("a", 2, 1, 10), 0.0) == []
    return core


def test_a_group_that_nobody_reads_stops_no_other() -> None:
    core = two_groups()
    assert core.handle(AttemptEnded("a", 3, 1, WINDOW), 0.0) == [GrantUpload("a", 3, 1)]
    assert core.handle(AttemptEnded("a", 4, 1, 10), 0.0) == [], "it has one in the window"
    core.handle(Uploaded("a", 3, 1, True), 0.0)
    assert core.handle(Consumed(3), 0.0) == [GrantUpload("a", 4, 1)]


def test_cancelled_results_leave_the_window() -> None:
    core = two_groups()
    core.handle(Uploaded("a", 1, 1, True), 0.0)
    core.handle(AttemptEnded("a", 3, 1, 1), 0.0)
    assert core.handle(AttemptEnded("a", 4, 1, 10), 0.0) == []
    effects = core.handle(Cancelled(0), 0.0)
    assert effects == [AbortAttempt("a", 2, 1), Forget(2), GrantUpload("a", 4, 1)]
    assert core.staged_bytes == 11 and len(core.groups) == 1


def test_no_room_on_this_host_waits_for_what_is_read_and_narrows_the_window() -> None:
    core = two_groups()
    core.window_bytes = 2 * WINDOW
    core.handle(Tick(), 0.0)  # task 2 is let in beside task 1
    effects = core.handle(NotStored("a", 2, 1, "no room on sda1"), 0.0)
    assert effects == [AbortAttempt("a", 2, 1), Assign("a", 2, 2)]
    assert core.window_bytes == WINDOW and not core.tasks[2].node_losses
    assert core.handle(AttemptEnded("a", 2, 2, 10), 0.0) == []
    core.handle(Uploaded("a", 1, 1, True), 0.0)
    assert core.handle(Consumed(1), 0.0) == [GrantUpload("a", 2, 2)]


def test_no_room_on_this_host_for_one_alone_is_the_end_of_its_task() -> None:
    core = one_task(State.UPLOADING)
    effects = core.handle(NotStored("a", 1, 1, "no room on sda1"), 0.0)
    aborted, given_up = effects
    assert aborted == AbortAttempt("a", 1, 1) and isinstance(given_up, GiveUp)
    assert given_up == GiveUp(1, "NoRoom", 1, given_up.history)
    assert given_up.history[-1] == "attempt 1: no room on sda1"


@pytest.mark.parametrize(
    "state",
    [State.QUEUED, State.ASSIGNED, State.RUNNING, State.WAITING, State.UPLOADING],
)
def test_a_task_whose_argument_is_gone_is_given_up(state: State) -> None:
    core = one_task(state)
    effects = core.handle(Unrunnable(1, "its argument was deleted"), 0.0)
    assert only(effects, GiveUp).error == "ArgumentLost"
    assert (AbortAttempt("a", 1, 1) in effects) is (state is not State.QUEUED)
    assert core.handle(Unrunnable(1, "again"), 0.0) == []
    core.check_invariants()


def test_damaged_upload_runs_again() -> None:
    core = one_task(State.UPLOADING)
    effects = core.handle(Uploaded("a", 1, 1, False), 1.0)
    assert effects == [AbortAttempt("a", 1, 1), Assign("a", 1, 2)]
    assert core.handle(Uploaded("a", 1, 1, True), 1.0) == [AbortAttempt("a", 1, 1)]


def test_cancel_aborts_and_drops() -> None:
    core = one_task(State.UPLOADING)
    assert core.handle(Cancelled(0), 1.0) == [AbortAttempt("a", 1, 1), Forget(1)]
    assert core.cancelled == 1 and not core.staged and not core.tasks


@pytest.mark.parametrize(("silent_s", "gets"), [(SUSPECT_AFTER_S, True), (10.1, False)])
def test_suspect_node_gets_no_task(silent_s: float, gets: bool) -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 1), 0.0)
    assert bool(assigned(core.handle(Submitted(1, 0, 0), silent_s))) is gets
    # it is trusted again as soon as it beats
    assert bool(assigned(core.handle(NodeSeen("a"), silent_s))) is not gets
    assert core.tasks[1].node == "a"


def test_suspect_node_keeps_its_attempt() -> None:
    core = one_task(State.RUNNING)
    core.handle(NodeJoined("b", 1), 0.0)
    core.handle(NodeSeen("b"), 20.0)
    assert core.tasks[1].state is State.RUNNING and core.tasks[1].node == "a"


@pytest.mark.parametrize(("silent_s", "lost"), [(LOST_AFTER_S, False), (30.1, True)])
def test_silent_node_is_lost(silent_s: float, lost: bool) -> None:
    core = one_task(State.RUNNING)
    core.handle(NodeJoined("b", 1), 0.0)
    effects = core.handle(NodeSeen("b"), silent_s) + core.handle(Tick(), silent_s)
    assert assigned(effects) == ([("b", 1, 2)] if lost else [])
    assert ("a" in core.nodes) is not lost
    if lost:
        assert NodeLost("a", "silent for 30 s") in effects
        # a late result of the old attempt is refused, a late beat revives nothing
        assert core.handle(AttemptEnded("a", 1, 1, 5), 31.0) == [AbortAttempt("a", 1, 1)]
        assert core.handle(NodeSeen("a"), 31.0) == []
        assert "a" not in core.nodes


def test_node_that_joins_again_loses_its_attempts() -> None:
    core = one_task(State.RUNNING)
    assert assigned(core.handle(NodeJoined("a", 1), 1.0)) == [("a", 1, 2)]
    assert core.tasks[1].node_losses == 1


def test_poison_after_three_deaths_with_the_history() -> None:
    core = one_task(State.ASSIGNED)
    for number in (1, 2):
        core.handle(AttemptStarted("a", 1, number), 0.0)
        effects = core.handle(AttemptDied("a", 1, number, f"signal {number}"), 0.0)
        assert assigned(effects) == [("a", 1, number + 1)]
    core.handle(AttemptStarted("a", 1, 3), 0.0)
    effects = core.handle(AttemptDied("a", 1, 3, "signal 3"), 0.0)
    given_up = only(effects, GiveUp)
    assert (given_up.task, given_up.error) == (1, "WorkerDied") and not assigned(effects)
    for number in (1, 2, 3):
        assert f"attempt {number}: assigned to a" in given_up.history
        assert f"attempt {number}: started on a" in given_up.history
        assert f"attempt {number}: signal {number} on a" in given_up.history
    assert core.nodes["a"].credit == 1


def test_an_interruption_is_no_failure_and_the_third_attempt_is_firm() -> None:
    core = one_task(State.RUNNING)
    for number in range(1, MAX_PREEMPTIONS + 1):
        effects = core.handle(AttemptPreempted("a", 1, number, "urgent job 7 of boris"), 1.0)
        firm = number == MAX_PREEMPTIONS
        assert effects == [Assign("a", 1, number + 1, firm=firm)]
    task = core.tasks[1]
    assert (task.deaths, task.kind.retries, task.kind.preempted) == (0, 0, MAX_PREEMPTIONS)
    assert "attempt 1: interrupted on a for urgent job 7 of boris" in task.history


def test_a_node_that_interrupts_for_ever_ends_the_task() -> None:
    core = one_task(State.RUNNING)
    for number in range(1, MAX_PREEMPTIONS + MAX_NODE_LOSSES):
        assert assigned(core.handle(AttemptPreempted("a", 1, number, "x"), 1.0))
    last = AttemptPreempted("a", 1, MAX_PREEMPTIONS + MAX_NODE_LOSSES, "x")
    assert only(core.handle(last, 1.0), GiveUp).error == "NodeLost"


def test_a_node_that_only_loses_tasks_is_left_out_while_there_are_others() -> None:
    core = Scheduler()
    core.handle(NodeJoined("good", 1), 0.0)
    for task in (1, 2):
        core.handle(Submitted(task, 0, 0, 1 / task), 0.0)

    def lost(slots: int = 1) -> list[Any]:
        core.handle(NodeJoined("bad", slots), 0.0)
        return [one for one in core.handle(NodeGone("bad", "gone"), 0.0) if type(one) is LeftOut]

    for _ in range(MOST_BARREN - 1):
        assert lost() == lost(slots=0) == []
    for seconds in (60, 120, 240):
        assert lost(slots=0) == [], "it had no task"
        [told] = lost()
        assert (told.node, told.seconds) == ("bad", seconds) and "at last: gone;" in told.reason
    [(_, task, attempt)] = assigned(core.handle(NodeJoined("bad", 1), 0.0))
    core.handle(AttemptEnded("bad", task, attempt, 5), 0.0)
    core.handle(Uploaded("bad", task, attempt, True), 0.0)
    core.handle(Submitted(3, 0, 0), 0.0)
    effects = core.handle(NodeGone("bad", "gone"), 0.0)
    assert not any(isinstance(one, LeftOut) for one in effects), "it has brought something"


def test_the_only_node_is_not_left_out() -> None:
    core = one_task(State.RUNNING)
    for _ in range(MAX_NODE_LOSSES - 1):
        assert not [e for e in core.handle(NodeGone("a", "g"), 0.0) if isinstance(e, LeftOut)]
        core.handle(NodeJoined("a", 1), 0.0)


def test_nodes_that_are_lost_together_are_not_left_out() -> None:
    core = Scheduler()
    for task in (1, 2):
        core.handle(Submitted(task, 0, 0), 0.0)
    for now in range(0, 100 * MOST_BARREN, 100):
        for name in "ab":
            core.handle(NodeJoined(name, 1), float(now))
        effects = core.handle(Tick(), now + LOST_AFTER_S + 1)
        assert [type(one) for one in effects] == [NodeLost, NodeLost]


def test_a_lost_task_prefers_another_node() -> None:
    core = Scheduler()
    core.handle(NodeJoined("b", 2), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    core.handle(NodeJoined("a", 9), 0.0)
    assert assigned(core.handle(NodeGone("b", "gone"), 0.0)) == [("a", 1, 2)]
    core.handle(NodeJoined("b", 2), 0.0)
    core.handle(NodeJoined("c", 1), 0.0)
    core.handle(Submitted(2, 0, 0), 0.0)
    assert assigned(core.handle(NodeGone("a", "gone"), 0.0)) == [("c", 1, 3)]


def test_task_is_given_up_after_too_many_lost_nodes() -> None:
    core = one_task(State.RUNNING)
    for _ in range(MAX_NODE_LOSSES - 1):
        assert assigned(core.handle(NodeJoined("a", 1), 0.0))
    given_up = only(core.handle(NodeGone("a", "left"), 0.0), GiveUp)
    assert given_up.task == 1
    assert sum("node a lost" in line for line in given_up.history) == MAX_NODE_LOSSES


def test_death_prefers_another_node() -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 5), 0.0)
    assert assigned(core.handle(Submitted(1, 0, 0), 0.0)) == [("a", 1, 1)]
    core.handle(NodeJoined("b", 2), 0.0)
    assert assigned(core.handle(Submitted(2, 0, 0), 0.0)) == [("b", 2, 1)]
    # "a" is the emptier one, and still comes last
    assert assigned(core.handle(AttemptDied("a", 1, 1, "signal 9"), 0.0)) == [("b", 1, 2)]


def test_death_does_not_prevent_the_only_node() -> None:
    core = one_task(State.RUNNING)
    assert assigned(core.handle(AttemptDied("a", 1, 1, "signal 9"), 0.0)) == [("a", 1, 2)]


def test_heaviest_first_then_oldest() -> None:
    core = Scheduler()
    for task, weight in [(1, 1.0), (2, 9.0), (3, 4.0), (4, 9.0), (5, 0.0)]:
        core.handle(Submitted(task, 0, 0, weight), 0.0)
    order = [task for _, task, _ in assigned(core.handle(NodeJoined("a", 5), 0.0))]
    assert order == [2, 4, 3, 1, 5]


def test_relative_free_capacity_decides() -> None:
    core = Scheduler()
    for name, slots in [("one", 1), ("two", 2), ("five", 5)]:
        core.handle(NodeJoined(name, slots), 0.0)
    where = []
    for task in range(9):
        effects = core.handle(Submitted(task, 0, 0), 0.0)
        where += [node for node, _, _ in assigned(effects)]
    # all empty: by name; then 4/5; 3/5; 1/2 against 2/5; the ties by name
    assert where == ["five", "one", "two", "five", "five", "two", "five", "five"]
    assert [n.credit for n in core.nodes.values()] == [0, 0, 0]
    assert core.tasks[8].state is State.QUEUED


def test_each_node_lost_in_one_tick_has_its_own_reason() -> None:
    core = Scheduler()
    for node, joined_s in (("alpha", 0.0), ("beta", 3.0), ("gamma", 20.0)):
        core.handle(NodeJoined(node, 1), joined_s)
    assert core.handle(Tick(), 40.0) == [
        NodeLost("alpha", "silent for 40 s"),
        NodeLost("beta", "silent for 37 s"),
    ]


def test_all_nodes_lost_gives_up_after_the_limit_naming_the_hosts() -> None:
    core = Scheduler(Limits(no_nodes_limit_s=60.0))
    core.handle(NodeJoined("alpha", 1), 0.0)
    core.handle(NodeJoined("beta", 1), 0.0)
    for task in (1, 2, 3):
        core.handle(Submitted(task, 0, 0), 0.0)
    core.handle(NodeGone("alpha", "connection reset"), 5.0)
    assert core.handle(Tick(), 31.0) == [NodeLost("beta", "silent for 31 s")]
    assert core.handle(Tick(), 90.9) == []
    given_up = [e for e in core.handle(Tick(), 91.0) if isinstance(e, GiveUp)]
    assert [e.task for e in given_up] == [1, 2, 3]
    for effect in given_up:
        assert effect.error == "NoWorkers"
        assert "alpha: connection reset" in effect.history[-1]
        assert "beta: silent for 31 s" in effect.history[-1]
    assert not core.tasks
    assert core.handle(NodeJoined("alpha", 1), 92.0) == []  # nothing of it is left in the queue


def test_a_node_that_cannot_come_back_is_not_waited_for() -> None:
    core = Scheduler()
    core.handle(NodeJoined("private", 1), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    core.no_nodes_limit_s = 0.0
    given_up = only(core.handle(NodeGone("private", "its process ended"), 1.0), GiveUp)
    assert given_up.history[-1] == "attempt 1: no node is left (private: its process ended)"
    assert core.handle(NodeResized("private", 1), 1.0) == [], "said before it was gone"


def test_a_node_in_time_ends_the_wait() -> None:
    core = Scheduler(Limits(no_nodes_limit_s=60.0))
    core.handle(Submitted(1, 0, 0), 0.0)
    assert assigned(core.handle(NodeJoined("a", 1), 59.0)) == [("a", 1, 1)]
    core.handle(NodeGone("a", "left"), 60.0)
    assert core.handle(Tick(), 119.0) == []
    assert only(core.handle(Tick(), 120.0), GiveUp).error == "NoWorkers"


def test_a_share_of_nothing_is_waited_for() -> None:
    # another job has the slots just now; that is no reason to give up
    core = Scheduler(Limits(no_nodes_limit_s=60.0))
    core.handle(NodeJoined("a", 0), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    for now in range(0, 100, 10):
        assert core.handle(NodeSeen("a"), float(now)) == []
    assert core.handle(Tick(), 100.0) == []
    assert assigned(core.handle(NodeResized("a", 1), 100.0)) == [("a", 1, 1)]


def test_a_share_that_shrinks_below_what_runs() -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 2), 0.0)
    for task in (1, 2, 3):
        core.handle(Submitted(task, 0, 0), 0.0)
    assert core.handle(NodeResized("a", 1), 0.0) == []
    assert core.nodes["a"].credit == 0
    assert core.handle(AttemptDied("a", 1, 1, "signal 9"), 0.0) == [], "one runs, one slot"


def test_closed_node_gets_nothing_until_it_opens() -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 1), 0.0)
    core.handle(NodeSeen("a", closed=True), 0.0)
    assert core.handle(Submitted(1, 0, 0), 0.0) == []
    assert core.handle(NodeSeen("a"), 1.0) == []
    assert assigned(core.handle(NodeSeen("a", closed=False), 2.0)) == [("a", 1, 1)]


# ---- out of memory


def nodes_with_memory(*free_bytes: int) -> Scheduler:
    """A scheduler with nodes "a", "b", ... of two slots that have so much memory left."""
    core = Scheduler()
    for name, free in zip("abc", free_bytes, strict=False):
        core.handle(NodeJoined(name, 2), 0.0)
        core.handle(NodeSeen(name, None, free), 0.0)
    return core


def test_out_of_memory_runs_alone_where_most_is_free() -> None:
    core = nodes_with_memory(10, 30, 20)
    assert assigned(core.handle(Submitted(1, 0, 0), 0.0)) == [("a", 1, 1)]
    effects = core.handle(AttemptDied("a", 1, 1, "killed to free memory", oom=True), 0.0)
    assert effects == [Assign("b", 1, 2, alone=True)]
    for task in (2, 3, 4, 5, 6):
        core.handle(Submitted(task, 0, 0), 0.0)
    assert [core.tasks[t].node for t in (2, 3, 4, 5, 6)] == ["a", "c", "a", "c", ""]
    core.handle(AttemptStarted("b", 1, 2), 0.0)
    effects = core.handle(AttemptEnded("b", 1, 2, 1), 0.0)
    assert assigned(effects) == [("b", 6, 1)], "the node is there for all again"


def test_alone_waits_until_its_node_is_empty() -> None:
    core = nodes_with_memory(10)
    for task in (1, 2, 3):
        core.handle(Submitted(task, 0, 0), 0.0)
    assert core.handle(AttemptDied("a", 1, 1, "killed", oom=True), 0.0) == [], (
        "task 2 runs, 3 waits"
    )
    core.handle(AttemptStarted("a", 2, 1), 0.0)
    effects = core.handle(AttemptEnded("a", 2, 1, 1), 0.0)
    assert effects == [GrantUpload("a", 2, 1), Assign("a", 1, 2, alone=True)]


def test_alone_keeps_its_node_when_another_gets_more_memory() -> None:
    core = nodes_with_memory(10, 20)
    for task in (1, 2, 3, 4):
        core.handle(Submitted(task, 0, 0), 0.0)
    core.handle(AttemptDied("a", 1, 1, "killed", oom=True), 0.0)
    assert core.nodes["b"].kept_for == 1
    core.handle(NodeSeen("a", None, 99), 0.0)
    assert core.nodes["b"].kept_for == 1 and core.nodes["a"].kept_for is None
    # lost while it was waited for: the other one takes its place
    core.handle(NodeGone("b", "left"), 0.0)
    assert core.nodes["a"].kept_for == 1


@pytest.mark.parametrize("event", [NodeSeen("b", True, 0), NodeResized("b", 0), Tick()])
def test_alone_takes_another_node_when_its_own_is_of_no_use(event: Event) -> None:
    core = nodes_with_memory(10, 20)
    for task in (1, 2, 3, 4):
        core.handle(Submitted(task, 0, 0), 0.0)
    core.handle(AttemptDied("a", 1, 1, "killed", oom=True), 0.0)
    core.handle(NodeSeen("a"), SUSPECT_AFTER_S + 1)  # of "b" nothing is heard before the Tick
    core.handle(event, SUSPECT_AFTER_S + (1 if isinstance(event, Tick) else 0))
    assert core.nodes["a"].kept_for == 1 and core.nodes["b"].kept_for is None


def test_alone_waits_for_the_node_that_is_full_with_what_runs_there() -> None:
    core = nodes_with_memory(10, 20)
    for task in (1, 2, 3, 4):
        core.handle(Submitted(task, 0, 0), 0.0)
    assert {t: core.tasks[t].node for t in (2, 4)} == {2: "b", 4: "b"}
    core.handle(NodeSeen("b", True, 20), 0.0)
    core.handle(AttemptDied("b", 2, 1, "killed", oom=True), 0.0)
    core.handle(AttemptEnded("b", 4, 1, 1), 0.0)
    assert core.nodes["b"].kept_for == 2 and core.tasks[2].node == ""
    assert core.handle(NodeSeen("b", False, 20), 1.0) == [Assign("b", 2, 2, alone=True)]


def alive(core: Scheduler, now: float) -> list[Effect]:
    """The effects of a tick at which all nodes have just been heard of."""
    for name in core.nodes:
        core.handle(NodeSeen(name), now)
    return core.handle(Tick(), now)


def test_what_does_not_start_on_a_node_goes_to_another() -> None:
    core = Scheduler(LIMITS)
    core.handle(NodeJoined("a", 1), 0.0)
    core.handle(NodeJoined("b", 1), 0.0)
    for task in (1, 2):
        core.handle(Submitted(task, 0, 0), 0.0)
    core.handle(AttemptStarted("a", 1, 1), 0.0)
    assert alive(core, UNSTARTED_S + 1) == [], "the other has no slot that is free"
    assert core.unstarted(UNSTARTED_S + 1) == ["b"]
    core.handle(AttemptEnded("a", 1, 1, 1), UNSTARTED_S + 1)
    assert alive(core, UNSTARTED_S + 2) == [AbortAttempt("b", 2, 1), Assign("a", 2, 2)]
    assert core.unstarted(UNSTARTED_S + 3) == []
    assert alive(core, 2 * UNSTARTED_S + 3) == [], "it may have to wait for its arguments"
    assert alive(core, 3 * UNSTARTED_S + 3) == [AbortAttempt("a", 2, 2), Assign("b", 2, 3)]
    core.handle(NodeGone("a", "left"), 3 * UNSTARTED_S + 3)
    assert alive(core, 99 * UNSTARTED_S) == [], "there is no other"


def test_one_that_may_not_go_to_a_free_node_does_not_keep_the_others_waiting() -> None:
    core = Scheduler(LIMITS)
    core.handle(NodeJoined("a", 1), 0.0)
    core.handle(NodeJoined("b", 2), 0.0)
    for task in (1, 2, 3):
        core.handle(Submitted(task, 0, 0), 0.0)
    where = {core.tasks[task].node for task in (1, 2, 3)}
    assert where == {"a", "b"}
    [there] = [task for task in (1, 2, 3) if core.tasks[task].node == "a"]
    assert core.handle(AttemptDied("a", there, 1, "full", no_room=True), 1.0) == []
    moved = [e for e in alive(core, UNSTARTED_S + 1) if isinstance(e, Assign)]
    assert {one.node: one.task == there for one in moved} == {"a": False, "b": True}


def test_a_task_that_runs_alone_leaves_a_node_that_does_not_begin_with_it() -> None:
    core = nodes_with_memory(10, 20)
    core.handle(Submitted(1, 0, 0), 0.0)
    first = core.tasks[1].node
    core.handle(AttemptDied(first, 1, 1, "killed", oom=True), 0.0)
    assert core.tasks[1].node == "b", "that with the most memory"
    assert alive(core, UNSTARTED_S + 1) == [
        AbortAttempt("b", 1, 2),
        Assign("a", 1, 3, alone=True),
    ]


def test_where_workers_died_is_not_forgotten_for_where_they_do_not_start() -> None:
    core = Scheduler(LIMITS)
    core.handle(NodeJoined("a", 1), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    core.handle(AttemptDied("a", 1, 1, "signal 9"), 0.0)
    core.handle(NodeJoined("b", 1), 0.0)
    core.handle(NodeJoined("c", 1), 0.0)
    assert core.handle(AttemptDied("a", 1, 2, "signal 9"), 0.0) == [Assign("b", 1, MAX_DEATHS)]
    assert alive(core, UNSTARTED_S + 1)[-1] == Assign("c", 1, MAX_DEATHS + 1)


def test_moves_for_crowds_do_not_make_the_wait_for_a_start_longer() -> None:
    core = Scheduler(LIMITS)
    core.handle(NodeJoined("a", 1), 0.0)
    core.handle(NodeJoined("b", 1), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    now = 0.0
    for _ in range(4):
        here = core.tasks[1].node
        core.handle(NodeResized(here, 0), now)
        now += 2.0
        assert alive(core, now), "it goes to the other"
        core.handle(NodeResized(here, 1), now)
    assert alive(core, now + UNSTARTED_S + 1) != []


def test_a_node_that_drains_is_no_reason_to_wait_for_another() -> None:
    core = Scheduler(LIMITS)
    core.handle(NodeJoined("a", 1), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    core.handle(NodeJoined("b", 1), 0.0)
    core.handle(NodeSeen("b", True, 0), 0.0)
    effects = core.handle(AttemptDied("a", 1, 1, "full", no_room=True), 1.0)
    assert effects == [Assign("a", 1, 2)]


def test_last_attempt_waits_for_another_node() -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 1), 0.0)
    core.handle(NodeJoined("b", 1), 0.0)
    for task in (1, 2):
        core.handle(Submitted(task, 0, 0), 0.0)
    node, other = (core.tasks[task].node for task in (1, 2))
    assert assigned(core.handle(AttemptDied(node, 1, 1, "signal 9"), 0.0)) == [(node, 1, 2)]
    assert assigned(core.handle(AttemptDied(node, 1, 2, "signal 9"), 0.0)) == []
    assert assigned(core.handle(Submitted(3, 0, 0), 0.0)) == [(node, 3, 1)]
    assert assigned(core.handle(AttemptEnded(other, 2, 1, 1), 0.0)) == [(other, 1, 3)]


def test_alone_waits_for_the_one_node_with_memory() -> None:
    core = nodes_with_memory(10, 100)
    for task in (1, 2):
        core.handle(Submitted(task, 0, 0), 0.0)
    for task in (1, 2):
        core.handle(AttemptDied(core.tasks[task].node, task, 1, "killed", oom=True), 0.0)
    first, second = (core.tasks[task].node for task in (1, 2))
    assert (first, second) == ("b", ""), "on a it would fail again"
    core.handle(AttemptStarted("b", 1, 2), 0.0)
    assert core.handle(AttemptEnded("b", 1, 2, 1), 0.0)[-1] == Assign("b", 2, 2, alone=True)


# ---- no room


def test_no_room_moves_the_task_and_narrows_the_node() -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 3), 0.0)
    for task in (1, 2, 3):
        core.handle(Submitted(task, 0, 0), 0.0)
    core.handle(NodeJoined("b", 1), 0.0)
    core.handle(Submitted(4, 0, 0), 0.0)
    assert core.tasks[4].node == "b"
    # where it has no room it is not tried again, though there is a slot, as long as "b" is there
    assert core.handle(AttemptDied("a", 1, 1, "disk full", no_room=True), 0.0) == []
    assert core.nodes["a"].credit == 0, "the two that run there are as many as have room"
    effects = core.handle(AttemptEnded("b", 4, 1, 1), 0.0)
    assert assigned(effects) == [("b", 1, 2)]
    # what ends well lets one more be tried
    core.handle(AttemptEnded("a", 2, 1, 1), 0.0)
    core.handle(Uploaded("a", 2, 1, True), 0.0)
    assert core.nodes["a"].credit == 2
    # others go there while the first of the queue may not
    core.handle(Submitted(5, 0, 0, weight=9), 0.0)
    core.handle(AttemptDied("a", 5, 1, "disk full", no_room=True), 0.0)
    assert assigned(core.handle(Submitted(6, 0, 0), 0.0)) == [("a", 6, 1)]
    assert core.tasks[5].node != "a"


def test_no_room_anywhere_ends_the_job_after_all_attempts() -> None:
    core = Scheduler()
    for name in "ab":
        core.handle(NodeJoined(name, 1), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    places, effects = [], []
    for number in (1, 2, 3):
        places.append(core.tasks[1].node)
        effects = core.handle(AttemptDied(places[-1], 1, number, "disk full", no_room=True), 0.0)
    assert set(places[:2]) == {"a", "b"}
    assert only(effects, GiveUp).error == "WorkerDied"


def test_no_room_on_any_number_of_nodes_is_no_end_while_there_is_another() -> None:
    core = Scheduler()
    for name in "abcde":
        core.handle(NodeJoined(name, 1), 0.0)
    core.handle(Submitted(1, 0, 0), 0.0)
    seen = []
    for number in (1, 2, 3, 4):
        seen.append(core.tasks[1].node)
        core.handle(AttemptDied(seen[-1], 1, number, "disk full", no_room=True), 0.0)
    assert len({*seen, core.tasks[1].node}) == 5


def test_node_is_given_back_when_the_task_is_cancelled() -> None:
    core = nodes_with_memory(10)
    for task in (1, 2):
        core.handle(Submitted(task, task, 0), 0.0)
    core.handle(AttemptDied("a", 1, 1, "killed", oom=True), 0.0)
    core.handle(Cancelled(1), 0.0)
    assert assigned(core.handle(Submitted(3, 0, 0), 0.0)) == [("a", 3, 1)]


def test_out_of_memory_alone_fails_with_the_figures() -> None:
    core = nodes_with_memory(10)
    core.handle(Submitted(1, 0, 0), 0.0)
    core.handle(AttemptDied("a", 1, 1, "its worker had 7 GiB", oom=True), 0.0)
    given_up = only(
        core.handle(AttemptDied("a", 1, 2, "its worker had 9 GiB", oom=True), 0.0), GiveUp
    )
    assert given_up.error == "OutOfMemory"
    assert "attempt 1: its worker had 7 GiB on a" in given_up.history
    assert "attempt 2: assigned to a, alone" in given_up.history
    assert given_up.history[-1] == "attempt 2: its worker had 9 GiB on a"
    assert core.nodes["a"].credit == 2


def test_memory_and_deaths_have_budgets_of_their_own() -> None:
    core = nodes_with_memory(10)
    core.handle(Submitted(1, 0, 0), 0.0)
    for number in range(1, MAX_DEATHS):
        core.handle(AttemptDied("a", 1, number, "signal 9"), 0.0)
    effects = core.handle(AttemptDied("a", 1, MAX_DEATHS, "killed", oom=True), 0.0)
    assert effects == [Assign("a", 1, MAX_DEATHS + 1, alone=True)]
    effects = core.handle(AttemptDied("a", 1, MAX_DEATHS + 1, "signal 9"), 0.0)
    assert only(effects, GiveUp).error == "WorkerDied"


# ---- second attempts

SPECULATION = Limits(speculation=True)


def straggler(
    weight: float = 1.0, nodes: tuple[str, ...] = ("a", "b"), ended: int = 9
) -> Scheduler:
    """Ten tasks of 10 s per weight; at 10 s task 0, on node "a", and some others have not ended."""
    core = Scheduler(SPECULATION)
    for name in nodes:
        core.handle(NodeJoined(name, 10), 0.0)
    for task in range(10):
        weight_of = weight if task == 0 else 1.0
        [(node, _, _)] = assigned(core.handle(Submitted(task, 0, 0, weight_of), 0.0))
        core.handle(AttemptStarted(node, task, 1), 0.0)
    assert core.tasks[0].node == "a"
    for task in range(1, 1 + ended):
        core.handle(AttemptEnded(core.tasks[task].node, task, 1, 1), 10.0)
    return core


def tick(core: Scheduler, now: float) -> list[tuple[str, int, int]]:
    """Second attempts at ``now``, to which all nodes are heard."""
    for name in list(core.nodes):
        assert not assigned(core.handle(NodeSeen(name), now))
    return assigned(core.handle(Tick(), now))


@pytest.mark.parametrize(("now", "second"), [(30.0, []), (30.1, [("b", 0, 2)])])
def test_straggler_gets_a_second_attempt_elsewhere(now: float, second: list[Any]) -> None:
    core = straggler()
    assert tick(core, now) == second
    assert tick(core, now + 100) == ([] if second else [("b", 0, 2)]), "once in its life"


def test_heavy_task_is_given_its_time() -> None:
    core = straggler(weight=4.0)
    assert tick(core, 120.0) == [] and tick(core, 120.1) == [("b", 0, 2)]


def test_no_second_attempt_without_speculation() -> None:
    core = straggler()
    core.limits = Limits()
    assert tick(core, 1000.0) == []


@pytest.mark.parametrize("ended", [4, 5])
def test_no_second_attempt_before_half_is_done(ended: int) -> None:
    core = straggler(ended=ended)
    assert bool(tick(core, 100.0)) is (ended == 5)


def test_no_second_attempt_while_others_wait() -> None:
    core = straggler()
    for name in ("a", "b"):
        core.handle(NodeResized(name, 1), 10.0)
    core.handle(Submitted(10, 0, 1, 1.0), 10.0)
    core.handle(Submitted(11, 0, 1, 1.0), 10.0)
    assert core.tasks[11].state is State.QUEUED
    assert tick(core, 100.0) == []


def test_no_second_attempt_on_the_same_node() -> None:
    assert tick(straggler(nodes=("a",)), 100.0) == []


@pytest.mark.parametrize("winner", [("a", 0, 1), ("b", 0, 2)])
def test_first_whole_attempt_wins(winner: tuple[str, int, int]) -> None:
    core = straggler()
    tick(core, 100.0)
    [loser] = {("a", 0, 1), ("b", 0, 2)} - {winner}
    core.handle(AttemptStarted("b", 0, 2), 100.0)
    effects = core.handle(AttemptEnded(*winner, 5), 101.0)
    assert effects == [AbortAttempt(*loser), GrantUpload(*winner)]
    assert core.handle(AttemptEnded(*loser, 5), 102.0) == [AbortAttempt(*loser)]
    assert core.handle(Uploaded(*winner, True), 103.0) == [Commit(*winner)]
    assert not any(0 in node.running | node.ended for node in core.nodes.values())


@pytest.mark.parametrize("dying", [("a", 0, 1), ("b", 0, 2)])
def test_death_of_one_of_two_attempts_leaves_the_other(dying: tuple[str, int, int]) -> None:
    core = straggler()
    tick(core, 100.0)
    core.handle(AttemptStarted("b", 0, 2), 100.0)
    [other] = {("a", 0, 1), ("b", 0, 2)} - {dying}
    assert core.handle(AttemptDied(*dying, "signal 9"), 101.0) == []
    assert core.tasks[0].deaths == 1
    assert core.handle(AttemptEnded(*other, 5), 102.0) == [GrantUpload(*other)]


@pytest.mark.parametrize("lost", ["a", "b"])
def test_loss_of_one_of_two_nodes_leaves_the_other(lost: str) -> None:
    core = straggler()
    tick(core, 100.0)
    core.handle(NodeGone(lost, "left"), 101.0)
    other = {"a": ("b", 0, 2), "b": ("a", 0, 1)}[lost]
    assert core.tasks[0].rival is None
    assert core.handle(AttemptEnded(*other, 5), 102.0) == [GrantUpload(*other)]


def test_cancel_aborts_both_attempts() -> None:
    core = straggler()
    tick(core, 100.0)
    effects = core.handle(Cancelled(0), 101.0)
    assert {AbortAttempt("a", 0, 1), AbortAttempt("b", 0, 2)} <= set(effects)


def test_out_of_memory_ends_both_attempts() -> None:
    core = straggler()
    tick(core, 100.0)
    effects = core.handle(AttemptDied("b", 0, 2, "killed", oom=True), 101.0)
    assert AbortAttempt("a", 0, 1) in effects
    [assign] = [e for e in effects if isinstance(e, Assign)]
    assert assign.alone and assign.attempt == 3


# ---- faults that the state machine found once


def test_empty_attempt_in_the_window() -> None:
    core = Scheduler(window_bytes=WINDOW)
    core.handle(NodeJoined("a", 2), 0.0)
    for task, nbytes in [(1, 0), (2, WINDOW + 1)]:
        core.handle(Submitted(task, 0, 0), 0.0)
        core.handle(AttemptStarted("a", task, 1), 0.0)
        core.handle(AttemptEnded("a", task, 1, nbytes), 0.0)
        core.check_invariants()


def test_consumed_before_the_commit_changes_nothing() -> None:
    core = one_task(State.UPLOADING)
    core.handle(Consumed(1), 0.0)
    core.check_invariants()


def test_upload_that_is_always_damaged_is_given_up() -> None:
    core = one_task(State.UPLOADING)
    for number in range(1, 100):
        effects = core.handle(Uploaded("a", 1, number, False), 0.0)
        if any(isinstance(e, GiveUp) for e in effects):
            return
        core.handle(AttemptStarted("a", 1, number + 1), 0.0)
        core.handle(AttemptEnded("a", 1, number + 1, 10), 0.0)
    pytest.fail("100 attempts")


def test_beats_that_were_read_late_keep_both_nodes() -> None:
    core = Scheduler()
    for name in ("a", "b"):
        core.handle(NodeJoined(name, 1), 0.0)
    # the broker was stopped for a minute; it reads one socket after the other, then ticks
    for name in ("a", "b"):
        core.handle(NodeSeen(name), 60.0)
    core.handle(Tick(), 60.0)
    assert set(core.nodes) == {"a", "b"}


def test_history_has_the_last_cause() -> None:
    core = one_task(State.UPLOADING)
    for number in range(1, 10):
        core.handle(Uploaded("a", 1, number, False), 0.0)
        core.handle(AttemptStarted("a", 1, number + 1), 0.0)
        core.handle(AttemptEnded("a", 1, number + 1, 10), 0.0)
    for number in range(10, 13):
        effects = core.handle(AttemptDied("a", 1, number, f"signal {number}"), 0.0)
    assert "signal 12" in only(effects, GiveUp).history[-1]


@pytest.mark.parametrize(
    ("took_s", "under_way"),
    [(0.0, 2 * AHEAD), (SHORT_S / 100, 2 * AHEAD), (SHORT_S / 2, 4), (SHORT_S * 2, 2)],
)
def test_short_tasks_wait_on_the_node_and_long_ones_in_the_queue(
    took_s: float, under_way: int
) -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 2), 0.0)
    for task in range(20):
        core.handle(Submitted(task, 0, 0), 0.0)
    assert len(core.nodes["a"].running) == 2, "nothing is known of the function yet"
    core.handle(AttemptEnded("a", 0, 1, 1), took_s)
    assert len(core.nodes["a"].running) == under_way
    core.check_invariants()


def test_what_waits_on_one_node_is_given_to_the_free_slots_of_another() -> None:
    core = Scheduler()
    core.handle(NodeJoined("a", 2), 0.0)
    core.handle(Submitted(0, 0, 0), 0.0)
    core.handle(AttemptStarted("a", 0, 1), 0.0)
    core.handle(AttemptEnded("a", 0, 1, 1), 0.0)
    for task in range(1, 8):
        core.handle(Submitted(task, 0, 0), 0.0)
    assert len(core.nodes["a"].running) == 7, "they seem to be short"
    for task in (1, 2):
        core.handle(AttemptStarted("a", task, 1), 0.3)
    core.handle(NodeJoined("b", 3), 0.5)
    assert core.handle(Tick(), 0.9) == [], "they may have started, and the word is on its way"
    effects = core.handle(Tick(), 2.0)
    assert effects == [
        *(AbortAttempt("a", task, 1) for task in (3, 4, 5)),
        *(Assign("b", task, 2) for task in (3, 4, 5)),
    ]
    assert core.handle(Tick(), 4.0) == [], "b is full"
    assert core.handle(AttemptEnded("a", 3, 1, 1), 4.0) == [AbortAttempt("a", 3, 1)], "of old"
    core.check_invariants()
