"""The seam to the engine; the only module that knows the engine's internals.

Seams, the same from 3.23.5 to 3.26.2: the registry ``parallel.submit``, the name
``parallel.Socket``, ``parallel.host_cores``, ``parallel.get_return_ip``, ``Starmap.__init__`` and
``Starmap.shutdown``, and ``workerpool.WorkerMaster``. ``check_seams`` compares their signatures
with what is expected here. Everything that is not ``oq_distribute = zmq`` is left as it was.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import pickle
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import zmq

from oq_runtime import errors, launch, pool, protocol, transport
from oq_runtime.config import SESSION_VARIABLE, Config

SUPPORTED = ("3.23.5", "3.25.1", "3.26.2")
#: marks the receiver of a Starmap whose results come from the broker
RECEIVER = "oq-runtime://"
#: "ports" of our receivers; above 65535, so that they are never taken for real ones
FIRST_PORT = 100_000
#: seconds for the session to have its first worker slots, and then for the other nodes to answer
READY_SECS, OTHERS_SECS = 60.0, 3.0
BROKER_LOST = "the broker process of this job has ended; run the job again"

#: what is called or replaced, with its positional parameters
SEAMS = {
    "safely_call": ["func", "args", "task_no", "mon"],
    "zmq_submit": ["self", "func", "args", "monitor"],
    "get_return_ip": ["receiver_host"],
    "Starmap.submit": ["self", "args", "func"],
    "Starmap.share": ["self"],
    "Starmap.shutdown": [],
    "Result.__init__": ["self", "val", "mon", "tb_str", "msg"],
    "Socket.__init__": ["self", "end_point", "socket_type", "mode", "timeout"],
}


def check_seams(parallel: ModuleType) -> None:
    """Raise UnsupportedEngine unless the engine has the seams that this adapter was made for."""
    version = engine_version()
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
    wrong += [
        f"{name} is missing" for name in ("submit", "host_cores") if name not in vars(parallel)
    ]
    if wrong or version not in SUPPORTED:
        detail = f" ({'; '.join(wrong)})" if wrong else ""
        raise errors.UnsupportedEngine(
            f"OpenQuake engine {version} is not supported{detail}; "
            f"supported are {', '.join(SUPPORTED)}"
        )


def engine_version() -> str:
    """Return the version of the imported engine."""
    from openquake import baselib

    return str(baselib.__version__)


class Session:
    """This process's connection to its broker; one per engine process.

    :param directory: of the session's sockets
    """

    _current: Session | None = None

    def __init__(self, directory: Path) -> None:
        self.pid = os.getpid()
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = transport.dealer(self.context, f"ipc://{directory}/engine")
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.sending = zmq.Poller()
        self.sending.register(self.socket, zmq.POLLOUT)
        self.tasks = itertools.count()
        self.inbox: dict[int, deque[Any]] = {}
        self.broker: int | None = None
        self.slots = self._greet()

    @classmethod
    def current(cls) -> Session:
        """Return the session of this process, starting one where there is none."""
        if cls._current is None or cls._current.pid != os.getpid():
            inherited = os.environ.get(SESSION_VARIABLE)
            if inherited and Path(inherited).is_dir():
                directory = Path(inherited)
            else:
                from openquake.baselib import config

                directory = launch.start(Config.from_sections(config), os.getpid())
            cls._current = cls(directory)
        return cls._current

    def _greet(self) -> int:
        """Wait for the first nodes; return their slots."""
        started_s = time.monotonic()
        told = reasons = ""
        transport.send(self.socket, protocol.Hello(pid=self.pid, role="engine"))
        while (waited_s := time.monotonic() - started_s) < READY_SECS:
            if not self.poller.poll(100):
                continue
            message = protocol.decode(self.socket.recv_multipart()[0])
            if isinstance(message, protocol.Welcome) and self.broker is None:
                self.broker = transport.pidfd(message.pid)
                if self.broker is not None:
                    self.poller.register(self.broker, zmq.POLLIN)
                    self.sending.register(self.broker, zmq.POLLIN)
            if isinstance(message, protocol.Status):
                if message.note and message.note != told:
                    logging.warning("waiting: %s", told := message.note)
                if message.note:
                    started_s = time.monotonic()
                states = [node.state for node in message.nodes]
                reasons = "; ".join(f"{n.host}: {n.reason}" for n in message.nodes if n.reason)
                if set(states) == {"refused"}:
                    raise errors.NoWorkers(f"no node takes this job: {reasons}")
                if "leased" in states and ("calling" not in states or waited_s > OTHERS_SECS):
                    if reasons:
                        logging.warning("running without %s", reasons)
                    return sum(node.slots for node in message.nodes)
            time.sleep(0.01)
            transport.send(self.socket, protocol.StatusQuery())
        raise errors.NoWorkers(f"no worker slots after {READY_SECS:.0f} s: {reasons}")

    def send(self, message: protocol.Message, *frames: Any) -> None:
        """Send to the broker; raises BrokerLost when it is gone and the queue to it is full."""
        data = [protocol.encode(message), *frames]
        while True:
            try:
                self.socket.send_multipart(data, zmq.DONTWAIT, copy=False)
                return
            except zmq.Again:
                ready = dict(self.sending.poll())
                if self.broker in ready and self.socket not in ready:
                    raise errors.BrokerLost(BROKER_LOST) from None

    def status(self) -> list[tuple[str, int, int]]:
        """Return ``[(host, busy slots, slots), ...]``."""
        self.send(protocol.StatusQuery())
        while True:
            for message, _ in self.receive():
                if isinstance(message, protocol.Status):
                    nodes = [node for node in message.nodes if node.state == "leased"]
                    return [(node.host, node.busy, node.slots) for node in nodes]

    def receive(self) -> list[tuple[Any, Any]]:
        """Wait for messages; results go to the inbox of their map, others are returned.

        Raises BrokerLost when the broker process has ended.
        """
        ready = dict(self.poller.poll())
        rest = []
        while frames := transport.receive(self.socket):
            message = protocol.decode(frames[0].buffer)
            payload = frames[1].buffer if len(frames) > 1 else None
            if isinstance(message, (protocol.Delivered, protocol.Failed)):
                if message.map in self.inbox:
                    self.inbox[message.map].append((message, payload))
            else:
                rest.append((message, payload))
        if self.socket not in ready and self.broker in ready:
            raise errors.BrokerLost(BROKER_LOST)
        return rest

    def cancel(self) -> None:
        """Cancel whatever this process has submitted."""
        self.inbox.clear()
        try:
            self.send(protocol.Cancel())
        except errors.BrokerLost:
            Session._current = None


class Receiver:
    """Stands in for the engine's PULL socket of one Starmap: yields ``Result`` objects."""

    ports = itertools.count(FIRST_PORT)
    by_port: dict[int, Receiver] = {}
    parallel: ModuleType

    def __init__(self) -> None:
        self.port = next(self.ports)
        self.local: deque[Any] = deque()
        self.monitors: dict[int, Any] = {}  # task in the session -> monitor with its number

    def __enter__(self) -> Receiver:
        self.by_port[self.port] = self
        return self

    def __exit__(self, *_: object) -> None:
        self.by_port.pop(self.port, None)
        if Session._current is not None:
            Session._current.inbox.pop(self.port, None)

    def submit(self, func: Any, args: Any, task_no: int, monitor: Any) -> None:
        """Hand one task to the broker."""
        session = Session.current()
        session.inbox.setdefault(self.port, deque())
        name = getattr(func, "__name__", type(func).__name__)
        call = pickle.dumps((func, args), pickle.HIGHEST_PROTOCOL)
        payload = pickle.dumps((task_no, monitor, call), pickle.HIGHEST_PROTOCOL)
        task = next(session.tasks)
        mon = monitor.new(operation=f"total {name}", measuremem=False)
        mon.task_no = task_no
        self.monitors[task] = mon
        header = protocol.Submit(task=task, map=self.port, func=name, weight=float(len(payload)))
        session.send(header, payload)

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.local:
                yield self.local.popleft()
                continue
            session = Session.current()
            inbox = session.inbox.setdefault(self.port, deque())
            while not inbox:
                session.receive()
            message, payload = inbox.popleft()
            if isinstance(message, protocol.Failed):
                exc = getattr(errors, message.error)(message.text)
                yield self.parallel.Result(exc, self.monitors[message.task], "lost task\n")
                continue
            if message.last:
                session.send(protocol.Consumed(task=message.task))
                del self.monitors[message.task]
            yield pickle.loads(payload)


