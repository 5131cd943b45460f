"""How long a silence, how much memory and how many attempts are too much; for broker and agents.

Keys of ``[oq_runtime]``, see ``config``. Pure data: the cores take them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

#: seconds of the longest limit: eleven days
MOST_S = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits that broker and agents judge each other by, so that all hosts must have the same.

    Each key has its default, what is allowed, and in one line what it means; the unit is in its
    name.
    """

    beat_s: Annotated[
        float,
        Meta(gt=0, le=MOST_S, description="seconds between two beats of broker and agent"),
    ] = 2.0
    suspect_s: Annotated[
        float,
        Meta(gt=0, le=MOST_S, description="seconds of silence after which a node gets no tasks"),
    ] = 10.0
    lost_s: Annotated[
        float,
        Meta(
            gt=0,
            le=MOST_S,
            description="seconds of silence after which a node is lost: its tasks are run "
            "elsewhere, and it kills the workers of a job that it does not hear of",
        ),
    ] = 30.0
    no_nodes_limit_s: Annotated[
        float,
        Meta(
            gt=0,
            le=MOST_S,
            description="seconds without any node after which a job fails; at its start it waits "
            "for 60 at least",
        ),
    ] = 60.0
    memory_soft_percent: Annotated[
        int,
        Meta(ge=1, le=100, description="memory in use on a node above which it gets no tasks"),
    ] = 80
    memory_hard_percent: Annotated[
        int,
        Meta(
            ge=1,
            le=100,
            description="memory in use on a node above which its newest task is killed",
        ),
    ] = 90
    max_attempts: Annotated[
        int,
        Meta(ge=1, description="attempts of a task that may end with the death of its worker"),
    ] = 3
    task_timeout_s: Annotated[
        float,
        Meta(
            ge=0,
            le=MOST_S,
            description="seconds after which the worker of a task is killed; 0 for never",
        ),
    ] = 0.0
    speculation: Annotated[
        bool,
        Meta(
            description="whether a task that takes much longer than those of its function did gets "
            "a second attempt on another node, when nothing else waits"
        ),
    ] = False

    def as_text(self) -> str:
        """Return them for the command line of a broker or agent."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_text(cls, text: str) -> Limits:
        """Return those of ``as_text``."""
        return msgspec.json.decode(text, type=cls)


DEFAULTS = Limits()
