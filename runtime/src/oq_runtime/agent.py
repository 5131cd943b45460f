"""The node's daemon: owns the slots, starts the workers, spools their results.

    broker --control--> agent --ipc--> worker (one per slot)
    broker <==data==>   agent          payloads down, spooled attempts up, in chunks

Never unpickles and never touches the shared filesystem. Decisions are ``node``'s; this module only
carries them out. One thread, one poll loop. A private agent ends with its owner process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import zmq

from oq_runtime import config, facts, protocol, security, systemd, transport
from oq_runtime import node as core
from oq_runtime.config import WORKER_VARIABLE
from oq_runtime.errors import ConfigError, OqRuntimeError, ProtocolError, VersionError
from oq_runtime.spool import Spool

BEAT_SECS = 2.0
#: chunks of results queued on the data socket; the rest waits in the spool
DATA_HWM = 16
#: last bytes of a dead worker's stderr that go into the error message
STDERR_TAIL_BYTES = 2000

Key = tuple[int, int]


class Process:
    """A worker process and where its messages come from."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen = popen
        self.log = log
        self.pidfd = os.pidfd_open(popen.pid)
        self.peer: bytes | None = None

    def reason(self) -> str:
        """Say how the process ended, with the last words of its stderr."""
        code = self.popen.wait()
        text = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - STDERR_TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
            if code > 0 and lines:
                text += f" ({lines[-1]})"
        return f"worker process {self.popen.pid} {text}"


class JobIO:
    """What the agent holds for one broker: links, payloads, spools, uploads.

    :param control: the link on the control socket, open since the broker's call
    """

    def __init__(self, control: transport.Link) -> None:
        self.control = control
        self.data: transport.Link | None = None  # open with the lease
        self.payloads: dict[Key, bytes | bytearray] = {}
        self.spools: dict[Key, Spool] = {}
        self.uploads: deque[tuple[Key, Iterator[tuple[int, int, int, bytes]]]] = deque()
        self.chunk: tuple[protocol.Chunk, bytes] | None = None

    def close(self) -> None:
        for spool in self.spools.values():
            spool.close()
        if self.data is not None:
            self.data.socket.close(linger=0)


