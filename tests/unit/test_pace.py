"""How long a phase still takes: it is counted down, and put off for a reason only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.core.pace import Pace


def test_what_is_left_does_not_grow_while_tasks_end() -> None:
    pace, shown = Pace(0.0), list[float]()
    for now, done in ((10, 1), (15, 2), (40, 3), (41, 8), (45, 9)):  # the third one took long
        pace.advance(10, done, 1, now)
        shown.append(pace.left_s(now) or 0.0)
    assert shown[0] == pytest.approx(10 * 8.5 / 1.5)
    assert shown == sorted(shown, reverse=True)
    pace.advance(10, 10, 0, 110)
    pace.advance(10, 10, 0, 200)
    assert (pace.left_s(200), pace.took_s) == (None, 110)


def test_it_is_counted_down_while_no_task_ends() -> None:
    pace = Pace(0.0)
    pace.advance(3, 1, 0, 600.0)
    for now, left_s in ((600, 1200), (900, 900), (1799, 1), (2400, 0)):
        pace.advance(3, 1, 1, now)
        assert pace.left_s(now) == pytest.approx(left_s)
    pace.advance(3, 2, 1, 2500.0)  # longer than it seemed: it is reckoned anew
    assert pace.left_s(2500.0) == pytest.approx(2500 * 0.5 / 2.5)


def test_no_time_counts_in_which_nothing_runs() -> None:
    """As while others have the slots, or between two rounds of a function."""
    pace = Pace(0.0)
    for now, total, done, running in (
        (3600, 100, 0, 0),  # after an hour of waiting
        (3600, 100, 0, 10),
        (3610, 100, 10, 10),
        (3700, 100, 100, 0),
        (7300, 100, 100, 0),
        (7300, 200, 100, 10),
    ):
        pace.advance(total, done, running, now)
    assert pace.took_s == 100
    pace.advance(200, 110, 10, 7310)
    assert pace.left_s(7310) == pytest.approx(100 * 95 / 105 - 10)


def test_what_runs_twice_is_one_task() -> None:
    pace = Pace(0.0)
    pace.advance(20, 18, 4, 90)
    assert pace.left_s(90) == pytest.approx(90 / 19)


def test_more_tasks_may_take_longer() -> None:
    pace = Pace(0.0)
    pace.advance(2, 1, 1, 10)
    pace.advance(20, 1, 1, 11)
    assert pace.left_s(11) == pytest.approx(11 * 18.5 / 1.5)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 100)), min_size=1, max_size=50))
def test_it_grows_only_once_it_has_passed(steps: list[tuple[int, float]]) -> None:
    pace, now, done = Pace(0.0), 0.0, 0
    before: float | None = None
    for ended, passed_s in steps:
        now, done = now + passed_s, min(done + ended, 40)
        pace.advance(40, done, min(4, 40 - done), now)
        left_s = pace.left_s(now)
        assert (left_s is None) == (done in (0, 40))
        if before is not None and before > passed_s and left_s is not None:
            assert left_s <= before - passed_s + 1e-6 * before
        before = left_s
