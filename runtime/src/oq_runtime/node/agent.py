"""The node's daemon: owns the slots, starts the workers, spools their results.

    broker --control--> agent <--channel--> worker (one per slot)
    broker <==data==>   agent          payloads down, spooled attempts up, in chunks

Never unpickles and never touches the shared filesystem. Decisions are ``node``'s; this module only
carries them out. One thread, one poll loop. A private agent ends with its owner process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import xxhash
import zmq

from oq_runtime import facts, logs, processes
from oq_runtime.config import NODE_VARIABLE, WORKER_VARIABLE
from oq_runtime.core import slots as core
from oq_runtime.core.events import Events
from oq_runtime.core.limits import Limits
from oq_runtime.errors import ProtocolError, VersionError
from oq_runtime.files import spares, store
from oq_runtime.files.store import Reception
from oq_runtime.logs import about
from oq_runtime.node import systemd
from oq_runtime.node.channel import Channel
from oq_runtime.node.forkserver import Ended, ForkServer
from oq_runtime.node.memory import Resident, oom_kills, usage
from oq_runtime.wire import protocol, security, transport

log = logging.getLogger(__name__)

#: seconds between two looks at the memory
LOOK_SECS = 0.5
#: seconds after which an attempt that still runs is told to have started
STARTED_SECS = 0.2
#: bytes of blobs and results in shared memory, and of one attempt's results; the rest is on disk
SHARED_BYTES, SPOOL_BYTES = 1 << 30, 64 << 20
#: chunks of results queued on the data socket; the rest waits in the spool
DATA_HWM = 16
#: messages that are read from the brokers before the others have their turn
AT_ONCE = 500
#: last bytes of a dead worker's stderr in which the reason is looked for
STDERR_TAIL_BYTES = 64 << 10
FORKSERVER_LOG = "forkserver.log"
#: of systemd.exec(5): for logs, and for what may need a disk
DIRECTORIES = ("RUNTIME_DIRECTORY", "CACHE_DIRECTORY")

Key = tuple[int, int]


class Process:
    """A worker process.

    :param log: what it prints
    :param channel: to it
    """

    def __init__(self, log: Path, channel: Channel) -> None:
        self.log = log
        self.channel = channel
        self.pid = 0  # until it is ready, as is its memory
        self.memory: Resident | None = None
        self.ended = False
        self.spool = "none"  # the name of the file with the results of its last task

    @property
    def held_bytes(self) -> int:
        """Return the bytes of memory that it holds for itself."""
        return self.memory.own_nbytes if self.memory else 0

    def last_words(self, ended: Ended, why: str = "") -> str:
        """Say how it ended, with what its log says of that, and remove the log.

        :param why: what its parent said when it could not start it
        """
        code = ended.code
        text = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [why] if why else _tail(self.log)
        if code > 0 and lines:
            text += f" ({lines[-1]})"
        elif fatal := [line for line in lines if line.startswith("Fatal Python error")]:
            frames = [line.strip() for line in lines if line.startswith("  File ")]
            text += f" ({'; '.join([*fatal[:1], *frames[:1]])})"  # see faulthandler
        self.log.unlink(missing_ok=True)
        return f"worker process {ended.pid} {text}"


class Incoming(Reception):
    """A blob on its way from a broker, and the attempts that wait for it."""

    def __init__(self, blob: protocol.Blob, descriptor: int) -> None:
        super().__init__(descriptor, blob.nbytes, xxhash.xxh3_128())
        self.blob = blob
        self.waiting: list[Key] = []


class JobIO:
    """What the agent holds for one broker: links, tasks, blobs on their way, results to be sent.

    :param control: the link on the control socket, open since the broker's call
    :param user: whose job it is, in the broker's words
    """

    def __init__(self, control: transport.Link, user: str) -> None:
        self.control = control
        self.user, self.title = user, ""
        self.since_s = time.monotonic()
        self.data: transport.Link | None = None  # open with the lease
        self.local = False  # the broker is on this host and takes files as they are
        self.tasks: dict[Key, protocol.Task] = {}
        self.missing: dict[Key, int] = {}  # blobs that have not come yet
        self.holds: dict[Key, list[str]] = {}  # names of blobs that have come
        self.incoming: dict[bytes, Incoming] = {}
        self.unasked: deque[bytes] = deque()  # digests of blobs that are still to be asked for
        self.results: dict[Key, protocol.Ended] = {}  # in files, until they are sent
        self.uploads: deque[tuple[Key, Iterator[tuple[int, memoryview]]]] = deque()
        self.chunk: tuple[protocol.Chunk, memoryview] | None = None

    def about(self, name: str) -> str:
        """Say which job this is, and whose."""
        return f"{self.title or name} of {self.user}"

    def close(self) -> None:
        for incoming in self.incoming.values():
            incoming.close()
        if self.data is not None:
            self.data.socket.close(linger=0)


class Agent:
    """
    :param directory: 0700 directory of logs
    :param memory: directory in shared memory for blobs and spool files
    :param disk: directory on the local disk for those that have no room there
    :param control_url: where brokers connect
    :param slots: worker processes at a time
    :param owner: pid with which this agent ends, or None for a daemon
    :param own_facts: what a broker must have in common with this node
    :param limits: of silence, memory and time
    :param keys: of the cluster, for a daemon
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
    ) -> None:
        self.directory = directory
        self.control_url = control_url
        self.store = store.Store(memory, disk, memory_bytes=SHARED_BYTES)
        self.blobs: dict[str, int] = {}  # names in the store, the least recently used first: users
        self.own_facts = own_facts
        self.keys = keys
        self.core = core.Node(slots, limits)
        self.context: zmq.Context[Any] = zmq.Context()
        self.gate = security.Gate(self.context, keys) if keys else None
        self.monitor: security.HandshakeMonitor | None = None
        self.control = transport.router(self.context, control_url, secure=self._secure_control)
        self.owner = None
        self.running = True
        if owner is not None:
            self.owner = processes.pidfd(owner)
            self.running = self.owner is not None
        self.drain_asked = self.ending = False
        self.forkserver: ForkServer | None = None  # while there are leases or workers
        self.processes: dict[int, Process] = {}
        self.channels: dict[int, int] = {}  # descriptors of those that are open -> worker
        self.jobs: dict[str, JobIO] = {}
        self._handle = Events(self.core.handle, self._apply, time.monotonic)
        self.next_beat_s = self.next_look_s = 0.0
        self.alone_bytes = 0  # of memory for a task that had the node for itself
        # the kernel's kills at the last two looks: one that is not reaped yet is not forgotten
        self.oom_kills = self.oom_kills_before = oom_kills()
        self.starting: dict[int, tuple[str, Key, float]] = {}  # worker -> attempt, and since when
        self.poller = zmq.Poller()
        for source in (self.control, self.owner, self._monitor_socket()):
            if source is not None:
                self.poller.register(source, zmq.POLLIN)

    def _monitor_socket(self) -> zmq.Socket[Any] | None:
        return self.monitor.socket if self.monitor is not None else None

    def run(self) -> None:
        try:
            while self.running:
                self._step()
        finally:
            if self.forkserver is not None:
                self.forkserver.close(self._pids())
            if self.monitor is not None:
                self.monitor.close()
            if self.gate is not None:
                self.gate.stop()
            self.context.destroy(linger=0)

    def _secure_control(self, socket: zmq.Socket[Any]) -> None:
        if self.keys is not None:
            security.secure_server(socket, self.keys)
            self.monitor = security.HandshakeMonitor(socket)

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
        self._handle(core.DrainAsked())

    def _step(self) -> None:
        due_s = min(self.next_beat_s, self.next_look_s)
        if self.starting:
            due_s = min(due_s, next(iter(self.starting.values()))[2] + STARTED_SECS)
        ready = dict(self.poller.poll(max(0, math.ceil((due_s - time.monotonic()) * 1000))))
        if self.owner in ready:
            self.running = False
            return
        if self.monitor is not None and self.monitor.socket in ready:
            self._watch_handshakes(self.monitor)
        for source in ready:
            if (worker := self.channels.get(source)) is not None:
                self._hear(worker)
        if self.forkserver is not None:
            self._from_forkserver(self.forkserver, self.forkserver.fileno() in ready)
        if self.control in ready:
            self._read_control()
        for name, job in list(self.jobs.items()):
            data = job.data
            while (
                self.jobs.get(name) is job
                and data
                and data.socket in ready
                and (views := transport.receive(data.socket, copy=False))
            ):
                self._from_data(name, job, views)
            if (job.unasked or job.uploads) and self.jobs.get(name) is job:
                self._send_data(name, job)
        if self.drain_asked and not self.ending:
            self._drain()
        now = time.monotonic()
        while self.starting and now - next(iter(self.starting.values()))[2] >= STARTED_SECS:
            worker = next(iter(self.starting))
            name, (task, attempt), _ = self.starting.pop(worker)
            self._to_broker(name, protocol.Started(task=task, attempt=attempt))
        if now >= self.next_look_s:
            self._look(now)
        if now >= self.next_beat_s:
            self._beat(now)

    def _read_control(self) -> None:
        for _ in range(AT_ONCE):
            if not (frames := transport.receive(self.control)):
                return
            self._from_broker(frames)

    def _watch_handshakes(self, monitor: security.HandshakeMonitor) -> None:
        for kind, reason in monitor.events():
            if kind == "refused":
                log.warning(f"refused a connection: {reason}", extra=about("connection"))
            elif kind == "disconnected":
                self.next_beat_s = 0.0  # a broker that died is found by sending to it

    def _look(self, now: float) -> None:
        self.next_look_s = now + LOOK_SECS
        self.oom_kills_before = max(self.oom_kills_before, self.oom_kills)
        self.oom_kills = oom_kills()
        used = usage()
        workers = {w: p.held_bytes for w, p in self.processes.items()}
        self.alone_bytes = min(used.free_bytes + self.core.grown(workers), used.limit_bytes)
        self._handle(core.MemoryUsed(used.used_bytes, used.limit_bytes, workers))
        self._handle(core.Tick())
        systemd.notify("WATCHDOG=1")

    def _beat(self, now: float) -> None:
        self.next_beat_s = now + self.core.limits.beat_s
        logs.recount()
        if not self.jobs:
            spares.clear(self.store.memory)
        if self.ending and not self.core.busy and not any(j.results for j in self.jobs.values()):
            self.running = False
        beat = protocol.Beat(
            busy=self.core.busy,
            closed=self.core.closed,
            free_bytes=0 if self.core.draining else self.alone_bytes,
        )
        for name, job in list(self.jobs.items()):
            if name in self.core.leases:
                self._to_broker(name, beat)
            elif now - job.since_s > self.core.limits.lost_s:
                self._forget(name, "it has not asked for a lease")
            if job.data is not None and name in self.jobs:  # it may have been found lost just now
                job.data.send(protocol.Beat())

    # ---- messages in

    def _from_broker(self, frames: list[bytes]) -> None:
        peer = frames[0]
        try:
            message = protocol.decode(frames[1])
        except ProtocolError as exc:
            log.warning(f"refused a message on the control socket: {exc}", extra=about("message"))
            if isinstance(exc, VersionError):  # the peer reads both versions from any answer
                transport.send_to(self.control, peer, protocol.Refused(reason=str(exc)))
            return
        name = message.job
        if isinstance(message, protocol.Command):
            self._command(message.action)
            transport.send_to(self.control, peer, self._status())
            return
        if isinstance(message, protocol.Ping):
            payload = frames[2:] if message.want is None else [bytes(message.want)]
            transport.send_to(self.control, peer, message, *payload)
            return
        if isinstance(message, protocol.Hello):
            self._greet(peer, message)
            return
        job = self.jobs.get(name)
        if job is None or job.control.epoch != message.epoch:
            unknown = protocol.NoLease(job=name, epoch=message.epoch)
            transport.send_to(self.control, peer, unknown)
            return
        job.control.peer = peer
        if not job.control.accepts(message):
            self._forget(name, "messages were lost on the way")
            return
        wanted = message.wanted if isinstance(message, protocol.Beat) else None
        self._handle(core.Heard(name, wanted))
        match message:
            case protocol.Lease(data_url=url) if job.data is None:
                keys = self.keys
                secure = functools.partial(security.secure_client, keys=keys) if keys else None
                job.local = keys is None
                try:
                    if url.startswith("ipc:") is not job.local:
                        raise ProtocolError("not encrypted")
                    data = transport.dealer(self.context, url, send_hwm=DATA_HWM, secure=secure)
                except (zmq.ZMQError, ProtocolError) as exc:
                    self._give_back(name, f"no way to {url}: {exc}")
                    return
                job.data = transport.Link(data, name, message.epoch)
                self.poller.register(data, zmq.POLLIN)
                job.data.send(protocol.Hello(pid=os.getpid(), role=message.node))
                self._handle(core.LeaseAsked(name))
                if lease := self.core.leases.get(name):
                    log.info(f"lease of {name} of {job.user} granted: {lease.slots} slots")
            case protocol.Task(task=task, attempt=attempt, alone=alone) if job.data:
                if alone:
                    self._handle(core.AloneAsked(name, task, attempt))
                self._take(name, job, message)
            case protocol.Grant(task=task, attempt=attempt):
                if ended := job.results.get((task, attempt)):
                    self._send_results(name, job, (task, attempt), ended)
            case protocol.Abort(task=task, attempt=attempt):
                self._handle(core.AbortAsked(name, task, attempt))
            case protocol.Release():
                self._forget(name, "released")
            case protocol.Beat(title=title):
                job.title = title
            case _:
                what = f"refused {type(message).__name__} on the control socket"
                log.warning(what, extra=about("message"))

    def _command(self, action: str) -> None:
        if action != "status":
            log.info(f"told to {action} by an administrator")
        match action:
            case "stop":
                self._handle(core.DrainAsked())
            case "start":
                self._handle(core.DrainAsked(False))
            case "kill":
                for name in list(self.jobs):
                    self._give_back(name, "its workers were killed by an administrator")

    def _status(self) -> protocol.AgentStatus:
        state = protocol.AgentState.UP
        if self.core.draining:
            busy = self.core.busy
            state = protocol.AgentState.DRAINING if busy else protocol.AgentState.STOPPED
        return protocol.AgentStatus(
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self.core.slots,
            busy=self.core.busy,
            jobs=[self.jobs[name].about(name) for name in sorted(self.core.leases)],
            memory=self.core.memory_percent / 100,
            engine=self.own_facts.engine,
            state=state,
            ready=self.core.ready,
            beat_age_s=self.core.beat_age_s(time.monotonic()),
        )

    def _greet(self, peer: bytes, hello: protocol.Hello) -> None:
        """Answer a broker that calls; whatever it had here before is void."""
        self._forget(hello.job, "called again")
        link = transport.Link(self.control, hello.job, hello.epoch, peer)
        if not link.accepts(hello):
            return
        if different := facts.difference(hello.facts, self.own_facts):
            who = f"{hello.job} of {hello.user}"
            log.warning(f"refused {who}: {different}", extra=about(f"{who}: {different}"))
            link.send(protocol.Refused(reason=different))
            return
        self.jobs[hello.job] = JobIO(link, hello.user)
        slots = 0 if self.core.draining else self.core.slots
        link.send(
            protocol.Welcome(
                pid=os.getpid(), host=socket.gethostname(), slots=slots, facts=self.own_facts
            )
        )

    def _forget(self, name: str, reason: str) -> None:
        """End the lease of a job and all that is held for it."""
        self._handle(core.Released(name, reason))
        if job := self.jobs.pop(name, None):
            self._close(name, job)

    def _close(self, name: str, job: JobIO) -> None:
        if job.data is not None:
            self.poller.unregister(job.data.socket)
        job.close()
        for stored in [stored for stored in self.store.files if stored.startswith(f"{name}-")]:
            self.store.remove(stored)
            self.blobs.pop(stored, None)

    # ---- blobs

    def _take(self, name: str, job: JobIO, given: protocol.Task) -> None:
        """Hold a task until its blobs are here; each is fetched once, however many wait for it."""
        key = given.task, given.attempt
        job.tasks[key] = given
        holds = job.holds[key] = []
        missing = 0
        for blob in given.blobs:
            stored = f"{name}-{blob.digest.hex()}"
            if blob.path:
                continue
            if stored in self.blobs:
                self.blobs[stored] = self.blobs.pop(stored) + 1  # now the most recently used
                holds.append(stored)
                continue
            if blob.digest not in job.incoming:
                try:
                    self._fetch(name, job, blob)
                except OSError as exc:
                    self._drop(name, job, key)
                    self._no_room(name, key, f"no room for its arguments: {exc}")
                    return
            job.incoming[blob.digest].waiting.append(key)
            missing += 1
        if missing:
            job.missing[key] = missing
        else:
            self._handle(core.TaskGiven(name, *key))

    def _fetch(self, name: str, job: JobIO, blob: protocol.Blob) -> None:
        for stored, users in list(self.blobs.items()):
            if self.store.free_bytes >= blob.nbytes:
                break
            if not users:
                self.store.remove(stored)
                del self.blobs[stored]
        descriptor = self.store.create(f"{name}-{blob.digest.hex()}", blob.nbytes)
        job.incoming[blob.digest] = Incoming(blob, descriptor)
        job.unasked.append(blob.digest)
        self._want_to_send(job)

    def _no_room(self, name: str, key: Key, reason: str) -> None:
        task, attempt = key
        died = protocol.Died(task=task, attempt=attempt, reason=reason, no_room=True)
        self._to_broker(name, died)

    def _from_data(self, name: str, job: JobIO, frames: list[memoryview]) -> None:
        assert job.data is not None
        try:
            message = protocol.decode(frames[0])
        except ProtocolError as exc:
            self._give_back(name, f"its data cannot be read: {exc}")
            return
        if not job.data.accepts(message):
            self._give_back(name, "tasks were lost on the way")
            return
        if not isinstance(message, protocol.BlobChunk):
            return
        incoming = job.incoming.get(message.digest)
        if incoming is None or not frames[1:] or not incoming.take(message.offset, frames[1]):
            self._give_back(name, "a big argument came in pieces that do not fit")
        elif incoming.whole:
            self._complete(name, job, incoming)

    def _complete(self, name: str, job: JobIO, incoming: Incoming) -> None:
        digest = incoming.blob.digest
        if incoming.hash.digest() != incoming.blob.check:
            self._give_back(name, "a big argument was damaged on the way")
            return
        job.incoming.pop(digest).close()
        waiting = [key for key in incoming.waiting if key in job.tasks]
        stored = f"{name}-{digest.hex()}"
        self.blobs[stored] = len(waiting)
        for key in waiting:
            job.holds[key].append(stored)
            job.missing[key] -= 1
            if not job.missing[key]:
                del job.missing[key]
                self._handle(core.TaskGiven(name, *key))

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
            self._handle(core.WorkerReady(worker, process.held_bytes))
            return
        found = self.core.workers.get(worker)
        job = self.jobs.get(message.job)
        key = (message.task, message.attempt)
        if (
            found is None
            or job is None
            or found.job != message.job
            or key != (found.task, found.attempt)
        ):
            return  # of an attempt that was aborted meanwhile
        self.starting.pop(worker, None)
        match message:
            case protocol.Ended(path=path):
                if path:
                    self.store.adopt(_name(message.job, key), Path(path), message.nbytes)
                    job.results[key] = message
                    process.spool = "none"  # not to be removed with the worker
                    told = message if job.local else msgspec.structs.replace(message, path="")
                else:
                    told = message
                    self._drop(message.job, job, key)
                self._to_broker(message.job, told)
            case protocol.NoRoom(reason=reason):
                self._drop(message.job, job, key)
                self._no_room(message.job, key, reason)
        self._handle(core.WorkerEnded(worker, process.held_bytes, process.ended))

    def _from_forkserver(self, forkserver: ForkServer, heard: bool) -> None:
        forkserver.flush()
        try:
            while heard and (ended := forkserver.hear()):
                self._reap(ended)
        except EOFError:
            self._forkserver_gone(forkserver)
            return
        if not self.processes and not self.core.leases:
            self._close_forkserver(forkserver)

    def _close_forkserver(self, forkserver: ForkServer) -> int:
        self.poller.unregister(forkserver.fileno())
        self.forkserver = None
        return forkserver.close(self._pids())

    def _pids(self) -> list[int]:
        return [process.pid for process in self.processes.values() if process.pid]

    def _forkserver_gone(self, forkserver: ForkServer) -> None:
        """It has died, or could not import the engine; the kernel ends its workers with it."""
        code = self._close_forkserver(forkserver)
        words = "".join(_tail(self.directory / FORKSERVER_LOG)[-1:])
        log.info(f"the fork server ended with {code}: {words}")
        for worker, process in list(self.processes.items()):
            ended = Ended(worker, process.pid or forkserver.process.pid, code)
            self._reap(ended, "" if process.pid else words)

    def _reap(self, ended: Ended, why: str = "") -> None:
        process = self.processes[ended.worker]
        process.ended = True
        if process.channel.fileno() in self.channels:
            self._hear(ended.worker)  # its last words come first
        self._stop_listening(process.channel)
        process.channel.close()
        del self.processes[ended.worker]
        reason = process.last_words(ended, why)
        oom = ended.code == -signal.SIGKILL and oom_kills() > self.oom_kills_before
        self.oom_kills_before += oom  # each kill explains one death
        if process.memory is not None:
            process.memory.close()
        known = self.core.workers.get(ended.worker)  # one that was killed on purpose is not
        if known is not None and known.state is core.WorkerState.IDLE:
            log.info(f"{reason}, while it had no task")
        self.starting.pop(ended.worker, None)
        for place in (self.store.memory, self.store.disk):
            (place / process.spool).unlink(missing_ok=True)
        self._handle(core.WorkerGone(ended.worker, reason, oom, ended.peak_bytes))

    # ---- effects out

    def _apply(self, effect: core.Effect) -> None:
        match effect:
            case core.GrantLease(job, slots):
                self._to_broker(job, protocol.Leased(slots=slots))
            case core.Spawn(worker, _):
                self._spawn(worker)
            case core.RunOn(worker, job, task, attempt):
                self._run(worker, job, (task, attempt))
            case core.Kill(worker):
                if self.forkserver is not None:
                    self.forkserver.kill(worker)
            case core.ReportDeath(job, task, attempt, reason, oom):
                log.info(f"task {task} of {job}, attempt {attempt}: {reason}")
                died = protocol.Died(task=task, attempt=attempt, reason=reason, oom=oom)
                self._to_broker(job, died)
            case core.DropAttempt(job, task, attempt):
                if found := self.jobs.get(job):
                    self._drop(job, found, (task, attempt))
            case core.LeaseEnded(job, reason):
                if ended := self.jobs.pop(job, None):
                    log.info(f"lease of {job} of {ended.user} ended: {reason}")
                    self._close(job, ended)

    def _run(self, worker: int, name: str, key: Key) -> None:
        process, job = self.processes[worker], self.jobs.get(name)
        if job is None:
            return  # its broker was found lost just now
        given = job.tasks[key]
        process.spool = _name(name, key)
        run = protocol.Run(
            job=name,
            task=key[0],
            attempt=key[1],
            call=given.call,
            paths=[blob.path or self._path(name, blob) for blob in given.blobs],
            spool_bytes=min(SPOOL_BYTES, self.store.free_bytes // self.core.slots),
        )
        process.channel.send(protocol.encode(run))
        if process.channel.unsent:
            self.poller.modify(process.channel.fileno(), _events(process.channel))
        self.starting[worker] = name, key, time.monotonic()

    def _path(self, name: str, blob: protocol.Blob) -> str:
        return str(self.store.path(f"{name}-{blob.digest.hex()}"))

    def _to_broker(self, name: str, message: protocol.Message) -> None:
        """Send to a broker; one that cannot be reached has lost the lease."""
        if (job := self.jobs.get(name)) and not job.control.send(message):
            self._forget(name, "its broker cannot be reached")

    def _give_back(self, name: str, reason: str) -> None:
        """End a lease of which something was lost, and say so to its broker."""
        self._to_broker(name, protocol.NoLease(reason=reason))
        self._forget(name, reason)

    def _drop(self, name: str, job: JobIO, key: Key) -> None:
        """Forget an attempt: what it was given, and the results that it has left."""
        job.tasks.pop(key, None)
        job.missing.pop(key, None)
        for stored in job.holds.pop(key, ()):
            self.blobs[stored] -= 1
        job.results.pop(key, None)
        if any(upload[0] == key for upload in job.uploads):
            self.store.release(_name(name, key))  # the mapping, of which frames are under way
        else:
            self.store.remove(_name(name, key))
        if job.uploads and job.uploads[0][0] == key:
            job.chunk = None
        job.uploads = deque(upload for upload in job.uploads if upload[0] != key)

    def _send_results(self, name: str, job: JobIO, key: Key, ended: protocol.Ended) -> None:
        """Send the body of an attempt, or leave its file to a broker on the same host."""
        stored = _name(name, key)
        if job.local:
            path, _ = self.store.release(stored)
            self._drop(name, job, key)
            placed = protocol.Placed(task=key[0], attempt=key[1], path=str(path))
            self._to_broker(name, placed)
            return
        try:
            body = spares.consume(self.store.path(stored))
        except OSError as exc:
            self._give_back(name, f"results are not there any more: {exc}")
            return
        job.uploads.append((key, protocol.chunks(body)))
        self._want_to_send(job)

    def _want_to_send(self, job: JobIO) -> None:
        assert job.data is not None
        self.poller.modify(job.data.socket, zmq.POLLIN | zmq.POLLOUT)

    def _send_data(self, name: str, job: JobIO) -> None:
        """Ask for blobs and send results, as far as the data socket takes them now."""
        assert job.data is not None
        while job.unasked:
            if not job.data.send(protocol.Fetch(digest=job.unasked[0])):
                return
            job.unasked.popleft()
        while job.uploads:
            (task, attempt), chunks = job.uploads[0]
            if job.chunk is None:
                if (item := next(chunks, None)) is None:
                    self._drop(name, job, (task, attempt))
                    continue
                offset, chunk = item
                job.chunk = protocol.Chunk(task=task, attempt=attempt, offset=offset), chunk
            if not job.data.send(*job.chunk):
                return
            job.chunk = None
        self.poller.modify(job.data.socket, zmq.POLLIN)

    def _spawn(self, worker: int) -> None:
        if self.forkserver is None:
            self.forkserver = self._start_forkserver()
        log_path = self.directory / f"worker-{worker}.log"
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.processes[worker] = Process(log_path, Channel(ours))
        self.channels[ours.fileno()] = worker
        self.poller.register(ours.fileno(), zmq.POLLIN)
        self.forkserver.fork(worker, self._writable(log_path), theirs)

    def _start_forkserver(self) -> ForkServer:
        env = dict(os.environ)
        env.setdefault("OMP_NUM_THREADS", "1")
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
            return path.open("wb")
        except OSError as exc:
            log.warning(f"{path}: {exc.strerror}", extra=about("log"))
            return Path(os.devnull).open("wb")


def _events(channel: Channel) -> int:
    """Return what to wait for on a channel."""
    return zmq.POLLIN | zmq.POLLOUT if channel.unsent else zmq.POLLIN


def _tail(path: Path) -> list[str]:
    """Return the last lines of a log, of which the last says most."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - STDERR_TAIL_BYTES))
        return file.read().decode(errors="replace").strip().splitlines()
    return []


def _name(job: str, key: Key) -> str:
    """Return the name of the file with the results of an attempt; the worker makes the same."""
    return f"{job}-{key[0]}-{key[1]}"
