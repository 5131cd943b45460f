"""How long a silence, how much memory and how many attempts are too much; for broker and agents.

The values of ``[oq_runtime]``, see ``config``. Pure data: the cores take them as they are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The keys of ``[oq_runtime]`` of the same names, with their defaults."""

    #: seconds between two beats, each way
    beat_s: float = 2.0
    #: seconds without a beat after which a node gets no new tasks
    suspect_s: float = 10.0
    #: seconds without a beat after which a node is lost, and after which it fences its workers
    lost_s: float = 30.0
    #: seconds without any node after which a job is given up
    no_nodes_limit_s: float = 60.0
    #: per cent of the memory above which a node takes no new task, and kills the newest attempt
    memory_soft_percent: int = 80
    memory_hard_percent: int = 90
    #: attempts of a task that may end with the death of its worker
    max_attempts: int = 3
    #: seconds after which the worker of a task is killed; 0: never
    task_timeout_s: float = 0.0
    #: whether a task that takes much longer than others gets a second attempt beside the first
    speculation: bool = False

    def as_text(self) -> str:
        """Return them for the command line of a broker or agent."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Limits:
        """Return those of ``as_text``."""
        return cls(**json.loads(text))


DEFAULTS = Limits()
