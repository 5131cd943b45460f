"""What the kernel offers on processes: to end with a parent, and to see another one end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent thread ends (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends; None when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        return os.pidfd_open(pid)
    return None
