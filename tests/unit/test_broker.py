"""The broker between a scripted engine and a scripted node, over real sockets in this process."""

from __future__ import annotations

import math
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from oq_runtime import metrics
from oq_runtime.core.limits import Limits
from oq_runtime.session import peer
from oq_runtime.session.broker import Broker
from oq_runtime.session.peers import Line
from oq_runtime.wire import protocol, transport
from tests.leftovers import wait_for

LIMITS = Limits(beat_s=0.2, suspect_s=5.0, lost_s=10.0, no_nodes_limit_s=10.0)
WINDOW = 1 << 20
#: seconds in which an answer comes
ANSWER_S = 10.0
Kind = TypeVar("Kind", bound=protocol.Message)


class Peer:
    """One end of a connection with the broker, whose messages are expected one by one."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self.socket = socket
        self.link: transport.Link | None = None
        self.peer = b""
        self.chunks: list[memoryview] = []

    def expect(self, kind: type[Kind], which: Callable[[Kind], object] = lambda _: True) -> Kind:
        """Return the next message of this kind; others are passed over."""
        while self.socket.poll(int(ANSWER_S * 1000)):
            frames = transport.receive(self.socket)
            assert frames is not None
            if self.socket.type == zmq.ROUTER:
                self.peer, *frames = frames
            message = protocol.decode(frames[0])
            if isinstance(message, kind) and which(message):
                self.chunks = [memoryview(frame) for frame in frames[1:]]
                return message
        raise AssertionError(f"no {kind.__name__} in {ANSWER_S:.0f} s")

    def never(self, kind: type[protocol.Message], after: Callable[[], object]) -> None:
        """No message of this kind comes before ``after`` has got its answer."""
        after()
        while frames := transport.receive(self.socket):
            assert not isinstance(protocol.decode(frames[-1]), kind)

    def send(self, message: protocol.Message, *frames: bytes) -> None:
        if self.link is not None:
            assert self.link.send(message, *frames)
        else:
            transport.send(self.socket, message, *frames)


class Stage:
    """A broker with one engine and one node that has ``slots`` slots.

    :param directory: of the session
    :param remote: whether the node is on another host, so that bodies and blobs travel
    """

    def __init__(
        self, directory: Path, *, remote: bool = False, slots: int = 2, limits: Limits = LIMITS
    ) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700)
        self.context: zmq.Context[Any] = zmq.Context()
        node_url, data_url = f"ipc://{directory}/control", f"ipc://{directory}/data"
        self.node = Peer(transport.router(self.context, node_url))
        self.broker = Broker(
            directory=directory,
            memory=directory / "memory",
            agents={"node": node_url},
            data_urls=["tcp://127.0.0.1:*" if remote else data_url],
            agent_pid=None,
            owner=os.getpid(),
            window_bytes=WINDOW,
            limits=limits,
            own_facts=protocol.Facts(engine="x"),
        )
        assert self.broker.peers.data is not None
        self.data_url = self.broker.peers.data.getsockopt_string(zmq.LAST_ENDPOINT)
        self.thread = threading.Thread(target=self.broker.run)
        self.thread.start()
        self.engine = Peer(transport.dealer(self.context, f"ipc://{directory}/engine"))
        self.engine.send(protocol.Hello(pid=os.getpid(), role="engine"))
        self.engine.expect(protocol.Welcome)
        self.data = Peer(transport.dealer(self.context, self.data_url))
        self.lease(slots)

    def lease(self, slots: int) -> None:
        """Answer the call of the broker until it has a lease."""
        hello = self.node.expect(protocol.Hello)
        link = transport.Link(self.node.socket, hello.job, hello.epoch, self.node.peer)
        link.accepts(hello)
        self.node.link = link
        self.node.send(protocol.Welcome(pid=1, host="n", slots=slots, facts=hello.facts))
        lease = self.node.expect(protocol.Lease)
        self.data.link = transport.Link(self.data.socket, hello.job, hello.epoch)
        opening = protocol.Hello(pid=1, role="agent", ticket=lease.ticket)
        self.data.send(opening, bytes(protocol.PROBE_BYTES))
        self.node.send(protocol.Leased(slots=slots))

    def submit(self, task: int, map_: int = 1, blobs: list[protocol.Blob] | None = None) -> None:
        self.engine.send(
            protocol.Submit(
                task=task, number=100 + task, map=map_, func="f", call=b"c", blobs=blobs or []
            )
        )

    def end(self, given: protocol.Task, body: bytes, nbytes: int | None = None) -> None:
        """End an attempt; small bodies travel with the message, bigger ones wait for a grant."""
        small = len(body) <= protocol.INLINE_BYTES and nbytes is None
        self.node.send(
            protocol.Ended(
                task=given.task,
                attempt=given.attempt,
                parts=1,
                nbytes=len(body) if nbytes is None else nbytes,
                body=body if small else b"",
            )
        )

    def upload(self, given: protocol.Task, body: bytes) -> None:
        grant = self.node.expect(protocol.Grant)
        assert (grant.task, grant.attempt) == (given.task, given.attempt)
        for offset, chunk in protocol.chunks(body):
            self.data.send(
                protocol.Chunk(task=given.task, attempt=given.attempt, offset=offset), bytes(chunk)
            )

    def asked(self) -> None:
        """Wait until the broker has read all that the engine has sent so far."""
        self.engine.send(protocol.StatusQuery())
        self.engine.expect(protocol.Status)

    def close(self) -> None:
        self.broker.stop()
        self.thread.join(ANSWER_S)
        assert not self.thread.is_alive()
        self.context.destroy(linger=0)


@contextmanager
def stage(tmp_path: Path, **options: Any) -> Iterator[Stage]:
    found = Stage(tmp_path / "s", **options)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as found:
        yield found


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, remote=True) as found:
        yield found


def blob(path: Path, data: bytes) -> protocol.Blob:
    path.write_bytes(data)
    return protocol.Blob(digest=b"d" * 32, nbytes=len(data), path=str(path))


def test_a_task_goes_to_a_node_and_its_body_comes_back(here: Stage) -> None:
    here.submit(7)
    given = here.node.expect(protocol.Task)
    assert (given.number, given.func) == (107, "f"), "the number that people know"
    here.end(given, b"body")
    delivered = here.engine.expect(protocol.Delivered)
    assert (delivered.task, delivered.map, delivered.body) == (7, 1, b"body")


def test_metrics_count_what_was_done(here: Stage) -> None:
    class Told:
        figures: dict[str, float] = {}

        def take(self, found: list[metrics.Value]) -> None:
            self.figures = {one.name: one.value for one in found}

    here.broker.exporter = told = Told()  # type: ignore[assignment]
    here.submit(7)
    here.end(here.node.expect(protocol.Task), b"body")
    here.engine.expect(protocol.Delivered)
    assert wait_for(lambda: told.figures.get("oq_session_received_bytes", 0) > 0)
    assert told.figures["oq_session_tasks_submitted"] == 1


def test_a_broker_that_is_stopped_releases_at_once_whatever_the_beat(tmp_path: Path) -> None:
    slow = Limits(beat_s=20.0, suspect_s=30.0, lost_s=60.0)
    with stage(tmp_path, limits=slow) as found:
        found.asked()
        threading.Timer(0.2, found.broker.stop).start()  # it waits for the next beat by then
        found.thread.join(3)
        assert not found.thread.is_alive()
        found.node.expect(protocol.Release)


def test_results_of_a_map_that_was_cancelled_leave_the_window(away: Stage) -> None:
    """Committed and never consumed: another map gets the room."""
    body = bytes(WINDOW)  # one fills the window
    away.submit(1)
    given = away.node.expect(protocol.Task)
    away.end(given, body)
    away.upload(given, body)
    delivered = away.engine.expect(protocol.Delivered)
    away.engine.send(protocol.Cancel(map=1))
    Path(delivered.path).unlink()
    away.submit(2, map_=2)
    given = away.node.expect(protocol.Task)
    away.end(given, body)
    away.upload(given, body)
    assert away.engine.expect(protocol.Delivered).task == 2
    assert len(away.broker.submissions) == 0


def test_a_map_that_nobody_reads_stops_no_other(away: Stage) -> None:
    """Its results fill the window; those of the map that is read come one by one."""
    body = bytes(WINDOW)
    for task, map_ in ((1, 1), (2, 2), (3, 2)):
        away.submit(task, map_)
        given = away.node.expect(protocol.Task)
        away.end(given, body)
        away.upload(given, body)
        assert away.engine.expect(protocol.Delivered).task == task
        if map_ == 2:
            away.engine.send(protocol.Consumed(tasks=[task]))


def test_counts_are_told_per_job(here: Stage) -> None:
    for job in ("calculation 1", "calculation 2"):
        here.engine.send(protocol.Title(text=job))
        for task in (1, 2):
            here.submit(task, map_=len(job))
            here.end(here.node.expect(protocol.Task), b"x")
            here.engine.expect(protocol.Delivered)
            here.engine.send(protocol.Consumed(tasks=[task]))
    here.submit(3)
    given = here.node.expect(protocol.Task)
    here.node.send(protocol.Died(task=given.task, attempt=1, reason="killed"))
    here.end(here.node.expect(protocol.Task, lambda task: task.attempt == 2), b"x")
    here.engine.expect(protocol.Delivered)
    here.engine.send(protocol.StatusQuery())
    found = here.engine.expect(protocol.Status).phases
    assert [(p.job, p.name, p.total, p.done, p.retries) for p in found] == [
        ("calculation 1", "f", 2, 2, 0),
        ("calculation 2", "f", 3, 3, 1),
    ]


def test_many_words_of_many_nodes_are_cut(here: Stage) -> None:
    """The answer would be longer than a message may be, and the engine's connection would end."""
    lines, words = here.broker.peers.lines, "\U0001f30d" * 500
    for number in range(1100):
        calls = peer.Peer(LIMITS, math.inf)
        calls.reason = words
        line = Line(str(number), "", calls, lines["node"].link, host=words)
        here.broker.peers.lines = lines = lines | {line.name: line}
    here.engine.send(protocol.StatusQuery())
    nodes = here.engine.expect(protocol.Status).nodes
    assert len(nodes) == 1101
    assert all(300 < len(node.reason) < 500 for node in nodes[1:])


