"""A worker process: imports the engine, runs one task at a time, streams what it yields.

    agent --Run(payload)--> worker: engine's safely_call --Part, Part, ..., Ended--> agent

The engine's own ``safely_call`` does the work; only the socket through which it answers is ours.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import traceback
from typing import Any

import zmq

from oq_runtime import protocol, transport
from oq_runtime.config import FAULT_VARIABLE


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
    """Stands in for the engine's ``Socket`` in the worker: each result becomes a Part."""

    agent: zmq.Socket[Any]
    run: protocol.Run
    faults: Faults
    sent = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, result: Any) -> None:
        cls = type(self)
        data = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        if result.msg == "TASK_ENDED":
            cls.faults.at("after_last", cls.run)
        run = cls.run
        part = protocol.Part(job=run.job, task=run.task, attempt=run.attempt)
        transport.send(cls.agent, part, data)
        cls.sent += 1
        if cls.sent == 1:
            cls.faults.at("after_first", run)


def execute(parallel: Any, run: protocol.Run, payload: memoryview) -> None:
    """Run one task; whatever happens in Python becomes a result, as the engine expects."""
    mon = None
    task_no = 0
    try:
        task_no, mon, call = pickle.loads(payload)
        func, args = pickle.loads(call)
        parallel.safely_call(func, args, task_no, mon)
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


def main() -> None:
    faulthandler.enable()
    transport.die_with_parent()
    url, agent_pid = sys.argv[1], int(sys.argv[2])
    if os.getppid() != agent_pid:
        sys.exit("the agent has ended")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from openquake.baselib import parallel

    parallel.init_workers()
    parallel.Socket = Stream
    context: zmq.Context[Any] = zmq.Context()
    Stream.agent = agent = transport.dealer(context, url)
    Stream.faults = Faults()
    transport.send(agent, protocol.Ready(pid=os.getpid()))
    while True:
        frames = agent.recv_multipart(copy=False)
        run = protocol.decode(frames[0].buffer)
        Stream.run, Stream.sent = run, 0
        started = protocol.Started(job=run.job, task=run.task, attempt=run.attempt, pid=os.getpid())
        transport.send(agent, started)
        Stream.faults.at("before_start", run)
        execute(parallel, run, frames[1].buffer)
        Stream.faults.at("before_end", run)
        ended = protocol.Ended(
            job=run.job, task=run.task, attempt=run.attempt, parts=Stream.sent, nbytes=0
        )
        transport.send(agent, ended)


if __name__ == "__main__":
    main()
