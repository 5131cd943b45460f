"""Waiting for a condition, and shared memory that nobody uses any more; for all lanes."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

SHM = Path("/dev/shm")
LIMIT_S = 5.0
PAUSE_S = 0.05


def wait_for(
    condition: Callable[[], object], limit_s: float = LIMIT_S, pause_s: float = PAUSE_S
) -> bool:
    """Wait until ``condition()`` is true; False when that takes longer than ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


def shm() -> set[str]:
    """The names in /dev/shm, to be compared with those of a later moment."""
    return {path.name for path in SHM.iterdir()}


def unused_shm(names: set[str]) -> list[str]:
    """Those of the entries that nobody has mapped: other programs use /dev/shm as well.

    Nor the directories of sessions and agents that run: one of ours would be a process left behind.
    """
    names = {name for name in names if not name.startswith(tuple(_in_use()))}
    inodes = {}
    for name in names:
        with contextlib.suppress(OSError):
            inodes[str((SHM / name).stat().st_ino)] = name
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # semaphores are mapped under another, deleted name
            for line in maps.read_text(errors="replace").splitlines():
                if "/dev/shm/" in line:
                    inodes.pop(line.split()[4], None)
    return sorted(name for name in inodes.values() if (SHM / name).exists())


def remove_unused_shm(names: set[str], prefix: str) -> None:
    """Remove those of the entries that begin so and that nobody has mapped."""
    for name in unused_shm({name for name in names if name.startswith(prefix)}):
        if (SHM / name).is_dir():
            shutil.rmtree(SHM / name)
        else:
            (SHM / name).unlink(missing_ok=True)


def _in_use() -> set[str]:
    """The beginnings of the names that running sessions and agents have, whoever's they are."""
    found = set()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = cmdline.read_text(errors="replace").split("\0")
            if "oq_runtime.session.broker" in words:
                found.add(Path(words[words.index("--directory") + 1]).name)
            elif "oq_runtime.node.daemon" in words and "--address" in words:
                found.add(f"oq-agent-{words[words.index('--address') + 1]}-")
    return found
