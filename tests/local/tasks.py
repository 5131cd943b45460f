"""Task functions; the workers import this module (PYTHONPATH), so it must stay free of pytest."""

import math
import os
import signal
import time

import numpy


def square(x, mon=None):
    return {"sum": x * x}


def parts(x, monitor):
    """Three partial results."""
    for i in range(3):
        yield {"sum": x * (i + 1)}


def splits(x, monitor):
    """A result and two subtasks, one of them a generator."""
    yield {"sum": x}
    yield square, x
    yield parts, x


def fails(x, monitor):
    if x == 3:
        raise ValueError(f"task with x={x} went wrong")
    return {"sum": x}


def unpicklable(x, monitor):
    return {"sum": lambda: x}


def poison(x, monitor):
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": x}


def crash(x, monitor):
    """A crash in native code."""
    if x == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"sum": x}


def slow(x, seconds, monitor):
    time.sleep(seconds)
    return {"sum": x}


def grow(x, data, nbytes, monitor):
    """Checksum of a big argument and a big result."""
    return {"in": sum(data[::4099]), f"out{x}": bytes([x]) * nbytes}


def stream(x, parts, seconds, monitor):
    """Partial results over some time, when it was, and a subtask."""
    start = time.time()
    for i in range(parts):
        time.sleep(seconds / parts)
        yield {"sum": x * (i + 1)}
    yield {"spans": [(start, time.time())]}
    yield square, x


def until(x, path, monitor):
    """Wait for a file."""
    return unless(x, math.inf, path, monitor)


def unless(x, seconds, path, monitor):
    """Take some seconds, unless there is a file."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not os.path.exists(path):
        time.sleep(0.05)
    return {"sum": x}


def hang(x, monitor):
    while x == 3:
        time.sleep(1)
    return {"sum": x}


def array(x, values, monitor):
    """A big result: 8 bytes per value."""
    return {"array": numpy.full(values, float(x))}


class Refused:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise RuntimeError("this argument cannot be unpickled")


def hold(x, mbytes, at_once, mbytes_per_s, seconds, monitor):
    """Take memory, some MB at once and the rest in steps of 10; then hold it for some seconds."""
    taken = [b"x" * (min(at_once, mbytes) * 1_000_000)]
    for _ in range((mbytes - at_once) // 10):
        taken.append(b"x" * 10_000_000)
        time.sleep(10 / mbytes_per_s)
    time.sleep(seconds)
    return {"sum": x}


def oom_score(x, monitor):
    """How willingly the kernel kills this worker."""
    with open("/proc/self/oom_score_adj") as file:
        return {"sum": int(file.read())}


def no_memory(x, path, monitor):
    """Fail as Python does for lack of memory, and leave a line per attempt."""
    with open(path, "a") as file:
        file.write(f"{x}\n")
    raise MemoryError(f"task with x={x} found no room")


def spoils(x, array, monitor):
    """Changes its argument in place: nobody else may see it. The result is as big."""
    before = array.sum()
    array += x
    yield {"sum": before + x}
    yield {"array": array}


def many(n, monitor):
    """So many small results."""
    for _ in range(n):
        yield {"sum": 1}
