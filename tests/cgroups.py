"""A cgroup with a limit of memory, for tests in which the kernel kills; needs root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.leftovers import wait_for

V2 = Path("/sys/fs/cgroup")
V1 = Path("/sys/fs/cgroup/memory")


@contextlib.contextmanager
def limited(limit_bytes: int, name: str = "test") -> Iterator[Path]:
    """Make a cgroup of either version, without swap; skips where that is not possible.

    :param name: tells it from others of this process
    """
    controllers = V2 / "cgroup.subtree_control"
    if controllers.exists() and "memory" in controllers.read_text().split():
        top, settings = V2, {"memory.max": limit_bytes, "memory.swap.max": 0}
    elif (V1 / "memory.limit_in_bytes").exists():
        top, settings = V1, {"memory.limit_in_bytes": limit_bytes, "memory.swappiness": 0}
    else:
        pytest.skip("no memory controller of cgroups at /sys/fs/cgroup")
    cgroup = top / f"oq-{name}-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as exc:
        pytest.skip(f"{cgroup} cannot be made: {exc.strerror}")
    try:
        for name, value in settings.items():
            with contextlib.suppress(FileNotFoundError):  # kernels without swap accounting
                (cgroup / name).write_text(str(value))
        yield cgroup
    finally:
        wait_for(lambda: not (cgroup / "cgroup.procs").read_text(), 10)
        cgroup.rmdir()


def inside(cgroup: Path, argv: Sequence[str | Path]) -> list[str]:
    """The command line that runs ``argv`` in the cgroup."""
    enter = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
    return ["sh", "-c", enter, str(cgroup), *map(str, argv)]
