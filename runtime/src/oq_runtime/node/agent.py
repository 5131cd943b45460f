"""The node's daemon: owns the slots, starts the workers, spools their results.

    broker --control--> agent <--channel--> worker (one per slot)
    broker <==data==>   agent          payloads down, spooled attempts up, in chunks

Never unpickles and never touches the shared filesystem. One thread, one poll loop: what is read
becomes an event, ``slots`` or ``attempts`` decides, and their effects are carried out here. A
private agent ends with its owner process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import zmq

from oq_runtime import facts, logs, metrics, processes
from oq_runtime.config import NODE_VARIABLE, WORKER_VARIABLE
from oq_runtime.core import attempts, slots
from oq_runtime.core.attempts import Attempts
from oq_runtime.core.events import Events
from oq_runtime.core.limits import Limits
from oq_runtime.core.slots import Slots, WorkerState
from oq_runtime.descriptors import patiently
from oq_runtime.errors import ProtocolError, TransitionError, VersionError
from oq_runtime.files import spares, store
from oq_runtime.files.store import AHEAD_BYTES, Reception
from oq_runtime.logs import about
from oq_runtime.node import systemd
from oq_runtime.node.channel import Channel
from oq_runtime.node.forkserver import Exited, ForkServer, refusal
from oq_runtime.node.memory import Resident, oom_kills, usage
from oq_runtime.priority import Priority
from oq_runtime.wire import bombs, protocol, security, transport
from oq_runtime.wire.bombs import Bombs
from oq_runtime.wire.seal import Seal
from oq_runtime.wire.strangers import Strangers

log = logging.getLogger(__name__)

#: seconds between two looks at the memory
LOOK_SECS = 0.5
#: bytes of blobs and results in shared memory, and of one attempt's results; the rest is on disk
SHARED_BYTES, SPOOL_BYTES = 1 << 30, 64 << 20
#: chunks queued on a data socket each way; the rest waits in the spool, or at the broker
DATA_HWM = 16
#: messages that are read from the brokers, and chunks from one, before others have their turn
AT_ONCE, DATA_AT_ONCE = 500, 64
#: big arguments of a job that come at a time: each has a file open, and room for it on the disk
COMING = 16
#: jobs that are known at a time; what each may have waiting for a worker: attempts, so many for
#: each slot and some more (a broker sends 8), bytes of their calls, and big arguments yet to come
MOST_JOBS, EACH_SLOT, MORE, CALLS_BYTES, MOST_COMING = 200, 32, 1000, 256 << 20, 10_000
#: bytes of pings that are on their way back at a time, for all peers together; and other answers to
#: one peer: whoever does not read them gets no more
PING_BYTES, MOST_ANSWERS = 32 << 20, 1000
#: last bytes of a dead worker's stderr in which the reason is looked for
STDERR_TAIL_BYTES = 64 << 10
NOT_URGENT = "it asks to be urgent without the key of [oq_runtime] urgent_key"
FORKSERVER_LOG = "forkserver.log"
#: how many threads a worker starts besides its own: none, unless somebody wants them. Each slot has
#: a worker, and a library that starts a thread for each core would start slots times cores
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
#: of systemd.exec(5): for logs, and for what may need a disk
DIRECTORIES = ("RUNTIME_DIRECTORY", "CACHE_DIRECTORY")

#: task and attempt, of one job
Key = tuple[int, int]
Event = slots.Event | attempts.Event
Effect = slots.Effect | attempts.Effect


class Process:
    """A worker process.

    :param log: what it prints
    :param channel: to it
    :param slot: of the node
    """

    def __init__(self, log: Path, channel: Channel, slot: int) -> None:
        self.log = log
        self.channel = channel
        self.slot = slot
        self.pid = 0  # until it is ready, as is its memory
        self.killed = ""  # why it was, in words
        self.memory: Resident | None = None
        self.ended = False
        self.spool = "none"  # the name of the file with the results of its last task

    @property
    def held_bytes(self) -> int:
        """Return the bytes of memory that it holds for itself."""
        return self.memory.own_nbytes if self.memory else 0

    def last_words(self, exited: Exited, why: str = "", *, oom: bool = False) -> str:
        """Say how it ended, with what its log says of that, and remove the log.

        :param why: what its parent said when it could not start it
        :param oom: whether the kernel has killed it for lack of memory
        """
        code = exited.code
        lines = [why] if why else _tail(self.log)
        self.log.unlink(missing_ok=True)
        text = "was killed by the kernel for lack of memory" if oom else processes.ending(code)
        text = self.killed or text
        if code > 0 and lines:
            text += f" ({lines[-1]})"
        elif fatal := [line for line in lines if line.startswith("Fatal Python error")]:
            frames = [line.strip() for line in lines if line.startswith("  File ")]
            text += f" ({'; '.join([*fatal[:1], *frames[:1]])})"  # see faulthandler
        return f"worker process {exited.pid} {text}"


@dataclass(slots=True, eq=False)
class Upload:
    """Results on their way: the chunks to come, and the one that the socket has not taken yet."""

    key: Key
    chunks: Iterator[tuple[int, memoryview]]
    chunk: tuple[protocol.Chunk, memoryview] | None = None


class JobIO:
    """What the agent holds for one broker: links, calls, bytes on their way.

    :param control: the link on the control socket, open since the broker's call
    :param user: whose job it is, in the broker's words
    """

    def __init__(self, control: transport.Link, user: str) -> None:
        self.control = control
        self.user, self.title = user, ""
        self.progress = protocol.Beat()  # the last one of the broker
        self.since_s = time.monotonic()
        self.data: transport.Link | None = None  # open with the lease
        self.heard_s = 0.0  # when something came over it, or it was opened
        self.local = False  # the broker is on this host and takes files as they are
        self.given: dict[Key, protocol.Task] = {}  # of the attempts that are not forgotten
        self.given_bytes = 0  # of the calls of those that wait for a worker
        self.incoming: dict[bytes, Reception] = {}
        self.moved = False  # bytes have come for one of these since the last look
        self.unasked: dict[bytes, int] = {}  # blobs that are still to be asked for, and their bytes
        self.uploads: deque[Upload] = deque()

    @property
    def whose(self) -> str:
        return _of(self.user)

    def about(self, name: str) -> str:
        """Say which job this is, and whose."""
        return f"{self.title or name}{self.whose}"

    def take(self, key: Key, given: protocol.Task) -> None:
        """Note an attempt."""
        if key not in self.given:
            self.given[key] = given
            self.given_bytes += len(given.call)

    def started(self, key: Key) -> None:
        """Let go of the call of an attempt, which its worker has."""
        given = self.given[key]
        self.given_bytes -= len(given.call)
        self.given[key] = msgspec.structs.replace(given, call=b"", blobs=[])

    def forget(self, key: Key) -> None:
        """Let go of an attempt."""
        if given := self.given.pop(key, None):
            self.given_bytes -= len(given.call)

    def forget_blob(self, digest: bytes) -> None:
        """Let go of what is known of a blob that nobody wants any more."""
        self.unasked.pop(digest, None)
        if reception := self.incoming.pop(digest, None):
            reception.close()

    def close(self) -> None:
        for reception in self.incoming.values():
            reception.close()
        if self.data is not None:
            self.data.socket.close(linger=0)


class Agent:
    """The process of a node: its slots, its workers, and a lease for each job.

    :param directory: 0700 directory of logs
    :param memory: directory in shared memory for blobs and spool files
    :param disk: directory on the local disk for those that have no room there
    :param control_url: where brokers connect
    :param slots: worker processes at a time
    :param owner: pid with which this agent ends, or None for a daemon
    :param own_facts: what a broker must have in common with this node
    :param limits: of silence, memory and time
    :param keys: of the cluster, for a daemon
    :param urgent_key: public key (hexadecimal) of those who may be urgent; none: everybody
    """

    def __init__(
        self,
        *,
        directory: Path,
        memory: Path,
        disk: Path,
        control_url: str,
        slots: int,
        owner: int | None,
        own_facts: protocol.Facts,
        limits: Limits,
        keys: security.Keys | None = None,
        urgent_key: str = "",
    ) -> None:
        self.directory = directory
        self.control_url = control_url
        self.store = store.Store(memory, disk, memory_bytes=SHARED_BYTES)
        self.own_facts = own_facts
        self.keys = keys
        self.limits = limits
        self.slots = Slots(slots, limits)
        self.attempts = Attempts(limits)
        self.context: zmq.Context[Any] = zmq.Context()
        self.urgent_key = urgent_key
        self.gate = security.Gate(self.context, keys, urgent_key) if keys else None
        self.strangers: Strangers | None = None
        self.bombs = Bombs(4 * bombs.MOST_BYTES) if keys else None
        self.next_beat_s = self.next_look_s = 0.0
        self.control = transport.router(self.context, control_url, secure=self._secure_control)
        self.owner = None
        self.running = True
        if owner is not None:
            self.owner = processes.pidfd(owner)
            self.running = self.owner is not None
        self.drain_asked = self.ending = False
        self.forkserver: ForkServer | None = None  # while there are leases or workers, or always
        self.ready = False
        self.processes: dict[int, Process] = {}
        self.channels: dict[int, int] = {}  # descriptors of those that are open -> worker
        self.jobs: dict[str, JobIO] = {}
        self._handle: Events[Event, Effect] = Events(self._decide, self._apply, time.monotonic)
        self.pings: list[tuple[zmq.MessageTracker, int]] = []  # on their way back, and their bytes
        self.answers: dict[bytes, deque[zmq.MessageTracker]] = {}  # peer -> on their way to it
        self.stopped_s: dict[int, float] = {}  # pids of processes that are, and since when
        # those that wait in the kernel, with their CPU time then
        self.waits: dict[int, tuple[int, float]] = {}
        self.alone_bytes = 0  # of memory for a task that had the node for itself
        # the kernel's kills at the last two looks: one that is not reaped yet is not forgotten
        self.oom_kills = self.oom_kills_before = oom_kills()
        self.exporter: metrics.Exporter | None = None
        self.told: Counter[type[protocol.Message]] = Counter()  # messages to brokers, by kind
        self.sent_bytes = 0  # of the results of those that ended
        self.poller = zmq.Poller()
        for source in (self.control, self.owner):
            if source is not None:
                self.poller.register(source, zmq.POLLIN)

    def run(self) -> None:
        try:
            while self.running:
                self._step()
        finally:
            if self.forkserver is not None:
                self.forkserver.close(self._pids())
            if self.strangers is not None:
                self.strangers.close()
            if self.bombs is not None:
                self.bombs.close()
            if self.gate is not None:
                self.gate.stop()
            self.context.destroy(linger=0)

    def make_ready(self) -> None:
        """Have the engine imported for the workers before the first job calls, once for all."""
        self.ready = True
        with contextlib.suppress(OSError):  # told with the first worker
            self.forkserver = self._start_forkserver()

    def _secure_control(self, socket: zmq.Socket[Any]) -> None:
        if self.keys is not None:
            security.secure_server(socket, self.keys)
            self.strangers = Strangers(socket, self._connection_ended)

    def _connection_ended(self) -> None:
        self.next_beat_s = 0.0  # a broker that died is found by sending to it

    def stop(self) -> None:
        self.running = False

    def drain(self) -> None:
        """Take no new tasks and end when those under way are done; asked twice, end at once.

        May be called by a signal handler: it only leaves word for the loop.
        """
        self.running = self.running and not self.drain_asked
        self.drain_asked = True

    def _drain(self) -> None:
        self.ending = True
        self.next_beat_s = 0.0  # tell the brokers now
        systemd.notify("STOPPING=1")
        log.info("draining: no new tasks; ends when those under way are done")
        self._handle(slots.DrainAsked())

    def _step(self) -> None:
        due_s = min(self.next_beat_s, self.next_look_s, self.attempts.due_s)
        ready = dict(self.poller.poll(max(0, math.ceil((due_s - time.monotonic()) * 1000))))
        if self.owner in ready:
            self.running = False
            return
        for source in ready:
            if (worker := self.channels.get(source)) is not None:
                self._hear(worker)
        if self.forkserver is not None:
            self._from_forkserver(self.forkserver, self.forkserver.fileno() in ready)
        if self.control in ready:
            self._read_control()
        for name, job in list(self.jobs.items()):
            if job.data is not None and job.data.socket in ready:
                self._read_data(name, job, job.data.socket)
            if (job.unasked or job.uploads) and self.jobs.get(name) is job:
                self._send_data(name, job)
        if self.drain_asked and not self.ending:
            self._drain()
        now = time.monotonic()
        if now >= self.attempts.due_s:
            self._handle(attempts.Tick())
        if now >= self.next_look_s:
            self._look(now)
        if now >= self.next_beat_s:
            self._beat(now)

    def _read_control(self) -> None:
        for _ in range(AT_ONCE):
            if not (frames := transport.receive_frames(self.control)):
                return
            try:
                self._from_broker(frames[0], [frame.bytes for frame in frames])
            except TransitionError as exc:
                what = f"refused a message on the control socket: {exc}"
                log.warning(what, extra=about("message"))

    def _read_data(self, name: str, job: JobIO, socket: zmq.Socket[Any]) -> None:
        for _ in range(DATA_AT_ONCE):
            if self.jobs.get(name) is not job:
                return  # lost by what came before
            if not (views := transport.receive(socket, copy=False)):
                return
            self._from_data(name, job, views)

    def _look(self, now: float) -> None:
        self.next_look_s = now + LOOK_SECS
        self.oom_kills_before = max(self.oom_kills_before, self.oom_kills)
        try:
            self._look_at_memory()
        except OSError as exc:
            log.warning(f"cannot look at the memory: {exc}", extra=about("memory"))
        self._look_at_processes(now)
        self._handle(slots.Tick())
        moved = frozenset(name for name, job in self.jobs.items() if job.moved)
        for name in moved:
            self.jobs[name].moved = False
        self._handle(attempts.Tick(moved))
        systemd.notify("WATCHDOG=1")

    def _look_at_processes(self, now: float) -> None:
        """Kill what was stopped for as long as a silent node is waited for: its task would hang.

        What waits in the kernel cannot be killed, and goes on when the device or server answers.
        """
        server = self.forkserver.process.pid if self.forkserver else 0
        pids = [server, *(process.pid for process in self.processes.values())]
        found = {pid: processes.condition(pid) for pid in pids if pid}
        stopped = [pid for pid, (state, _) in found.items() if state == "T"]
        self.stopped_s = {pid: self.stopped_s.get(pid, now) for pid in stopped}
        waits, self.waits = self.waits, {}
        for pid in [pid for pid, (state, _) in found.items() if state == "D"]:
            before, ticks = waits.get(pid), found[pid][1]
            self.waits[pid] = before if before and before[0] == ticks else (ticks, now)
        for pid in self._waiting(now):
            seconds = now - self.waits[pid][1]
            log.warning(
                f"process {pid} waits in the kernel for {seconds:.0f} s: a device or a file server "
                f"does not answer; see /proc/{pid}/stack",
                extra=about(f"wait of {pid}"),
            )
        late = {
            pid for pid, since_s in self.stopped_s.items() if now - since_s > self.limits.lost_s
        }
        for worker, process in self.processes.items():
            if process.pid in late and self.forkserver:
                process.killed = f"was stopped for {self.limits.lost_s:g} s, and so killed"
                self.forkserver.kill(worker)
        if self.forkserver and server in late:
            self.forkserver.process.kill()

    def _waiting(self, now: float) -> list[int]:
        """The processes that wait in the kernel for as long as a silent node is waited for."""
        return [pid for pid, (_, s) in self.waits.items() if now - s > self.limits.lost_s]

    def _look_at_memory(self) -> None:
        self.oom_kills = oom_kills()
        used = usage()
        workers = {w: p.held_bytes for w, p in self.processes.items()}
        self.alone_bytes = min(used.free_bytes + self.slots.grown(workers), used.limit_bytes)
        self._handle(slots.MemoryUsed(used.used_bytes, used.limit_bytes, workers))

    def _beat(self, now: float) -> None:
        self.next_beat_s = now + self.limits.beat_s
        logs.recount()
        self.answers = {
            peer: unread for peer, unread in self.answers.items() if unread and not unread[-1].done
        }
        if self.exporter is not None:
            self.exporter.take(metrics.of_agent(self._status(), self.told, self.sent_bytes))
        if not self.jobs:
            spares.clear(self.store.memory)
        if self.ending and not self.attempts.attempts:
            self.running = False
        beat = protocol.Beat(
            busy=self.slots.busy,
            closed=self.slots.closed,
            free_bytes=0 if self.slots.draining else self.alone_bytes,
        )
        for name, job in list(self.jobs.items()):
            if name in self.slots.leases:
                self._to_broker(name, beat)
            elif now - job.since_s > self.limits.lost_s:
                self._forget(name, "it has not asked for a lease")
            if job.data is not None and name in self.jobs:  # it may have been found lost just now
                job.data.send(protocol.Beat())
                if now - job.heard_s > (lost_s := self.limits.lost_s):
                    self._give_back(
                        name, f"nothing has come over its data connection for {lost_s:g} s"
                    )

    def _decide(self, event: Event, now: float) -> Sequence[Effect]:
        if isinstance(event, attempts.Event):
            return self.attempts.handle(event, now)
        return self.slots.handle(event, now)

    # ---- messages in

    def _from_broker(self, first: zmq.Frame, frames: list[bytes]) -> None:
        peer = frames[0]
        try:
            message = protocol.decode(frames[1])
        except ProtocolError as exc:
            log.warning(f"refused a message on the control socket: {exc}", extra=about("message"))
            if isinstance(exc, VersionError):  # the peer reads both versions from any answer
                self._answer(peer, protocol.Refused(reason=str(exc)))
            return
        name = message.job
        if isinstance(message, protocol.Command):
            self._command(message.action)
            self._answer(peer, self._status())
            return
        if isinstance(message, protocol.Ping):
            self._return(peer, message, b"".join(frames[2:]))
            return
        if isinstance(message, protocol.Hello):
            self._greet(peer, message)
            return
        job = self.jobs.get(name)
        # each call of a broker has a connection of its own
        if job is None or job.control.epoch != message.epoch or job.control.peer != peer:
            self._answer(peer, protocol.NoLease(job=name, epoch=message.epoch))
            return
        if not job.control.accepts(message):
            self._forget(name, "messages were lost on the way")
            return
        wanted = message.wanted if isinstance(message, protocol.Beat) else None
        self._handle(slots.Heard(name, wanted))
        match message:
            case protocol.Lease(priority=asked) if job.data is None:
                if asked is Priority.URGENT and not self._admits_urgent(first):
                    log.warning(f"refused {name}{job.whose}: {NOT_URGENT}", extra=about("urgent"))
                    self._to_broker(name, protocol.Refused(reason=NOT_URGENT))
                    self._forget(name, NOT_URGENT)
                    return
                try:
                    self._open_data(name, job, message)
                except (zmq.ZMQError, ProtocolError) as exc:
                    reason = f"cannot connect to {message.data_url} for the results: {exc}"
                    self._give_back(name, reason)
                    return
                self._handle(slots.LeaseAsked(name, asked))
                if lease := self.slots.leases.get(name):
                    slots_ = "1 slot" if lease.slots == 1 else f"{lease.slots} slots"
                    how = "" if asked is Priority.NORMAL else f", {asked}"
                    log.info(f"lease of {name}{job.whose} granted: {slots_}{how}")
            case protocol.Task() if job.data:
                self._take(name, job, message)
            case protocol.Grant(task=task, attempt=attempt):
                self._handle(attempts.Granted(name, task, attempt))
            case protocol.Abort(task=task, attempt=attempt):
                self._handle(attempts.AbortAsked(name, task, attempt))
            case protocol.Release():
                self._forget(name, "released")
            case protocol.Beat(title=title):
                job.title, job.progress = title, message
            case _:
                what = f"refused {type(message).__name__} on the control socket"
                log.warning(what, extra=about("message"))

    def _open_data(self, name: str, job: JobIO, lease: protocol.Lease) -> None:
        """Open the data connection of a lease; raises zmq.ZMQError and ProtocolError."""
        job.local, terms = self.keys is None, lease.terms
        scheme = "ipc:" if job.local else "tcp:"
        if not lease.data_url.startswith(scheme) or (terms is None) is not job.local:
            raise ProtocolError("not encrypted")
        show = functools.partial(security.show_ticket, ticket=lease.ticket)
        data = transport.dealer(
            self.context,
            lease.data_url,
            send_hwm=DATA_HWM,
            receive_hwm=DATA_HWM,
            again=False,  # it would have to begin anew, with other keys
            secure=None if job.local else show,
        )
        seal = Seal(terms, name, lease.epoch, broker=False) if terms else None
        job.data = transport.Link(data, name, lease.epoch, seal=seal)
        job.heard_s = time.monotonic()
        self.poller.register(data, zmq.POLLIN)
        opening = protocol.Hello(pid=os.getpid(), role="agent", ticket=lease.ticket)
        job.data.send(opening, bytes(protocol.PROBE_BYTES))

    def _return(self, peer: bytes, ping: protocol.Ping, payload: bytes) -> None:
        """Send a ping back, unless those of peers that do not read hold too much memory."""
        self.pings = [one for one in self.pings if not one[0].done]
        held_bytes = sum(nbytes for _, nbytes in self.pings)
        nbytes = len(payload) if ping.want is None else ping.want
        if not nbytes:
            self._answer(peer, ping)
        elif held_bytes + nbytes <= PING_BYTES:
            returned = payload if ping.want is None else bytes(nbytes)
            if tracker := transport.send_tracked(self.control, peer, ping, returned):
                self.pings.append((tracker, nbytes))

    def _answer(self, peer: bytes, message: protocol.Message) -> bool:
        """Send to a peer without a lease; False when it is gone, or does not read its answers."""
        unread = self.answers.setdefault(peer, deque())
        while unread and unread[0].done:
            unread.popleft()
        if len(unread) >= MOST_ANSWERS:
            return False
        if tracker := transport.send_tracked(self.control, peer, message):
            unread.append(tracker)
        return tracker is not None

    def _admits_urgent(self, frame: zmq.Frame) -> bool:
        """Whether who has sent this may be urgent; it is known by the key of its connection."""
        if not (self.keys and self.urgent_key):
            return True
        return security.key_of(frame) == self.urgent_key

    def _command(self, action: str) -> None:
        if action != "status":
            log.info(f"told to {action} by an administrator")
        match action:
            case "stop":
                self._handle(slots.DrainAsked())
            case "start":
                self._handle(slots.DrainAsked(False))
            case "kill":
                for name in list(self.jobs):
                    self._give_back(name, "its workers were killed by an administrator")

    def _status(self) -> protocol.AgentStatus:
        state = protocol.AgentState.UP
        if self.slots.draining:
            busy = self.slots.busy
            state = protocol.AgentState.DRAINING if busy else protocol.AgentState.STOPPED
        return protocol.AgentStatus(
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self.slots.slots,
            busy=self.slots.busy,
            jobs=[self.jobs[name].about(name) for name in sorted(self.slots.leases)],
            leases=[self._lease_status(name) for name in sorted(self.slots.leases)],
            memory=self.slots.memory_percent / 100,
            engine=self.own_facts.engine,
            state=state,
            ready=self.slots.ready,
            beat_age_s=self.slots.beat_age_s(time.monotonic()),
            waiting=len(self._waiting(time.monotonic())),
            stuck=self.slots.stuck,
            unstarted=self.slots.unstarted,
        )

    def _lease_status(self, name: str) -> protocol.LeaseStatus:
        job, lease = self.jobs[name], self.slots.leases[name]
        return protocol.LeaseStatus(
            name=name,
            user=job.user,
            title=job.title,
            priority=lease.priority,
            age_s=time.monotonic() - job.since_s,
            slots=lease.slots,
            busy=self.slots.running(name),
            done=job.progress.done,
            total=job.progress.total,
            left_s=job.progress.left_s,
        )

    def _greet(self, peer: bytes, hello: protocol.Hello) -> None:
        """Answer a broker that calls; whatever it had here before is void."""
        self._forget(hello.job, "called again")
        link = transport.Link(self.control, hello.job, hello.epoch, peer)
        if not link.accepts(hello):
            return
        if different := facts.difference(hello.facts, self.own_facts):
            who = f"{hello.job}{_of(hello.user)}"
            log.warning(f"refused {who}: {different}", extra=about(f"{who}: {different}"))
            self._answer(peer, link.numbered(protocol.Refused(reason=different)))
            return
        if len(self.jobs) >= MOST_JOBS:
            reason = f"it has {MOST_JOBS} other jobs, which is the most"
            log.warning(f"refused {hello.job}{_of(hello.user)}: {reason}", extra=about("jobs"))
            self._answer(peer, link.numbered(protocol.Refused(reason=reason)))
            return
        slots = 0 if self.slots.draining else self.slots.slots
        welcome = protocol.Welcome(
            pid=os.getpid(), host=socket.gethostname(), slots=slots, facts=self.own_facts
        )
        if self._answer(peer, link.numbered(welcome)):
            link.sent += 1
            self.jobs[hello.job] = JobIO(link, hello.user)

    def _forget(self, name: str, reason: str) -> None:
        """End the lease of a job and all that is held for it."""
        self._handle(slots.Released(name, reason))
        if job := self.jobs.pop(name, None):
            self._close(name, job)

    def _close(self, name: str, job: JobIO) -> None:
        if job.data is not None:
            self.poller.unregister(job.data.socket)
        job.close()
        for stored in [stored for stored in self.store.files if stored.startswith(f"{name}-")]:
            self.store.remove(stored)

    def _take(self, name: str, job: JobIO, given: protocol.Task) -> None:
        """Take a task; the blobs that a broker on this host has in files stay there."""
        blobs = [blob for blob in given.blobs if not (job.local and blob.path)]
        if (
            self.attempts.waiting[name] >= EACH_SLOT * self.slots.configured + MORE
            or job.given_bytes + len(given.call) > CALLS_BYTES
            or self.attempts.coming(name) + len(blobs) > MOST_COMING
        ):
            self._give_back(name, "its broker sends more tasks than can wait here")
            return
        key = given.task, given.attempt
        job.take(key, given)
        sizes = tuple((blob.digest, blob.nbytes) for blob in blobs)
        free_bytes = self.store.free_bytes
        self._handle(attempts.Given(name, *key, sizes, given.alone, free_bytes, given.firm))

    # ---- data in

    def _from_data(self, name: str, job: JobIO, frames: list[memoryview]) -> None:
        assert job.data is not None
        try:
            frames = job.data.open(frames)
            message = protocol.decode(frames[0])
        except ProtocolError as exc:
            self._give_back(name, f"its data cannot be read: {exc}")
            return
        job.heard_s = time.monotonic()
        if not job.data.accepts(message):
            self._give_back(name, "tasks were lost on the way")
            return
        if not isinstance(message, protocol.BlobChunk):
            return
        job.moved = True
        reception = job.incoming.get(message.digest)
        if reception is None or not frames[1:]:
            return  # nobody waits for it any more
        try:
            if not reception.take(message.offset, frames[1]):
                return  # of an answer to an earlier question
        except OSError as exc:
            self._refuse_blob(name, message.digest, exc)
            return
        if reception.whole:
            job.incoming.pop(message.digest).close()
            self._handle(attempts.BlobCame(name, message.digest))

    def _refuse_blob(self, name: str, digest: bytes, exc: OSError) -> None:
        reason = f"{exc.strerror} in {self.store.disk}"
        self._handle(attempts.BlobRefused(name, digest, reason))

    # ---- workers

    def _hear(self, worker: int) -> None:
        """Read what a worker says, and send it what it could not take before."""
        channel = self.processes[worker].channel
        if channel.unsent:
            channel.flush()
            self.poller.modify(channel.fileno(), _events(channel))
        try:
            while (received := channel.receive()) is not None:
                self._from_worker(worker, protocol.decode(received))
        except EOFError:  # how it ended is told by the fork server
            self._stop_listening(channel)

    def _stop_listening(self, channel: Channel) -> None:
        if self.channels.pop(channel.fileno(), None) is not None:
            self.poller.unregister(channel.fileno())

    def _from_worker(self, worker: int, message: Any) -> None:
        process = self.processes[worker]
        if isinstance(message, protocol.Ready):
            process.pid, process.memory = message.pid, Resident(message.pid)
            self._handle(slots.WorkerReady(worker, process.held_bytes))
            return
        found = self.slots.workers.get(worker)
        job = self.jobs.get(message.job)
        key = (message.task, message.attempt)
        if (
            found is None
            or job is None
            or found.job != message.job
            or key != (found.task, found.attempt)
        ):
            return  # of an attempt that was aborted meanwhile
        match message:
            case protocol.Ended(path=path):
                told = message
                if path:
                    self.store.adopt(_name(message.job, key), Path(path), message.nbytes)
                    process.spool = "none"  # not to be removed with the worker
                    if not job.local:
                        told = msgspec.structs.replace(message, path="")
                self.sent_bytes += message.nbytes
                self._handle(attempts.Done(message.job, *key, bool(path)))
                self._to_broker(message.job, told)
            case protocol.NoRoom(reason=reason):
                self._handle(attempts.Failed(message.job, *key, reason, no_room=True))
        self._handle(slots.WorkerFree(worker, process.held_bytes, process.ended))

    def _from_forkserver(self, forkserver: ForkServer, heard: bool) -> None:
        forkserver.flush()
        try:
            while heard and (exited := forkserver.hear()):
                self._reap(exited)
        except EOFError:
            self._forkserver_gone(forkserver)
            return
        # while it imports the engine it takes no orders, also not to kill what it has not made
        if not (self.ready or self._pids() or self.slots.leases):
            self._close_forkserver(forkserver)

    def _close_forkserver(self, forkserver: ForkServer, words: str = "") -> int:
        """End it and its workers, for which ``words`` say why there was no process of theirs."""
        self.poller.unregister(forkserver.fileno())
        self.forkserver = None
        code = forkserver.close(self._pids())
        for worker, process in list(self.processes.items()):
            exited = Exited(worker, process.pid or forkserver.process.pid, code)
            self._reap(exited, "" if process.pid else words)
        return code

    def _pids(self) -> list[int]:
        return [process.pid for process in self.processes.values() if process.pid]

    def _forkserver_gone(self, forkserver: ForkServer) -> None:
        """It has died, or could not import the engine; the kernel ends its workers with it."""
        words = "".join(_tail(self.directory / FORKSERVER_LOG)[-1:])
        code = self._close_forkserver(forkserver, words)
        log.info(f"the fork server ended with {code}: {words}")

    def _reap(self, exited: Exited, why: str = "") -> None:
        process = self.processes[exited.worker]
        process.ended = True
        if process.channel.fileno() in self.channels:
            self._hear(exited.worker)  # its last words come first
        self._stop_listening(process.channel)
        process.channel.close()
        del self.processes[exited.worker]
        if exited.refused:
            process.log.unlink(missing_ok=True)
            self._handle(slots.WorkerRefused(exited.worker, exited.refused))
            return
        oom = exited.code == -signal.SIGKILL and oom_kills() > self.oom_kills_before
        self.oom_kills_before += oom  # each kill explains one death
        reason = process.last_words(exited, why, oom=oom)
        if process.memory is not None:
            process.memory.close()
        known = self.slots.workers.get(exited.worker)  # one that was killed on purpose is not
        if known is not None and known.state is WorkerState.IDLE:
            log.info(f"{reason}, while it had no task")
        for place in (self.store.memory, self.store.disk):
            (place / process.spool).unlink(missing_ok=True)
        self._handle(slots.WorkerGone(exited.worker, reason, oom, exited.peak_bytes))

    # ---- effects out

    def _apply(self, effect: Effect) -> None:
        match effect:
            case slots.RunOn():
                self._run(effect)
            case slots.TaskGiven() | slots.TaskTaken() | slots.Died() | slots.Preempted():
                self._handle(effect)  # one core has decided something for the other
            case attempts.Forget(job, task, attempt):
                self._forget_attempt(job, (task, attempt))
            case slots.GrantLease(job, share):
                self._to_broker(job, protocol.Leased(slots=share))
            case slots.Spawn(worker, _):
                self._spawn(worker)
            case slots.Kill(worker):
                if self.forkserver is not None:
                    self.forkserver.kill(worker)
            case slots.Stuck(worker, seconds):
                if not (pid := self.processes[worker].pid):
                    return  # the fork server has not come to it yet: it imports the engine
                log.warning(
                    f"worker process {pid} was killed {seconds:.0f} s ago and does not end; its "
                    "slot stays taken. The kernel waits for a device or a file server: see "
                    f"/proc/{pid}/stack"
                )
            case slots.Slow(_, seconds):
                importer = self.forkserver.process.pid if self.forkserver else "unknown"
                log.warning(
                    f"no worker for {seconds:.0f} s: process {importer} still imports the engine; "
                    "if it uses no CPU time, it waits for the files of the engine",
                    extra=about("unstarted"),
                )
            case slots.Fewer(left, reason):
                log.warning(f"goes on with {left} of its slots: {reason}", extra=about("processes"))
            case slots.LeaseEnded(job, reason):
                self._handle(attempts.JobEnded(job))
                if ended := self.jobs.pop(job, None):
                    log.info(f"lease of {job}{ended.whose} ended: {reason}")
                    self._close(job, ended)
            case attempts.Fetch(job, digest, nbytes):
                self._fetch(job, digest, nbytes)
            case attempts.DropBlob(job, digest):
                self.store.remove(_blob_name(job, digest))
                if found := self.jobs.get(job):
                    found.forget_blob(digest)
            case attempts.Upload(job, task, attempt):
                self._send_results(job, (task, attempt))
            case attempts.TellStarted(job, task, attempt):
                self._to_broker(job, protocol.Started(task=task, attempt=attempt))
            case attempts.TellPreempted(job, task, attempt, by):
                self._tell_preempted(job, (task, attempt), by)
            case attempts.TellDied(job, task, attempt, reason, oom, no_room):
                log.info(f"{self._called(job, (task, attempt))}, attempt {attempt}: {reason}")
                died = protocol.Died(
                    task=task, attempt=attempt, reason=reason, oom=oom, no_room=no_room
                )
                self._to_broker(job, died)

    def _tell_preempted(self, name: str, key: Key, by: str) -> None:
        whose = "a job of higher priority"  # whose broker was found lost just now
        if (job := self.jobs.get(by)) and (lease := self.slots.leases.get(by)):
            whose = f"{lease.priority} {job.about(by)}"
        task, attempt = key
        log.info(f"{self._called(name, key)}, attempt {attempt}: interrupted for {whose}")
        self._to_broker(name, protocol.Preempted(task=task, attempt=attempt, by=whose))

    def _run(self, chosen: slots.RunOn) -> None:
        name, key = chosen.job, (chosen.task, chosen.attempt)
        process, job = self.processes[chosen.worker], self.jobs.get(name)
        if job is None:
            return  # its broker was found lost just now
        given = job.given[key]
        process.spool = _name(name, key)
        run = protocol.Run(
            job=name,
            task=key[0],
            attempt=key[1],
            call=given.call,
            paths=[self._path(name, job, blob) for blob in given.blobs],
            spool_bytes=min(SPOOL_BYTES, self.store.free_bytes // self.slots.slots),
            slot=process.slot,
        )
        job.started(key)
        process.channel.send(protocol.encode(run))
        if process.channel.unsent:
            self.poller.modify(process.channel.fileno(), _events(process.channel))
        self._handle(chosen)

    def _called(self, name: str, key: Key) -> str:
        """Say which task this is, by the number and the function that people know."""
        job = self.jobs.get(name)
        if job is None or (given := job.given.get(key)) is None:
            return f"a task of {name}"
        return f"task #{given.number} ({given.func}) of {job.about(name)}"

    def _path(self, name: str, job: JobIO, blob: protocol.Blob) -> str:
        if job.local and blob.path:
            return blob.path
        return str(self.store.path(_blob_name(name, blob.digest)))

    def _fetch(self, name: str, digest: bytes, nbytes: int) -> None:
        if job := self.jobs.get(name):
            job.unasked[digest] = nbytes
            self._want_to_send(job)

    def _receive(self, name: str, job: JobIO, digest: bytes, nbytes: int) -> bool:
        """Get ready for a blob; False, and those that wait for it have failed, without room."""
        try:
            descriptor = self.store.create(_blob_name(name, digest), nbytes, AHEAD_BYTES)
        except OSError as exc:
            self._refuse_blob(name, digest, exc)
            return False
        job.incoming[digest] = Reception(descriptor, nbytes)
        return True

    def _to_broker(self, name: str, message: protocol.Message) -> None:
        """Send to a broker; one that cannot be reached has lost the lease."""
        self.told[type(message)] += 1
        if (job := self.jobs.get(name)) and not job.control.send(message):
            self._forget(name, "its broker cannot be reached")

    def _give_back(self, name: str, reason: str) -> None:
        """End a lease of which something was lost, and say so to its broker."""
        self._to_broker(name, protocol.NoLease(reason=reason))
        self._forget(name, reason)

    def _forget_attempt(self, name: str, key: Key) -> None:
        """Let go of what is here of an attempt: its call, and the results that it has left."""
        job, stored = self.jobs.get(name), _name(name, key)
        if job is None:
            return  # its broker was found lost just now
        job.forget(key)
        if stored not in self.store:
            return
        if sending := [upload for upload in job.uploads if upload.key == key]:
            job.uploads.remove(sending[0])
            self.store.release(stored)  # the mapping, of which frames are under way
        else:
            self.store.remove(stored)

    def _send_results(self, name: str, key: Key) -> None:
        """Send the body of an attempt, or leave its file to a broker on the same host."""
        job, stored = self.jobs.get(name), _name(name, key)
        if job is None:
            return
        if job.local:
            path, _ = self.store.release(stored)
            placed = protocol.Placed(task=key[0], attempt=key[1], path=str(path))
            self._to_broker(name, placed)
            self._handle(attempts.Sent(name, *key))
            return
        try:
            body = spares.consume(self.store.path(stored))
        except OSError as exc:
            reason = f"its results are not there any more: {exc.strerror}"
            self._handle(attempts.Failed(name, *key, reason))
            return
        job.uploads.append(Upload(key, protocol.chunks(body)))
        self._want_to_send(job)

    def _want_to_send(self, job: JobIO) -> None:
        assert job.data is not None
        self.poller.modify(job.data.socket, zmq.POLLIN | zmq.POLLOUT)

    def _send_data(self, name: str, job: JobIO) -> None:
        """Ask for blobs and send results, as far as the data socket takes them now."""
        assert job.data is not None
        while job.unasked:
            digest, nbytes = next(iter(job.unasked.items()))
            if digest not in job.incoming and len(job.incoming) >= COMING:
                break  # in their order, as their answers come
            if digest not in job.incoming and not self._receive(name, job, digest, nbytes):
                job.unasked.pop(digest, None)
                continue
            if not job.data.send(protocol.Fetch(digest=digest)):
                return
            del job.unasked[digest]
        while job.uploads:
            upload = job.uploads[0]
            if upload.chunk is None:
                task, attempt = upload.key
                if (item := next(upload.chunks, None)) is None:
                    self._handle(attempts.Sent(name, task, attempt))
                    continue
                offset, chunk = item
                upload.chunk = protocol.Chunk(task=task, attempt=attempt, offset=offset), chunk
            if not job.data.send(*upload.chunk):
                return
            upload.chunk = None
        self.poller.modify(job.data.socket, zmq.POLLIN)

    def _spawn(self, worker: int) -> None:
        log_path = self.directory / f"worker-{worker}.log"
        try:
            if self.forkserver is None:
                self.forkserver = patiently(self._start_forkserver)
            output = self._writable(log_path)
            ours, theirs = patiently(socket.socketpair)
        except OSError as exc:
            self._handle(slots.WorkerRefused(worker, refusal(exc)))
            return
        ours.setblocking(False)
        taken = {process.slot for process in self.processes.values()}
        slot = next(slot for slot in itertools.count() if slot not in taken)
        self.processes[worker] = Process(log_path, Channel(ours), slot)
        self.channels[ours.fileno()] = worker
        self.poller.register(ours.fileno(), zmq.POLLIN)
        self.forkserver.fork(worker, output, theirs)

    def _start_forkserver(self) -> ForkServer:
        env = dict(os.environ)
        for name in THREADS:
            env.setdefault(name, "1")
        env[WORKER_VARIABLE] = "1"
        env[NODE_VARIABLE] = self.control_url
        places = (str(self.store.memory), str(self.store.disk))
        with self._writable(self.directory / FORKSERVER_LOG) as log:
            forkserver = ForkServer(log, places, env)
        self.poller.register(forkserver.fileno(), zmq.POLLIN)
        return forkserver

    def _writable(self, path: Path) -> IO[bytes]:
        """Open a log file; with the disk full, better a worker without a log than none."""
        try:
            return patiently(lambda: path.open("wb"))
        except OSError as exc:
            log.warning(f"{path}: {exc.strerror}", extra=about("log"))
            return Path(os.devnull).open("wb")


def _of(user: str) -> str:
    """Say whose a job is, where its broker has said so."""
    return f" of {user}" if user else ""


def _events(channel: Channel) -> int:
    """Return what to wait for on a channel."""
    return zmq.POLLIN | zmq.POLLOUT if channel.unsent else zmq.POLLIN


def _tail(path: Path) -> list[str]:
    """Return the last lines of a log, of which the last says most."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - STDERR_TAIL_BYTES))
        return file.read().decode(errors="replace").strip().splitlines()
    return []


def _blob_name(job: str, digest: bytes) -> str:
    return f"{job}-{digest.hex()}"


def _name(job: str, key: Key) -> str:
    """Return the name of the file with the results of an attempt; the worker makes the same."""
    return f"{job}-{key[0]}-{key[1]}"
