"""The journal of a job: what is read back, whatever has become of its bytes."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from oq_runtime.commands import journal as commands_journal
from oq_runtime.errors import ConfigError, JournalError
from oq_runtime.files import detached, journal
from oq_runtime.files.detached import Detached
from oq_runtime.files.journal import Consumed, Cut, Event, Reader, Slots, Submitted, Used, Writer
from tests.leftovers import wait_for

GB = 1 << 30
HEAD = {"job": 7, "facts": {"the input a": "01"}}
MUTATIONS = 2000
LIMIT_S = 20.0


def write(
    directory: Path,
    items: list[tuple[Event, bytes]],
    budget_bytes: int = GB,
    claimed: int | None = None,
) -> Writer:
    writer = Writer(directory, HEAD, budget_bytes=budget_bytes, claimed=claimed)
    for event, body in items:
        writer.put(event, body)
    writer.close()
    return writer


def read(directory: Path) -> list[tuple[Event, bytes]]:
    """Return what is good, up to the first body that is not."""
    reader = Reader(directory)
    assert reader.head == HEAD
    found = []
    for record in reader.records:
        try:
            found.append((record.event, bytes(reader.body(record))))
        except JournalError:
            break
    reader.close()
    return found


def some(n: int, seed: int = 1) -> list[tuple[Event, bytes]]:
    rng = random.Random(seed)
    items: list[tuple[Event, bytes]] = []
    for number in range(n):
        items.append((Submitted(0, number, "module.task", rng.randbytes(16)), b""))
        items.append((Consumed(0, number), rng.randbytes(rng.choice([0, 1, 63, 64, 5000]))))
    return items


def events() -> st.SearchStrategy[Event]:
    number = st.integers(0, 1 << 40)
    submitted = st.builds(Submitted, number, number, st.text(), st.binary(max_size=16))
    used = st.builds(Used, st.lists(st.text()).map(tuple), number, number)
    return st.one_of(submitted, st.builds(Consumed, number, number), st.builds(Slots, number), used)


@given(st.lists(st.tuples(events(), st.binary(max_size=300))))
def test_what_was_written_is_read(items: list[tuple[Event, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "j", items)
        assert read(Path(name) / "j") == items


def test_goes_on_in_another_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 4096)
    items = some(30)
    write(tmp_path / "j", items)
    assert len(journal.segments(tmp_path / "j")) > 3
    assert read(tmp_path / "j") == items


def test_goes_on_after_a_crash(tmp_path: Path) -> None:
    """The torn tail is cut off, and what follows is read."""
    items = some(10)
    write(tmp_path / "j", items[:10])
    [segment] = journal.segments(tmp_path / "j")
    os.truncate(segment, segment.stat().st_size - 70)
    reader = Reader(tmp_path / "j")
    assert reader.torn
    good = len(reader.records)
    assert 0 < good < 10
    claimed = journal.claim(tmp_path / "j")
    reader.cut_tail()
    reader.close()
    write(tmp_path / "j", items[10:], claimed=claimed)
    assert read(tmp_path / "j") == items[:good] + items[10:]


def test_another_job_of_that_number_begins_anew(tmp_path: Path) -> None:
    """Nor is it complete, or was it detached."""
    write(tmp_path / "j", some(10))
    journal.set_complete(tmp_path / "j")
    detached.note(tmp_path / "j", ())
    write(tmp_path / "j", some(3)[3:])
    assert read(tmp_path / "j") == some(3)[3:]
    assert not journal.is_complete(tmp_path / "j")
    assert detached.read(tmp_path / "j") is None


def test_odd_journals_are_told_in_a_line(tmp_path: Path) -> None:
    write(tmp_path / "j", some(2))
    (tmp_path / "j" / "0 (copy).oqj").touch()
    assert read(tmp_path / "j") == some(2)
    (tmp_path / "j" / "000001.oqj").mkdir()
    with pytest.raises(JournalError, match=r"000001.oqj: is no file"):
        Reader(tmp_path / "j")
    (tmp_path / "j" / journal.LOCK).unlink()
    (tmp_path / "j" / journal.LOCK).symlink_to("elsewhere")
    with pytest.raises(JournalError, match="Too many levels"):
        journal.claim(tmp_path / "j")
    assert not journal.remove(tmp_path / "j")


def test_cut(tmp_path: Path) -> None:
    items = some(5)
    write(tmp_path / "j", [*items[:6], (Cut(2), b""), *items[6:], (Cut(99), b"")])
    assert read(tmp_path / "j") == items[:2] + items[6:]
    assert not Reader(tmp_path / "j").torn


def test_any_damage_leaves_what_stood_before(tmp_path: Path) -> None:
    """A byte flipped, or some cut off, left out or put in: a prefix, or one line."""
    rng = random.Random(18)
    items = some(12)
    whole = tmp_path / "whole"
    write(whole, items)
    for number in range(MUTATIONS):
        damaged = tmp_path / "damaged"
        shutil.copytree(whole, damaged)
        target = rng.choice([*journal.segments(damaged), damaged / journal.HEAD])
        data = bytearray(target.read_bytes())
        at, size = rng.randrange(len(data)), rng.randrange(1, 200)
        match number % 4:
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = rng.randbytes(size)
        target.write_bytes(data)
        try:
            found = read(damaged)
        except JournalError as exc:
            assert target.name == journal.HEAD, f"mutation {number}: {exc}"
            assert "\n" not in str(exc)
        else:
            assert found == items[: len(found)], f"mutation {number} of {target.name} at {at}"
        shutil.rmtree(damaged)


def test_ends_at_its_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = some(200)
    writer = write(tmp_path / "j", items, budget_bytes=100_000)
    assert journal.size(tmp_path / "j") <= 100_000
    found = read(tmp_path / "j")
    assert 10 < len(found) < len(items)
    assert found == items[: len(found)]
    assert "0.0 GB" in writer.stopped
    assert len(caplog.records) == 1
    write(tmp_path / "k", [*items, (Cut(len(found) - 1), b"")], budget_bytes=100_000)
    assert read(tmp_path / "k") == found[:-1], "an attempt that has failed must not stay"


@pytest.mark.parametrize("names", [1, 120])
def test_its_budget_counts_all_that_is_written(tmp_path: Path, names: int) -> None:
    used: Event = Used(tuple(f"a_parameter_with_a_long_name_{n}" for n in range(names)))
    write(tmp_path / "j", [(used, b"")] * 2000, budget_bytes=100_000)
    assert 90_000 < journal.size(tmp_path / "j") <= 100_000


def test_a_log_that_fails_costs_neither_job_nor_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's is a database, which may lie on the same full disk."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the database is full")

    monkeypatch.setattr(journal.log, "warning", fail)
    writer = Writer(tmp_path / "j", HEAD, budget_bytes=1000)
    for event, body in some(20):
        writer.put(event, body)
    assert writer.stopped
    writer.close()
    writer = Writer(tmp_path / "k", HEAD, budget_bytes=GB)
    monkeypatch.setattr(writer, "_append", fail)
    writer.put(*some(1)[0])
    assert wait_for(lambda: writer.stopped, LIMIT_S)
    assert wait_for(writer._queue.empty, LIMIT_S)
    writer.close()


def test_a_segment_that_became_shorter_ends_a_replay_and_no_process(tmp_path: Path) -> None:
    write(tmp_path / "j", [(Consumed(1, 2), bytes(200_000))])
    reader = Reader(tmp_path / "j")
    os.truncate(tmp_path / "j/000000.oqj", 10_000)
    with pytest.raises(JournalError, match="the file ends there"):
        reader.body(reader.records[0])
    reader.close()


def test_one_that_is_removed_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has its lock while it is being removed, and a lock without a journal is none."""
    write(tmp_path / "j", some(3))
    remove, others = shutil.rmtree, []

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        with pytest.raises(JournalError):
            journal.claim(path)
        others.append(os.open(path / journal.LOCK, os.O_RDWR))
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert journal.remove(tmp_path / "j") and len(others) == 1
    os.close(others[0])
    with pytest.raises(JournalError):
        journal.claim(tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_a_look_does_not_keep_a_job_from_its_journal(tmp_path: Path) -> None:
    write(tmp_path / "j", some(3))
    looking = journal.claim(tmp_path / "j")
    threading.Timer(0.05, os.close, [looking]).start()
    os.close(journal.claim(tmp_path / "j"))


def test_ends_at_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit of the size of files stands for it: the same call fails, with another number."""
    items = some(200)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        writer = write(tmp_path / "j", items)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in writer.stopped
    found = read(tmp_path / "j")
    assert 10 < len(found) < len(items)
    assert found == items[: len(found)]
    assert len(caplog.records) == 1


def test_ends_at_a_disk_that_cannot_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that fails tells so when it is to keep what it has taken."""
    monkeypatch.setattr(journal, "SYNC_SECS", 0.0)
    syncs = iter([None, OSError(errno.EIO, os.strerror(errno.EIO))])

    def sync(descriptor: int) -> None:
        if (error := next(syncs, None)) is not None:
            raise error

    monkeypatch.setattr(os, "fdatasync", sync)
    items = some(200)
    writer = write(tmp_path / "j", items)
    assert os.strerror(errno.EIO) in writer.stopped
    found = read(tmp_path / "j")
    assert found == items[: len(found)]
    assert len(caplog.records) == 1


def test_one_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "calc_7.journal"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            Writer(directory, HEAD, budget_bytes=GB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not directory.exists()


def test_who_was_told_is_told_again_when_the_job_has_gone_on(tmp_path: Path) -> None:
    directory = tmp_path / "calc_7.journal"
    writer = Writer(directory, HEAD, budget_bytes=GB)
    assert journal.untold(tmp_path) == [], "it runs"
    writer.close()
    assert journal.untold(tmp_path) == [7]
    journal.set_told(directory)
    assert journal.untold(tmp_path) == []
    write(directory, [], claimed=journal.claim(directory))
    assert journal.untold(tmp_path) == [7]


def test_syncs_also_while_something_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_SECS", 0.0)
    waited = []

    def sync(descriptor: int) -> None:
        waited.append(writer._queue.qsize())

    monkeypatch.setattr(os, "fdatasync", sync)
    writer = Writer(tmp_path / "calc_1.journal", {}, budget_bytes=1 << 30)
    for event, body in some(1000):
        writer.put(event, body)
    writer.close()
    assert max(waited) > 10


def test_slow_disk_ends_it_and_not_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "WAITING_BYTES", 1000)
    writer = Writer(tmp_path / "j", HEAD, budget_bytes=GB)
    with writer._lock:  # which the thread needs after each body
        writer.waiting_bytes = 1100  # as of one body
    writer.put(Slots(1))
    assert not writer.stopped, "nothing has to wait for more memory"
    writer.put(Consumed(0, 0), bytes(200))
    writer.put(Consumed(0, 1), b"")
    writer.close()
    assert "too slow" in writer.stopped
    assert read(tmp_path / "j") == [(Slots(1), b"")]


@pytest.mark.parametrize("busy", ["with a sync", "with a write"])
def test_what_is_removed_is_not_written_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    began, go_on = threading.Event(), threading.Event()
    call = {"with a sync": "fdatasync", "with a write": "_append"}[busy]
    done: list[object] = []

    def wait(*args: object) -> None:
        began.set()
        assert go_on.wait(LIMIT_S)
        done.append(args)

    monkeypatch.setattr(journal, "SYNC_SECS", 0.0)
    monkeypatch.setattr(os if call == "fdatasync" else Writer, call, wait)
    writer = Writer(tmp_path / "j", HEAD, budget_bytes=GB)
    writer.put(*some(1)[0])
    assert began.wait(LIMIT_S)
    for event, body in some(100):
        writer.put(event, body)
    ending = threading.Thread(target=writer.discard)
    ending.start()
    assert wait_for(lambda: journal.size(tmp_path / "j") == 0, LIMIT_S)
    go_on.set()
    ending.join(LIMIT_S)
    assert not (tmp_path / "j").exists()
    assert len(done) == 1, "only what was under way"


def test_the_end_of_a_job_says_that_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(journal, "WAIT_SECS", 0.0)
    monkeypatch.setattr(os, "fdatasync", lambda _: wait_for(lambda: bool(told), LIMIT_S))
    writer = Writer(tmp_path / "j", HEAD, budget_bytes=GB)
    for event, body in some(1):
        writer.put(event, body)
    writer.close(told.append)
    assert told == [f"waiting for the disk: the end of the journal is written to {tmp_path / 'j'}"]
    assert read(tmp_path / "j") == some(1)


def test_one_process_has_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "calc_1.journal", HEAD, budget_bytes=GB)
    with pytest.raises(JournalError, match="a job that runs"):
        Writer(tmp_path / "calc_1.journal", HEAD, budget_bytes=GB)
    assert not journal.remove(tmp_path / "calc_1.journal")
    assert journal.numbers(tmp_path) == [1]
    assert journal.find(tmp_path, "-1") == 1, "so that it is told that it runs"
    write(tmp_path / "calc_0.journal", some(1))
    assert journal.find(tmp_path, "-1") == 0
    assert journal.remove(tmp_path / "calc_0.journal")
    writer.close()
    assert journal.remove(tmp_path / "calc_1.journal")
    assert journal.numbers(tmp_path) == []


