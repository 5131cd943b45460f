"""The agent under a scripted broker, over real sockets in this process, with real workers."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pickle
import re
import resource
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import zmq

from oq_runtime import descriptors, metrics, processes
from oq_runtime.core.limits import Limits
from oq_runtime.errors import ConfigError
from oq_runtime.files import private
from oq_runtime.node.agent import (
    CALLS_BYTES,
    COMING,
    DATA_AT_ONCE,
    DATA_HWM,
    EACH_SLOT,
    MORE,
    MOST_ANSWERS,
    MOST_COMING,
    MOST_JOBS,
    PING_BYTES,
    Agent,
    JobIO,
)
from oq_runtime.node.memory import Resident
from oq_runtime.priority import Priority
from oq_runtime.wire import payload, protocol, security, transport
from oq_runtime.wire.seal import Seal
from tests.leftovers import wait_for

pytestmark = pytest.mark.timeout(90)

#: short enough for a test; the fence is a beat before ``lost_s``
LIMITS = Limits(beat_s=0.2, suspect_s=1.0, lost_s=2.0)
#: seconds in which an answer comes; the first worker imports a part of the engine
ANSWER_S = 30.0
TASKS = Path(__file__).parents[1] / "local"
JOB = "oq-run-test"
FACTS = protocol.Facts(engine="x")
Kind = TypeVar("Kind", bound=protocol.Message)


class Peer:
    """One socket of the scripted broker: what has come and was not asked for yet."""

    def __init__(self, socket: zmq.Socket[Any], job: str = JOB) -> None:
        self.socket = socket
        self.link = transport.Link(socket, job, 0)
        self.ticket = b"t"  # with which its agent comes, if it is sealed
        self.come: deque[tuple[Any, list[bytes]]] = deque()

    def read(self) -> deque[tuple[Any, list[bytes]]]:
        while frames := transport.receive_frames(self.socket):
            if self.link.seal and security.ticket_of(frames[0]) != self.ticket:
                continue  # of an earlier lease
            if self.socket.type == zmq.ROUTER:
                self.link.peer = frames.pop(0).bytes
            header, *rest = self.link.open([frame.buffer for frame in frames])
            self.come.append((protocol.decode(header), [bytes(frame) for frame in rest]))
        return self.come


class Stage:
    """An agent in a thread of its own, and the broker of a job, whose words are in the tests.

    ``others`` are brokers of other jobs, which beat together with this one.

    :param directory: of the agent
    :param remote: whether the broker is on another host, so that results travel
    """

    terms: protocol.Terms | None = None

    def __init__(
        self,
        directory: Path,
        *,
        remote: bool = False,
        slots: int = 1,
        limits: Limits = LIMITS,
        owner: int | None = None,
        urgent_key: str = "",
    ) -> None:
        self.directory = private.own(directory)
        self.memory, self.disk = (private.own(directory / name) for name in ("memory", "disk"))
        self.context: zmq.Context[Any] = zmq.Context()
        self.keys = security.Keys.derive(b"a secret of this test") if remote else None
        self.gate = security.Gate(self.context, self.keys) if self.keys else None
        self.agent = Agent(
            directory=directory,
            memory=self.memory,
            disk=self.disk,
            control_url="tcp://127.0.0.1:*" if remote else f"ipc://{directory}/control",
            slots=slots,
            owner=owner or os.getpid(),
            own_facts=FACTS,
            limits=limits,
            keys=self.keys,
            urgent_key=urgent_key,
        )
        self.url = self.agent.control.getsockopt_string(zmq.LAST_ENDPOINT)
        self.thread = threading.Thread(target=self.agent.run)
        self.thread.start()
        url = "tcp://127.0.0.1:*" if remote else f"ipc://{directory}/data"
        keys = self.keys
        secure = functools.partial(security.secure_client, keys=keys) if keys else None
        tickets = security.ask_for_tickets if keys else None
        self.data = Peer(transport.router(self.context, url, secure=tickets))
        self.control = Peer(transport.dealer(self.context, self.url, secure=secure))
        self.mute = False  # on the data connection
        self.job, self.user, self.priority = JOB, "anna", Priority.NORMAL
        self.others: list[Beside] = []
        self.lease()

    def lease(self) -> None:
        epoch = self.control.link.epoch + 1
        self.control.link = transport.Link(self.control.socket, self.job, epoch)
        self.send(protocol.Hello(pid=1, role="broker", facts=FACTS, user=self.user))
        self.expect(protocol.Welcome, beat=False)
        url = self.data.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        ticket, seal = b"%d" % epoch, None
        if self.keys and self.gate:
            self.gate.tickets.add(ticket)
            self.terms = protocol.Terms(protocol.Suite.AES_256_GCM, os.urandom(32), "this node")
            seal = Seal(self.terms, self.job, epoch, broker=True)
        data = transport.Link(self.data.socket, self.job, epoch, seal=seal)
        self.data.link, self.data.ticket = data, ticket
        lease = protocol.Lease(
            ticket=ticket, data_url=url, priority=self.priority, terms=self.terms
        )
        self.send(lease)
        self.expect(protocol.Leased, beat=False)
        self.expect(protocol.Hello)

    def send(self, message: protocol.Message) -> None:
        assert wait_for(lambda: self.control.link.send(message))  # when the agent is slower

    def expect(
        self,
        kind: type[Kind],
        which: Callable[[Kind], object] = lambda _: True,
        *,
        beat: bool = True,
        within_s: float = ANSWER_S,
    ) -> Kind:
        """Return the first message of this kind that comes on either socket; others stay."""
        found: list[Kind] = []

        def look() -> bool:
            for one in (*([self] if beat else []), *self.others):
                one.beat()
            for peer in (self.control, self.data):
                peer.read()
                for item in peer.come:
                    if isinstance(item[0], kind) and which(item[0]):
                        peer.come.remove(item)
                        self.frames = item[1]
                        found.append(item[0])
                        return True
            return False

        came = wait_for(look, within_s, LIMITS.beat_s / 4)
        assert came, f"no {kind.__name__}, but {[m for m, _ in self.control.come][-3:]}"
        return found[0]

    def beat(self) -> None:
        self.send(protocol.Beat(wanted=1, title="calculation 7", done=3, total=9, left_s=60.0))
        if self.data.link.peer and not self.mute:
            self.data.link.send(protocol.Beat())

    def give(self, task: int, name: str, *arguments: Any, firm: bool = False) -> protocol.Task:
        """Give an attempt of a function of tests/local/tasks; a blob stands for its argument."""
        import tasks  # type: ignore[import-not-found]  # see ``light``
        from openquake.baselib import performance

        blobs = [one for one in arguments if isinstance(one, protocol.Blob)]
        items: list[Any] = [[*map(bytes, payload.dump(payload.Pickled(getattr(tasks, name))))]]
        for one in arguments:
            known = isinstance(one, protocol.Blob)
            items.append(blobs.index(one) if known else [*map(bytes, payload.dump(one))])
        monitor = performance.Monitor("test")
        monitor.inject, monitor.backurl = True, "inproc://none"
        call = pickle.dumps((task, monitor, items), payload.PROTOCOL)
        given = protocol.Task(
            task=task, attempt=1, func=name, number=100 + task, call=call, blobs=blobs, firm=firm
        )
        self.send(given)
        return given

    def answer(self, digest: bytes, body: bytes) -> None:
        for offset, chunk in protocol.chunks(body):
            message = protocol.BlobChunk(digest=digest, offset=offset)
            assert self.data.link.send(message, bytes(chunk))

    def ended(self, task: int) -> Any:
        """Return what a task has returned: with the message that ends it, or afterwards."""
        ended = self.expect(protocol.Ended, lambda one: one.task == task)
        body = ended.body
        if not body:
            self.send(protocol.Grant(task=task, attempt=ended.attempt))
            body = self._uploaded(ended) if self.keys else self._placed(ended)
        results = [payload.load(frames) for frames in payload.parts(bytearray(body))]
        assert results.pop().msg == "TASK_ENDED"
        return [result.get() for result in results]

    def _uploaded(self, ended: protocol.Ended) -> bytes:
        body = b""
        while len(body) < ended.nbytes:
            chunk = self.expect(protocol.Chunk)
            assert (chunk.task, chunk.offset) == (ended.task, len(body))
            body += self.frames[0]
        return body

    def _placed(self, ended: protocol.Ended) -> bytes:
        placed = self.expect(protocol.Placed)
        assert placed.path == ended.path
        body = Path(placed.path).read_bytes()
        Path(placed.path).unlink()
        return body

    @property
    def workers(self) -> list[int]:
        """The pids of the workers that are ready."""
        return [process.pid for process in [*self.agent.processes.values()] if process.pid]

    def ping(self) -> None:
        """Wait until the agent has read all that was sent on the control socket so far."""
        transport.send(self.control.socket, protocol.Ping())
        self.expect(protocol.Ping)

    def close(self) -> None:
        self.agent.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.gate:
            self.gate.stop()
        self.context.destroy(linger=0)


class Beside(Stage):
    """The broker of another job of the same agent, which is on this host."""

    def __init__(self, first: Stage, user: str, priority: Priority) -> None:
        self.agent, self.context, self.keys = first.agent, first.context, None
        self.job, self.user, self.priority = f"oq-run-{user}", user, priority
        self.mute = False
        url = f"ipc://{first.directory}/data-{user}"
        self.data = Peer(transport.router(self.context, url), self.job)
        self.control = Peer(transport.dealer(self.context, first.url), self.job)
        self.others = [first]  # type: ignore[list-item]
        self.lease()
        first.others.append(self)


@contextmanager
def stage(tmp_path: Path, **options: Any) -> Iterator[Stage]:
    found = Stage(tmp_path / "s", **options)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(autouse=True)
def light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that have the tasks of the tests, and no calculator, which takes seconds."""
    cfg = tmp_path / "openquake.cfg"
    cfg.write_text("[oq_runtime]\npreload =\n")
    monkeypatch.setenv("OQ_CONFIG_FILE", str(cfg))
    monkeypatch.setenv("PYTHONPATH", str(TASKS))
    monkeypatch.syspath_prepend(str(TASKS))
    importlib.import_module("tasks")  # now: a broker must not fall silent
    importlib.import_module("openquake.baselib.performance")


