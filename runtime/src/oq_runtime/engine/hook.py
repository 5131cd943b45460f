"""The import hook that puts the adapter under the engine of this process.

The adapter takes over when ``openquake.baselib.parallel`` and ``openquake.baselib.workerpool`` are
loaded; until then nothing of the engine is imported. In worker processes it does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from oq_runtime.config import WORKER_VARIABLE

PARALLEL = "openquake.baselib.parallel"
WORKERPOOL = "openquake.baselib.workerpool"


class _After(importlib.abc.Loader):
    """Runs a loader and then a function on the finished module."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.then = then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)

    def __getattr__(self, name: str) -> Any:  # get_source and others, for ``python -m`` and inspect
        return getattr(self.loader, name)


class _Hook(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (PARALLEL, WORKERPOOL):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _After(spec.loader, _install)
        return spec


def _install(module: ModuleType) -> None:
    from oq_runtime.engine import adapter, workerpool

    if module.__name__ == PARALLEL:
        adapter.install_parallel(module)
    else:
        workerpool.install_workerpool(module)


def activate() -> None:
    """Register the import hook, once."""
    if os.environ.get(WORKER_VARIABLE) or any(isinstance(f, _Hook) for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _Hook())