def test_of_somebody_else_is_not_read(tmp_path: Path) -> None:
    """It holds pickles."""
    write(tmp_path / "calc_1.journal", some(1))
    (tmp_path / "calc_1.journal").chmod(0o755)
    with pytest.raises(JournalError, match="not a directory of this user alone"):
        Reader(tmp_path / "calc_1.journal")
    assert journal.numbers(tmp_path) == []
    (tmp_path / "calc_1.journal").chmod(0o700)
    (tmp_path / "calc_2.journal").symlink_to(tmp_path / "calc_1.journal")
    assert journal.numbers(tmp_path) == [1]


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_root_keeps_none_in_the_directory_of_another() -> None:
    """Who could put a link in its place."""
    with tempfile.TemporaryDirectory() as name:  # where others may enter
        os.chown(name, 65534, 65534)
        os.chmod(name, 0o755)
        with pytest.raises(ConfigError, match="is not root's"):
            Writer(Path(name) / "calc_1.journal", HEAD, budget_bytes=GB)
        assert not os.listdir(name)


def test_makes_room(tmp_path: Path) -> None:
    for number in range(1, 6):
        write(tmp_path / f"calc_{number}.journal", some(20))
    size = journal.size(tmp_path / "calc_1.journal")
    (tmp_path / "calc_3.journal" / journal.HEAD).unlink()
    assert journal.make_room(tmp_path, 2 * size, 5, lambda number: number == 4) == []
    assert journal.numbers(tmp_path) == [1, 2, 5]  # 3 has no head, 4 was deleted
    assert journal.make_room(tmp_path, size + 1, 5, lambda _: False) == [1]
    assert journal.numbers(tmp_path) == [2, 5]