def test_an_attempt_that_ends_after_its_map_was_cancelled_leaves_nothing(here: Stage) -> None:
    here.submit(1)
    given = here.node.expect(protocol.Task)
    here.engine.send(protocol.Cancel(map=1))
    here.node.expect(protocol.Abort)
    here.end(given, b"late")
    here.node.expect(protocol.Abort)
    here.asked()
    assert not here.broker.staging.bodies and not here.broker.core.tasks
    assert not here.broker.numbers and not here.broker.groups


def test_what_has_ended_is_forgotten(here: Stage) -> None:
    for task in range(50):
        here.submit(task)
        here.end(here.node.expect(protocol.Task), b"x")
        here.engine.expect(protocol.Delivered)
    here.engine.send(protocol.Consumed(tasks=list(range(50))))
    here.engine.send(protocol.Cancel(map=1))
    here.asked()
    broker = here.broker
    held = (broker.core.tasks, broker.submissions, broker.numbers, broker.groups, broker.blobs)
    noted = (broker.ledger.tasks, broker.ledger.rows)  # of no job: nobody asks
    assert not any(held + noted)


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_an_argument_that_was_deleted_gives_its_task_up(
    away: Stage, tmp_path: Path, how: str
) -> None:
    """By its client, which cancels at the same moment, or by somebody else."""
    argument = blob(tmp_path / "argument", b"x" * 100_000)
    away.submit(1, blobs=[argument])
    away.node.expect(protocol.Task)
    Path(argument.path).unlink() if how == "deleted" else Path(argument.path).write_bytes(b"")
    away.data.send(protocol.Fetch(digest=argument.digest))
    failed = away.engine.expect(protocol.Failed)
    assert failed.error == "ArgumentLost" and "task #101 (f)" in failed.text
    away.node.expect(protocol.Abort)
    away.submit(2)  # it goes on with the others
    away.end(away.node.expect(protocol.Task), b"body")
    assert away.engine.expect(protocol.Delivered).task == 2


