"""Events in turn: what an effect asks for waits, and an error loses nobody's turn."""

from __future__ import annotations

import pytest

from oq_runtime.core.events import Events


class Counting:
    """A core whose event N has the effects N0 and N1, of which the first asks for event N - 1."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.broken = ""
        self.events = Events(self.handle, self.apply, lambda: 1.0)

    def handle(self, event: int, now: float) -> list[str]:
        assert now == 1.0
        return [f"{event}0", f"{event}1"]

    def apply(self, effect: str) -> None:
        if effect == self.broken:
            raise OSError(effect)
        self.applied.append(effect)
        if effect.endswith("0") and effect[0] != "0":
            self.events(int(effect[0]) - 1)


def test_all_effects_of_an_event_come_before_those_of_the_next() -> None:
    core = Counting()
    core.events(2)
    assert core.applied == ["20", "21", "10", "11", "00", "01"]


def test_an_error_leaves_the_next_event_its_turn() -> None:
    core = Counting()
    core.broken = "21"
    with pytest.raises(OSError, match="21"):
        core.events(2)
    core.events(0)
    assert core.applied == ["20", "10", "11", "00", "01", "00", "01"]
