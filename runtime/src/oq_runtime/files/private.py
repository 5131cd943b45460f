"""The directories of a session: one for sockets and logs, one of the same name in shared memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from oq_runtime.files import store


def remove(directory: Path) -> None:
    """Remove a session's directory, and the one of the same name in shared memory."""
    for path in (store.SHARED_MEMORY / directory.name, directory):
        shutil.rmtree(path, ignore_errors=True)
