"""The broker of one session: queue, staging and commit between an engine and the agents.

    engine --ipc--> broker --control--> agents
    engine <--ipc-- broker <==data==>   agents

Decisions are ``scheduler``'s; this module moves the bytes. Its own process, because unpickling in
the engine holds Python's lock for seconds; never the engine's child; ends with its owner.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import getpass
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from oq_runtime import config, descriptors, facts, logs, metrics, processes
from oq_runtime.core import scheduler as core
from oq_runtime.core.events import Events
from oq_runtime.core.ledger import ROW, Ledger, Task
from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.core.pace import Pace
from oq_runtime.errors import NoRoom, OqRuntimeError, OutOfMemory, ProtocolError, TransitionError
from oq_runtime.files import crashes, private
from oq_runtime.files.store import Store
from oq_runtime.logs import about
from oq_runtime.priority import Priority
from oq_runtime.session.peer import Event
from oq_runtime.session.peers import Line, Peers
from oq_runtime.session.staging import Staging
from oq_runtime.text import MOST_CHARACTERS, clean
from oq_runtime.wire import bombs, payload, protocol, security, transport
from oq_runtime.wire.bombs import Bombs

log = logging.getLogger(__name__)

#: messages that are read from the engine before the agents have their turn
AT_ONCE = 500
#: rows on attempts in a message, 0.6 MB; with all names and shares it stays below 4 MiB
MOST_ROWS = 5000
#: characters of the name of a node in it
NODE_CHARACTERS = 100
#: characters of the names of all nodes in a status, and of their reasons: up to 4 B each
STATUS_CHARACTERS = 400_000
#: for the last messages to the agents
LINGER_MS = 500
MEMORY_REMEDY = (
    "; give the nodes more memory, or make the tasks smaller by a higher concurrent_tasks"
)


@dataclass(slots=True)
class Submission:
    """A task as an engine process, the client, has sent it; ``kind`` is its phase's number."""

    client: bytes
    sent: protocol.Submit
    kind: int


