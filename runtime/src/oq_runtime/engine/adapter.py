"""The seam to the engine; with ``worker`` the only module that knows the engine's internals.

Seams, the same from 3.23.5 to 3.26.2: ``parallel.Socket``, ``parallel.host_cores``,
``parallel.get_return_ip``, ``Starmap.submit``, ``Starmap._loop``, ``Starmap.shutdown``, and
``workerpool.WorkerMaster``. ``check_seams`` compares their signatures with what is expected here.
What is not ``oq_distribute = zmq`` runs as it did, but for where its results come in (``inbox``).
Not covered: how tasks travel (``session``).
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any

import numpy

from oq_runtime.engine import versions
from oq_runtime.engine.history import History
from oq_runtime.engine.inbox import SCHEME, Inbox, PoolSockets
from oq_runtime.engine.reads import Request
from oq_runtime.engine.records import Records
from oq_runtime.session.client import Session, Unchanged
from oq_runtime.wire import payload

#: tasks, and bytes of their big arguments, that are under way at a time beyond ``Starmap.CT``
LIVE_TASKS, LIVE_BYTES = 4096, 256 << 20

#: seconds for which the engine's check of the memory holds
CHECK_SECS = 0.1

#: what is called or replaced, with its positional parameters
SEAMS = {
    "safely_call": ["func", "args", "task_no", "mon"],
    "getargnames": ["task_func"],
    "check_mem_usage": ["soft_percent", "hard_percent"],
    "get_return_ip": ["receiver_host"],
    "Starmap.submit": ["self", "args", "func"],
    "Starmap._loop": ["self"],
    "Starmap.log_percent": ["self"],
    "Starmap.share": ["self"],
    "Starmap.unlink": ["self"],
    "Starmap.shutdown": [],
    "Monitor.get_data": ["self"],
    "Pickled.__init__": ["self", "obj"],
    "Result.__init__": ["self", "val", "mon", "tb_str", "msg"],
    "Socket.__init__": ["self", "end_point", "socket_type", "mode", "timeout"],
}


def check_seams(parallel: ModuleType) -> None:
    """Raise UnsupportedEngine unless the engine has the seams that this adapter was made for."""
    wrong = []
    for path, expected in SEAMS.items():
        found: Any = parallel
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is None:
            wrong.append(f"{path} is missing")
            continue
        names = [
            p.name
            for p in inspect.signature(found).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if names != expected:
            wrong.append(f"{path}({', '.join(names)})")
    if wrong:
        raise versions.misfit("; ".join(wrong))


class Receiver:
    """Stands in for the engine's PULL socket of one Starmap, and for its loop over results."""

    numbers = itertools.count()
    parallel: Any

    def __init__(self) -> None:
        versions.warn()
        self.map = next(self.numbers)
        self.tasks: dict[int, tuple[int, str]] = {}  # task in the session -> number and name
        self.argnames: dict[Any, list[str]] = {}
        self.functions: dict[Any, list[payload.Buffer]] = {}  # their frames

    @classmethod
    def of(cls, starmap: Any) -> Receiver:
        """Return the receiver of a Starmap, which gets it with its first task."""
        if not hasattr(starmap, "socket"):
            attach(starmap, cls(), SCHEME)
        receiver: Receiver = starmap.socket
        return receiver

    def submit(self, starmap: Any, args: Sequence[Any], func: Any, unchanged: Unchanged) -> None:
        """Hand one task to the broker, with what the engine notes of it."""
        name = getattr(func, "__name__", type(func).__name__)
        if func not in self.argnames:
            self.argnames[func] = self.parallel.getargnames(func)[:-1]
        history = History.current()
        number = starmap.task_no
        held = history is not None and history.submitting(self.map, number, func, args, unchanged)
        if history is not None and history.collector is not None:
            starmap.monitor.looks = Request(history.collector)
        task, (_, *sizes) = Session.current().submit(
            self.map,
            name,
            (number, starmap.monitor),
            [func, *args],
            dump=self._dump,
            weight=float(getattr(args[0], "weight", 1.0)),
            unchanged=unchanged,
            number=number,
            held=held,
        )
        if history is not None:
            history.submitted(self.map, number, task, args, unchanged)
        starmap.sent[name] += dict(zip(self.argnames[func], sizes, strict=False))
        self.tasks[task] = number, name
        starmap.tasks.append(number)
        starmap.task_no += 1

    def _dump(self, obj: Any) -> list[payload.Buffer]:
        """Return the frames of an argument, which the worker finds pickled as by the engine."""
        if isinstance(obj, FunctionType):  # pickled by its name, whatever happens meanwhile
            if obj not in self.functions:
                self.functions[obj] = self._pickle(obj)
            return self.functions[obj]
        return self._pickle(obj)

    def _pickle(self, obj: Any) -> list[payload.Buffer]:
        if not hasattr(obj, "unpickle"):
            compress = self.parallel.config.distribution.get("compress")
            obj = (self.parallel.Pickled if compress else payload.Pickled)(obj)
        return payload.dump(obj)

    def refill(self, starmap: Any) -> None:
        """Submit what waits in the Starmap, as far as it is good to have it under way.

        Nothing of the engine runs between the tasks submitted here, so no argument can change.
        """
        queue, unchanged = starmap.task_queue, Unchanged()
        if len(starmap.tasks) > LIVE_TASKS // 2:
            return
        taken = 0
        for func, args in queue:
            live = len(starmap.tasks)
            blobs = Session.current().blobs
            if live >= starmap.CT and (live >= LIVE_TASKS or blobs.needed_bytes >= LIVE_BYTES):
                break
            self.submit(starmap, args, func, unchanged)
            taken += 1
        del queue[:taken]

    def results(self) -> Iterator[tuple[int, Any, Exception | None]]:
        """Yield task, objects of its attempt, and error of each task: those of before first."""
        history = History.current()
        if history is None:
            yield from Session.current().results(self.map)
        else:
            yield from history.replay(self.map)
            yield from Session.current().results(self.map, history.consumed)

    def loop(self, starmap: Any) -> Iterator[Any]:
        """Yield the results of all tasks, subtasks included, and keep the engine's records."""
        records = Records(self.parallel, starmap.h5)
        history = History.current()
        try:
            for task, objects, error in self.results():
                number, name = self.tasks.pop(task)
                if error is not None:
                    records.write(starmap.sent)
                    mon = starmap.monitor.new(operation=f"total {name}", measuremem=False)
                    mon.task_no = number
                    yield self.parallel.Result(error, mon, "lost task\n")
                for result in objects:
                    starmap.log_percent()
                    if result.msg == "TASK_ENDED":
                        starmap.busytime += {result.workerid: result.mon.duration}
                        if history is not None:
                            history.ended(self.map, number, result.mon)
                        operation = result.mon.operation.removeprefix("total ")
                        if operation == "split_task":  # of engine 3.23
                            operation = f"{starmap.name}:{operation}"
                        records.add(result, operation, starmap.sent)
                    elif result.func:
                        starmap.task_queue.append((result.func, result.pik))
                    else:
                        if result.tb_str:  # the engine will raise it, and not come back
                            records.write(starmap.sent)
                            if history is not None:
                                history.failed()
                        starmap.n_out += 1
                        yield result
                starmap.tasks.remove(number)
                self.refill(starmap)
                if not starmap.tasks:
                    break
            records.write(starmap.sent)
        finally:
            if session := Session.existing():
                session.close_map(self.map)