class LocalSocket:
    """Stands in for the PUSH socket of a task that runs inside the engine process."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def __enter__(self) -> LocalSocket:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, result: Any) -> None:
        # through pickle, as over a socket: what the task keeps must not change what was sent
        data = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        self.receiver.local.append(pickle.loads(data))


def install_parallel(parallel: Any) -> None:
    """Take over ``oq_distribute = zmq`` in the engine's parallel module."""
    check_seams(parallel)
    engine_socket, starmap = parallel.Socket, parallel.Starmap
    starmap_init = starmap.__init__
    shutdown = starmap.shutdown.__func__
    get_return_ip = parallel.get_return_ip
    Receiver.parallel = parallel

    def socket(end_point: str, socket_type: int, mode: str, timeout: int = 60) -> Any:
        if end_point == RECEIVER:
            return Receiver()
        port = re.search(r":(\d+)$", end_point) if socket_type == zmq.PUSH else None
        if port and (receiver := Receiver.by_port.get(int(port.group(1)))):
            return LocalSocket(receiver)
        return engine_socket(end_point, socket_type, mode, timeout)

    def submit(self: Any, func: Any, args: Any, monitor: Any) -> None:
        self.socket.submit(func, args, self.task_no, monitor)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        starmap_init(self, *args, **kwargs)
        if self.distribute == "zmq":
            self.receiver = RECEIVER

    def stop(cls: Any) -> None:
        if Session._current is not None and Session._current.pid == os.getpid():
            Session._current.cancel()
        shutdown(cls)

    def return_ip(receiver_host: str) -> Any:
        # the engine resolves its own host name, for sockets that it does not open here
        return get_return_ip(receiver_host) if receiver_host else "127.0.0.1"

    parallel.Socket = socket
    parallel.submit["zmq"] = submit
    parallel.get_return_ip = return_ip
    # the engine would ask each of these hosts for its memory, and wait a minute for a dead one
    parallel.host_cores[:] = []
    starmap.__init__ = init
    starmap.shutdown = classmethod(stop)
    logging.getLogger("oq_runtime").debug("the runtime is active")


