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

from oq_runtime import node as core
from oq_runtime import protocol, transport
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
    """What the agent holds for one lease: the data socket, payloads, spools, uploads."""

    def __init__(self, peer: bytes, data: zmq.Socket[Any]) -> None:
        self.peer = peer
        self.data = data
        self.payloads: dict[Key, bytes | bytearray] = {}
        self.spools: dict[Key, Spool] = {}
        self.uploads: deque[tuple[Key, Iterator[tuple[int, int, int, bytes]]]] = deque()
        self.chunk: tuple[protocol.Chunk, bytes] | None = None


class Agent:
    """
    :param directory: 0700 directory of sockets, logs and spool files
    :param control_url: where brokers connect
    :param slots: worker processes at a time
    :param owner: pid with which this agent ends, or None for a daemon
    """

    def __init__(self, *, directory: Path, control_url: str, slots: int, owner: int | None) -> None:
        self.directory = directory
        self.core = core.Node(slots)
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = transport.router(self.context, control_url)
        self.workers_url = f"ipc://{directory}/workers"
        self.workers = transport.router(self.context, self.workers_url)
        self.poller = zmq.Poller()
        self.poller.register(self.control, zmq.POLLIN)
        self.poller.register(self.workers, zmq.POLLIN)
        self.owner = None
        self.running = True
        if owner is not None:
            self.owner = transport.pidfd(owner)
            if self.owner is None:
                self.running = False
            else:
                self.poller.register(self.owner, zmq.POLLIN)
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
        for job in self.jobs.values():
            wanted = zmq.POLLIN | (zmq.POLLOUT if job.uploads else 0)
            self.poller.register(job.data, wanted)
        wait_ms = max(0, round((self.next_beat_s - time.monotonic()) * 1000))
        ready = dict(self.poller.poll(wait_ms))
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
            while name in self.jobs and (frames := transport.receive(job.data)):
                self._from_data(name, job, frames)
            self._upload(name, job)
        now = time.monotonic()
        if now >= self.next_beat_s:
            self.next_beat_s = now + BEAT_SECS
            self._apply(self.core.handle(core.Tick(), now))
            for name, job in list(self.jobs.items()):
                beat = protocol.Beat(job=name, busy=self.core.busy)
                transport.send_to(self.control, job.peer, beat)

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
        job = message.job
        self._handle(core.Heard(job))
        match message:
            case protocol.Hello():
                slots = self.core.slots
                welcome = protocol.Welcome(
                    job=job, pid=os.getpid(), host=socket.gethostname(), slots=slots
                )
                transport.send_to(self.control, peer, welcome)
            case protocol.Lease(slots=slots, data_url=url):
                if job not in self.jobs:
                    data = transport.dealer(self.context, url, send_hwm=DATA_HWM)
                    self.jobs[job] = JobIO(peer, data)
                    transport.send(data, protocol.Hello(job=job, pid=os.getpid(), role="agent"))
                self._handle(core.LeaseAsked(job, slots))
            case protocol.Task(task=task, attempt=attempt):
                if job in self.jobs:
                    if len(frames) > 2:
                        self.jobs[job].payloads[task, attempt] = frames[2].bytes
                        self._handle(core.TaskGiven(job, task, attempt))
                    else:
                        fetch = protocol.Fetch(job=job, task=task, attempt=attempt)
                        transport.send(self.jobs[job].data, fetch)
            case protocol.Grant(task=task, attempt=attempt):
                if job in self.jobs and (spool := self.jobs[job].spools.get((task, attempt))):
                    parts = spool.read(protocol.CHUNK_BYTES)
                    self.jobs[job].uploads.append(((task, attempt), parts))
            case protocol.Abort(task=task, attempt=attempt):
                self._handle(core.AbortAsked(job, task, attempt))
            case protocol.Release():
                self._handle(core.Released(job))
            case protocol.Beat():
                pass
            case _:
                log(f"refused {type(message).__name__} on the control socket")

    def _from_data(self, name: str, job: JobIO, frames: list[zmq.Frame]) -> None:
        message = protocol.decode(frames[0].buffer)
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
        if found is None or job is None or (message.task, message.attempt) != (
            found.task, found.attempt,
        ):  # fmt: skip
            return  # of an attempt that was aborted meanwhile
        key = (message.task, message.attempt)
        match message:
            case protocol.Started():
                transport.send_to(self.control, job.peer, message)
            case protocol.Part():
                job.spools[key].add(frames[2].buffer)
            case protocol.Ended():
                spool = job.spools[key]
                ended = protocol.Ended(
                    job=message.job,
                    task=message.task,
                    attempt=message.attempt,
                    parts=len(spool.sizes),
                    nbytes=spool.nbytes,
                    digest=spool.digest,
                )
                transport.send_to(self.control, job.peer, ended)
                self._handle(core.WorkerEnded(found.id))

    def _reap(self, worker: int) -> None:
        process = self.processes.pop(worker)
        reason = process.reason()
        self.poller.unregister(process.pidfd)
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
                    self._to_broker(job, protocol.Leased(job=job, slots=slots))
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
                    died = protocol.Died(
                        job=job, task=task, attempt=attempt, reason=reason, started=started
                    )
                    self._to_broker(job, died)
                case core.DropAttempt(job, task, attempt):
                    if found := self.jobs.get(job):
                        self._drop(found, (task, attempt))
                case core.LeaseEnded(job, reason):
                    log(f"lease of {job} ended: {reason}")
                    ended = self.jobs.pop(job)
                    for spool in ended.spools.values():
                        spool.close()
                    self.poller.unregister(ended.data)
                    ended.data.close(linger=0)

    def _to_broker(self, job: str, message: protocol.Message) -> None:
        if job in self.jobs:
            transport.send_to(self.control, self.jobs[job].peer, message)

    def _drop(self, job: JobIO, key: Key) -> None:
        job.payloads.pop(key, None)
        if spool := job.spools.pop(key, None):
            spool.close()
        if job.uploads and job.uploads[0][0] == key:
            job.chunk = None
        job.uploads = deque(upload for upload in job.uploads if upload[0] != key)

    def _upload(self, name: str, job: JobIO) -> None:
        while job.uploads:
            (task, attempt), parts = job.uploads[0]
            if job.chunk is None:
                item = next(parts, None)
                if item is None:
                    self._drop(job, (task, attempt))
                    continue
                index, offset, size, data = item
                header = protocol.Chunk(
                    job=name, task=task, attempt=attempt, index=index, offset=offset,
                    part_bytes=size,
                )  # fmt: skip
                job.chunk = (header, data)
            try:
                frames = [protocol.encode(job.chunk[0]), job.chunk[1]]
                job.data.send_multipart(frames, zmq.DONTWAIT, copy=False)
            except zmq.Again:
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
        self.poller.register(self.processes[worker].pidfd, zmq.POLLIN)


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
        )
        signal.signal(signal.SIGTERM, lambda *_: agent.stop())
        agent.run()
    finally:
        if args.owner is not None:
            shutil.rmtree(args.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