@pytest.fixture
def here(tmp_path: Path, light: None) -> Iterator[Stage]:
    with stage(tmp_path) as found:
        yield found


@pytest.fixture
def away(tmp_path: Path, light: None) -> Iterator[Stage]:
    with stage(tmp_path, remote=True) as found:
        yield found


def test_pings_of_a_peer_that_does_not_read(away: Stage) -> None:
    """What is to go back to it would fill the memory of the agent, which is this process."""
    assert away.keys is not None
    deaf = away.context.socket(zmq.DEALER)
    deaf.setsockopt(zmq.RCVHWM, 1)
    deaf.setsockopt(zmq.SNDHWM, 10)
    security.secure_client(deaf, away.keys)
    deaf.connect(away.url)
    memory = Resident(os.getpid())
    before = memory.own_nbytes
    ping = [protocol.encode(protocol.Ping()), b"x" * 60_000]
    for _ in range(4000):
        deaf.send_multipart(ping)
    away.ping()
    assert not wait_for(lambda: memory.own_nbytes > before + 4 * PING_BYTES, limit_s=3)


def test_answers_to_a_peer_that_does_not_read(away: Stage) -> None:
    """Of many questions it gets a few answers, once it reads, and others get theirs meanwhile."""
    assert away.keys is not None
    deaf = away.context.socket(zmq.DEALER)
    deaf.setsockopt(zmq.RCVHWM, 1)
    deaf.setsockopt(zmq.RCVBUF, 4096)
    security.secure_client(deaf, away.keys)
    deaf.connect(away.url)
    away.user = "u" * 500  # these words are in the answers
    away.lease()
    away.send(protocol.Beat(title="t" * 500))
    away.ping()
    for _ in range(asked := 5000):
        deaf.send(protocol.encode(protocol.Command(action="status")))
    deaf.send(protocol.encode(protocol.Command(action="stop")))
    assert wait_for(lambda: away.agent.slots.draining), "the agent has read them all"
    away.ping()
    read = nbytes = 0
    while deaf.poll(500):
        nbytes += len(deaf.recv())
        read += 1
    assert 0 < read < asked - MOST_ANSWERS, f"{nbytes} B is more than the kernel keeps"
    assert wait_for(lambda: not away.agent.answers), "it is forgotten"


