"""The node's daemon: owns the slots, starts the workers, spools their results.

    broker --control--> agent --ipc--> worker (one per slot)
    broker <==data==>   agent          payloads down, spooled attempts up, in chunks

Never unpickles and never touches the shared filesystem. Decisions are ``node``'s; this module only
carries them out. One thread, one poll loop. A private agent ends with its owner process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from oq_runtime import facts, protocol, transport
from oq_runtime import node as core
from oq_runtime.config import WORKER_VARIABLE
from oq_runtime.errors import ProtocolError
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
    """

    def __init__(
        self,
        *,
        directory: Path,
        control_url: str,
        slots: int,
        owner: int | None,
        own_facts: protocol.Facts,
    ) -> None:
        self.directory = directory
        self.own_facts = own_facts
        self.core = core.Node(slots)
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = transport.router(self.context, control_url)
        self.workers_url = f"ipc://{directory}/workers"
        self.workers = transport.router(self.context, self.workers_url)
        self.owner = None
        self.running = True
        if owner is not None:
            self.owner = transport.pidfd(owner)
            self.running = self.owner is not None
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
            self.context.destroy(linger=0)

    def stop(self) -> None:
        self.running = False

    def _step(self) -> None:
        poller = zmq.Poller()
        poller.register(self.control, zmq.POLLIN)
        poller.register(self.workers, zmq.POLLIN)
        if self.owner is not None:
            poller.register(self.owner, zmq.POLLIN)
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
        for name, job in list(self.jobs.items()):
            if name in self.core.leases:
                self._to_broker(name, protocol.Beat(busy=self.core.busy, closed=self.core.closed))
            if job.data is not None:
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
            return
        name = message.job
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
                data = transport.dealer(self.context, url, send_hwm=DATA_HWM)
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
        message = protocol.decode(frames[0].buffer)
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
            for worker, process in self.processes.items():
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
                job.spools[key].add(frames[2].buffer)
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
        with log_path.open("wb") as stream:
            popen = subprocess.Popen(
                [sys.executable, "-m", "oq_runtime.worker", self.workers_url, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=env,
            )
        self.processes[worker] = Process(popen, log_path)


def log(text: str) -> None:
    """Print one line; the service manager adds time and name."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="oq-agent")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--control-url", required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--owner", type=int)
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
        if args.owner is not None:
            shutil.rmtree(args.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
