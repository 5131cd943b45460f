"""The work that every system does; its workers import this module (PYTHONPATH).

Only numpy, for the peers have no engine. The functions take no monitor, so that the same ones run
everywhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: elements of the result of ``array`` and of the argument of ``total``: 8 and 16 MB
RESULT_FLOATS, ARGUMENT_FLOATS = 1_000_000, 2_000_000
#: floats per page of memory: reading every such one touches all of the array
PAGE_FLOATS = 4096 // 8


def nothing(number: int) -> int:
    return number


def array(number: int) -> NDArray[np.float64]:
    return np.full(RESULT_FLOATS, float(number))


def argument() -> NDArray[np.float64]:
    return np.arange(ARGUMENT_FLOATS, dtype=float)


def total(common: NDArray[np.float64], number: int) -> float:
    """A number that only the whole array can give, without computing for long."""
    return float(common[::PAGE_FLOATS].sum()) + number


def ramp(number: int, floats: int) -> NDArray[np.float64]:
    """An array that starts with the number; no two of its pages are the same."""
    return np.arange(number, number + floats, dtype=float)


def sleep(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number


def whoami(number: int, seconds: float) -> int:
    """Say which process this is, late enough for the other workers to get a task as well."""
    time.sleep(seconds)
    return os.getpid()


def die_once(number: int, seconds: float, victim: int, flag: str) -> int:
    """Sleep; the first attempt of the task ``victim`` is killed in the middle, if there is a flag.

    :param flag: a file that is removed by the one who dies
    """
    time.sleep(seconds / 2)
    if number == victim:
        with contextlib.suppress(FileNotFoundError):
            Path(flag).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds / 2)
    return number
