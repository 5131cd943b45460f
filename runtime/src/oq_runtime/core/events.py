"""The events of a pure core, one after the other, and what comes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Event = TypeVar("Event")
Effect = TypeVar("Effect")


class Events(Generic[Event, Effect]):
    """Has the core take an event when called; one that comes of an effect waits for its turn.

    :param handle: of the core: takes an event and the time (s), returns its effects
    :param apply: carries out an effect
    :param clock: says the time (s), monotonic
    """

    def __init__(
        self,
        handle: Callable[[Event, float], Iterable[Effect]],
        apply: Callable[[Effect], None],
        clock: Callable[[], float],
    ) -> None:
        self.handle, self.apply, self.clock = handle, apply, clock
        self.waiting: deque[Event] = deque()
        self.busy = False

    def __call__(self, event: Event) -> None:
        self.waiting.append(event)
        if self.busy:
            return
        self.busy = True
        try:
            while self.waiting:
                for effect in self.handle(self.waiting.popleft(), self.clock()):
                    self.apply(effect)
        finally:
            self.busy = False
