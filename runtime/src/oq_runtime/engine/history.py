"""The history of a job: what its engine has submitted and consumed, kept so that it can go on.

The engine's process is a deterministic function of its input and of the results it is given, in
their order. So a job that was begun before is run again from its start, and each submission is
compared with the one in the journal (see ``files.journal``): as long as they are the same, the
engine is given the results of then, in the order of then. From the first difference, or from the
journal's end, tasks are computed. Nothing is sent before: a task whose result is in the journal is
held, and is computed after all when the replay ends before its turn.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

from oq_runtime.engine.canonical import digest
from oq_runtime.engine.reads import Collector
from oq_runtime.files.journal import (
    Consumed,
    Cut,
    Event,
    Reader,
    Record,
    Slots,
    Submitted,
    Used,
    Writer,
)
from oq_runtime.session.client import Session, Unchanged
from oq_runtime.text import duration
from oq_runtime.wire import payload
from oq_runtime.wire.payload import Buffer

#: seconds between two figures that are shown
SHOW_SECS = 1.0


class History:
    """The history of the job that this process runs.

    :param writer: of its journal
    :param before: its journal as an earlier run, or another job, has left it; None: there is none
    :param tell: is given a line for the user when the replay has ended
    :param collector: of the parameters that are looked at, where these are kept too
    :param show: is given now and then how many results were taken over, and of how many; when the
        replay has ended these are the same
    """

    _current: History | None = None

    def __init__(
        self,
        writer: Writer,
        before: Reader | None,
        tell: Callable[[str], None],
        collector: Collector | None = None,
        show: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        self.pid = os.getpid()
        self.writer = writer
        self.before = before
        self.tell, self.show = tell, show
        self.next_show_s = 0.0
        self.collector = collector
        self.used: set[str] = set()  # by the engine, as far as it is in the journal
        self.rest: deque[Record] = deque(before.records if before else ())
        self.replaying = bool(self.rest)
        self.events = 0  # of this run: those of the journal that hold for it
        self.last = 0  # the number of the last one that was consumed
        self.kept = self.results = before.results if before else 0  # attempts in the journal
        self.replayed, self.saved_s = 0, 0.0  # tasks, and what they took on their nodes
        self.maps: dict[int, int] = {}  # number in this process -> number in the job
        self.tasks: dict[tuple[int, int], int] = {}  # of the job -> in the session
        self.names: dict[int, tuple[int, int]] = {}  # and back
        self.big: dict[int, bytes] = {}  # id of an unchanged argument -> its digest

    @classmethod
    def begin(cls, history: History | None) -> None:
        """Make it the one of this process, or none."""
        cls._current = history

    @classmethod
    def current(cls) -> History | None:
        """Return the one of this process, if there is one."""
        found = cls._current
        return found if found is not None and found.pid == os.getpid() else None

    def slots(self, found: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        """Return what the engine is told of the nodes: it cuts its tasks by the number of slots.

        :param found: host, busy slots and slots of each node
        """
        self._skip()
        if self.replaying and self.rest and isinstance(event := self.rest[0].event, Slots):
            self.rest.popleft()
            self.events += 1
            return [("as then", 0, event.slots)]
        if self.replaying:
            self._end("the engine asks for the nodes, as it did not then" if self.rest else "")
        self._note(Slots(sum(slots for _, _, slots in found)))
        return found

    # ---- what the engine submits

    def submitting(
        self, map_: int, number: int, func: Any, args: Sequence[Any], unchanged: Unchanged
    ) -> bool:
        """Note a task; whether it is to be held, because its result may be in the journal."""
        if not unchanged:
            self.big.clear()
        found = Submitted(
            map=self.maps.setdefault(map_, len(self.maps)),
            task=number,
            func=f"{getattr(func, '__module__', '')}.{getattr(func, '__qualname__', func)}",
            digest=self._digest(args),
        )
        self._skip()
        if self.replaying and self.rest and self.rest[0].event == found:
            self.rest.popleft()
            self.events += 1
            return True
        if self.replaying:
            other = f"{found.func} {number} of map {found.map} is another one than then"
            self._end(other if self.rest else "")
        self._note(found)
        return False

    def submitted(
        self, map_: int, number: int, task: int, args: Sequence[Any], unchanged: Unchanged
    ) -> None:
        """Take the number that the session has given to a task."""
        key = self.maps[map_], number
        self.tasks[key], self.names[task] = task, key
        for arg in args:
            if id(arg) in unchanged:
                self.big[id(arg)] = digest(arg) if id(arg) not in self.big else self.big[id(arg)]

    def _digest(self, args: Sequence[Any]) -> bytes:
        hashed = xxhash.xxh3_128()
        for arg in args:
            hashed.update(self.big.get(id(arg)) or digest(arg))
        return hashed.digest()

    # ---- what it consumes

    def replay(self, map_: int) -> Iterator[tuple[int, list[Any], None]]:
        """Yield task and objects of the attempts that the engine was given then."""
        while self.replaying:
            if (record := self._next(map_)) is None:
                return
            assert isinstance(record.event, Consumed) and self.before is not None
            try:
                body = self.before.body(record)
                objects = [payload.load(frames) for frames in payload.parts(body)]
            except Exception as exc:  # also of what the objects refer to, and is gone since
                self._end(f"a result cannot be read any more ({type(exc).__name__}: {exc})")
                return
            self.rest.popleft()
            self.last = self.events
            self.events += 1
            self.replayed += 1
            if (now := time.monotonic()) >= self.next_show_s:
                self.next_show_s = now + SHOW_SECS
                self.show(self.replayed, self.kept)
            task = self.tasks.pop((record.event.map, record.event.task))
            del self.names[task]
            Session.current().answered(task)
            yield task, objects, None

    def _next(self, map_: int) -> Record | None:
        """Return what the engine was given next then; None when the replay is over."""
        self._skip()
        if not self.rest:
            self._end("")
            return None
        event = self.rest[0].event
        if (
            isinstance(event, Consumed)
            and event.map == self.maps[map_]
            and (event.map, event.task) in self.tasks
        ):
            return self.rest[0]
        self._end(f"the engine takes results of map {self.maps[map_]}, as it did not then")
        return None

    def consumed(self, task: int, body: Buffer) -> None:
        """Note an attempt that is given to the engine, and what it has brought."""
        self._note_used()
        self.last = self.events
        map_, number = self.names.pop(task)
        del self.tasks[map_, number]
        self.results += 1
        self._note(Consumed(map_, number), body)

    def failed(self) -> None:
        """Forget the attempt that was consumed last: what it brought is an error."""
        self.writer.put(Cut(self.last))
        self.events = self.last
        self.results -= 1

    # ---- both

    def ended(self, map_: int, number: int, monitor: Any) -> None:
        """Take what a task has taken of time, and the parameters that it has looked at."""
        if self.replaying:
            self.saved_s += monitor.duration
        elif self.collector is not None:  # also that it was nothing, see ``resume.usable``
            self._note(Used(tuple(getattr(monitor, "looks", ())), self.maps[map_], number))

    def _skip(self) -> None:
        """Pass by what is known of the parameters that were looked at."""
        while self.rest and isinstance(event := self.rest[0].event, Used):
            self.rest.popleft()
            self.events += 1
            if event.map < 0:
                self.used.update(event.names)

    def _note(self, event: Event, body: Buffer = b"") -> None:
        self._note_used()
        self.writer.put(event, body)
        self.events += 1

    def _note_used(self) -> None:
        if self.collector is not None and (new := self.collector.names - self.used):
            self.used |= new
            self.writer.put(Used(tuple(sorted(new))))
            self.events += 1

    def _end(self, why: str) -> None:
        """Compute from here on; what was held is sent.

        :param why: what differs from then; nothing when the journal is at its end
        """
        if self.rest:
            self.writer.put(Cut(self.events))
        self.rest.clear()
        self._tell(why)
        Session.current().send_held()

    def _tell(self, why: str) -> None:
        self.replaying = False
        self.show(self.replayed, self.replayed)
        of = f" of {self.kept}" if self.replayed < self.kept else ""
        self.tell(
            f"took over the results of {self.replayed} tasks{of}, {duration(self.saved_s)} of "
            + (f"computing; then {why}: the rest is computed" if why else "computing")
        )

    def close(self, *, keep: bool = True) -> None:
        """Write what waits; to be called when the job has ended.

        :param keep: False: remove the journal instead
        """
        if self.replaying:
            self._tell("")
        if keep:
            self.writer.close(self.tell)
        else:
            self.writer.discard()
        if self.before is not None:
            self.before.close()
