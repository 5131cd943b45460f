"""The broker of one session: queue, staging and commit between an engine and the agents.

    engine --ipc--> broker --control--> agents
    engine <--ipc-- broker <==data==>   agents

Decisions are ``scheduler``'s; this module moves the bytes. Its own process, because unpickling in
the engine holds Python's lock for seconds; never the engine's child; ends with its owner.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from oq_runtime import protocol, transport
from oq_runtime import scheduler as core
from oq_runtime.errors import ProtocolError, TransitionError

BEAT_SECS = 2.0


@dataclass(slots=True)
class Submission:
    """A task as the engine sent it: who, under which number, and the pickle to run."""

    client: bytes
    task: int
    map: int
    func: str
    payload: zmq.Frame


@dataclass(slots=True)
class Staging:
    """Parts of an attempt on their way from an agent."""

    parts: int
    nbytes: int
    digest: bytes
    received: int = 0
    data: list[bytearray] = field(default_factory=list)

    def intact(self) -> bool:
        digest = hashlib.blake2b(digest_size=32)
        for part in self.data:
            digest.update(part)
        return len(self.data) == self.parts and digest.digest() == self.digest


class Broker:
    """
    :param directory: 0700 directory of the sockets
    :param agents: control URLs of the agents
    :param agent_pid: pid of a private agent, whose death is seen at once
    :param owner: pid with which this broker ends
    :param window_bytes: results staged at a time
    """

    def __init__(
        self,
        *,
        directory: Path,
        agents: list[str],
        agent_pid: int | None,
        owner: int,
        window_bytes: int,
    ) -> None:
        self.job = directory.name
        self.core = core.Scheduler(window_bytes=window_bytes)
        self.context: zmq.Context[Any] = zmq.Context()
        self.data_url = f"ipc://{directory}/data"
        self.engine = transport.router(self.context, f"ipc://{directory}/engine")
        self.data = transport.router(self.context, self.data_url)
        self.agents = {url: transport.dealer(self.context, url) for url in agents}
        self.hosts: dict[str, str] = {}
        self.poller = zmq.Poller()
        for socket in (self.engine, self.data, *self.agents.values()):
            self.poller.register(socket, zmq.POLLIN)
        self.watched: dict[int, Callable[[], None]] = {}
        self.running = True
        self._watch(owner, self.stop)
        if agent_pid is not None:
            self._watch(agent_pid, self._agent_ended)
        self.submissions: dict[int, Submission] = {}
        self.numbers: dict[tuple[bytes, int], int] = {}  # (client, its task) -> ours
        self.groups: dict[tuple[bytes, int], int] = {}  # (client, its map) -> ours
        self.unsubmitted = 0
        self.staging: dict[tuple[int, int], Staging] = {}
        self.phases: dict[str, protocol.Phase] = {}
        self.next_beat_s = 0.0
        for agent in self.agents.values():
            transport.send(agent, protocol.Hello(job=self.job, pid=os.getpid(), role="broker"))

    def run(self) -> None:
        try:
            while self.running:
                self._step()
        finally:
            for agent in self.agents.values():
                transport.send(agent, protocol.Release(job=self.job))
                agent.close(linger=500)
            self.context.destroy(linger=500)

    def stop(self) -> None:
        self.running = False

    def _watch(self, pid: int, ended: Callable[[], None]) -> None:
        descriptor = transport.pidfd(pid)
        if descriptor is None:
            ended()
            return
        self.watched[descriptor] = ended
        self.poller.register(descriptor, zmq.POLLIN)

    def _agent_ended(self) -> None:
        self.core.no_nodes_limit_s = 0.0  # a private agent does not come back
        for url in self.agents:
            self._handle(core.NodeGone(url, "its agent process ended"))

    def _step(self) -> None:
        wait_ms = max(0, round((self.next_beat_s - time.monotonic()) * 1000))
        ready = dict(self.poller.poll(wait_ms))
        for descriptor, ended in list(self.watched.items()):
            if descriptor in ready:
                self.poller.unregister(descriptor)
                os.close(descriptor)
                del self.watched[descriptor]
                ended()
        for url, agent in self.agents.items():
            while frames := transport.receive(agent):
                self._from(frames, lambda m, f, url=url: self._from_agent(url, m))  # type: ignore[misc]
        while frames := transport.receive(self.data):
            peer = frames[0].bytes
            self._from(frames[1:], lambda m, f: self._from_data(peer, m, f))  # noqa: B023
        while frames := transport.receive(self.engine):
            peer = frames[0].bytes
            self._from(frames[1:], lambda m, f: self._from_engine(peer, m, f))  # noqa: B023
        now = time.monotonic()
        if now >= self.next_beat_s:
            self.next_beat_s = now + BEAT_SECS
            for agent in self.agents.values():
                transport.send(agent, protocol.Beat(job=self.job))
            self._handle(core.Tick())

    def _from(self, frames: list[zmq.Frame], take: Callable[[Any, list[zmq.Frame]], None]) -> None:
        try:
            take(protocol.decode(frames[0].buffer), frames[1:])
        except (ProtocolError, TransitionError, IndexError) as exc:
            log(f"refused a message: {exc}")

    def _handle(self, event: core.Event) -> None:
        for effect in self.core.handle(event, time.monotonic()):
            self._apply(effect)

    # ---- messages in

    def _from_engine(self, peer: bytes, message: Any, frames: list[zmq.Frame]) -> None:
        match message:
            case protocol.Hello(pid=pid):
                self._watch(pid, lambda: self._client_ended(peer))
                self._welcome(peer)
            case protocol.Submit(task=task, map=map_, func=func, weight=weight):
                number = self.unsubmitted
                self.unsubmitted += 1
                group = self.groups.setdefault((peer, map_), len(self.groups))
                self.submissions[number] = Submission(peer, task, map_, func, frames[0])
                self.numbers[peer, task] = number
                phase = self.phases.setdefault(func, protocol.Phase(name=func))
                phase.total += 1
                self._handle(core.Submitted(number, group, func, weight))
            case protocol.Consumed(task=task):
                number = self.numbers.pop((peer, task), -1)
                self._handle(core.Consumed(number))
            case protocol.Cancel(map=map_):
                self._cancel(peer, map_)
            case protocol.StatusQuery():
                transport.send_to(self.engine, peer, self._status())

    def _welcome(self, peer: bytes) -> None:
        slots = sum(node.slots for node in self.core.nodes.values())
        welcome = protocol.Welcome(job=self.job, pid=os.getpid(), slots=slots)
        transport.send_to(self.engine, peer, welcome)

    def _cancel(self, peer: bytes, map_: int) -> None:
        for (client, number), group in list(self.groups.items()):
            if client == peer and map_ in (-1, number):
                self._handle(core.Cancelled(group))
        for number, submission in list(self.submissions.items()):
            cancelled = self.core.tasks[number].state is core.State.CANCELLED
            if submission.client == peer and cancelled:
                self._forget(number)
                del self.numbers[peer, submission.task]

    def _client_ended(self, peer: bytes) -> None:
        self._cancel(peer, -1)
        for client, task in [key for key in self.numbers if key[0] == peer]:
            self._handle(core.Consumed(self.numbers.pop((client, task))))

    def _from_agent(self, url: str, message: Any) -> None:
        if url in self.core.nodes or isinstance(message, protocol.Welcome | protocol.Leased):
            self._handle(core.NodeSeen(url))
        else:  # it was lost and is back: it needs a new lease
            transport.send(self.agents[url], protocol.Hello(job=self.job, pid=os.getpid(), role=""))
        match message:
            case protocol.Welcome(host=host):
                self.hosts[url] = host
                lease = protocol.Lease(job=self.job, slots=-1, data_url=self.data_url)
                transport.send(self.agents[url], lease)
            case protocol.Leased(slots=slots):
                self._handle(core.NodeJoined(url, slots))
            case protocol.Started(task=task, attempt=attempt):
                self._handle(core.Started(url, task, attempt))
            case protocol.Ended(task=task, attempt=attempt):
                staging = Staging(message.parts, message.nbytes, message.digest)
                self.staging[task, attempt] = staging
                self._handle(core.Ended(url, task, attempt, message.nbytes))
            case protocol.Died(task=task, attempt=attempt, reason=reason):
                host = self.hosts.get(url, url)
                self._handle(core.Died(url, task, attempt, f"{reason}, host {host}"))

    def _from_data(self, peer: bytes, message: Any, frames: list[zmq.Frame]) -> None:
        match message:
            case protocol.Fetch(task=task, attempt=attempt):
                if submission := self.submissions.get(task):
                    payload = submission.payload.buffer
                    for offset, chunk in protocol.chunks(payload):
                        header = protocol.Chunk(
                            job=self.job, task=task, attempt=attempt, index=0, offset=offset,
                            part_bytes=len(payload),
                        )  # fmt: skip
                        transport.send_to(self.data, peer, header, chunk)
            case protocol.Chunk(task=task, attempt=attempt):
                self._stage(task, attempt, message, frames[0].buffer)

    def _stage(self, task: int, attempt: int, header: protocol.Chunk, chunk: memoryview) -> None:
        staging = self.staging.get((task, attempt))
        if staging is None:
            return  # of an attempt that was dropped meanwhile
        if header.offset == 0:
            staging.data.append(bytearray(header.part_bytes))
        part = staging.data[-1]
        part[header.offset : header.offset + len(chunk)] = chunk
        staging.received += len(chunk)
        whole = header.index == staging.parts - 1 and header.offset + len(chunk) == len(part)
        if whole:
            node = self.core.tasks[task].node
            self._handle(core.Uploaded(node, task, attempt, staging.intact()))

    # ---- effects out

    def _apply(self, effect: core.Effect) -> None:
        match effect:
            case core.Assign(node, task, attempt):
                submission = self.submissions[task]
                size = len(submission.payload)
                header = protocol.Task(
                    job=self.job, task=task, attempt=attempt, func=submission.func, nbytes=size
                )
                inline = [submission.payload] if size <= protocol.INLINE_BYTES else []
                transport.send(self.agents[node], header, *inline)
            case core.GrantUpload(node, task, attempt):
                grant = protocol.Grant(job=self.job, task=task, attempt=attempt)
                transport.send(self.agents[node], grant)
            case core.AbortAttempt(node, task, attempt):
                found = self.core.tasks.get(task)
                if found is None or found.attempt != attempt:
                    self.staging.pop((task, attempt), None)
                if node in self.agents:
                    abort = protocol.Abort(job=self.job, task=task, attempt=attempt)
                    transport.send(self.agents[node], abort)
            case core.DropStaged(task, attempt):
                self.staging.pop((task, attempt), None)
            case core.Commit(_, task, attempt):
                self._deliver(task, self.staging.pop((task, attempt)))
            case core.GiveUp(task, error, history):
                self._fail(task, error, history)

    def _deliver(self, task: int, staging: Staging) -> None:
        submission = self._forget(task)
        phase = self.phases[submission.func]
        phase.done += 1
        phase.received_bytes += staging.nbytes
        for index, part in enumerate(staging.data):
            header = protocol.Delivered(
                job=self.job,
                task=submission.task,
                map=submission.map,
                index=index,
                last=index == staging.parts - 1,
            )
            transport.send_to(self.engine, submission.client, header, part)

    def _fail(self, task: int, error: str, history: tuple[str, ...]) -> None:
        submission = self._forget(task)
        text = (
            f"task #{submission.task} ({submission.func}) was given up after "
            f"{self.core.tasks[task].attempt} attempts:\n" + "\n".join(history)
        )
        log(text)
        header = protocol.Failed(
            job=self.job, task=submission.task, map=submission.map, error=error, text=text
        )
        transport.send_to(self.engine, submission.client, header)

    def _forget(self, task: int) -> Submission:
        return self.submissions.pop(task)

    def _status(self) -> protocol.Status:
        for phase in self.phases.values():
            phase.running, phase.retries = 0, self.core.retries[phase.name]
        for node in self.core.nodes.values():
            for task in node.running:
                if task in self.submissions:
                    self.phases[self.submissions[task].func].running += 1
        nodes = [
            protocol.Node(
                host=self.hosts.get(url, url),
                slots=node.slots,
                busy=len(node.running),
                state="up",
            )
            for url, node in self.core.nodes.items()
        ]
        return protocol.Status(job=self.job, phases=list(self.phases.values()), nodes=nodes)


def log(text: str) -> None:
    """Print to stderr, which the launcher has directed to a file of the session."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="oq-broker")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--agent", action="append", required=True)
    parser.add_argument("--agent-pid", type=int)
    parser.add_argument("--owner", type=int, required=True)
    parser.add_argument("--window-bytes", type=int, required=True)
    args = parser.parse_args()
    try:
        broker = Broker(
            directory=args.directory,
            agents=args.agent,
            agent_pid=args.agent_pid,
            owner=args.owner,
            window_bytes=args.window_bytes,
        )
        signal.signal(signal.SIGTERM, lambda *_: broker.stop())
        broker.run()
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