BIG = bytes(range(256)) * 8192


def blob(data: bytes = BIG) -> tuple[protocol.Blob, bytes]:
    """An argument as a blob, and the bytes of it that travel."""
    body = b"".join(map(bytes, payload.lay_out(payload.dump(data))))
    digest = hashlib.blake2b(body, digest_size=32).digest()
    return protocol.Blob(digest, len(body)), body


# ---- the way of a task


def test_small_results_come_with_the_end(here: Stage) -> None:
    here.give(1, "square", 3)
    assert here.ended(1) == [{"sum": 9}]


@pytest.mark.parametrize("where", ["here", "away"])
def test_big_results_are_sent_when_there_is_room(
    request: pytest.FixtureRequest, where: str
) -> None:
    stage: Stage = request.getfixturevalue(where)
    for task in (1, 2):
        stage.give(task, "grow", task, b"x" * 5000, 3_000_000)
        [result] = stage.ended(task)
        assert result[f"out{task}"] == bytes([task]) * 3_000_000
    assert wait_for(lambda: not stage.agent.attempts.attempts)
    assert not stage.agent.store.files


class Told:
    """In place of an exporter: the figures that it was told last."""

    def __init__(self) -> None:
        self.figures: dict[tuple[str, ...], float] = {}

    def take(self, found: list[metrics.Value]) -> None:
        self.figures = {(one.name, *one.labels.values()): one.value for one in found}


def test_metrics_count_what_was_done(here: Stage) -> None:
    here.agent.exporter = told = Told()  # type: ignore[assignment]
    here.give(1, "grow", 1, b"x", 1000)
    here.ended(1)
    assert wait_for(lambda: told.figures.get(("oq_agent_attempts", "ended")) == 1)
    assert told.figures["oq_agent_results_bytes",] > 1000
    assert told.figures["oq_agent_slots",] == here.agent.slots.slots


