"""How much memory this node has, and how often the kernel has killed for lack of it.

What counts is where least is free: the machine, or a cgroup around this process that has a limit.
Page cache that the kernel can drop at once is not in use. The files are those of
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
Not covered: what to do when memory is short (``node``).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from oq_runtime import cgroups
from oq_runtime.cgroups import PROC, V1, V2
from oq_runtime.descriptors import patiently

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
#: of workers; the agent and the engine have 0 or less
OOM_SCORE = 500


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes in use, of those that may be."""

    used_bytes: int
    limit_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class Names:
    """What the files of a memory cgroup are called, and in memory.stat the cache to be dropped.

    Above some limits the kernel kills, above others it slows everything down to what it can free.
    """

    used: str
    limits: tuple[str, ...]
    events: str
    cache: str


NAMES = {
    V2: Names(
        "memory.current", ("memory.max", "memory.high"), "memory.events", "inactive_file"
    ),
    V1: Names(
        "memory.usage_in_bytes", ("memory.limit_in_bytes",), "memory.oom_control",
        "total_inactive_file",
    ),
}  # fmt: skip


def usage(proc: Path = PROC) -> Usage:
    """Return the use of the machine's memory, or of the cgroup that has less to give."""
    machine = patiently(psutil.virtual_memory)
    found = [Usage(machine.total - machine.available, machine.total)]
    for kind, directory in cgroups.own("memory", proc):
        names = NAMES[kind]
        for limit in names.limits:
            with contextlib.suppress(OSError, ValueError):  # the root has none, others "max"
                limit_bytes = int(patiently((directory / limit).read_text))
                used_bytes = int(patiently((directory / names.used).read_text))
                used_bytes -= _counter(directory / "memory.stat", names.cache) or 0
                found.append(Usage(max(0, used_bytes), max(1, limit_bytes)))
    return min(found, key=lambda one: one.limit_bytes - one.used_bytes)


def oom_kills(proc: Path = PROC) -> int:
    """Return how many processes of this cgroup the kernel has killed for lack of memory.

    Without a memory cgroup: how many on this machine.
    """
    for kind, directory in cgroups.own("memory", proc):
        if (count := _counter(directory / NAMES[kind].events, "oom_kill")) is not None:
            return count
    return _counter(proc / "vmstat", "oom_kill") or 0


class Resident:
    """How much memory a process holds (RSS); asked for after each task, so the file stays open.

    Its number may be another process's one day, its file never. Source: proc(5), statm.
    """

    def __init__(self, pid: int) -> None:
        self._descriptor = -1
        with contextlib.suppress(OSError):  # it has ended
            path, flags = f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC
            self._descriptor = patiently(lambda: os.open(path, flags))

    @property
    def nbytes(self) -> int:
        """Return the bytes that it holds, 0 when it is gone."""
        return self._pages()[0] * PAGE_BYTES

    @property
    def own_nbytes(self) -> int:
        """Return the same without files, which others may have mapped as well."""
        resident, shared = self._pages()
        return (resident - shared) * PAGE_BYTES

    def _pages(self) -> tuple[int, int]:
        try:
            _, resident, shared, *_ = os.pread(self._descriptor, 128, 0).split()
            return int(resident), int(shared)
        except (OSError, ValueError):
            return 0, 0

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def volunteer() -> None:
    """Make the kernel kill this process rather than others when memory is short, see proc(5)."""
    with contextlib.suppress(OSError):  # already higher
        (PROC / "self/oom_score_adj").write_text(str(OOM_SCORE))


def _counter(path: Path, name: str) -> int | None:
    """Return the number behind a name in a file of ``name number`` lines, None without it."""
    with contextlib.suppress(OSError, ValueError):
        for line in patiently(path.read_text).splitlines():
            key, _, number = line.partition(" ")
            if key == name:
                return int(number)
    return None
