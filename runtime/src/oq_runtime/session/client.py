"""The engine process's side of a session: tasks to the broker, whole attempts back.

    engine --Submit(call)--> broker        big arguments lie in files, see ``blobs``
    engine <--Delivered----- broker        so do big results

Not covered: what the engine makes of them (``adapter``).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import zmq

from oq_runtime import errors, processes
from oq_runtime.config import SESSION_VARIABLE, Config
from oq_runtime.files import crashes, private, spares
from oq_runtime.session import launch
from oq_runtime.session.blobs import Blobs
from oq_runtime.text import grouped
from oq_runtime.wire import payload, protocol, transport
from oq_runtime.wire.payload import Buffer
from oq_runtime.wire.protocol import NodeState

#: seconds for the session to have its first worker slots (more if no_nodes_limit_s is more), and
#: then for the other nodes to answer
READY_SECS, OTHERS_SECS = 60.0, 3.0
#: ended tasks of which the broker is told in one message
CONSUMED_TASKS = 32

Answer = TypeVar("Answer", bound=protocol.Message)
#: id of an argument -> the argument itself, so that the id stays its own, and its blob
Unchanged = dict[int, tuple[object, protocol.Blob]]


class Session:
    """This process's connection to its broker; one per engine process.

    :param directory: of the session's sockets
    """

    _current: Session | None = None

    def __init__(self, directory: Path) -> None:
        self.pid = os.getpid()
        self.name = directory.name
        self.directory = directory
        self.told: set[str] = set()  # processes whose end is in the log
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = transport.dealer(self.context, f"ipc://{directory}/engine")
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.sending = zmq.Poller()
        self.sending.register(self.socket, zmq.POLLOUT)
        self.blobs = Blobs(private.memory_of(directory), directory)
        self.needs: dict[
            int, dict[int, list[bytes]]
        ] = {}  # map -> live task -> digests of its blobs
        self.consumed: list[int] = []
        self.held: dict[int, protocol.Submit] = {}  # tasks that are not to be computed yet
        self.tasks = itertools.count()
        self.inbox: dict[int, deque[Any]] = {}
        self.broker: int | None = None
        self.slots = self._greet()

    @classmethod
    def current(cls) -> Session:
        """Return the session of this process, starting one where there is none."""
        if cls._current is None or cls._current.pid != os.getpid():
            inherited = os.environ.get(SESSION_VARIABLE)
            # one that has ended leaves its name to anybody
            if inherited and private.is_own(Path(inherited)):
                directory = Path(inherited)
            else:
                from openquake.baselib import config

                directory = launch.start(Config.from_sections(config), os.getpid())
            cls._current = cls(directory)
        return cls._current

    @classmethod
    def existing(cls) -> Session | None:
        """Return the session of this process, if there is one."""
        current = cls._current
        return current if current is not None and current.pid == os.getpid() else None

    def _greet(self) -> int:
        """Wait for the first nodes; return their slots."""
        started_s, limit_s = time.monotonic(), READY_SECS
        told = reasons = ""
        transport.send(self.socket, protocol.Hello(pid=self.pid, role="engine"))
        while (waited_s := time.monotonic() - started_s) < limit_s:
            ready = dict(self.poller.poll(100))
            if not ready:
                continue
            if (frames := transport.receive(self.socket)) is None:
                raise self._broker_lost()
            message = protocol.decode(frames[0])
            if isinstance(message, protocol.Welcome) and self.broker is None:
                limit_s = max(limit_s, message.no_nodes_limit_s)
                self.broker = processes.pidfd(message.pid)
                if self.broker is not None:
                    self.poller.register(self.broker, zmq.POLLIN)
                    self.sending.register(self.broker, zmq.POLLIN)
            if isinstance(message, protocol.Status):
                if message.note and message.note != told:
                    logging.warning("waiting: %s", told := message.note)
                if message.note:
                    started_s = time.monotonic()
                states = [node.state for node in message.nodes]
                pairs = [(n.host, n.reason) for n in message.nodes if n.reason]
                reasons = "; ".join(grouped(pairs))
                if set(states) == {NodeState.REFUSED}:
                    raise errors.NoWorkers(f"no node takes this job: {reasons}")
                settled = NodeState.CALLING not in states or waited_s > OTHERS_SECS
                if NodeState.LEASED in states and settled:
                    if reasons:
                        logging.warning("running without %s", reasons)
                    return sum(node.slots for node in message.nodes)
            time.sleep(0.01)
            transport.send(self.socket, protocol.StatusQuery())
        why = reasons or "no agent has answered"
        raise errors.NoWorkers(f"no worker slots after {limit_s:.0f} s: {why}")

    # ---- tasks out

    def submit(
        self,
        map_: int,
        name: str,
        context: tuple[Any, ...],
        arguments: Sequence[Any],
        *,
        dump: Callable[[Any], list[Buffer]],
        weight: float,
        unchanged: Unchanged,
        number: int = 0,
        held: bool = False,
    ) -> tuple[int, list[int]]:
        """Hand one task to the broker; return its number and the bytes of each argument.

        :param map_: whose inbox gets the results
        :param name: of the task function, for people
        :param context: what is pickled in front of the arguments
        :param arguments: objects
        :param dump: makes frames of an object, see ``payload.dump``
        :param weight: tasks with a higher one go first
        :param number: the engine's of the task, for people
        :param held: whether it waits for ``answered`` or ``send_held``
        :param unchanged: big arguments that cannot have changed since they were sent, and are not
            pickled again; those of this call are added
        :raises OSError: when there is no room for the big ones
        :raises CallTooBig: when the rest does not fit into a message
        """
        items: list[Any] = []
        sizes: list[int] = []
        for obj in arguments:
            if id(obj) in unchanged:
                items.append(None)
                sizes.append(unchanged[id(obj)][1].nbytes)
            else:
                items.append(dump(obj))
                sizes.append(payload.nbytes(items[-1]))
        inline = sum(sizes)
        blobs: list[protocol.Blob] = []
        # the biggest first, until the rest fits into a message
        for position in sorted(range(len(items)), key=sizes.__getitem__, reverse=True):
            frames, obj = items[position], arguments[position]
            if frames is None:
                blob = self.blobs.again(unchanged[id(obj)][1].digest)
            elif inline > protocol.INLINE_BYTES:
                blob = self.blobs.add(frames, obj)
                unchanged[id(obj)] = obj, blob
            else:
                # writable in the worker, as pickle itself would make them
                items[position] = [frames[0], *map(bytearray, frames[1:])]
                continue
            items[position] = len(blobs)
            blobs.append(blob)
            inline -= sizes[position]
        call = pickle.dumps((*context, items), payload.PROTOCOL)
        if len(call) > protocol.CALL_BYTES:
            raise errors.CallTooBig(
                f"the call of a task {name} takes {len(call)} bytes besides its big arguments; "
                f"at most {protocol.CALL_BYTES}: pass less with the monitor"
            )
        task = next(self.tasks)
        self.needs.setdefault(map_, {})[task] = [blob.digest for blob in blobs]
        self.inbox.setdefault(map_, deque())  # before its results can come
        message = protocol.Submit(
            task=task,
            number=number,
            map=map_,
            func=name,
            call=call,
            weight=weight,
            blobs=blobs,
        )
        if held:
            self.held[task] = message
        else:
            self.send(message)
        return task, sizes

    def answered(self, task: int) -> None:
        """Forget a held task: its result is known."""
        self._forget(self.held.pop(task).map, task)

    def send_held(self) -> None:
        """Hand the held tasks to the broker after all."""
        held, self.held = self.held, {}
        for message in held.values():
            self.send(message)

    def send(self, message: protocol.Message) -> None:
        """Send to the broker; raises BrokerLost when it is gone and the queue to it is full."""
        data = [protocol.encode(message)]
        while not transport.send_frames(self.socket, data):
            ready = dict(self.sending.poll())
            if self.broker in ready and self.socket not in ready:
                raise self._broker_lost()

    def _broker_lost(self) -> errors.BrokerLost:
        """Return the error for a broker that is gone; what its log says goes to that of the job."""
        crash = crashes.find(self.directory, "broker")
        self._tell("broker", crash)
        what = f"has crashed: {crash}" if crash else "has ended"
        return errors.BrokerLost(f"the broker process of this job {what}; run the job again")

    def _tell(self, name: str, crash: crashes.Crash | None) -> None:
        """Put the end of a crashed process's log into that of the job, once."""
        if crash and name not in self.told:
            self.told.add(name)
            logging.error("the %s of this job has ended; its log says:\n%s", name, crash.text)

    # ---- results in

    def results(
        self, map_: int, keep: Callable[[int, Buffer], None] | None = None
    ) -> Iterator[Any]:
        """Yield ``(task, objects of its attempt, error or None)`` for each task of a map.

        :param keep: is given the task and the body of each attempt before its objects are made
        """
        inbox = self.inbox[map_]
        while True:
            while not inbox:
                self._tell_consumed()
                self.receive()
            message = inbox.popleft()
            if isinstance(message, protocol.Failed):
                self._ended(message)
                if message.error == errors.NoWorkers.__name__:
                    self._tell("agent", crashes.find(self.directory, "agent"))
                yield message.task, (), getattr(errors, message.error)(message.text)
                continue
            if keep is not None:
                path = message.path
                kept = payload.map_file(path, private=True) if path else message.body
                keep(message.task, kept)
            if message.path:
                view = spares.consume(Path(message.path), kept=keep is not None)
            else:
                view = payload.writable(message.body)
            self._ended(message)
            yield message.task, map(payload.load, payload.parts(view)), None

    def _ended(self, message: protocol.Delivered | protocol.Failed) -> None:
        self._forget(message.map, message.task)
        self.consumed.append(message.task)
        if len(self.consumed) >= CONSUMED_TASKS:
            self._tell_consumed()

    def _forget(self, map_: int, task: int) -> None:
        if digests := self.needs[map_].pop(task):
            self.blobs.done(Counter(digests))

    def _tell_consumed(self) -> None:
        if self.consumed:
            self.send(protocol.Consumed(tasks=self.consumed))
            self.consumed = []

    def receive(self) -> list[Any]:
        """Wait for messages; results go to the inbox of their map, others are returned.

        Raises BrokerLost when the broker process has ended.
        """
        ready = dict(self.poller.poll())
        rest = []
        while frames := transport.receive(self.socket):
            message = protocol.decode(frames[0])
            if isinstance(message, (protocol.Delivered, protocol.Failed)):
                if message.map in self.inbox:
                    self.inbox[message.map].append(message)
                elif isinstance(message, protocol.Delivered) and message.path:
                    Path(message.path).unlink(missing_ok=True)  # of a map that was given up
            else:
                rest.append(message)
        if self.socket not in ready and self.broker in ready:
            raise self._broker_lost()
        return rest

    def call_it(self, title: str) -> None:
        """Say what people call the job, for ``oq-workers status``."""
        self.send(protocol.Title(text=title))

    def state(self) -> protocol.Status:
        """Return the broker's counters of tasks, and what it knows of its nodes."""
        return self._ask(protocol.StatusQuery(), protocol.Status)

    def attempts(self, title: str) -> list[protocol.Attempts]:
        """Return what became of the attempts of a job that are over; they are told once.

        :param title: of the job, see ``call_it``
        """
        found = [self._ask(protocol.AttemptsQuery(of=title), protocol.Attempts)]
        while found[-1].more:
            found.append(self._ask(protocol.AttemptsQuery(of=title), protocol.Attempts))
        return found

    def _ask(self, question: protocol.Message, kind: type[Answer]) -> Answer:
        self.send(question)
        while True:
            for message in self.receive():
                if isinstance(message, kind):
                    return message

    def nodes(self) -> list[protocol.Node]:
        """Return what the broker knows of its nodes."""
        return self.state().nodes

    def retries(self) -> int:
        """Return how many attempts were made again since the session began."""
        return sum(phase.retries for phase in self.state().phases)

    def status(self) -> list[tuple[str, int, int]]:
        """Return ``[(host, busy slots, slots), ...]``."""
        return [(n.host, n.busy, n.slots) for n in self.nodes() if n.state is NodeState.LEASED]

    def close_map(self, map_: int) -> None:
        """Forget a map: what is under way of it is not wanted, and what has come is deleted."""
        if map_ not in self.inbox:
            return
        self.held = {task: held for task, held in self.held.items() if held.map != map_}
        # first, so that what the broker is going to send is of a map that it knows to be over
        with contextlib.suppress(errors.BrokerLost):  # then there is nothing to be forgotten
            self._tell_consumed()
            self.send(protocol.Cancel(map=map_))
        for message in self.inbox.pop(map_):
            if isinstance(message, protocol.Delivered) and message.path:
                Path(message.path).unlink(missing_ok=True)
        self.blobs.done(Counter(itertools.chain.from_iterable(self.needs.pop(map_).values())))

    def cancel(self) -> None:
        """Cancel whatever this process has submitted."""
        for map_ in list(self.inbox):
            self.close_map(map_)