class MemoryCheck:
    """The engine's check of this machine's memory, which it makes for every result.

    :param check: the engine's function; its answer holds for CHECK_SECS
    """

    def __init__(self, check: Callable[[], Any]) -> None:
        self.check = check
        self.next_s = 0.0
        self.found: Any = None

    def __call__(self) -> Any:
        if time.monotonic() > self.next_s:
            self.found = self.check()
            self.next_s = time.monotonic() + CHECK_SECS
        return self.found


def attach(starmap: Any, socket: Any, url: str) -> None:
    """Give a Starmap what the engine gives it with its first task: where results come in."""
    type(starmap).running_tasks = starmap.tasks
    starmap.socket = socket
    starmap.monitor.shared = starmap._shared
    starmap.monitor.backurl = url


def install_parallel(parallel: Any) -> None:
    """Take over ``oq_distribute = zmq`` in the engine's parallel module, and all its receivers."""
    check_seams(parallel)
    engine_socket, starmap = parallel.Socket, parallel.Starmap
    engine_init, engine_submit, engine_loop = starmap.__init__, starmap.submit, starmap._loop
    engine_shutdown = starmap.shutdown.__func__
    get_return_ip = parallel.get_return_ip
    pool_sockets = PoolSockets(engine_socket)
    # engine 3.23 can be told to run one task only, to debug it
    debugs = "OQ_TASK_NO" in engine_submit.__code__.co_consts and "OQ_TASK_NO" in os.environ
    Receiver.parallel = parallel

    def where(self: Any) -> str:
        """Return the kind of distribution as the engine decides it for each task."""
        return "no" if self.num_tasks == 1 or debugs else str(self.distribute)

    def open_socket(end_point: str, socket_type: int, mode: str, timeout: int = 60) -> Any:
        # of a task in this process
        return Inbox.by_url.get(end_point) or engine_socket(end_point, socket_type, mode, timeout)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        engine_init(self, *args, **kwargs)
        # the engine keeps it in the class, where the next Starmap changes it
        self.distribute = type(self).distribute

    def submit(self: Any, args: Any, func: Any = None) -> None:
        if where(self) == "zmq":
            Receiver.of(self).submit(self, args, func or self.task_func, Unchanged())
            return
        if not hasattr(self, "socket"):
            if where(self) == "no":
                inbox = Inbox()
                attach(self, inbox, inbox.url)
            elif where(self) != "slurm":
                attach(self, *pool_sockets.open())
        engine_submit(self, args, func)

    def loop(self: Any) -> Iterator[Any]:
        if where(self) != "zmq":
            yield from engine_loop(self)
            return
        self.busytime = parallel.AccumDict(accum=[])
        if self.task_queue:
            Receiver.of(self).refill(self)
        if not self.tasks:
            return
        nbytes = sum(self.sent[self.task_func.__name__].values())
        size = parallel.humansize(nbytes)
        logging.warning("Sent %d %s tasks, %s", len(self.tasks), self.name, size)
        yield from self.socket.loop(self)
        self.log_percent()
        self.unlink()
        if self.expected_outputs:
            assert self.expected_outputs == self.n_out, (self.expected_outputs, self.n_out)
        if len(self.busytime) < 2 or getattr(self.h5, "mode", "r") == "r":
            return
        if hasattr(self.monitor, "save_starmap_info"):  # from 3.26 on
            times = numpy.array(list(self.busytime.values()))
            self.monitor.save_starmap_info(self.h5, self.name, times)

    def shutdown(cls: Any) -> None:
        if session := Session.existing():
            session.cancel()
        engine_shutdown(cls)

    def return_ip(receiver_host: str) -> Any:
        # the engine resolves its own host name, for sockets that it does not open here
        return get_return_ip(receiver_host) if receiver_host else "127.0.0.1"

    parallel.Socket = open_socket
    parallel.check_mem_usage = MemoryCheck(parallel.check_mem_usage)
    parallel.get_return_ip = return_ip
    # the engine would ask each of these hosts for its memory, and wait a minute for a dead one
    parallel.host_cores[:] = []
    starmap.__init__ = init
    starmap.submit = submit
    starmap._loop = loop
    starmap.shutdown = classmethod(shutdown)
    logging.getLogger("oq_runtime").debug("the runtime is active")