class Broker:
    """The heart of a session: tasks of the engine go to nodes, and their results come back.

    :param directory: 0700 directory of the sockets, and of what has no room in ``memory``
    :param memory: directory in shared memory for results
    :param agents: name of each agent and its control URL
    :param data_urls: where to receive results: the first that is free
    :param agent_pid: pid of a private agent, whose death is seen at once
    :param owner: pid with which this broker ends
    :param window_bytes: results staged at a time
    :param limits: of silence and attempts
    :param own_facts: what the agents must have in common with this host
    :param priority: of the job, beside those of others on the agents
    :param keys: of the cluster, where the agents are reached over TCP
    :param caller: with which they are called, by default ``keys``
    """

    def __init__(
        self,
        *,
        directory: Path,
        memory: Path,
        agents: dict[str, str],
        data_urls: list[str],
        agent_pid: int | None,
        owner: int,
        window_bytes: int,
        limits: Limits,
        own_facts: protocol.Facts,
        priority: Priority = Priority.NORMAL,
        keys: security.Keys | None = None,
        caller: security.Keys | None = None,
    ) -> None:
        self.directory = directory
        self.job = directory.name
        self.title = ""
        self.core = core.Scheduler(limits, window_bytes=window_bytes)
        self.context: zmq.Context[Any] = zmq.Context()
        self.gate = security.Gate(self.context, keys) if keys else None
        self.bombs = Bombs(window_bytes + bombs.MOST_BYTES) if keys else None
        self.ledger = Ledger()
        self._handle = Events(self._decide, self._apply, time.monotonic)
        self.watched: dict[int, Callable[[], None]] = {}
        self.sources: dict[Any, Callable[[], None]] = {}
        self.poller: zmq.Poller | None = None  # of these; None when they have changed
        self.running = True
        self.stopped = os.eventfd(0)  # ends a wait, which a signal alone does not (PEP 475)
        self.submissions: dict[int, Submission] = {}
        self.numbers: dict[tuple[bytes, int], int] = {}  # (client, its task) -> ours
        self.groups: dict[tuple[bytes, int], int] = {}  # (client, its map) -> ours
        self.unsubmitted = 0
        self.told_wanted = False  # whether the nodes have been told that there are tasks
        # digest -> file -> tasks that need it; each client has files of its own
        self.blobs: dict[bytes, Counter[str]] = {}
        # the scheduler's window bounds what is staged; an attempt beyond it goes to the disk
        self.staging = Staging(Store(memory, directory, memory_bytes=window_bytes))
        self.local = all(url.startswith("ipc:") for url in data_urls)
        self.titles: dict[bytes, str] = {}  # of the job that each client runs now
        self.kinds: dict[tuple[str, str], int] = {}  # (job, function) -> its place in the next
        self.phases: list[protocol.Phase] = []
        self.paces: list[Pace] = []  # of the phases
        self.progress = protocol.Beat()  # its counts of the job, as of the last beat
        self.unstarted: list[str] = []  # nodes that begin with none of their tasks, as of then
        self.exporter: metrics.Exporter | None = None
        self.next_beat_s = 0.0
        self.peers = Peers(
            self.context,
            job=self.job,
            agents=agents,
            data_urls=data_urls,
            limits=limits,
            own_facts=own_facts,
            user=getpass.getuser(),
            priority=priority,
            keys=caller or keys,
            tickets=self.gate.tickets if self.gate else None,
            watched=agent_pid is not None,
            tell=self._handle,
            read_control=self._from_node,
            read_data=self._from_data,
        )
        self._watch(owner, self.stop)
        if agent_pid is not None:
            self._watch(agent_pid, self._agent_ended)
        # the last: whoever finds this socket knows that all the rest could be set up
        self.engine = transport.router(self.context, f"ipc://{directory}/engine")

    def run(self) -> None:
        try:
            while self.running:
                self._step()
        finally:
            self.peers.close(LINGER_MS)
            if self.bombs is not None:
                self.bombs.close()
            if self.gate is not None:
                self.gate.stop()
            self.context.destroy(linger=LINGER_MS)

    def stop(self) -> None:
        """Have the leases released and the broker end; for signal handlers and other threads."""
        self.running = False
        os.eventfd_write(self.stopped, 1)

    def _watch(self, pid: int, ended: Callable[[], None]) -> None:
        descriptor = processes.pidfd(pid)
        if descriptor is None:
            ended()
            return
        self.watched[descriptor] = ended
        self.poller = None

    def _agent_ended(self) -> None:
        self.core.no_nodes_limit_s = 0.0  # a private agent does not come back
        crash = crashes.find(self.directory, "agent")
        reason = f"its agent process ended{f': {crash}' if crash else ''}"
        for line in self.peers.lines.values():
            self.peers.lose(line, reason, Event.ENDED)

    def _step(self) -> None:
        now = time.monotonic()
        due_s = min(self.next_beat_s, self.peers.due_s)
        if self.poller is None:
            self.poller = self._poll_all()
        for source, _ in self.poller.poll(max(0, math.ceil((due_s - now) * 1000))):
            self.sources[source]()
        now = time.monotonic()
        self.peers.step(now, self._news())
        if now >= self.next_beat_s:
            self._beat(now)
        if bool(self.core.tasks) != self.told_wanted:
            self.told_wanted = not self.told_wanted
            self.peers.send_all(self._news())

    def _news(self) -> protocol.Beat:
        """Return what the nodes are to know of the job."""
        known = self.progress
        return protocol.Beat(
            wanted=len(self.core.tasks),
            title=self.title,
            done=known.done,
            total=known.total,
            left_s=known.left_s,
        )

    def _count(self, now: float) -> protocol.Beat:
        """Return the counts of the job that has the title, and about how long the rest takes."""
        self._recount(now)
        phases = [phase for phase in self.phases if phase.job == self.title]
        return protocol.Beat(
            done=sum(phase.done for phase in phases),
            total=sum(phase.total for phase in phases),
            left_s=max((p.left_s for p in phases if p.left_s is not None), default=None),
        )

    def _recount(self, now: float) -> None:
        """Bring the counters of the phases up to date."""
        for kind, (phase, pace) in enumerate(zip(self.phases, self.paces, strict=True)):
            known = self.core.kinds[kind]
            phase.running, phase.retries = known.busy, known.retries
            phase.preempted = known.preempted
            pace.advance(phase.total, phase.done, phase.running, now)
            phase.took_s, left_s = pace.took_s, pace.left_s(now)
            phase.left_s = None if left_s is None else min(left_s, protocol.MOST_AGE_S)

    def _beat(self, now: float) -> None:
        self.next_beat_s = now + self.core.limits.beat_s
        self.progress = self._count(now)
        if self.peers.data is None:
            self.peers.bind()
            self.poller = None
        logs.recount()
        if self.exporter is not None:
            self.exporter.take(metrics.of_session(self._status()))
        self._handle(core.Tick())
        self.unstarted = self.core.unstarted(now)

    def _poll_all(self) -> zmq.Poller:
        """Return a poller of all sources, and note what is to be done with each that is ready."""
        self.sources = {
            descriptor: functools.partial(self._ended, descriptor) for descriptor in self.watched
        }
        self.sources |= self.peers.sources()
        self.sources[self.stopped] = lambda: None
        self.sources[self.engine] = self._read_engine
        poller = zmq.Poller()
        for source in self.sources:
            poller.register(source, zmq.POLLIN)
        return poller

    def _ended(self, descriptor: int) -> None:
        os.close(descriptor)
        self.poller = None
        self.watched.pop(descriptor)()

    def _read_engine(self) -> None:
        for _ in range(AT_ONCE):
            if not (frames := transport.receive(self.engine)):
                return
            self._dispatch(frames[1], functools.partial(self._from_engine, frames[0]))

    def _dispatch(self, header: bytes, take: Callable[[Any], None]) -> None:
        """Have a message taken; one that cannot be decoded, or does not fit here, is refused."""
        try:
            take(protocol.decode(header))
        except (ProtocolError, TransitionError) as exc:
            log.warning(f"refused a message: {exc}", extra=about("message"))

    def _decide(self, event: core.Event, now: float) -> list[core.Effect]:
        effects = self.core.handle(event, now)
        self.ledger.take(event, now)
        for effect in effects:
            self.ledger.take(effect, now)
        return effects

    # ---- messages in

    def _from_engine(self, peer: bytes, message: Any) -> None:
        match message:
            case protocol.Hello(pid=pid):
                self._watch(pid, lambda: self._client_ended(peer))
                self._welcome(peer)
            case protocol.Submit(task=task, map=map_, func=func, blobs=blobs):
                number = self.unsubmitted
                self.unsubmitted += 1
                group = self.groups.setdefault((peer, map_), number)
                for blob in blobs:
                    self.blobs.setdefault(blob.digest, Counter())[blob.path] += 1
                self.numbers[peer, task] = number
                kind = self._kind(peer, func)
                self.phases[kind].total += 1
                self.submissions[number] = Submission(peer, message, kind)
                nbytes = len(message.call) + sum(blob.nbytes for blob in blobs)
                about_it = (self.phases[kind].job, kind, message.number, message.weight, nbytes)
                self.ledger.submitted(number, Task(*about_it, time.monotonic()))
                self._handle(core.Submitted(number, group, kind, message.weight))
            case protocol.Consumed(tasks=tasks):
                for task in tasks:
                    self._handle(core.Consumed(self.numbers.pop((peer, task), -1)))
            case protocol.Cancel(map=map_):
                self._cancel(peer, map_)
            case protocol.Title(text=text):
                self.title = self.titles[peer] = text
            case protocol.StatusQuery():
                transport.send_to(self.engine, peer, self._status())
            case protocol.AttemptsQuery(of=job):
                transport.send_to(self.engine, peer, self._attempts(job))

    def _kind(self, peer: bytes, func: str) -> int:
        """Return the number of the phase that a function is in the job that a client runs now."""
        job = self.titles.get(peer, "")
        kind = self.kinds.setdefault((job, func), len(self.phases))
        if kind == len(self.phases):
            self.phases.append(protocol.Phase(name=func, job=job))
            self.paces.append(Pace(time.monotonic()))
        return kind

    def _welcome(self, peer: bytes) -> None:
        slots = sum(node.slots for node in self.core.nodes.values())
        limit_s = self.core.limits.no_nodes_limit_s
        welcome = protocol.Welcome(
            job=self.job, pid=os.getpid(), slots=slots, no_nodes_limit_s=limit_s
        )
        transport.send_to(self.engine, peer, welcome)

    def _cancel(self, peer: bytes, map_: int) -> None:
        """Forget a map of a client, or all: its tasks, and the results not consumed yet."""
        for client, number in list(self.groups):
            if client == peer and map_ in (-1, number):
                self._handle(core.Cancelled(self.groups.pop((client, number))))

    def _client_ended(self, peer: bytes) -> None:
        self._cancel(peer, -1)
        for key in [key for key in self.numbers if key[0] == peer]:
            del self.numbers[key]

    def _from_node(self, line: Line, message: Any) -> None:
        name = line.name
        match message:
            case protocol.Beat(closed=closed, free_bytes=free_bytes):
                self._handle(core.NodeSeen(name, closed, free_bytes))
            case protocol.Leased(slots=slots):
                self._handle(core.NodeResized(name, slots))
            case protocol.Started(task=task, attempt=attempt):
                self._handle(core.AttemptStarted(name, task, attempt))
            case protocol.Ended(task=task, attempt=attempt, usage=usage):
                took = msgspec.structs.asdict(usage)
                self.ledger.measured(task, attempt, time.monotonic(), **took)
                if not self.local and message.path:
                    message = msgspec.structs.replace(message, path="")
                self.staging.announce(name, message)
                self._handle(core.AttemptEnded(name, task, attempt, message.nbytes))
            case protocol.Placed(task=task, attempt=attempt, path=path) if self.local:
                if self.staging.place((name, task, attempt), Path(path)):
                    self._handle(core.Uploaded(name, task, attempt, True))
            case protocol.Died(task=task, attempt=attempt, oom=oom, no_room=no_room):
                reason = f"{message.reason}, host {line.host}"
                self._handle(core.AttemptDied(name, task, attempt, reason, oom, no_room))
            case protocol.Preempted(task=task, attempt=attempt, by=by):
                self._handle(core.AttemptPreempted(name, task, attempt, by))

    def _from_data(self, line: Line, message: Any, rest: list[memoryview]) -> None:
        match message:
            case protocol.Fetch(digest=digest):
                self._send_blob(line, digest)
            case protocol.Chunk() if not rest:
                self.peers.lose(line, "a chunk of results came without its bytes")
            case protocol.Chunk(task=task, attempt=attempt, offset=offset):
                try:
                    intact = self.staging.receive((line.name, task, attempt), offset, rest[0])
                except NoRoom as exc:
                    log.warning(str(exc), extra=about("room"))
                    self._handle(core.NotStored(line.name, task, attempt, str(exc)))
                    return
                if intact is not None:
                    self._handle(core.Uploaded(line.name, task, attempt, intact))

    def _send_blob(self, line: Line, digest: bytes) -> None:
        if digest not in self.blobs:
            return  # of a task that is not wanted any more
        try:
            blob = self._open_blob(digest)
        except OSError as exc:
            self._lose_blob(digest, exc)
            return
        self.peers.feed(line, digest, blob)

    def _open_blob(self, digest: bytes) -> memoryview:
        """Map one of the files of a blob; raises OSError when all are gone."""
        gone: OSError | None = None
        for path in self.blobs[digest]:
            try:
                return payload.map_file(path, private=True)
            except OSError as exc:
                gone = exc
        assert gone is not None, "a blob that is known has a file"
        raise gone

    def _lose_blob(self, digest: bytes, exc: OSError) -> None:
        """Give up the tasks whose argument was deleted by somebody else, or by their own client."""
        needing = [
            number
            for number, submission in self.submissions.items()
            if any(blob.digest == digest for blob in submission.sent.blobs)
        ]
        for number in needing:
            self._handle(core.Unrunnable(number, f"a big argument: {exc}"))

    # ---- effects out

    def _apply(self, effect: core.Effect) -> None:
        match effect:
            case core.Assign(node, task, attempt, alone, firm):
                sent = self.submissions[task].sent
                blobs = sent.blobs
                if not self.local:
                    blobs = [msgspec.structs.replace(blob, path="") for blob in blobs]
                given = protocol.Task(
                    number=sent.number,
                    task=task,
                    attempt=attempt,
                    func=sent.func,
                    call=sent.call,
                    blobs=blobs,
                    alone=alone,
                    firm=firm,
                )
                self.peers.send(self.peers.lines[node], given)
            case core.GrantUpload(node, task, attempt):
                self._grant(self.peers.lines[node], task, attempt)
            case core.AbortAttempt(node, task, attempt):
                self.staging.drop((node, task, attempt))
                abort = protocol.Abort(task=task, attempt=attempt)
                self.peers.send(self.peers.lines[node], abort)
            case core.Commit(node, task, attempt):
                self._deliver(node, task, attempt)
            case core.NodeLost(node, reason):
                self.peers.lose(self.peers.lines[node], reason)
            case core.LeftOut(node, seconds, reason):
                self.peers.leave_out(self.peers.lines[node], seconds, reason)
            case core.GiveUp(task, error, attempts, history):
                self._fail(task, error, attempts, history)
            case core.Forget(task):
                submission = self._forget(task)
                del self.numbers[submission.client, submission.sent.task]

    def _grant(self, line: Line, task: int, attempt: int) -> None:
        """Get the body of an attempt, for which there is room in the window."""
        intact = self.staging.grant((line.name, task, attempt))
        if intact is None:
            self.peers.send(line, protocol.Grant(task=task, attempt=attempt))
        else:
            self._handle(core.Uploaded(line.name, task, attempt, intact))

    def _deliver(self, node: str, task: int, attempt: int) -> None:
        ended, path = self.staging.deliver((node, task, attempt))
        submission = self._forget(task)
        sent = submission.sent
        phase = self.phases[submission.kind]
        phase.done += 1
        phase.received_bytes += ended.nbytes
        delivered = protocol.Delivered(
            job=self.job, task=sent.task, map=sent.map, path=path, body=ended.body
        )
        transport.send_to(self.engine, submission.client, delivered)

    def _fail(self, task: int, error: str, attempts: int, history: tuple[str, ...]) -> None:
        submission = self._forget(task)
        sent = submission.sent
        # all in the last line, which is the one that oq-run shows
        verdict = (
            f"task #{sent.number} ({sent.func}) was given up after {attempts} attempts; "
            f"{history[-1]}"
        )
        if error == OutOfMemory.__name__:
            verdict += MEMORY_REMEDY
        text = "\n".join([*history[:-1], verdict])
        log.info(text)
        failed = protocol.Failed(job=self.job, task=sent.task, map=sent.map, error=error, text=text)
        transport.send_to(self.engine, submission.client, failed)

    def _forget(self, task: int) -> Submission:
        submission = self.submissions.pop(task)
        for blob in submission.sent.blobs:
            paths = self.blobs[blob.digest]
            paths[blob.path] -= 1
            if not paths[blob.path]:
                del paths[blob.path]
            if not paths:
                del self.blobs[blob.digest]
        return submission

    def _attempts(self, job: str) -> protocol.Attempts:
        rows = self.ledger.pop(job, MOST_ROWS)
        names = list(self.ledger.nodes)
        hosts = [(self.peers.lines[name].host or name)[:NODE_CHARACTERS] for name in names]
        return protocol.Attempts(
            rows=rows,
            more=len(rows) == MOST_ROWS * ROW.size,
            functions=[phase.name for phase in self.phases],
            nodes=hosts if len(set(hosts)) == len(hosts) else names,
            reasons=list(self.ledger.reasons),
            shares=[protocol.Share(*dataclasses.astuple(share)) for share in self.ledger.shares],
        )

    def _status(self) -> protocol.Status:
        self._recount(time.monotonic())
        nodes = []
        most = min(MOST_CHARACTERS, STATUS_CHARACTERS // len(self.peers.lines))
        for line in self.peers.lines.values():
            found = self.core.nodes.get(line.name)
            slots, busy = (found.slots, found.busy) if found else (0, 0)
            if found and not self.core.tasks:
                slots = line.slots  # its share is small because it wants nothing now
            node = protocol.Node(
                host=clean(line.host or line.name, most),
                slots=slots,
                busy=busy,
                state=line.peer.told,
                reason=clean(line.peer.reason, most),
                unstarted=line.name in self.unstarted,
            )
            nodes.append(node)
        note = ""
        if self.peers.data is None:
            ports = ", ".join(self.peers.data_urls)
            note = (
                f"all of {ports} are in use by other jobs; this one begins when one of them ends, "
                "receiver_ports in [dbserver] of openquake.cfg gives more"
            )
        return protocol.Status(job=self.job, phases=self.phases, nodes=nodes, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(prog="oq-broker")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--agent-pid", type=int, help="of a private agent; without: the cluster")
    parser.add_argument("--owner", type=int, required=True)
    parser.add_argument("--window-bytes", type=int, required=True)
    parser.add_argument("--limits", type=Limits.from_text, default=DEFAULTS)
    parser.add_argument("--priority", type=Priority, default=Priority.NORMAL)
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info")
    args = parser.parse_args()
    logs.start(args.log_level)
    descriptors.raise_limit()
    memory = private.memory_of(args.directory)
    try:
        with crashes.kept(args.directory, "broker"):
            broker = _made(args, memory)
            if broker is None:
                sys.exit(1)
            signal.signal(signal.SIGTERM, lambda *_: broker.stop())
            broker.run()
    finally:
        private.remove(args.directory, memory)


def _made(args: argparse.Namespace, memory: Path) -> Broker | None:
    """Return the broker of these arguments; None, and the reason is told, when it cannot be."""
    agents = {"private": f"ipc://{args.directory}/control"}
    data_urls = [f"ipc://{args.directory}/data"]
    own = facts.own(limits=args.limits)
    keys = caller = None
    exported: tuple[str, list[int]] = "", []  # metrics: of a cluster alone
    try:
        if args.agent_pid is None:
            settings = config.Config.from_sections(config.read())
            cluster = settings.cluster
            assert cluster is not None, "the launcher has read the same configuration"
            agents = {host: cluster.control_url(host) for host in cluster.hosts}
            data_urls = [f"tcp://{cluster.receiver_host}:{port}" for port in cluster.receiver_ports]
            own = facts.own(
                cluster.dbserver, cluster.shared_dir, args.limits, settings.urgent_group
            )
            exported = cluster.receiver_host, metrics.session_ports(settings.metrics_port)
            keys = caller = security.Keys.derive(security.read_secret(cluster.authkey))
            if args.priority is Priority.URGENT:
                settings.check_urgent()
                if settings.urgent_key:
                    file = Path(settings.urgent_key_file)
                    caller = security.calling_with(keys, file, settings.urgent_key)
        broker = Broker(
            directory=args.directory,
            memory=memory,
            agents=agents,
            data_urls=data_urls,
            agent_pid=args.agent_pid,
            owner=args.owner,
            window_bytes=args.window_bytes,
            limits=args.limits,
            own_facts=own,
            priority=args.priority,
            keys=keys,
            caller=caller,
        )
        broker.exporter = metrics.start(*exported)
        return broker
    except OqRuntimeError as exc:
        print(exc, file=sys.stderr)
        return None


if __name__ == "__main__":
    main()
