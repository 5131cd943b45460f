"""Task functions; the workers import this module (PYTHONPATH), so it must stay free of pytest."""

from __future__ import annotations

import math
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy


def square(x: Any, mon: Any = None) -> dict[str, Any]:
    return {"sum": x * x}


def parts(x: Any, monitor: Any) -> Iterator[Any]:
    """Three partial results."""
    for i in range(3):
        yield {"sum": x * (i + 1)}


def splits(x: Any, monitor: Any) -> Iterator[Any]:
    """A result and two subtasks, one of them a generator."""
    yield {"sum": x}
    yield square, x
    yield parts, x


def fails(x: Any, monitor: Any) -> dict[str, Any]:
    if x == 3:
        raise ValueError(f"task with x={x} went wrong")
    return {"sum": x}


def unpicklable(x: Any, monitor: Any) -> dict[str, Any]:
    return {"sum": lambda: x}


def poison(x: Any, monitor: Any) -> dict[str, Any]:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": x}


def dies_once(x: Any, monitor: Any) -> dict[str, Any]:
    """Kill the worker of the first attempt of every other task."""
    if x % 2 and os.environ["OQ_RUNTIME_ATTEMPT"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": x}


def crash(x: Any, monitor: Any) -> dict[str, Any]:
    """A crash in native code."""
    if x == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"sum": x}


def slow(x: Any, seconds: Any, monitor: Any) -> dict[str, Any]:
    time.sleep(seconds)
    return {"sum": x}


def spin(x: Any, seconds: Any, monitor: Any) -> dict[str, Any]:
    """Compute for so many seconds of a CPU, PACE times as many where that is set."""
    end_s = time.thread_time() + seconds * float(os.environ.get("PACE", "1"))
    while time.thread_time() < end_s:
        pass
    return {"sum": x}


def reads(x: Any, path: Any, monitor: Any) -> dict[str, Any]:
    """Wait for the file server, which a FIFO is: until somebody has written and closed it."""
    with open(path) as file:
        return {"sum": len(file.read()) + x}


def swaps(x: Any, path: Any, seconds: Any, monitor: Any) -> dict[str, Any]:
    """Read pages of a file that the kernel has just put away, for so many seconds."""
    faults, end_s = 0, time.monotonic() + seconds
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        pages.madvise(mmap.MADV_RANDOM)
        while time.monotonic() < end_s:
            pages.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, len(pages), 16 * mmap.PAGESIZE):
                faults += pages[at]
    return {"sum": x}


def begins(x: Any, seconds: Any, path: Any, monitor: Any) -> dict[str, Any]:
    """Leave a file, and take some seconds."""
    open(path, "w").close()
    return slow(x, seconds, monitor)


def grow(x: Any, data: Any, nbytes: Any, monitor: Any) -> dict[str, Any]:
    """Checksum of a big argument and a big result."""
    return {"in": sum(data[::4099]), f"out{x}": bytes([x]) * nbytes}


def stream(x: Any, parts: Any, seconds: Any, monitor: Any) -> Iterator[Any]:
    """Partial results over some time, when it was, and a subtask."""
    start = time.time()
    for i in range(parts):
        time.sleep(seconds / parts)
        yield {"sum": x * (i + 1)}
    yield {"spans": [(start, time.time())]}
    yield square, x


def until(x: Any, path: Any, monitor: Any) -> dict[str, Any]:
    """Wait for a file."""
    return unless(x, math.inf, path, monitor)


def unless(x: Any, seconds: Any, path: Any, monitor: Any) -> dict[str, Any]:
    """Take some seconds, unless there is a file."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not os.path.exists(path):
        time.sleep(0.05)
    return {"sum": x}


def writes(x: Any, path: Any, monitor: Any) -> dict[str, Any]:
    """Append to a file."""
    with open(path, "a") as file:
        file.write(f"{x}\n")
    return {"sum": x}


def leaves(x: Any, monitor: Any) -> dict[str, Any]:
    """Start a process and leave it running; return its number."""
    return {"pid": subprocess.Popen(["sleep", "600"]).pid}


def hang(x: Any, monitor: Any) -> dict[str, Any]:
    while x == 3:
        time.sleep(1)
    return {"sum": x}


def array(x: Any, values: Any, monitor: Any) -> dict[str, Any]:
    """A big result: 8 bytes per value."""
    return {"array": numpy.full(values, float(x))}


class Refused:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> NoReturn:
    raise RuntimeError("this argument cannot be unpickled")


def hold(
    x: Any, mbytes: Any, at_once: Any, mbytes_per_s: Any, seconds: Any, monitor: Any
) -> dict[str, Any]:
    """Take memory, some MB at once and the rest in steps of 10; then hold it for some seconds."""
    taken = [b"x" * (min(at_once, mbytes) * 1_000_000)]
    for _ in range((mbytes - at_once) // 10):
        taken.append(b"x" * 10_000_000)
        time.sleep(10 / mbytes_per_s)
    time.sleep(seconds)
    return {"sum": x}


def oom_score(x: Any, monitor: Any) -> dict[str, Any]:
    """How willingly the kernel kills this worker."""
    with open("/proc/self/oom_score_adj") as file:
        return {"sum": int(file.read())}


def no_memory(x: Any, path: Any, monitor: Any) -> NoReturn:
    """Fail as Python does for lack of memory, and leave a line per attempt."""
    with open(path, "a") as file:
        file.write(f"{x}\n")
    raise MemoryError(f"task with x={x} found no room")


def spoils(x: Any, array: Any, monitor: Any) -> Iterator[Any]:
    """Changes its argument in place: nobody else may see it. The result is as big."""
    before = array.sum()
    array += x
    yield {"sum": before + x}
    yield {"array": array}


def many(n: Any, monitor: Any) -> Iterator[Any]:
    """So many small results."""
    for _ in range(n):
        yield {"sum": 1}
