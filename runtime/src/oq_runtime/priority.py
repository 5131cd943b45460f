"""How urgent a job is beside the jobs of others; what that means for slots is in ``core.slots``."""

from __future__ import annotations

from enum import StrEnum


class Priority(StrEnum):
    """Of a job, as people give it; the first is the highest."""

    URGENT = "urgent"
    NORMAL = "normal"
    LOW = "low"
