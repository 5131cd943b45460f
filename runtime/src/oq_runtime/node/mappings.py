"""Big arguments as a worker has them: files, mapped so that no task sees what another writes.

The mappings of one task serve the next when nothing refers to them any more and no page of them was
written. To map 16 MB and to read a byte of each page takes 1.2 ms, to ask the kernel which pages
are copies 0.2 ms. It tells by proc(5), pagemap: bit 63 a page is present, 62 it is in the swap, 61
it is one of a file; what a process has written in a private mapping is none of a file any more.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from oq_runtime.wire import payload

#: bytes that are kept for the next task: they stay while the worker is idle, also when the agent
#: has deleted the files
KEPT_BYTES = 256 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Mappings:
    """Those of the last task, for one process and its only thread."""

    def __init__(self) -> None:
        # file -> its mapping, and what all objects in it refer to
        self.kept: dict[str, tuple[Any, weakref.ref[Any]]] = {}
        self.clean = True

    def views(self, paths: Sequence[str]) -> list[memoryview]:
        """Return the contents of these files, to be changed as one likes; others are let go.

        To be called once for each task.

        :raises OSError: when one is not there
        """
        if not self.clean:
            self.task_ended()
        last, self.kept, self.clean = self.kept, {}, False
        views = []
        for path in paths:
            mapping: Any
            mapping, _ = last.pop(path, (None, None))
            if mapping is None:
                mapping = payload.map_file(path, private=True).obj
            array = np.frombuffer(mapping, np.uint8)
            if sum(len(kept) for kept, _ in self.kept.values()) + len(mapping) <= KEPT_BYTES:
                self.kept[path] = mapping, weakref.ref(array)
            views.append(array.data)
        return views

    def task_ended(self) -> None:
        """Let go of what cannot serve the next task: at once, since it is memory."""
        self.clean = True
        self.kept = {
            path: (mapping, window)
            for path, (mapping, window) in self.kept.items()
            if window() is None and not written(mapping)
        }


def written(mapping: Any) -> bool:
    """Say whether a page of a private mapping may be other than the file's."""
    first = np.frombuffer(mapping, np.uint8).ctypes.data // PAGE_BYTES
    pages = -(-len(mapping) // PAGE_BYTES)
    try:
        with open("/proc/self/pagemap", "rb", 0) as file:
            entries = np.frombuffer(os.pread(file.fileno(), 8 * pages, 8 * first), np.uint64)
    except OSError:
        return True  # not to be known here
    # among bits 63, 62, 61 the first two tell that there is a page, the last that it is the file's
    kinds = entries >> np.uint64(61)
    return len(entries) < pages or bool(((kinds > 1) & (kinds & np.uint64(1) == 0)).any())
