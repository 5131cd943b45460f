"""The cgroups of this process, of both versions, and what they say of processors and processes.

A limit of any of them holds, however far out: the least counts. Where a container mounts no more
than its own, the walk ends there. The files are those of Documentation/admin-guide/cgroup-v2.rst
and cgroup-v1 of Linux. Not covered: memory (``node.memory``).
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oq_runtime.descriptors import patiently
from oq_runtime.errors import ConfigError

PROC = Path("/proc")
#: the two versions, as the kinds of file systems that they are
V1, V2 = "cgroup", "cgroup2"
#: processes and threads of a job besides its workers
JOB_PROCESSES = 18


def own(controller: str, proc: Path = PROC) -> Iterator[tuple[str, Path]]:
    """Yield the cgroups of this process that have a controller, from the innermost out.

    :return: the version, V1 or V2, and the directory
    """
    paths = {}
    for line in _lines(proc / "self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths[V2] = path
        elif controller in controllers.split(","):
            paths[V1] = path
    for line in _lines(proc / "self/mountinfo"):
        mount, _, device = line.partition(" - ")  # see proc_pid_mountinfo(5)
        root, top = map(_unescaped, mount.split()[3:5])
        kind, options = device.partition(" ")[0], device.rpartition(" ")[2]
        if kind not in paths or (kind == V1 and controller not in options.split(",")):
            continue
        # in a container the mount may begin at the container's own cgroup
        path = paths[kind].removeprefix(root if root != "/" else "")
        inner = Path(top, path.lstrip("/"))
        for directory in (inner, *inner.parents) if inner.is_dir() else (Path(top),):
            yield kind, directory
            if directory == Path(top):
                break


def cpu_quota(proc: Path = PROC) -> tuple[float, Path] | None:
    """Return how many processors' time there is, and which cgroup says so; None: all of it."""
    found = []
    for kind, directory in own("cpu", proc):
        if kind == V2:
            words = _words(directory / "cpu.max")
        else:
            words = [
                *_words(directory / "cpu.cfs_quota_us"),
                *_words(directory / "cpu.cfs_period_us"),
            ]
        with contextlib.suppress(ValueError):  # none, "max", or a file with nothing in it
            quota, period = map(int, words)
            if quota > 0 and period > 0:
                found.append((quota / period, directory))
    return min(found, default=None)


@dataclass(frozen=True, slots=True)
class ProcessLimit:
    """A bound of the number of processes and threads.

    :param of: who sets it, for a person who may raise it
    """

    most: int
    used: int
    of: str

    def __str__(self) -> str:
        return f"{self.most} of {self.of}"


def process_limits(proc: Path = PROC) -> Iterator[ProcessLimit]:
    """Yield what bounds the number of processes and threads of this user here."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.getuid() != 0:  # the kernel exempts root
        yield ProcessLimit(soft, _threads(os.getuid(), proc), "this user (ulimit -u)")
    for _, directory in own("pids", proc):
        if (words := _words(directory / "pids.max")) and words != ["max"]:
            used = _words(directory / "pids.current") or ["0"]
            yield ProcessLimit(int(words[0]), int(used[0]), f"{directory} (pids.max)")


def process_limit(proc: Path = PROC) -> str:
    """Say what bounds the number of processes and threads."""
    return " and ".join(map(str, process_limits(proc))) or "those of the machine"


def check_processes(slots: int, proc: Path = PROC) -> None:
    """Raise ConfigError where fewer processes may be started than a job of ``slots`` needs.

    Without a thread libzmq ends its process in the midst, by an assertion.

    :param slots: of this machine
    """
    needed = JOB_PROCESSES + slots
    for limit in process_limits(proc):
        if limit.most - limit.used < needed:
            raise ConfigError(
                f"{needed} processes and threads are needed here, and {limit.used} are in use of "
                f"the {limit}; raise this limit"
            )


def _threads(uid: int, proc: Path) -> int:
    """Return how many threads a user has, those of processes that ``/proc`` hides left out."""
    count = 0
    for path in proc.glob("[1-9]*/task"):
        with contextlib.suppress(OSError):  # it has ended
            stat = path.stat()
            count += stat.st_nlink - 2 if stat.st_uid == uid else 0
    return count


def _unescaped(word: str) -> str:
    """Return a word of mountinfo, where blanks and backslashes are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def _words(path: Path) -> list[str]:
    with contextlib.suppress(OSError):  # no such limit here
        return patiently(path.read_text).split()
    return []


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):  # a kernel without cgroups
        return patiently(path.read_text).splitlines()
    return []
