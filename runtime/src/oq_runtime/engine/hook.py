"""The import hook that puts the adapter under the engine of this process.

Ours is installed in modules of the engine when these have just been loaded; until then nothing of
the engine is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

from oq_runtime.config import WORKER_VARIABLE
from oq_runtime.engine import versions

#: module of the engine -> what installs ours in it, each by module and function, and the names
#: there that it replaces or uses
INSTALLERS = {
    "openquake.baselib.hdf5": ("oq_runtime.engine.reading:install_hdf5", ("File",)),
    "openquake.baselib.parallel": (
        "oq_runtime.engine.adapter:install_parallel",
        ("host_cores", "config"),  # the others with their parameters, see there
    ),
    "openquake.baselib.workerpool": (
        "oq_runtime.engine.workerpool:install_workerpool",
        ("WorkerMaster",),
    ),
    "openquake.baselib.zeromq": ("oq_runtime.engine.dbserver:install_zeromq", ("context",)),
    "openquake.server.dbserver": (
        "oq_runtime.engine.dbserver:install_dbserver",
        ("DbServer", "actions", "p", "w"),
    ),
    "openquake.server.db.actions": (
        "oq_runtime.engine.jobtable:install_actions",
        ("reset_is_running",),
    ),
    "openquake.hazardlib.gsim_lt": (
        "oq_runtime.engine.reading:install_gsim_lt",
        ("GsimLogicTree", "shutil", "tempfile"),
    ),
    "openquake.commonlib.readinput": (
        "oq_runtime.engine.archives:install_readinput oq_runtime.engine.reads:install_readinput",
        ("unzip_rename", "extract_from_zip", "get_oqparam"),
    ),
    "openquake.engine.engine": (
        "oq_runtime.engine.queue:install_queue oq_runtime.engine.oq:install_run_calc "
        "oq_runtime.engine.kept:install_kept oq_runtime.engine.oq:install_create_jobs",
        ("poll_queue", "run_jobs", "create_jobs", "run_calc"),
    ),
    "openquake.baselib.sap": ("oq_runtime.engine.oq:install_sap", ("run",)),
    "openquake.commands.engine": (
        "oq_runtime.engine.oq:install_main oq_runtime.engine.abort:install_delete",
        ("main", "datastore", "abort", "del_calculation"),
    ),
    "openquake.commands.abort": ("oq_runtime.engine.abort:install_abort", ("main",)),
    "openquake.commands.dump": ("oq_runtime.engine.jobtable:install_dump", ("smart_save",)),
}
#: what is installed in worker processes, whose tasks are run by ``worker``
IN_WORKERS = (
    "openquake.baselib.zeromq",
    "openquake.baselib.hdf5",
    "openquake.hazardlib.gsim_lt",
)


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
    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _After(spec.loader, _install)
        return spec


def _install(module: ModuleType) -> None:
    installers, names = INSTALLERS[module.__name__]
    if missing := [name for name in names if not hasattr(module, name)]:
        raise versions.misfit(f"{module.__name__} has no {', '.join(missing)}")
    for one in installers.split():
        where, _, function = one.partition(":")
        getattr(importlib.import_module(where), function)(module)


def activate() -> None:
    """Register the import hook, once."""
    if not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook(IN_WORKERS if WORKER_VARIABLE in os.environ else INSTALLERS))
