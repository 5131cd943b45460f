"""Which parameters of a calculation are looked at, in the engine's process and in tasks.

For two jobs that differ in some parameters everything is the same until somebody looks at one of
these. So while a ``Collector`` collects, it is given the name of each attribute that is read of an
``OqParam``, whichever of its copies that is. To write all of them down is not to look at them;
where somebody goes through all for another reason, every parameter counts as looked at.

A task is asked to collect by its monitor, which has a ``Request``: pickled, that is what a worker
begins to collect with; a collector is pickled as the names it has.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

#: stands for all parameters
ALL = "*"
#: ends of the file, and function, of what goes through all parameters and decides nothing by them
WRITERS = frozenset(
    {
        ("baselib/hdf5.py", "dumps"),
        ("commonlib/oqvalidation.py", "to_ini"),
        ("commonlib/oqvalidation.py", "from_parent"),
        ("commonlib/oqvalidation.py", "<dictcomp>"),
        ("commonlib/readinput.py", "get_checksum32"),  # of engine 3.23
        ("/copy.py", "_reconstruct"),
    }
)
#: parameters that a ``ContextMaker`` keeps for whoever asks it, which counts instead
CARRIED = frozenset({"poes"})
_current: Collector | None = None


class Collector:
    """Collects the names of parameters that this process looks at for a job.

    What a task has found, others that the process runs later may find in its caches. So it goes on
    collecting for all tasks of a job.

    :param job: by which collectors of one job are known
    """

    def __init__(self, job: str) -> None:
        self.job = job
        self.names: set[str] = set()
        self.paused = 0

    def add(self, name: str) -> None:
        if not self.paused:
            self.names.add(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (sorted(self.names),)


class Request:
    """Pickled, what has the process that loads it collect.

    :param collector: of the job
    """

    def __init__(self, collector: Collector) -> None:
        self.job = collector.job

    def __reduce__(self) -> tuple[Any, ...]:
        return begin, (self.job,)


def begin(job: str = "") -> Collector:
    """Collect the names of the parameters that this process looks at from now on.

    :param job: of a task; without it, another one begins
    """
    from openquake.commonlib.oqvalidation import OqParam
    from openquake.hazardlib import contexts

    global _current
    if _current is None:
        OqParam.__getattribute__ = _read
        for cls in vars(contexts).values():  # some take the attributes of others
            if isinstance(cls, type) and cls.__name__.endswith("Maker"):
                for name in CARRIED:
                    setattr(cls, name, Carried(name))
    if _current is None or _current.job != job:
        _current = Collector(job or secrets.token_hex(8))
    return _current


def install_readinput(readinput: Any) -> None:
    """Have parameters that are checked not count: what comes of it is among them, and compared."""
    get_oqparam: Callable[..., Any] = readinput.get_oqparam

    def checked(*args: Any, **kwargs: Any) -> Any:
        with _pause():
            return get_oqparam(*args, **kwargs)

    readinput.get_oqparam = checked


@contextlib.contextmanager
def _pause() -> Iterator[None]:
    if (collector := _current) is None:
        yield
        return
    collector.paused += 1
    try:
        yield
    finally:
        collector.paused -= 1


def _note(name: str) -> None:
    if _current is not None:
        _current.add(name)


def _read(self: Any, name: str) -> Any:
    """Stand in for ``OqParam.__getattribute__``."""
    if name == "__dict__":
        found = object.__getattribute__(self, name)
        if not isinstance(found, Watched):
            found = Watched(found)
            object.__setattr__(self, name, found)
        return found
    if not name.startswith("__"):
        _note(name)
    return object.__getattribute__(self, name)


class Watched(dict[str, Any]):
    """The ``__dict__`` of an ``OqParam``, for those who look there."""

    def __getitem__(self, name: str) -> Any:
        _looked(name, sys._getframe(1))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        _looked(name, sys._getframe(1))
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        _looked(str(name), sys._getframe(1))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        _looked(ALL, sys._getframe(1))
        return super().__iter__()

    def keys(self) -> Any:
        _looked(ALL, sys._getframe(1))
        return super().keys()

    def values(self) -> Any:
        _looked(ALL, sys._getframe(1))
        return super().values()

    def items(self) -> Any:
        _looked(ALL, sys._getframe(1))
        return super().items()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(dict.items(self)),)


def _looked(name: str, frame: FrameType) -> None:
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    if name in CARRIED and file.endswith("hazardlib/contexts.py"):
        return
    if not any(file.endswith(end) and function == writer for end, writer in WRITERS):
        _note(name)


class Carried:
    """An attribute of a ``ContextMaker``, or of what is made of one, that is a parameter."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, obj: Any, owner: type) -> Any:
        if obj is None:
            return self
        _note(self.name)
        try:
            return vars(obj)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, obj: Any, value: Any) -> None:
        vars(obj)[self.name] = value
