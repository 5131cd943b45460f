"""A worker process: runs one task at a time in the engine, spools what it yields.

    agent --Run(call)--> worker: engine's safely_call -> spool --Ended--> agent

The engine's own ``safely_call`` does the work; ours are the socket through which it answers and the
pickles that it makes, whose big buffers stay apart. Every task gets arguments of its own: blobs
are mapped privately, so that what one task writes is seen by no other.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import traceback
from pathlib import Path
from typing import Any

from oq_runtime.config import ATTEMPT_VARIABLE, FAULT_VARIABLE
from oq_runtime.node import memory as node_memory
from oq_runtime.node.channel import Channel
from oq_runtime.node.mappings import Mappings
from oq_runtime.node.meter import Meter
from oq_runtime.node.spool import Spool
from oq_runtime.wire import payload, protocol


class NoRoom(BaseException):
    """The spool is full; not an Exception, which would become the task's result."""


class Faults:
    """Deaths on demand for the tests: ``POINT:TASK:ATTEMPTS`` in the environment."""

    def __init__(self) -> None:
        point, _, rest = os.environ.get(FAULT_VARIABLE, "").partition(":")
        task, _, attempts = rest.partition(":")
        self.point, self.task, self.attempts = point, int(task or -1), int(attempts or 0)

    def at(self, point: str, run: protocol.Run) -> None:
        if point == self.point and run.task == self.task and run.attempt <= self.attempts:
            os.kill(os.getpid(), signal.SIGKILL)


class Stream:
    """Stands in for the engine's ``Socket`` in the worker: each result becomes a part."""

    run: protocol.Run
    spool: Spool
    faults: Faults

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, result: Any) -> None:
        cls = type(self)
        frames = payload.dump(result)
        if result.msg == "TASK_ENDED":
            cls.faults.at("after_last", cls.run)
        try:
            cls.spool.add(frames)
        except OSError as exc:
            raise NoRoom(f"no room for its results in {cls.spool.places[1]}: {exc}") from exc
        if cls.spool.parts == 1:
            cls.faults.at("after_first", cls.run)


def execute(parallel: Any, mappings: Mappings, run: protocol.Run) -> None:
    """Run one task; whatever happens in Python becomes a result, as the engine expects."""
    mon = None
    task_no = 0
    try:
        task_no, mon, items = pickle.loads(run.call)
        func, *args = map(payload.load, _frames(items, mappings.views(run.paths)))
        parallel.safely_call(func.unpickle(), args, task_no, mon)
    except Exception as exc:
        # outside the engine's own net: arguments or a result that pickle refuses
        if mon is None:
            mon = parallel.dummy_mon
        mon = mon.new(operation="total task", measuremem=False)
        mon.task_no = task_no
        text = "".join(traceback.format_tb(exc.__traceback__))
        safe = RuntimeError(f"{type(exc).__name__}: {exc}")
        Stream().send(parallel.Result(safe, mon, text))
        end = parallel.Result(None, mon, msg="TASK_ENDED")
        end.pik = parallel.FakePickle(0)
        Stream().send(end)


def _frames(items: list[Any], blobs: list[memoryview]) -> list[list[payload.Buffer]]:
    """Return the frames of each item of a call: they are in it, or in the blob of that number."""
    found: list[list[payload.Buffer]] = []
    for item in items:
        if isinstance(item, int):
            [frames] = payload.parts(blobs[item])
            found.append([*frames])
        else:
            found.append(item)
    return found


def prepare() -> None:
    """Import the engine and put ours in the place of its socket and its pickles."""
    from openquake.baselib import config, parallel

    parallel.Socket = Stream
    if not config.distribution.get("compress"):  # whoever asks for it gets the engine's own
        parallel.Pickled = payload.Pickled
    if hasattr(parallel, "scratch_dir"):
        # engine 3.23 would leave rates in a file of this node, where only this job may find them
        config.directory.custom_tmp = ""


def work(channel: int, *directories: str) -> None:
    """Run the tasks that come, until the agent has ended.

    :param channel: descriptor of the socket to the agent
    :param directories: for results in shared memory and on the disk
    """
    from openquake.baselib import parallel, performance

    node_memory.volunteer()
    parallel.init_workers()
    own_memory = node_memory.Resident(os.getpid())
    performance.memory_rss = lambda _: own_memory.nbytes  # the engine's takes 29 µs, this 2
    memory, disk = map(Path, directories)
    agent, mappings = Channel(socket.socket(fileno=channel)), Mappings()
    Stream.faults = Faults()
    meter = Meter()
    agent.send(protocol.encode(protocol.Ready(pid=os.getpid())))
    for message in agent:
        run = protocol.decode(message)
        name = f"{run.job}-{run.task}-{run.attempt}"
        spool = Spool(
            name,
            (memory, disk),
            inline_bytes=protocol.INLINE_BYTES,
            memory_bytes=run.spool_bytes,
        )
        Stream.run, Stream.spool = run, spool
        os.environ[ATTEMPT_VARIABLE] = str(run.attempt)
        Stream.faults.at("before_start", run)
        no_room = ""
        meter.start()
        try:
            execute(parallel, mappings, run)
        except NoRoom as exc:
            no_room = str(exc)
        mappings.task_ended()
        if no_room:
            spool.discard()
            lost = protocol.NoRoom(job=run.job, task=run.task, attempt=run.attempt, reason=no_room)
            agent.send(protocol.encode(lost))
            continue
        Stream.faults.at("before_end", run)
        path, body = spool.finish()
        ended = protocol.Ended(
            job=run.job,
            task=run.task,
            attempt=run.attempt,
            parts=spool.parts,
            nbytes=spool.nbytes,
            path=path,
            body=body,
            usage=meter.read(run.slot),
        )
        agent.send(protocol.encode(ended))