class Agent:
    """
    :param directory: 0700 directory of sockets, logs and spool files
    :param control_url: where brokers connect
    :param slots: worker processes at a time
    :param owner: pid with which this agent ends, or None for a daemon
    :param own_facts: what a broker must have in common with this node
    :param keys: of the cluster, for a daemon
    :param task_timeout_s: see ``node.Node``
    """

    def __init__(
        self,
        *,
        directory: Path,
        control_url: str,
        slots: int,
        owner: int | None,
        own_facts: protocol.Facts,
        keys: security.Keys | None = None,
        task_timeout_s: float | None = None,
    ) -> None:
        self.directory = directory
        self.own_facts = own_facts
        self.keys = keys
        self.core = core.Node(slots, task_timeout_s=task_timeout_s)
        self.context: zmq.Context[Any] = zmq.Context()
        self.gate = security.Gate(self.context, keys) if keys else None
        self.monitor: security.HandshakeMonitor | None = None
        self.control = transport.router(self.context, control_url, secure=self._secure_control)
        self.workers_url = f"ipc://{directory}/workers"
        self.workers = transport.router(self.context, self.workers_url)
        self.owner = None
        self.running = True
        if owner is not None:
            self.owner = transport.pidfd(owner)
            self.running = self.owner is not None
        self.ending = False
        self.processes: dict[int, Process] = {}
        self.by_peer: dict[bytes, int] = {}
        self.jobs: dict[str, JobIO] = {}
        self.next_beat_s = 0.0

    def run(self) -> None:
        try:
            while self.running:
                self._step()
        finally:
            for process in self.processes.values():
                process.popen.kill()
            for process in self.processes.values():
                process.popen.wait()
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
        """Take no new tasks and end when those under way are done; asked twice, end at once."""
        if self.core.draining:
            self.running = False
        self.core.handle(core.DrainAsked(), time.monotonic())
        self.next_beat_s = 0.0  # tell the brokers now
        self.ending = True
        systemd.notify("STOPPING=1")
        log("draining: no new tasks; this agent ends when those under way are done")

    def _step(self) -> None:
        poller = zmq.Poller()
        poller.register(self.control, zmq.POLLIN)
        poller.register(self.workers, zmq.POLLIN)
        if self.owner is not None:
            poller.register(self.owner, zmq.POLLIN)
        if self.monitor is not None:
            poller.register(self.monitor.socket, zmq.POLLIN)
        for process in self.processes.values():
            poller.register(process.pidfd, zmq.POLLIN)
        for job in self.jobs.values():
            if job.data is not None:
                wanted = zmq.POLLIN | (zmq.POLLOUT if job.uploads else 0)
                poller.register(job.data.socket, wanted)
        ready = dict(poller.poll(max(0, round((self.next_beat_s - time.monotonic()) * 1000))))
        if self.owner in ready:
            self.running = False
            return
        for kind, reason in self.monitor.events() if self.monitor else ():
            if kind == "refused":
                log(f"refused a connection: {reason}")
            elif kind == "disconnected":
                self.next_beat_s = 0.0  # a broker that died is found by sending to it
        while frames := transport.receive(self.workers):
            self._from_worker(frames)
        for worker, process in list(self.processes.items()):
            if process.pidfd in ready:
                while frames := transport.receive(self.workers):  # its last words come first
                    self._from_worker(frames)
                self._reap(worker)
        while frames := transport.receive(self.control):
            self._from_broker(frames)
        for name, job in list(self.jobs.items()):
            data = job.data
            while (
                self.jobs.get(name) is job and data and (frames := transport.receive(data.socket))
            ):
                self._from_data(name, job, frames)
            if self.jobs.get(name) is job:
                self._upload(job)
        now = time.monotonic()
        if now >= self.next_beat_s:
            self._beat(now)

    def _beat(self, now: float) -> None:
        self.next_beat_s = now + BEAT_SECS
        self._handle(core.Tick())
        self._handle(core.MemoryUsed(memory_used()))
        systemd.notify("WATCHDOG=1")
        if self.ending and not self.core.busy and not any(j.spools for j in self.jobs.values()):
            self.running = False
        for name, job in list(self.jobs.items()):
            if name in self.core.leases:
                self._to_broker(name, protocol.Beat(busy=self.core.busy, closed=self.core.closed))
            if job.data is not None and name in self.jobs:  # it may have been found lost just now
                job.data.send(protocol.Beat())

    def _handle(self, event: core.Event) -> None:
        self._apply(self.core.handle(event, time.monotonic()))

    # ---- messages in

    def _from_broker(self, frames: list[zmq.Frame]) -> None:
        peer = frames[0].bytes
        try:
            message = protocol.decode(frames[1].buffer)
        except (ProtocolError, IndexError) as exc:
            log(f"refused a message on the control socket: {exc}")
            if isinstance(exc, VersionError):  # the peer will understand as little, but see why
                transport.send_to(self.control, peer, protocol.Refused(reason=str(exc)))
            return
        name = message.job
        if isinstance(message, protocol.Command):
            self._command(message.action)
            transport.send_to(self.control, peer, self._status())
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
            case protocol.Lease(data_url=url):
                keys = self.keys
                secure = functools.partial(security.secure_client, keys=keys) if keys else None
                data = transport.dealer(self.context, url, send_hwm=DATA_HWM, secure=secure)
                job.data = transport.Link(data, name, message.epoch)
                job.data.send(protocol.Hello(pid=os.getpid(), role=message.node))
                self._handle(core.LeaseAsked(name))
            case protocol.Task(task=task, attempt=attempt) if job.data:
                if len(frames) > 2:
                    job.payloads[task, attempt] = frames[2].bytes
                    self._handle(core.TaskGiven(name, task, attempt))
                else:
                    job.data.send(protocol.Fetch(task=task, attempt=attempt))
            case protocol.Grant(task=task, attempt=attempt):
                if spool := job.spools.get((task, attempt)):
                    job.uploads.append(((task, attempt), spool.read(protocol.CHUNK_BYTES)))
            case protocol.Abort(task=task, attempt=attempt):
                self._handle(core.AbortAsked(name, task, attempt))
            case protocol.Release():
                self._forget(name, "released")
            case protocol.Beat():
                pass
            case _:
                log(f"refused {type(message).__name__} on the control socket")

    def _command(self, action: str) -> None:
        if action != "status":
            log(f"told to {action}")
        match action:
            case "stop":
                self._handle(core.DrainAsked())
            case "start":
                self._handle(core.DrainAsked(False))
            case "kill":
                for name in list(self.jobs):
                    self._give_back(name, "its workers were killed by an administrator")

    def _status(self) -> protocol.AgentStatus:
        return protocol.AgentStatus(
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self.core.slots,
            busy=self.core.busy,
            jobs=sorted(self.core.leases),
            memory=self.core.memory,
            engine=self.own_facts.engine,
            state="stopped" if self.core.draining else "up",
        )

    def _greet(self, peer: bytes, hello: protocol.Hello) -> None:
        """Answer a broker that calls; whatever it had here before is void."""
        self._forget(hello.job, "called again")
        link = transport.Link(self.control, hello.job, hello.epoch, peer)
        if not link.accepts(hello):
            return
        if different := facts.difference(hello.facts, self.own_facts):
            log(f"refused {hello.job}: {different}")
            link.send(protocol.Refused(reason=different))
            return
        self.jobs[hello.job] = JobIO(link)
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
            job.close()

    def _from_data(self, name: str, job: JobIO, frames: list[zmq.Frame]) -> None:
        assert job.data is not None
        try:
            message = protocol.decode(frames[0].buffer)
        except ProtocolError as exc:
            self._give_back(name, f"its data cannot be read: {exc}")
            return
        if not job.data.accepts(message):
            self._give_back(name, "tasks were lost on the way")
            return
        if not isinstance(message, protocol.Chunk):
            return
        key = (message.task, message.attempt)
        if message.offset == 0:
            job.payloads[key] = bytearray(message.part_bytes)
        payload = job.payloads.get(key)
        if payload is None:
            return  # of an attempt that was aborted meanwhile
        chunk = frames[1].buffer
        assert isinstance(payload, bytearray)
        payload[message.offset : message.offset + len(chunk)] = chunk
        if message.offset + len(chunk) == message.part_bytes:
            self._handle(core.TaskGiven(name, *key))

    def _from_worker(self, frames: list[zmq.Frame]) -> None:
        peer = frames[0].bytes
        message = protocol.decode(frames[1].buffer)
        if isinstance(message, protocol.Ready):
            for worker, process in list(self.processes.items()):  # readiness may start another
                if process.popen.pid == message.pid:
                    process.peer = peer
                    self.by_peer[peer] = worker
                    self._handle(core.WorkerReady(worker))
            return
        found = self.core.workers.get(self.by_peer.get(peer, -1))
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
            case protocol.Started():
                self._to_broker(message.job, message)
            case protocol.Part():
                try:
                    job.spools[key].add(frames[2].buffer)
                except OSError as exc:
                    reason = f"killed, its results cannot be stored in {self.directory}"
                    self._handle(core.WorkerFailed(found.id, f"{reason}: {exc.strerror}"))
            case protocol.Ended():
                spool = job.spools[key]
                ended = protocol.Ended(
                    task=message.task,
                    attempt=message.attempt,
                    parts=len(spool.sizes),
                    nbytes=spool.nbytes,
                    digest=spool.digest,
                )
                self._to_broker(message.job, ended)
                self._handle(core.WorkerEnded(found.id))

    def _reap(self, worker: int) -> None:
        process = self.processes.pop(worker)
        reason = process.reason()
        os.close(process.pidfd)
        if process.peer is not None:
            del self.by_peer[process.peer]
        if process.popen.returncode:
            log(reason)
        self._handle(core.WorkerGone(worker, reason))

    # ---- effects out

    def _apply(self, effects: list[core.Effect]) -> None:
        for effect in effects:
            match effect:
                case core.GrantLease(job, slots):
                    self._to_broker(job, protocol.Leased(slots=slots))
                case core.Spawn(worker, _):
                    self._spawn(worker)
                case core.RunOn(worker, job, task, attempt):
                    io = self.jobs[job]
                    payload = io.payloads.pop((task, attempt))
                    io.spools[task, attempt] = Spool(self.directory)
                    peer = self.processes[worker].peer
                    assert peer is not None
                    run = protocol.Run(job=job, task=task, attempt=attempt)
                    transport.send_to(self.workers, peer, run, payload)
                case core.Kill(worker):
                    if process := self.processes.get(worker):
                        process.popen.kill()
                case core.ReportDeath(job, task, attempt, reason, started):
                    died = protocol.Died(task=task, attempt=attempt, reason=reason, started=started)
                    self._to_broker(job, died)
                case core.DropAttempt(job, task, attempt):
                    if found := self.jobs.get(job):
                        self._drop(found, (task, attempt))
                case core.LeaseEnded(job, reason):
                    log(f"lease of {job} ended: {reason}")
                    if ended := self.jobs.pop(job, None):
                        ended.close()

    def _to_broker(self, name: str, message: protocol.Message) -> None:
        """Send to a broker; one that cannot be reached has lost the lease."""
        if (job := self.jobs.get(name)) and not job.control.send(message):
            self._forget(name, "its broker cannot be reached")

    def _give_back(self, name: str, reason: str) -> None:
        """End a lease of which something was lost, and say so to its broker."""
        self._to_broker(name, protocol.NoLease(reason=reason))
        self._forget(name, reason)

    def _drop(self, job: JobIO, key: Key) -> None:
        job.payloads.pop(key, None)
        if spool := job.spools.pop(key, None):
            spool.close()
        if job.uploads and job.uploads[0][0] == key:
            job.chunk = None
        job.uploads = deque(upload for upload in job.uploads if upload[0] != key)

    def _upload(self, job: JobIO) -> None:
        while job.uploads and job.data is not None:
            (task, attempt), parts = job.uploads[0]
            if job.chunk is None:
                item = next(parts, None)
                if item is None:
                    self._drop(job, (task, attempt))
                    continue
                index, offset, size, data = item
                header = protocol.Chunk(
                    task=task, attempt=attempt, index=index, offset=offset, part_bytes=size
                )
                job.chunk = (header, data)
            if not job.data.send(*job.chunk):
                return
            job.chunk = None

    def _spawn(self, worker: int) -> None:
        log_path = self.directory / f"worker-{worker}.log"
        env = dict(os.environ)
        env.setdefault("OMP_NUM_THREADS", "1")
        env[WORKER_VARIABLE] = "1"
        with _writable(log_path) as stream:
            popen = subprocess.Popen(
                [sys.executable, "-m", "oq_runtime.worker", self.workers_url, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=env,
            )
        self.processes[worker] = Process(popen, log_path)


def _writable(path: Path) -> IO[bytes]:
    """Open a log file; with the disk full, better a worker without a log than none."""
    try:
        return path.open("wb")
    except OSError as exc:
        log(f"{path}: {exc.strerror}")
        return Path(os.devnull).open("wb")


def log(text: str) -> None:
    """Print one line; the service manager adds time and name."""
    print(text, file=sys.stderr, flush=True)


def memory_used() -> float:
    """Return the part of this node's memory that is in use."""
    memory = psutil.virtual_memory()
    return 1.0 - memory.available / memory.total


def own_address(cluster: config.Cluster) -> str:
    """Return the address in ``host_cores`` that belongs to this node; raises ConfigError."""
    local = {a.address for found in psutil.net_if_addrs().values() for a in found}
    mine = [host for host in cluster.hosts if host in local or _resolved(host) & local]
    if len(mine) != 1:
        raise ConfigError(
            f"[zworkers] host_cores names {len(mine)} addresses of this node; "
            f"it has {', '.join(sorted(a for a in local if '.' in a))}; set --address"
        )
    return mine[0]


def _resolved(host: str) -> set[str]:
    try:
        return {str(row[4][0]) for row in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def run_daemon(address: str | None) -> None:
    """Serve the cluster of openquake.cfg on this node until SIGTERM, which drains.

    Raises ConfigError for a node that is not in the cluster, and OqRuntimeError when the address
    cannot be bound or is not protected.
    """
    settings = config.Config.from_sections(config.read())
    cluster = settings.cluster
    if cluster is None:
        raise ConfigError(
            "no cluster is configured: set [distribution] oq_distribute = zmq and the workers' "
            "addresses in [zworkers] host_cores of openquake.cfg"
        )
    address = address or own_address(cluster)
    if address not in cluster.hosts:
        raise ConfigError(f"{address} is not in [zworkers] host_cores: {', '.join(cluster.hosts)}")
    wanted = cluster.hosts[address]
    keys = security.Keys.derive(security.read_secret(cluster.authkey))
    os.umask(0o077)
    given = os.environ.get("RUNTIME_DIRECTORY")
    directory = Path(given or tempfile.mkdtemp(prefix="oq-agent-"))
    try:
        try:
            agent = Agent(
                directory=directory,
                control_url=cluster.control_url(address),
                slots=config.available_cores() if wanted < 0 else wanted,
                owner=None,
                own_facts=facts.own(cluster.dbserver, cluster.shared_dir),
                keys=keys,
                task_timeout_s=settings.task_timeout_s or None,
            )
        except zmq.ZMQError as exc:
            raise OqRuntimeError(f"{cluster.control_url(address)}: {exc.strerror}") from exc
        signal.signal(signal.SIGTERM, lambda *_: agent.drain())
        signal.signal(signal.SIGINT, lambda *_: agent.stop())
        systemd.notify("READY=1")
        log(f"ready on {cluster.control_url(address)} with {agent.core.slots} slots")
        agent.run()
        log("ended")
    finally:
        if not given:
            shutil.rmtree(directory, ignore_errors=True)


def daemon() -> None:
    """``oq-agent``: exit 0 after SIGTERM or SIGINT, 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(
        prog="oq-agent", description="Serve this node's slots to the OpenQuake cluster."
    )
    parser.add_argument("--address", help="of this node in host_cores, if it has several")
    args = parser.parse_args()
    try:
        run_daemon(args.address)
    except OqRuntimeError as exc:
        log(f"oq-agent: {exc}")
        sys.exit(2 if isinstance(exc, ConfigError) else 1)


def main() -> None:
    """The private agent of ``launch``."""
    parser = argparse.ArgumentParser(prog="oq-agent-private")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--control-url", required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--owner", type=int, required=True)
    args = parser.parse_args()
    try:
        agent = Agent(
            directory=args.directory,
            control_url=args.control_url,
            slots=args.slots,
            owner=args.owner,
            own_facts=facts.own(),
        )
        signal.signal(signal.SIGTERM, lambda *_: agent.stop())
        agent.run()
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)


if __name__ == "__main__":
    main() if "--directory" in sys.argv else daemon()
