"""A job that ends in the midst, with a journal that may be damaged, goes on with right results.

The engine is a small program that, like the real one, does what its input and the results say, in
their order: it submits tasks whose arguments depend on what it was given so far, with two maps at a
time. A session of this process computes what is sent, in an order by chance. Not covered: the
engine itself and its sockets (``local/test_resume``, ``tests.kills``), the journal's format
(``test_journal``).
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from oq_runtime.engine import history
from oq_runtime.engine.history import History
from oq_runtime.errors import JournalError
from oq_runtime.files import journal
from oq_runtime.session import client
from oq_runtime.session.client import Unchanged
from oq_runtime.wire import payload

#: maps of a program, the most tasks of one, and the nodes that it asks for
MAPS, MOST_TASKS, NODES = 4, 6, [("a", 0, 3), ("b", 1, 2)]
PROGRAMS, MUTATIONS = 60, 2000


class Killed(Exception):
    """The process of the engine is."""


class TaskError(Exception):
    """A task has brought an error, which ends the job."""


def task_of(argument: str) -> str:
    """What a task computes."""
    return hashlib.blake2b(argument.encode(), digest_size=8).hexdigest()


class Session:
    """Computes what is sent, and gives the results in an order by chance."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.held: dict[int, tuple[int, str]] = {}  # task -> map and argument
        self.sent: dict[int, tuple[int, str]] = {}
        self.computed = 0

    def submit(self, task: int, map_: int, argument: str, held: bool) -> None:
        (self.held if held else self.sent)[task] = map_, argument

    def answered(self, task: int) -> None:
        del self.held[task]

    def send_held(self) -> None:
        self.sent.update(self.held)
        self.held.clear()

    def results(self, map_: int, consumed: Any) -> Iterator[tuple[int, list[Any]]]:
        while found := [task for task, (of, _) in self.sent.items() if of == map_]:
            task = self.rng.choice(found)
            _, argument = self.sent.pop(task)
            self.computed += 1
            objects = [task_of(argument)]
            consumed(task, b"".join(b"".join(payload.lay_out(payload.dump(o))) for o in objects))
            yield task, objects


class Engine:
    """
    :param seed: of the program
    :param first: number of its first map in this process
    :param kill_at: results after which the process is killed
    :param fails: whether the task of the last result has brought an error
    :param turns: seed of the order in which it comes to its maps
    """

    def __init__(
        self, seed: int, session: Session, kept: History, kill_at: int, fails: bool, turns: int
    ) -> None:
        self.rng, self.turns = random.Random(seed), random.Random(turns)
        self.session, self.history = session, kept
        self.first = session.rng.randrange(100)
        self.kill_at, self.fails = kill_at, fails
        self.state, self.given, self.task = "", 0, 0
        self.arguments: dict[int, str] = {}
        self.counts: list[int] = []  # of the tasks of each map

    def submit(self, map_: int, number: int) -> None:
        # what two runs have in common only where all before was the same
        given = self.state if self.rng.random() < 0.5 else ""
        argument = f"{map_} {number} {self.rng.choice('ab')} {given}"
        unchanged, args = Unchanged(), (argument,)
        held = self.history.submitting(self.first + map_, number, task_of, args, unchanged)
        self.task += 1
        self.session.submit(self.task, self.first + map_, argument, held)
        self.history.submitted(self.first + map_, number, self.task, args, unchanged)
        self.arguments[self.task] = argument

    def take(self, map_: int) -> Iterator[str]:
        """Take the results of a map, each of which must be that of its task."""

        def both() -> Iterator[tuple[int, list[Any]]]:
            for task, objects, _ in self.history.replay(self.first + map_):
                yield task, objects
            yield from self.session.results(self.first + map_, self.history.consumed)

        results = both()
        for _ in range(self.counts[map_]):  # as the engine, which knows when it has all
            task, [value] = next(results)
            argument = self.arguments[task]
            assert value == task_of(argument) and argument.startswith(f"{map_} "), "a wrong result"
            self.given += 1
            if self.given == self.kill_at and self.fails:
                self.history.failed()
                raise TaskError
            if self.given == self.kill_at:
                raise Killed
            self.state = task_of(self.state + value)
            yield value

    def run(self) -> str:
        """Return what the job has come to."""
        slots = sum(slots for _, _, slots in self.history.slots(NODES))
        self.counts = [min(self.rng.randint(1, MOST_TASKS), slots) for _ in range(MAPS)]
        waiting: list[Iterator[str]] = []
        for map_, count in enumerate(self.counts):
            for number in range(count):
                self.submit(map_, number)
            waiting.append(self.take(map_))
            if self.rng.random() < 0.5:  # else the next map begins beside it
                self.drain(waiting)
        self.drain(waiting)
        return self.state

    def drain(self, waiting: list[Iterator[str]]) -> None:
        """Take all results of some maps, in turns."""
        while waiting:
            results = waiting.pop(self.turns.randrange(len(waiting)))
            if next(results, None) is not None:
                waiting.append(results)