def test_of_complete_jobs(tmp_path: Path) -> None:
    """They cannot go on, are kept by their last use, and make room for others first."""
    for number in range(1, 6):
        write(tmp_path / f"calc_{number}.journal", some(20))
        if number < 4:
            journal.set_complete(tmp_path / f"calc_{number}.journal")
            os.utime(tmp_path / f"calc_{number}.journal" / journal.COMPLETE, (number, number))
    size = journal.size(tmp_path / "calc_1.journal")
    assert journal.complete(tmp_path) == [3, 2, 1]
    assert journal.numbers(tmp_path) == [4, 5]
    assert journal.find(tmp_path, "2") == 2
    journal.set_complete(tmp_path / "calc_1.journal")  # used
    assert journal.complete(tmp_path) == [1, 3, 2]
    assert journal.make_room(tmp_path, 2 * size, 5, lambda _: False) == []
    assert journal.everything(tmp_path) == [1, 4, 5]
    assert journal.make_room(tmp_path, 0, 5, lambda _: False) == [4]
    (tmp_path / "calc_5.journal" / journal.COMPLETE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        journal.set_complete(tmp_path / "calc_5.journal")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("events", [0, 1, 2, 29, 40, 60])
@pytest.mark.parametrize("able", [True, False])
def test_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: int, able: bool) -> None:
    """Of several segments; goes on under another head, and the first one stays as it is.

    :param able: whether the file system can copy
    """

    def unable(*_: int) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not able:
        monkeypatch.setattr(os, "copy_file_range", unable)
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 5000)
    items = some(30)
    write(tmp_path / "k", items)  # of another one that had this number
    journal.set_complete(tmp_path / "k")
    write(tmp_path / "j", [*items[:30], (Cut(20), b""), *items[30:]])
    kept = [*items[:20], *items[30:]]
    assert len(journal.segments(tmp_path / "j")) > 3
    source = Reader(tmp_path / "j")
    events = min(events, len(kept))
    claimed = journal.copy(source, events, tmp_path / "k", HEAD | {"job": 8})
    assert Reader(tmp_path / "k").head == HEAD | {"job": 8}
    assert not journal.is_complete(tmp_path / "k")
    Reader(tmp_path / "k").cut_tail()
    assert Reader(tmp_path / "k").records == source.records[:events]
    write(tmp_path / "k", items[:5], claimed=claimed)
    assert read(tmp_path / "k") == [*kept[:events], *items[:5]]
    assert read(tmp_path / "j") == kept


