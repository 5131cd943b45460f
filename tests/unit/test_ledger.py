"""What the ledger notes of attempts, in a simulated cluster with faults, and how it is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import msgspec
import pytest

from benchmarks.simulation import Scenario, Simulation
from oq_runtime.core import scheduler as core
from oq_runtime.core.explain import Use, divide
from oq_runtime.core.ledger import (
    FIELDS,
    MOST_ATTEMPTS,
    MOST_REASONS,
    MOST_SHARES,
    ROW,
    STARTED_SECS,
    Ledger,
    Outcome,
    Task,
)
from oq_runtime.core.scheduler import Effect, Event, Scheduler
from oq_runtime.engine import kept
from oq_runtime.session.broker import MOST_ROWS, NODE_CHARACTERS
from oq_runtime.wire import protocol
from oq_runtime.wire.protocol import Attempts, Share

TASKS = 300
FACTS = {"format": kept.FORMAT, "seconds": 1000.0}


class Noted(Scheduler):
    """A scheduler with a ledger, as the broker has it."""

    def __init__(self, of: Scheduler) -> None:
        super().__init__(of.limits)
        self.ledger = Ledger()

    def handle(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, core.Submitted):
            self.ledger.submitted(
                event.task, Task("j", event.kind, event.task, event.weight, 7, now)
            )
        effects = super().handle(event, now)
        for one in (event, *effects):
            self.ledger.take(one, now)
        return effects


def told(ledger: Ledger, most: int = 1_000_000) -> Attempts:
    """What the broker would say."""
    return Attempts(
        rows=ledger.pop("j", most),
        more=False,
        functions=["f"],
        nodes=list(ledger.nodes),
        reasons=list(ledger.reasons),
        shares=[Share(*dataclasses.astuple(share)) for share in ledger.shares],
    )


@pytest.mark.parametrize("speculation", [False, True])
def test_each_attempt_is_noted_once_whatever_happens(tmp_path: Path, speculation: bool) -> None:
    simulation = Simulation(
        Scenario(
            nodes=6, slots=4, tasks=TASKS, seed=1, lost=0.5, dying=0.05, straggling=0.05,
            slowdown=20.0, speculation=speculation,
        )
    )  # fmt: skip
    simulation.core = noted = Noted(simulation.core)
    simulation.run()
    ledger = noted.ledger
    assert not ledger.tasks, "something is still open"
    with h5py.File(tmp_path / "calc_1.hdf5", "w") as file:
        kept.write(file, [told(ledger)], 0.0, FACTS | {"seconds": simulation.now})
        job = kept.read(file)
    assert job is not None
    good = [one.task for one in job.attempts if one.counts]
    assert sorted(good) == list(range(TASKS))
    assert len({(one.task, one.attempt) for one in job.attempts}) == len(job.attempts)
    outcomes = {one.outcome for one in job.attempts}
    assert outcomes >= {Outcome.DIED, Outcome.NODE_LOST} | (
        {Outcome.DROPPED} if speculation else set()
    )
    for one in job.attempts:
        assert one.submitted_s <= one.assigned_s <= one.started_s <= one.ended_s
        assert one.ended_s <= one.granted_s <= one.over_s <= simulation.now
        assert one.in_bytes == 7 and one.func == "f"
        assert bool(one.reason) == (one.outcome not in (Outcome.COMMITTED, Outcome.DROPPED))
    uses = divide(job).uses
    ran_s = sum(one.ran_s for one in job.attempts)
    assert uses[Use.COMPUTED] + uses[Use.WASTED] == pytest.approx(ran_s)


def test_rows_are_the_datastores() -> None:
    assert ROW.size == kept.DTYPE.itemsize and tuple(FIELDS) == kept.DTYPE.names


def begun() -> Ledger:
    """A ledger with attempt 1 of task 5 on node a, since 10 s."""
    ledger = Ledger()
    ledger.take(core.NodeJoined("a", 2), 1.0)
    ledger.submitted(5, Task("j", 3, 105, 2.0, 1000, 9.0))
    ledger.take(core.Assign("a", 5, 1), 10.0)
    return ledger


def row(ledger: Ledger) -> dict[str, float]:
    rows = ledger.pop("j", 10)
    assert len(rows) == ROW.size
    return dict(zip(FIELDS, ROW.unpack(rows), strict=True))


def test_times_are_those_of_the_broker() -> None:
    ledger = begun()
    usage = {"slot": 1, "cpu_s": 3.0, "queued_s": 0.5, "faults": 2, "peak_bytes": 99}
    ledger.measured(5, 1, 14.0, ran_s=3.5, **usage)  # type: ignore[arg-type]
    ledger.take(core.AttemptEnded("a", 5, 1, 77), 14.0)
    ledger.take(core.GrantUpload("a", 5, 1), 15.0)
    ledger.take(core.Commit("a", 5, 1), 17.0)
    assert row(ledger) == usage | {
        "task": 105, "func": 3, "attempt": 1, "node": 0, "outcome": Outcome.COMMITTED, "reason": 0,
        "weight": 2.0, "submitted_s": 9.0, "assigned_s": 10.0, "started_s": 10.5, "ended_s": 14.0,
        "granted_s": 15.0, "over_s": 17.0, "in_bytes": 1000, "out_bytes": 77,
    }  # fmt: skip
    assert ledger.pop("j", 10) == b"", "told once"


@pytest.mark.parametrize("stray", [core.GrantUpload("a", 5, 2), core.AttemptStarted("a", 6, 1)])
def test_what_is_not_under_way_is_not_noted(stray: core.Event | core.Effect) -> None:
    ledger = begun()
    ledger.take(stray, 11.0)
    assert ledger.pop("j", 10) == b"" and [*ledger.tasks[5].open] == [1]


def test_results_that_were_damaged_on_the_way() -> None:
    ledger = begun()
    ledger.take(core.AttemptEnded("a", 5, 1, 77), 14.0)
    ledger.take(core.Uploaded("a", 5, 1, False), 15.0)
    assert row(ledger)["outcome"] == Outcome.DAMAGED
    assert [*ledger.reasons][1:] == ["damaged on the way"]


@pytest.mark.parametrize(
    "event, outcome, started_s",
    [
        (core.AttemptDied("a", 5, 1, "killed"), Outcome.DIED, 20.0 - STARTED_SECS),
        (core.AttemptDied("a", 5, 1, "killed", oom=True), Outcome.OUT_OF_MEMORY, 20.0),
        (core.AttemptDied("a", 5, 1, "full", no_room=True), Outcome.NO_ROOM, 20.0),
        (core.NodeGone("a", "power"), Outcome.NODE_LOST, 20.0),
        (core.NodeLost("a", "silent"), Outcome.NODE_LOST, 20.0),
        (core.AttemptPreempted("a", 5, 1, "it"), Outcome.PREEMPTED, 20.0 - STARTED_SECS),
        (core.AbortAttempt("a", 5, 1), Outcome.DROPPED, 20.0),
        (core.GiveUp(5, "NoWorkers", 1, ()), Outcome.DROPPED, 20.0),
        (core.Forget(5), Outcome.DROPPED, 20.0),
    ],
)
def test_outcomes(event: Event | Effect, outcome: Outcome, started_s: float) -> None:
    ledger = begun()
    ledger.take(event, 20.0)
    found = row(ledger)
    assert (found["outcome"], found["started_s"], found["over_s"]) == (outcome, started_s, 20.0)
    ledger.take(core.AttemptEnded("a", 5, 1, 1), 21.0)  # comes too late
    assert ledger.pop("j", 10) == b""


def test_a_start_that_was_told_is_known_of_one_that_died() -> None:
    ledger = begun()
    ledger.take(core.AttemptStarted("a", 5, 1), 12.2)
    ledger.take(core.AttemptDied("a", 5, 1, "worker process 17 was killed"), 20.0)
    assert row(ledger)["started_s"] == pytest.approx(12.0)
    assert list(ledger.reasons) == ["", "worker process was killed"], "one reason, not one each"


def test_an_earlier_group_is_replaced_and_a_later_format_is_not_read(tmp_path: Path) -> None:
    ledger = begun()
    ledger.take(core.Commit("a", 5, 1), 20.0)
    with h5py.File(tmp_path / "calc_1.hdf5", "w") as file:
        kept.write(file, [told(ledger)], 5.0, FACTS)
        kept.write(file, [told(ledger)], 5.0, FACTS)
        job = kept.read(file)
        assert job is not None and job.attempts == [] and job.shares[0].at_s == -4.0
        file[kept.GROUP].attrs["format"] = kept.FORMAT + 1
        assert kept.read(file) is None


def test_what_lying_nodes_fill_in_fits_into_a_message() -> None:
    ledger = begun()
    for number in range(MOST_SHARES + MOST_REASONS):
        ledger.take(core.NodeResized("a", 1_000_000 - number % 2), 1e9)
        if number < 2 * MOST_REASONS:
            ledger.take(core.NodeGone("a", f"{number}" + "\U0001f4a3" * 495), 1e9)
    said = told(ledger)
    assert len(said.shares) == MOST_SHARES and len(said.reasons) == MOST_REASONS + 1
    nodes = ["\U0001f4a3" * NODE_CHARACTERS] * 2000
    rows = bytes(MOST_ROWS * ROW.size)
    said = msgspec.structs.replace(said, rows=rows, nodes=nodes, functions=["f" * 50] * 1000)
    assert len(protocol.encode(said)) < protocol.HEADER_BYTES
    ledger.take(core.Assign("a", 5, 1 << 20), 20.0)
    ledger.take(core.Forget(5), 21.0)
    assert row(ledger)["attempt"] == MOST_ATTEMPTS