def test_big_arguments_are_fetched_once(away: Stage) -> None:
    found, body = blob()
    for task in (1, 2):
        away.give(task, "grow", task, found, 10)
    assert away.expect(protocol.Fetch).digest == found.digest
    away.answer(found.digest, body)
    for task in (1, 2):
        assert away.ended(task)[0]["in"] == sum(BIG[::4099])
    away.give(3, "grow", 3, found, 10)
    assert away.ended(3), "it is here already"


# ---- fetches without answer


def test_what_an_aborted_task_waited_for_is_asked_for_anew(away: Stage) -> None:
    # the broker ignores the first question: it wants nothing of that task any more
    found, body = blob()
    away.give(1, "grow", 1, found, 10)
    away.expect(protocol.Fetch)
    away.send(protocol.Abort(task=1, attempt=1))
    away.give(2, "grow", 2, found, 10)
    away.expect(protocol.Fetch)
    away.answer(found.digest, body)
    assert away.ended(2)[0]["in"] == sum(BIG[::4099])


def test_a_fetch_is_asked_again_and_its_answers_may_cross(away: Stage) -> None:
    found, body = blob()
    away.give(1, "grow", 1, found, 10)
    away.expect(protocol.Fetch)
    away.expect(protocol.Fetch)
    away.answer(found.digest, body)
    away.answer(found.digest, body)
    assert away.ended(1)[0]["in"] == sum(BIG[::4099])


def test_a_fetch_that_is_never_answered_fails_its_attempts(away: Stage) -> None:
    found, _ = blob()
    away.give(1, "grow", 1, found, 10)
    died = away.expect(protocol.Died)
    assert "was asked for twice and did not come" in died.reason and not died.no_room
    away.give(2, "square", 2)
    assert away.ended(2) == [{"sum": 4}]


def test_late_and_foreign_chunks_are_ignored(away: Stage) -> None:
    found, body = blob()
    away.answer(b"unknown", b"x" * 100)
    away.give(1, "grow", 1, found, 10)
    away.expect(protocol.Fetch)
    whole = protocol.BlobChunk(digest=found.digest, offset=0)
    assert away.data.link.send(whole, body + b"more than was announced")
    assert away.data.link.send(protocol.BlobChunk(digest=found.digest, offset=77), b"from nowhere")
    away.answer(found.digest, body)
    assert away.ended(1)[0]["in"] == sum(BIG[::4099])


@pytest.mark.parametrize("how", ["changed", "left out", "not sealed"])
def test_what_was_tampered_with_on_the_way_ends_the_lease(away: Stage, how: str) -> None:
    found, body = blob()
    away.give(1, "grow", 1, found, 10)
    away.expect(protocol.Fetch)
    away.answer(found.digest, body[: protocol.CHUNK_BYTES])
    link = away.data.link
    assert link.seal and link.peer
    plain = [protocol.encode(protocol.BlobChunk(digest=found.digest, offset=1 << 20)), b"x" * 1000]
    sealed = link.seal.seal(plain)
    match how:
        case "changed":
            sealed[1] = sealed[1][:500] + bytes([sealed[1][500] ^ 1]) + sealed[1][501:]
        case "left out":
            sealed = link.seal.seal(plain)
        case "not sealed":
            sealed = [bytes(piece) for piece in plain]
    assert transport.send_frames(link.socket, [link.peer, *sealed])
    away.mute = True
    assert "does not open" in away.expect(protocol.NoLease).reason
    away.mute = False
    away.lease()
    away.give(1, "square", 2)
    assert away.ended(1) == [{"sum": 4}]


def test_a_blob_for_which_there_is_no_room(away: Stage) -> None:
    found, _ = blob()
    away.disk.rmdir()  # neither here
    away.memory.rename(away.directory / "elsewhere")  # nor there
    away.give(1, "grow", 1, found, 10)
    died = away.expect(protocol.Died)
    assert died.no_room and str(away.disk) in died.reason


def test_a_size_is_only_a_word_until_bytes_come(away: Stage) -> None:
    huge = protocol.Blob(b"h" * 32, 1 << 49)
    before = os.statvfs(away.disk).f_bavail
    away.give(1, "grow", 1, huge, 10)
    away.expect(protocol.Fetch)
    block = os.statvfs(away.disk).f_frsize
    assert (before - os.statvfs(away.disk).f_bavail) * block < 1 << 30


def test_big_arguments_come_a_few_at_a_time(away: Stage) -> None:
    blobs = [blob(bytes([n]) * 200_000) for n in range(2 * COMING)]
    for task, (found, _) in enumerate(blobs):
        away.give(task, "grow", task, found, 10)
    job = away.agent.jobs[JOB]
    for number, (found, body) in enumerate(blobs):
        assert away.expect(protocol.Fetch).digest == found.digest, "in their order"
        if number == COMING - 1:
            away.ping()
            assert len(job.incoming) == COMING
            assert not any(isinstance(told, protocol.Fetch) for told, _ in away.data.come)
            for ready, its_body in blobs[:COMING]:
                away.answer(ready.digest, its_body)
        elif number >= COMING:
            away.answer(found.digest, body)
    assert {away.ended(task)[0]["in"] for task in range(len(blobs))}