def install_workerpool(workerpool: Any) -> None:
    """Replace the engine's client of its own worker pools."""
    engine_master = workerpool.WorkerMaster

    class WorkerMaster:
        """Answers in the engine's own terms: for the session of a job, or for the whole cluster.

        The engine makes one with a job id while it runs a job; ``oq workers`` makes one with the
        configuration.
        """

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if os.environ.get("OQ_DISTRIBUTE") != "zmq":
                return engine_master(*args, **kwargs)
            return super().__new__(cls)

        def __init__(self, job: Any = -1, *_: Any, **__: Any) -> None:
            from openquake.baselib import config

            cluster = None if isinstance(job, int) else Config.from_sections(config).cluster
            self.pool = pool.Pool(cluster) if cluster else None

        def status(self) -> list[tuple[str, int, int]]:
            return self.pool.triples("status") if self.pool else Session.current().status()

        def wait(self, seconds: int = 120) -> list[tuple[str, int, int]]:
            return self.pool.wait(seconds) if self.pool else self.status()

        def start(self) -> str:
            return f"started {self.pool.triples('start') if self.pool else self.status()}"

        def stop(self) -> str:
            """Stop taking tasks; in a job, cancel its own and touch the workers of nobody else."""
            if self.pool:
                return f"stopped {self.pool.triples('stop')}"
            if Session._current is not None:
                Session._current.cancel()
            return "released"

        def kill(self) -> str:
            return f"killed {self.pool.triples('kill')}" if self.pool else self.stop()

        def restart(self) -> str:
            if not self.pool:
                return "nothing to restart: the workers belong to this job"
            self.kill()
            return self.start()

    workerpool.WorkerMaster = WorkerMaster