def test_a_second_file_with_the_same_argument_is_as_good(away: Stage, tmp_path: Path) -> None:
    data = b"y" * 100_000
    one, two = blob(tmp_path / "one", data), blob(tmp_path / "two", data)
    away.submit(1, blobs=[one])
    away.submit(2, blobs=[two])
    away.asked()
    Path(one.path).unlink()
    away.data.send(protocol.Fetch(digest=one.digest))
    away.data.expect(protocol.BlobChunk)
    assert bytes(away.data.chunks[0]) == data


def test_a_size_that_is_only_claimed_takes_no_room(away: Stage) -> None:
    away.submit(1)
    given = away.node.expect(protocol.Task)
    away.end(given, b"x" * 10, nbytes=1 << 49)
    away.node.expect(protocol.Grant)
    chunk = protocol.Chunk(task=given.task, attempt=given.attempt, offset=0)
    away.data.send(chunk, b"x" * 10)
    path = away.directory / f"{given.task}-{given.attempt}"
    assert wait_for(path.exists)
    away.asked()
    assert path.stat().st_blocks * 512 <= 128 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with next to no room."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_of_the_master_is_told_once(small_disk: Path) -> None:
    """It is neither the task's fault nor the node's: nothing is computed again."""
    body = b"x" * (4 * WINDOW)  # beyond the window, and so for the disk
    with stage(small_disk, remote=True) as away:
        away.submit(1)
        given = away.node.expect(protocol.Task)
        away.end(given, body)
        away.upload(given, body)
        failed = away.engine.expect(protocol.Failed)
        assert failed.error == "NoRoom" and "after 1 attempts" in failed.text
        assert f"no room on {small_disk} of this machine" in failed.text
        away.node.expect(protocol.Abort)
        away.node.never(protocol.Task, away.asked)
        assert not away.broker.staging.bodies