@contextmanager
def current(monkeypatch: pytest.MonkeyPatch, session: Session) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(client.Session, "current", lambda: session)
        yield


class Job:
    """A job in a directory of its own, which is begun, killed, and goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, seed: int) -> None:
        self.monkeypatch, self.directory, self.seed = monkeypatch, directory, seed
        self.told: list[str] = []
        self.shown: list[tuple[int, int]] = []
        self.replayed = self.computed = 0

    def run(self, by: int, kill_at: int = 0, *, fails: bool = False, turns: int = 0) -> str:
        """Run it, or let it go on; returns what it has come to, or nothing.

        :param by: seed of the order in which results come
        """
        before, claimed = None, None
        if self.directory.exists():
            before = journal.Reader(self.directory)
            claimed = journal.claim(self.directory)
            before.cut_tail()
        writer = journal.Writer(self.directory, {}, budget_bytes=1 << 30, claimed=claimed)
        kept = History(writer, before, self.told.append, show=lambda *two: self.shown.append(two))
        session = Session(random.Random(by))
        engine = Engine(self.seed, session, kept, kill_at, fails, turns)
        with current(self.monkeypatch, session):
            try:
                return engine.run()
            except (Killed, TaskError):
                return ""
            finally:
                kept.close()
                self.replayed, self.computed = kept.replayed, session.computed


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is not what is tested, and would take most of the time."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_killed_job_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int) -> None:
    """With each result that it had; killed twice; and the whole is given again."""
    rng = random.Random(seed)
    job = Job(monkeypatch, tmp_path / "j", seed)
    had = 0
    for kill_at in (rng.randint(1, 6), rng.randint(1, 12), 0):
        state = job.run(rng.randrange(99), kill_at)
        assert job.replayed == min(had, kill_at or had)
        had = max(had, job.replayed + job.computed)
    assert state
    assert job.run(rng.randrange(99)) == state, "in the order of then"
    assert (job.replayed, job.computed) == (had, 0)
    assert job.shown[-1] == (had, had)
    assert not any("then" in line for line in job.told), job.told


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_task_that_failed_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    job = Job(monkeypatch, tmp_path / "j", seed)
    at = random.Random(seed).randint(1, 5)
    if job.run(1, at, fails=True):
        return  # it has fewer tasks
    assert job.run(2)
    assert job.replayed == at - 1


def test_a_replay_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what there is; and its end, whatever ended it."""
    monkeypatch.setattr(history, "SHOW_SECS", 0)
    job = Job(monkeypatch, tmp_path / "j", 1)
    job.run(1, kill_at=8)
    had = job.computed
    other = Job(monkeypatch, tmp_path / "j", 1)
    other.run(2)
    assert other.shown == [*((number, had) for number in range(1, had + 1)), (had, had)]
    changed = Job(monkeypatch, tmp_path / "j", 1)
    monkeypatch.setattr(history, "digest", lambda _: b"another")
    changed.run(1)
    assert changed.shown == [(0, 0)] and " 0 tasks of " in changed.told[0]


def test_another_program_takes_nothing_that_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its results are right, whatever it has in common with the one of the journal."""
    for seed in range(PROGRAMS):
        Job(monkeypatch, tmp_path / f"{seed}", seed).run(1)
        other = Job(monkeypatch, tmp_path / f"{seed}", seed + 1)
        assert other.run(2)


def test_an_engine_that_takes_its_maps_in_another_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What comes after the difference is kept in the place of what was there."""
    differed = 0
    for seed in range(PROGRAMS):
        job = Job(monkeypatch, tmp_path / f"{seed}", seed)
        job.run(1, turns=1)
        state = job.run(2, turns=2)
        differed += job.computed > 0
        assert state == job.run(3, turns=2)
        assert job.computed == 0
    assert differed > PROGRAMS / 4


def test_no_damage_makes_a_wrong_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bytes that are flipped, left out or repeated, anywhere: less is taken over, or nothing."""
    rng = random.Random(1)
    kept = 0
    for number in range(MUTATIONS):
        seed = number % 20
        source = tmp_path / f"of-{seed}"
        if not source.exists():
            Job(monkeypatch, source, seed).run(seed, kill_at=rng.randint(3, 15))
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(source, damaged)
        [path] = journal.segments(damaged)
        data, at = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.choice((1, 64, 128))]
            case 3:
                data[at:at] = data[at : at + rng.choice((1, 64, 128))]
        path.write_bytes(data)
        job = Job(monkeypatch, damaged, seed)
        try:
            assert job.run(number)
        except JournalError:
            continue
        kept += job.replayed
    assert kept > MUTATIONS, "hardly anything was taken over"