# ---- what makes no sense


def test_a_task_with_thousands_of_big_arguments_takes_few_files(away: Stage) -> None:
    before = len(os.listdir("/proc/self/fd"))
    blobs = [protocol.Blob(b"%032d" % n, 1 << 20) for n in range(MOST_COMING - 1)]
    away.send(protocol.Task(task=1, attempt=1, func="f", call=b"c", blobs=blobs))
    away.expect(protocol.Fetch)
    away.ping()
    assert len(os.listdir("/proc/self/fd")) < before + 2 * COMING
    away.send(protocol.Abort(task=1, attempt=1))
    away.ping()
    assert not away.agent.store.files and not away.agent.jobs[JOB].unasked
    away.send(
        protocol.Task(task=2, attempt=1, func="f", call=b"c", blobs=[*blobs, *blob()[:1]] * 2)
    )
    assert "more tasks than can wait" in away.expect(protocol.NoLease).reason


def test_more_tasks_than_can_wait_end_the_lease(here: Stage) -> None:
    def said(lost: protocol.NoLease) -> str:  # those after it are told that there is none
        return lost.reason

    for task in range(EACH_SLOT + MORE + 2):
        here.send(protocol.Task(task=task, attempt=1, func="f", call=b"c"))
    assert "more tasks than can wait" in here.expect(protocol.NoLease, said, beat=False).reason
    assert wait_for(lambda: not here.agent.attempts.attempts)
    here.lease()
    call = bytes(protocol.CALL_BYTES)
    for task in range(CALLS_BYTES // len(call) + 2):
        here.send(protocol.Task(task=task, attempt=1, func="f", call=call))
    assert "more tasks than can wait" in here.expect(protocol.NoLease, said, beat=False).reason


def test_a_job_is_of_the_connection_that_has_called(here: Stage) -> None:
    other = Peer(transport.dealer(here.context, here.url))
    sent = here.control.link.sent
    for seq in (sent, 0):
        forged = protocol.Release(job=JOB, epoch=here.control.link.epoch, seq=seq)
        transport.send(other.socket, forged)
    assert wait_for(lambda: len(other.read()) == 2)
    assert all(isinstance(told, protocol.NoLease) for told, _ in other.come)
    here.give(1, "square", 3)
    assert here.ended(1) == [{"sum": 9}]


def test_a_crowd_of_jobs_is_refused(here: Stage, caplog: pytest.LogCaptureFixture) -> None:
    other = Peer(transport.dealer(here.context, here.url))
    unlike = protocol.Facts(engine="y")
    transport.send(other.socket, protocol.Hello(job="jx", pid=1, role="broker", facts=unlike))
    for number in range(MOST_JOBS):
        hello = protocol.Hello(job=f"j{number}", pid=1, role="broker", facts=FACTS)
        transport.send(other.socket, hello)
    assert wait_for(lambda: len(other.read()) == MOST_JOBS + 1)
    (first, _), *_, (last, _) = other.come
    assert isinstance(first, protocol.Refused) and isinstance(last, protocol.Refused)
    assert "200 other jobs" in last.reason
    told = [line for line in caplog.messages if line.startswith("refused")]
    assert told == [f"refused jx: {first.reason}", f"refused j199: {last.reason}"], "without a user"
    here.give(1, "square", 3)
    assert here.ended(1) == [{"sum": 9}]


def test_messages_out_of_place_are_refused_and_the_job_goes_on(here: Stage) -> None:
    here.give(1, "square", 3)
    here.give(1, "square", 4)  # given twice
    here.send(protocol.Grant(task=1, attempt=1))  # it has nothing to send yet
    here.send(protocol.Grant(task=9, attempt=9))
    here.send(protocol.Abort(task=9, attempt=9))
    here.send(protocol.Welcome(pid=1))
    assert here.ended(1) == [{"sum": 9}]
    here.give(2, "square", 4)
    assert here.ended(2) == [{"sum": 16}]


def test_a_broker_that_is_heard_on_the_control_connection_alone(away: Stage) -> None:
    away.mute = True
    lost = away.expect(protocol.NoLease)
    assert lost.reason == "nothing has come over its data connection for 2 s"


def test_a_url_to_which_nobody_can_connect(away: Stage) -> None:
    assert away.keys is not None
    secure = functools.partial(security.secure_client, keys=away.keys)
    other = Peer(transport.dealer(away.context, away.url, secure=secure), "oq-run-other")
    other.link.send(protocol.Hello(pid=1, role="broker", facts=FACTS))
    other.link.send(protocol.Lease(ticket=b"o", data_url="tcp://a b", terms=away.terms))
    assert wait_for(functools.partial(has_answers, other, 2), ANSWER_S)
    lost, _ = other.come[1]
    assert isinstance(lost, protocol.NoLease)
    told = "cannot connect to tcp://a b for the results: Invalid argument"
    assert lost.reason.startswith(told)


def test_what_nobody_reads_waits_at_its_sender(tmp_path: Path) -> None:
    chunk = bytes(protocol.CHUNK_BYTES)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sender:
        sender.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sender.setsockopt(zmq.SNDHWM, 1)
        sender.bind(url := f"ipc://{tmp_path}/data")
        with transport.dealer(context, url, receive_hwm=DATA_HWM) as deaf:
            transport.send(deaf, protocol.Ping())
            peer, taken = sender.recv_multipart()[0], 0
            while taken < 100 and wait_for(
                lambda: transport.send_frames(sender, [peer, chunk]), limit_s=0.5, pause_s=0.01
            ):
                taken += 1
    assert DATA_HWM <= taken < 3 * DATA_HWM


def test_others_have_their_turn_between_the_chunks_of_one(tmp_path: Path) -> None:
    memory, disk = (private.own(tmp_path / name) for name in ("memory", "disk"))
    agent = Agent(
        directory=tmp_path, memory=memory, disk=disk, control_url=f"ipc://{tmp_path}/control",
        slots=1, owner=None, own_facts=FACTS, limits=LIMITS,
    )  # fmt: skip
    sender = transport.router(agent.context, url := f"ipc://{tmp_path}/data")
    data = transport.dealer(agent.context, url)
    transport.send(data, protocol.Ping())
    link = transport.Link(sender, JOB, 1, sender.recv_multipart()[0])
    job = agent.jobs[JOB] = JobIO(transport.Link(agent.control, JOB, 1), "anna")
    job.data = transport.Link(data, JOB, 1)
    for _ in range(20 * DATA_AT_ONCE):
        link.send(protocol.BlobChunk(digest=b"f", offset=0), b"chunk")
    taken = [0]
    while sum(taken) < 20 * DATA_AT_ONCE and data.poll(int(ANSWER_S * 1000)):
        agent._read_data(JOB, job, data)
        taken.append(job.data.received - sum(taken))
    assert sum(taken) == 20 * DATA_AT_ONCE and max(taken) <= DATA_AT_ONCE
    agent.context.destroy(linger=0)


def test_descriptors_that_run_out_for_a_moment(
    away: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job goes on, whatever is to be opened just then: here by all threads of this process."""
    most, waits = resource.getrlimit(resource.RLIMIT_NOFILE), 0

    def until_some_are_free(_: float) -> None:
        nonlocal waits
        waits += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, most)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=until_some_are_free)
    monkeypatch.setattr(descriptors, "time", clock)
    monkeypatch.setenv("USER", "anna")  # else it is looked for in a file, in ``give``
    try:
        for task in (1, 2):  # a fork server and a worker; an argument
            found, body = blob(bytes([task]) * 200_000)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, most[1]))
            away.give(task, "grow", task, found, 1_000_000)
            away.expect(protocol.Fetch)
            away.answer(found.digest, body)
            assert away.ended(task)[0]["in"] == sum((bytes([task]) * 200_000)[::4099])
            assert waits >= task, "there was room"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_a_flood_of_chunks_waits_at_its_sender(away: Stage) -> None:
    data = away.agent.jobs[JOB].data
    assert data and data.socket.getsockopt(zmq.RCVHWM) == DATA_HWM
    flood = bytes(protocol.CHUNK_BYTES)
    for n in range(200):
        assert away.data.link.send(protocol.BlobChunk(digest=b"f", offset=0), flood)
        if n % 20 == 0:
            away.send(protocol.Beat(wanted=1))
    away.give(1, "square", 5)
    assert away.ended(1) == [{"sum": 25}], "other messages are read meanwhile"


# ---- workers that end, or do not


def test_the_death_of_a_worker_is_told_in_a_sentence(
    here: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    here.give(3, "poison", 3)
    died = here.expect(protocol.Died)
    assert re.fullmatch(r"worker process \d+ was killed by SIGKILL", died.reason)
    told = f"task #103 (poison) of calculation 7 of anna, attempt 1: {died.reason}"
    assert wait_for(lambda: told in caplog.messages)
    here.send(protocol.Release())
    assert wait_for(lambda: f"lease of {JOB} of anna ended: released" in caplog.messages)
    here.lease()
    assert wait_for(lambda: f"lease of {JOB} of anna granted: 1 slot" in caplog.messages)
    here.user = ""
    here.lease()
    assert wait_for(lambda: f"lease of {JOB} granted: 1 slot" in caplog.messages)


def test_a_stopped_worker_is_killed_and_its_slot_used_again(here: Stage) -> None:
    here.give(1, "square", 3)
    here.ended(1)
    [pid] = here.workers
    os.kill(pid, signal.SIGSTOP)
    here.give(2, "square", 4)
    here.send(protocol.Abort(task=2, attempt=1))
    here.give(3, "square", 5)
    assert here.ended(3) == [{"sum": 25}]
    assert here.workers != [pid] and not Path(f"/proc/{pid}").exists()


def test_what_stays_stopped_is_killed_and_its_task_runs_elsewhere(here: Stage) -> None:
    here.give(1, "square", 3)
    here.ended(1)
    [pid] = here.workers
    here.give(2, "slow", 2, 300)
    here.expect(protocol.Started)
    os.kill(pid, signal.SIGSTOP)
    died = here.expect(protocol.Died)
    assert died.reason == f"worker process {pid} was stopped for {LIMITS.lost_s:g} s, and so killed"
    here.give(3, "square", 5)
    here.ended(3)
    assert here.agent.forkserver is not None
    os.kill(here.agent.forkserver.process.pid, signal.SIGSTOP)
    os.kill(here.workers[0], signal.SIGKILL)
    here.give(4, "square", 6)  # to the dead worker, whose end nobody tells
    here.expect(protocol.Died, lambda one: one.task == 4)
    here.give(5, "square", 7)
    assert here.ended(5) == [{"sum": 49}]


def test_what_a_task_has_left_ends_with_its_worker(tmp_path: Path) -> None:
    with stage(tmp_path) as here:
        for task in (1, 2):
            here.give(task, "leaves", None)
            [left] = here.ended(task)
            assert processes.exists(left["pid"])
            if task == 1:
                os.kill(here.workers[0], signal.SIGKILL)
                assert wait_for(lambda: not alive(left["pid"]))  # noqa: B023
    assert wait_for(lambda: not alive(left["pid"])), "at the end of the agent"


def alive(pid: int) -> bool:
    return bool((found := processes.look(pid)) and found.command)


def test_workers_have_one_thread(here: Stage) -> None:
    here.give(1, "square", 3)
    here.ended(1)
    assert os.listdir(f"/proc/{here.workers[0]}/task") == [str(here.workers[0])]


@contextmanager
def no_more_processes(pid: int) -> Iterator[Path]:
    """Put a process into a cgroup that may have no other."""
    v1 = Path("/sys/fs/cgroup/pids")
    path = (v1 if v1.exists() else Path("/sys/fs/cgroup")) / f"oq-test-{os.getpid()}"
    try:
        path.mkdir()
        (path / "pids.max").write_text("1")
    except OSError as exc:
        pytest.skip(f"{path}: {exc.strerror}")
    try:
        (path / "cgroup.procs").write_text(str(pid))
        yield path / "pids.max"
    finally:
        (path / "pids.max").write_text("max")
        for inside in (path / "cgroup.procs").read_text().split():
            (path.parent / "cgroup.procs").write_text(inside)
        path.rmdir()


def test_a_refused_process_is_an_error_that_names_the_limit(here: Stage) -> None:
    here.give(1, "square", 3)
    here.ended(1)
    assert here.agent.forkserver
    with no_more_processes(here.agent.forkserver.process.pid) as limit:
        os.kill(here.workers[0], signal.SIGKILL)
        assert wait_for(lambda: not here.workers)
        here.give(2, "square", 4)
        reason = here.expect(protocol.Died).reason
        assert f"1 of {limit.parent} (pids.max)" in reason and "no process for a worker" in reason
        limit.write_text("max")
        here.give(3, "square", 5)
        assert here.ended(3) == [{"sum": 25}]


def test_results_that_are_gone_fail_their_attempt_alone(away: Stage) -> None:
    away.give(1, "grow", 1, b"x", 1_000_000)
    ended = away.expect(protocol.Ended)
    [file] = away.memory.glob("*-1-1")
    file.unlink()
    away.send(protocol.Grant(task=1, attempt=ended.attempt))
    assert "results are not there any more" in away.expect(protocol.Died).reason
    away.give(2, "square", 2)
    assert away.ended(2) == [{"sum": 4}]


# ---- the end


def test_a_private_agent_ends_with_its_owner_whatever_the_beat(tmp_path: Path, light: None) -> None:
    owner = subprocess.Popen(["sleep", "60"])
    slow = Limits(beat_s=20.0, suspect_s=30.0, lost_s=60.0)
    with stage(tmp_path, limits=slow, owner=owner.pid) as found:
        owner.kill()
        owner.wait()
        found.thread.join(3)
        assert not found.thread.is_alive()


def test_a_fork_server_that_still_imports_ends_with_the_last_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openquake.cfg").write_text("[oq_runtime]\npreload = hanging\n")
    monkeypatch.setenv("HANGS", "1")
    with stage(tmp_path, slots=2) as here:
        assert wait_for(lambda: len(here.agent.processes) == 2 and here.agent.forkserver)
        assert here.agent.forkserver is not None
        importer = here.agent.forkserver.process.pid
        here.send(protocol.Release())
        assert wait_for(lambda: here.agent.forkserver is None and not here.agent.processes)
        assert not alive(importer)
        monkeypatch.delenv("HANGS")
        here.lease()
        here.give(1, "square", 3)
        assert here.ended(1) == [{"sum": 9}]


def test_a_drained_agent_sends_its_results_and_ends(here: Stage) -> None:
    here.give(1, "grow", 1, b"x", 1_000_000)
    ended = here.expect(protocol.Ended)
    here.agent.drain()
    assert here.expect(protocol.Beat, lambda beat: beat.closed).free_bytes == 0
    assert here.thread.is_alive(), "its results are still here"
    here.send(protocol.Grant(task=1, attempt=ended.attempt))
    here.expect(protocol.Placed)
    here.thread.join(5)
    assert not here.thread.is_alive()


# ---- jobs of several priorities


def test_an_urgent_job_interrupts_a_task_that_then_runs_again(here: Stage, tmp_path: Path) -> None:
    go = tmp_path / "go"
    here.give(1, "until", 1, str(go))
    here.expect(protocol.Started)
    boris = Beside(here, "boris", Priority.URGENT)
    assert here.expect(protocol.Leased).slots == 0
    boris.give(1, "square", 3)
    interrupted = here.expect(protocol.Preempted, within_s=5)
    assert interrupted.by == "urgent calculation 7 of boris"
    assert boris.ended(1) == [{"sum": 9}]
    transport.send(here.control.socket, protocol.Command(action="status"))
    found = {lease.user: lease for lease in here.expect(protocol.AgentStatus).leases}
    assert found["boris"].priority == "urgent" and found["anna"].priority == "normal"
    assert (found["anna"].done, found["anna"].total, found["anna"].left_s) == (3, 9, 60.0)
    boris.give(2, "until", 2, str(go))
    boris.expect(protocol.Started)
    here.give(1, "until", 1, str(go))
    go.touch()
    assert boris.ended(2) == [{"sum": 2}]
    boris.send(protocol.Release())
    here.others.clear()
    assert here.ended(1) == [{"sum": 1}]


def test_a_firm_attempt_runs_to_its_end(here: Stage, tmp_path: Path) -> None:
    go = tmp_path / "go"
    here.give(1, "until", 1, str(go), firm=True)
    here.expect(protocol.Started)
    boris = Beside(here, "boris", Priority.URGENT)
    boris.give(1, "square", 3)
    boris.ping()
    go.touch()
    assert here.ended(1) == [{"sum": 1}]
    assert boris.ended(1) == [{"sum": 9}]
    assert not [m for m, _ in here.control.come if isinstance(m, protocol.Preempted)]


def has_answers(peer: Peer, number: int) -> bool:
    peer.read()
    return len(peer.come) >= number


def test_an_urgent_lease_needs_the_key_of_administrators(tmp_path: Path, light: None) -> None:
    urgent_key, secret = security.new_pair()
    file = tmp_path / "secret"
    file.write_text(secret)
    with stage(tmp_path, remote=True, urgent_key=urgent_key) as found:
        assert found.keys is not None
        administrator = security.calling_with(found.keys, file, urgent_key)
        for keys, answer in ((found.keys, protocol.Refused), (administrator, protocol.Leased)):
            secure = functools.partial(security.secure_client, keys=keys)
            socket = transport.dealer(found.context, found.url, secure=secure)
            boris = Peer(socket, f"oq-run-{answer.__name__}")
            boris.link.send(protocol.Hello(pid=1, role="broker", facts=FACTS, user="root"))
            url = found.data.socket.getsockopt_string(zmq.LAST_ENDPOINT)
            lease = protocol.Lease(
                ticket=b"u", data_url=url, priority=Priority.URGENT, terms=found.terms
            )
            boris.link.send(lease)
            assert wait_for(functools.partial(has_answers, boris, 2), ANSWER_S)
            assert isinstance(boris.come[1][0], answer), boris.come
    with pytest.raises(ConfigError, match="it is not the half of urgent_key"):
        security.calling_with(administrator, file, urgent_key[::-1])


def test_commands_of_an_administrator(here: Stage) -> None:
    def command(action: Any) -> protocol.AgentStatus:
        transport.send(here.control.socket, protocol.Command(action=action))
        return here.expect(protocol.AgentStatus)

    assert command("status").jobs == ["calculation 7 of anna"]
    assert command("stop").state == "stopped"
    assert command("start").state == "up"
    assert command("kill").jobs == []
    assert "killed by an administrator" in here.expect(protocol.NoLease).reason
