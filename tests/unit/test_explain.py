"""Where the time of a job went: planted causes are named, and the slot time is divided whole."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.core.explain import Attempt, Cause, Job, Share, Use, causes, divide
from oq_runtime.core.ledger import Outcome
from oq_runtime.report.words import MOST_LINES, lines, parts

SENDS_S = 0.01


def attempt(**fields: Any) -> Attempt:
    """An attempt of 10 s that has computed and waited for nothing."""
    start = fields.pop("start", 1.0)
    ran = fields.pop("ran", 10.0)
    made = {
        "task": 0,
        "func": "classical",
        "attempt": 1,
        "node": "a",
        "slot": 0,
        "outcome": Outcome.COMMITTED,
        "reason": "",
        "weight": 1.0,
        "submitted_s": 0.5,
        "assigned_s": start,
        "started_s": start,
        "ended_s": start + ran,
        "granted_s": start + ran,
        "over_s": start + ran + SENDS_S,
        "cpu_s": ran,
    }
    return Attempt(**made | fields)


def run(
    nodes: Mapping[str, int],
    seconds: list[float],
    *,
    joins: Mapping[str, float] | None = None,
    made: Callable[[Attempt], Attempt] = lambda one: one,
    longer: Mapping[str, float] | None = None,
) -> Job:
    """A phase whose tasks go to whichever slot is free first, as the scheduler does it.

    :param nodes: slots of each
    :param seconds: that each task takes
    :param joins: when a node comes, if not at once
    :param made: gives an attempt other figures
    :param longer: by which factor tasks take longer on a node
    """
    joins, longer = joins or {}, longer or {}
    free = [
        (joins.get(name, 0.0) + 1.0, name, slot) for name in nodes for slot in range(nodes[name])
    ]
    heapq.heapify(free)
    attempts = []
    for task, ran in enumerate(seconds):
        start, name, slot = heapq.heappop(free)
        ran *= longer.get(name, 1.0)
        one = made(attempt(task=task, node=name, slot=slot, start=start, ran=ran))
        attempts.append(one)
        heapq.heappush(free, (one.ended_s, name, slot))
    shares = [Share(joins.get(name, 0.0), name, slots) for name, slots in nodes.items()]
    end = max(one.over_s for one in attempts) + 1.0
    return Job(end, attempts, sorted(shares, key=lambda share: share.at_s))


def replaced(condition: Callable[[Attempt], bool], **fields: Any) -> Callable[[Attempt], Attempt]:
    return lambda one: dataclasses.replace(one, **fields) if condition(one) else one


TWO, THREE = {"a": 4, "b": 4}, {"a": 4, "b": 4, "c": 4}
EVEN = [10.0] * 80


def died(job: Job) -> Job:
    """A fifth of the tasks took two attempts: the first one was killed in the middle."""
    first = [
        dataclasses.replace(
            one,
            outcome=Outcome.DIED,
            reason="worker process was killed by SIGKILL on a",
            ended_s=one.started_s + 1.0,
            granted_s=one.started_s + 1.0,
            over_s=one.started_s + 1.0,
        )
        for one in job.attempts[::5]
    ]
    again = [
        dataclasses.replace(one, attempt=2, assigned_s=one.started_s + 1.0,
                            started_s=one.started_s + 1.0)
        for one in job.attempts[::5]
    ]  # fmt: skip
    rest = [one for number, one in enumerate(job.attempts) if number % 5]
    return Job(job.seconds, [*first, *again, *rest], job.shares)


PLANTED: dict[Cause, tuple[Job, str]] = {
    Cause.STRAGGLER: (run(TWO, [*EVEN[:79], 90.0]), "task #79 of classical took 1 min 30 s"),
    Cause.FEW_TASKS: (run(TWO, [100.0] * 3), "classical had 3 tasks"),
    Cause.SLOW_NODE: (run(THREE, EVEN, longer={"b": 3.0}), "b takes 3.0 times as long"),
    Cause.SWAPPING: (
        run(
            THREE, EVEN, longer={"c": 3.0},
            made=replaced(lambda one: one.node == "c", cpu_s=10.0, faults=9000, peak_bytes=7 << 30),
        ),
        "on c 300 pages of memory a second",
    ),
    Cause.SLOW_FILES: (run(TWO, EVEN, made=replaced(lambda _: True, cpu_s=4.0)), "60 % of their"),
    Cause.BUSY_CPUS: (
        run(TWO, EVEN, made=replaced(lambda _: True, cpu_s=4.0, queued_s=6.0)), "60 % of their"
    ),
    Cause.BIG_RESULTS: (
        run(
            TWO, [10.0] * 8,
            made=replaced(lambda _: True, over_s=60.0, out_bytes=2_000_000_000),
        ),
        "16.0 GB were on their way",
    ),
    Cause.RETRIES: (died(run(TWO, EVEN)), "16 attempts failed, most: worker process was killed"),
    Cause.LATE_NODE: (run(TWO, EVEN, joins={"b": 60.0}), "b came 59.5 s after the first task"),
}  # fmt: skip


@pytest.mark.parametrize("cause", Cause, ids=lambda cause: cause.name.lower())
def test_a_planted_cause_is_named_first(cause: Cause) -> None:
    job, figures = PLANTED[cause]
    found = causes(job, division := divide(job))
    assert [one.cause for one in found][:1] == [cause]
    told = lines(job, division, found)
    [line] = [line for line in told if line.startswith("cause:")]
    assert cause in line and figures in line
    assert told[-1].startswith("to do: ")


def test_a_job_without_a_fault_has_no_cause() -> None:
    job = run(THREE, [*EVEN, *EVEN, *EVEN])
    division = divide(job)
    assert causes(job, division) == []
    assert division.part(Use.COMPUTED) > 0.95
    told = lines(job, division, [])
    assert told[-1] == "nothing stands out that you could change" and "retries: none" in told
    assert "nodes: a 80 tasks on 4 slots, b 80 tasks on 4 slots, c 80 tasks on 4 slots" in told


@pytest.mark.parametrize("waits", ["queued_s", "blocked_s"])
def test_what_a_slow_node_waits_for_is_said(waits: str) -> None:
    cpu_s = 20.0 if waits == "queued_s" else 10.0
    slow = replaced(lambda one: one.node == "b", cpu_s=cpu_s, queued_s=30.0 - cpu_s - 2.0)
    slow = slow if waits == "queued_s" else replaced(lambda one: one.node == "b", cpu_s=cpu_s)
    job = run(THREE, EVEN, longer={"b": 3.0}, made=slow)
    [found] = [one for one in causes(job, divide(job)) if one.cause is Cause.SLOW_NODE]
    what = "a CPU" if waits == "queued_s" else "files"
    assert (found.node, found.reason) == ("b", f"its tasks wait for {what}")


def test_a_cause_of_two_nodes_has_cost_what_both_have() -> None:
    nodes = dict.fromkeys("abcde", 4)
    job = run(nodes, [*EVEN, *EVEN], longer={"b": 3.0, "c": 2.0})
    found = causes(job, divide(job))
    worst, other = [one.part for one in found if one.cause is Cause.SLOW_NODE]
    assert parts(found)["slow_node"] == pytest.approx(worst + other, abs=1e-4)
    assert next(iter(parts(found))) == found[0].cause.name.lower()


def test_a_straggler_of_few_tasks_counts_once() -> None:
    job = run(TWO, [10.0] * 4 + [90.0])
    found = {one.cause: one for one in causes(job, divide(job))}
    assert found[Cause.STRAGGLER].part > 0.5
    assert Cause.FEW_TASKS not in found or found[Cause.FEW_TASKS].part < 0.3


def test_a_slow_node_is_not_taken_for_a_straggler() -> None:
    """The last task runs on the slow node, alone."""
    job = run({"a": 4, "b": 1}, [10.0] * 40, longer={"b": 9.0})
    assert Cause.STRAGGLER not in {one.cause for one in causes(job, divide(job))}


def test_the_engine_alone_is_no_fault_of_the_tasks() -> None:
    job = run(TWO, EVEN)
    job = Job(job.seconds * 3, job.attempts, job.shares)
    division = divide(job)
    assert division.part(Use.ENGINE) == pytest.approx(2 / 3, abs=0.02)
    assert causes(job, division) == []


def test_results_that_wait_for_the_engine_are_the_engines() -> None:
    late = replaced(lambda _: True, granted_s=60.0, over_s=60.1)
    division = divide(run(TWO, [10.0] * 8, made=late))
    assert division.part(Use.ENGINE) > 0.75 and division.part(Use.RESULTS) < 0.01


def test_tasks_that_no_node_takes_are_told_apart() -> None:
    """Nodes with free slots that are closed, for want of memory for example."""
    waits = [attempt(task=task, start=1.0 + 12 * task) for task in range(4)]
    job = Job(50.0, waits, [Share(0.0, "a", 1)])
    uses = divide(job).uses
    assert uses[Use.UNDEALT] == pytest.approx(0.5 + 3 * 2, abs=0.1)


# ---- whatever happened


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    moments = st.floats(-5.0, 60.0)
    attempts = []
    for number in range(draw(st.integers(0, 12))):
        times = sorted(draw(st.lists(moments, min_size=6, max_size=6)))
        attempts.append(
            attempt(
                task=draw(st.integers(0, 5)),
                func=draw(st.sampled_from("fg")),
                attempt=number + 1,
                node=draw(st.sampled_from("abc")),
                outcome=draw(st.sampled_from(Outcome)),
                weight=draw(st.sampled_from([0.0, 1.0, 5.0, math.inf, math.nan, -1.0])),
                cpu_s=draw(st.floats(0.0, 100.0)),
                queued_s=draw(st.floats(0.0, 100.0)),
                faults=draw(st.integers(0, 10_000)),
                **dict(zip(
                    ("submitted_s", "assigned_s", "started_s", "ended_s", "granted_s", "over_s"),
                    times, strict=True,
                )),
            )
        )  # fmt: skip
    shares = draw(
        st.lists(st.tuples(moments, st.sampled_from("abc"), st.integers(0, 4)), max_size=8)
    )
    return Job(draw(st.floats(0.0, 50.0)), attempts, [Share(*one) for one in sorted(shares)])


def slot_seconds(job: Job) -> float:
    """What there was: at each moment the slots of each node, or what ran there if that was more."""

    def within(at_s: float) -> float:
        return min(max(at_s, 0.0), job.seconds)

    moments = {0.0, job.seconds, *(within(share.at_s) for share in job.shares)}
    moments |= {within(at) for one in job.attempts for at in (one.started_s, one.ended_s)}
    total = 0.0
    for begin, end in itertools.pairwise(sorted(moments)):
        for node in "abc":
            slots = [s.slots for s in job.shares if s.node == node and within(s.at_s) <= begin]
            running = sum(
                one.node == node and within(one.started_s) <= begin and within(one.ended_s) >= end
                for one in job.attempts
            )
            total += max(slots[-1] if slots else 0, running) * (end - begin)
    return total


@given(jobs())
def test_the_slot_time_is_divided_to_the_last_second(job: Job) -> None:
    uses = divide(job).uses
    assert sum(uses.values()) == pytest.approx(slot_seconds(job), abs=1e-6)
    assert min(uses.values()) >= -1e-9
    computed = {
        one: max(0.0, min(one.ended_s, job.seconds) - max(one.started_s, 0.0))
        for one in job.attempts
    }
    good = sum(ran for one, ran in computed.items() if one.counts)
    assert uses[Use.COMPUTED] == pytest.approx(good, abs=1e-6)
    assert uses[Use.WASTED] == pytest.approx(sum(computed.values()) - good, abs=1e-6)


@given(jobs())
def test_whatever_happened_can_be_told(job: Job) -> None:
    division = divide(job)
    found = causes(job, division)
    assert all(one.part > 0 for one in found)
    assert [one.part for one in found] == sorted((one.part for one in found), reverse=True)
    told = lines(job, division, found)
    assert 2 <= len(told) <= MOST_LINES
    assert all(line and line.isprintable() for line in told)


@given(jobs(), st.randoms())
def test_the_order_of_the_attempts_does_not_matter(job: Job, random: Any) -> None:
    mixed = list(job.attempts)
    random.shuffle(mixed)
    assert divide(Job(job.seconds, mixed, job.shares)).uses == pytest.approx(divide(job).uses)