@pytest.mark.parametrize("fault", ["removed", "full"])
def test_copy_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Of one that is removed just now, or where no room is left; a new one can begin there."""
    write(tmp_path / "j", some(3))
    source = Reader(tmp_path / "j")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if fault == "full":
            patch.setattr(journal, "write_atomically", full)
        else:
            journal.segments(tmp_path / "j")[0].unlink()
        with pytest.raises(OSError):
            journal.copy(source, 6, tmp_path / "k", HEAD)
    assert not (tmp_path / "k").exists()
    write(tmp_path / "k", some(1))
    assert read(tmp_path / "k") == some(1)


def test_a_job_goes_on_by_itself_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the options of then; a note of another form, or of somebody else, counts as none."""
    directory = journal.directory_of(tmp_path, 7)
    directory.mkdir(mode=0o700)
    for times in range(detached.MOST_TIMES + 1):
        detached.note(directory, ("--cores=2",))
        assert detached.read(directory) == Detached(("--cores=2",), times)
    monkeypatch.setenv("OQ_DATADIR", str(tmp_path))
    done = CliRunner().invoke(commands_journal.main, ["resume"])
    assert done.exit_code == 0 and "job 7 has gone on 3 times" in done.output, done.output
    detached.forget(directory)
    assert detached.read(directory) is None
    for text in ("", "[]", "[1, 2]", '{"a": 1}', "[[], null]", "[[], 1, 2]"):
        (directory / detached.NOTE).write_text(text)
        assert detached.read(directory) is None
    detached.forget(directory)
    detached.note(directory, ())
    directory.chmod(0o755)
    assert detached.read(directory) is None


def test_a_number_that_no_job_has(tmp_path: Path) -> None:
    for number in ("9" * 5000, "\u00b2", "-2", "1e9", ""):
        with pytest.raises(JournalError, match="there is none"):
            journal.find(tmp_path, number)


def test_the_size_of_one_that_is_removed_just_now(tmp_path: Path) -> None:
    write(tmp_path / "calc_1.journal", some(3))
    there = journal.size(tmp_path / "calc_1.journal")
    (tmp_path / "calc_1.journal" / "000009.oqj").symlink_to("gone")
    assert journal.size(tmp_path / "calc_1.journal") == there > 0


@pytest.mark.parametrize("name", ["head.json", "000000.oqj", detached.NOTE])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    directory = tmp_path / "calc_1.journal"
    write(directory, some(3))
    (directory / name).unlink(missing_ok=True)
    make(directory / name)
    if name == detached.NOTE:
        assert detached.read(directory) is None
    else:
        with pytest.raises(JournalError, match=name):
            Reader(directory)
