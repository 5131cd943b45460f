"""The journal of a job: what its engine has submitted and what it has consumed, in that order.

A directory with ``head.json``, which says of what job it is, and segments of records that are only
ever appended::

    record = magic (u32), kind (u32), bytes of the event (u64), bytes of the body (u64),
             XXH3-128 of what stands before and of the event, XXH3-128 of the body,
             event (msgpack), body, zeros up to a multiple of 64 bytes

A record counts when it and all before it are whole: a torn tail is cut off. ``Writer`` has a thread
that copies bodies and syncs once a second; whoever hands something over never waits for it. When
there is no more room, or the disk is too slow for the memory that it may hold, journalling ends
with one line, and what is there stays good. It holds pickles: it is its owner's alone, and only his
is read. Not covered: what is done with it (``engine.history``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import queue
import re
import shutil
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import xxhash

from oq_runtime.errors import JournalError
from oq_runtime.files import places, private
from oq_runtime.wire.payload import Buffer

log = logging.getLogger(__name__)

FORMAT = 1
HEAD, LOCK = "head.json", "lock"
#: of the journal of a job that is complete, kept for others; its time is that of the last use
COMPLETE = "complete"
#: of a job that can go on, whose user knows that
TOLD = "told"
MAGIC = 0x314A514F  # "OQJ1"
HEADER = struct.Struct("<IIQQ16s16s")
PREFIX = struct.Struct("<IIQQ")
ALIGN = 64
#: bytes from which a new segment is begun
SEGMENT_BYTES = 1 << 30
#: seconds between two syncs
SYNC_SECS = 1.0
#: seconds after which a user is told that the end of a job waits for the disk
WAIT_SECS = 2.0
#: seconds for which another process may look whether somebody has a journal
GLANCE_SECS = 0.2
#: bytes of bodies that may wait for the disk
WAITING_BYTES = 256 << 20
#: bytes of the largest event that is read: what a stranger's file may claim
EVENT_BYTES = 1 << 20
#: bytes of the head, which names all inputs and parameters
HEAD_BYTES = 256 << 20
#: bytes that are copied at a time
COPY_BYTES = 8 << 20
#: the file system cannot copy by itself
NO_RANGES = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM)


class Slots(msgspec.Struct, frozen=True, tag="slots", array_like=True):
    """The engine was told how many worker slots there are."""

    slots: int


class Submitted(msgspec.Struct, frozen=True, tag="submitted", array_like=True):
    """A task was submitted: number ``task`` of map ``map``, and the digest of its arguments."""

    map: int
    task: int
    func: str
    digest: bytes


class Consumed(msgspec.Struct, frozen=True, tag="consumed", array_like=True):
    """The engine was given the attempt at a task; the body of the record is that of the attempt."""

    map: int
    task: int


class Cut(msgspec.Struct, frozen=True, tag="cut", array_like=True):
    """Of the events before this one only the first ``events`` count."""

    events: int


class Used(msgspec.Struct, frozen=True, tag="used", array_like=True):
    """Parameters that were looked at for the first time, by the engine or by a task of a map."""

    names: tuple[str, ...]
    map: int = -1
    task: int = -1


Event = Slots | Submitted | Consumed | Cut | Used
_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
KIND = 1  # of all records as yet


@dataclass(frozen=True, slots=True)
class Record:
    """An event, and where its body lies."""

    event: Event
    segment: int
    offset: int
    nbytes: int
    digest: bytes


def directory_of(datadir: Path, number: int) -> Path:
    """Return where the journal of a calculation is: beside its datastore."""
    return datadir / f"calc_{number}.journal"


def numbers(datadir: Path) -> list[int]:
    """Return the calculations of this user that can go on, in their order."""
    return [n for n in everything(datadir) if not is_complete(directory_of(datadir, n))]


def complete(datadir: Path) -> list[int]:
    """Return the complete calculations of this user with a journal, the last used first."""
    found = {}
    for number in everything(datadir):
        with contextlib.suppress(FileNotFoundError):
            found[number] = os.lstat(directory_of(datadir, number) / COMPLETE).st_mtime_ns
    return sorted(found, key=lambda number: (found[number], number), reverse=True)


def everything(datadir: Path) -> list[int]:
    """Return the calculations of this user that have a journal, in their order."""
    found = [
        int(path.stem.removeprefix("calc_"))
        for path in datadir.glob("calc_*.journal")
        if path.stem.removeprefix("calc_").isdecimal() and private.is_own(path)
    ]
    return sorted(found)


def is_complete(directory: Path) -> bool:
    return os.path.lexists(directory / COMPLETE)


def set_complete(directory: Path) -> None:
    """Keep the journal of a job that is complete for others, or note that one has used it."""
    _mark(directory / COMPLETE)


def untold(datadir: Path) -> list[int]:
    """Return the calculations that can go on, of which nobody has told their user."""
    found = []
    for number in numbers(datadir):
        directory = directory_of(datadir, number)
        with contextlib.suppress(JournalError):  # an odd one
            if not os.path.lexists(directory / TOLD) and not claimed(directory):
                found.append(number)
    return found


def set_told(directory: Path) -> None:
    """Note that the user has been told that a job can go on; until it does."""
    with contextlib.suppress(OSError):  # then he is told once more
        _mark(directory / TOLD)


def _mark(path: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        os.utime(descriptor)
    finally:
        os.close(descriptor)


def find(datadir: Path, number: str) -> int:
    """Return the number of a calculation of this user that has a journal.

    :param number: as it was given; -1 for the last one

    Raises JournalError when there is none.
    """
    kept = numbers(datadir)
    if number == "-1" and kept:
        for last in reversed(kept):
            with contextlib.suppress(JournalError):  # an odd one
                if not claimed(directory_of(datadir, last)):
                    return last
        return kept[-1]
    if re.fullmatch("[0-9]{1,18}", number) and int(number) in everything(datadir):
        return int(number)
    there = f"there is one of job {', '.join(map(str, kept))}" if kept else "there is none"
    raise JournalError(
        f"no journal of job {number} in {datadir}: {there}; a job has one while it runs, and when "
        "it did not complete"
    )


class Claimed(JournalError):
    """Another process has the journal."""


def claim(directory: Path, wait_s: float = GLANCE_SECS) -> int:
    """Return a descriptor that keeps other processes from this journal until it is closed.

    :param wait_s: how long it may be another's, which may only look whether somebody has it

    Raises JournalError when one has it, or has removed it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    until_s = time.monotonic() + wait_s
    while True:
        descriptor = -1
        try:
            descriptor = os.open(directory / LOCK, flags, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(directory / LOCK, follow_symlinks=False)
        except OSError as exc:
            if descriptor >= 0:
                os.close(descriptor)
            if not isinstance(exc, BlockingIOError):
                raise JournalError(f"{directory / LOCK}: {exc.strerror}") from None
        else:
            if os.path.samestat(os.fstat(descriptor), there):
                return descriptor
            os.close(descriptor)  # of a journal that was removed meanwhile
        if time.monotonic() >= until_s:
            raise Claimed(f"{directory} belongs to a job that runs")
        time.sleep(0.01)


def claimed(directory: Path) -> bool:
    """Whether a process has this journal."""
    try:
        os.close(claim(directory, wait_s=0))
    except Claimed:
        return True
    return False


def size(directory: Path) -> int:
    """Return the bytes of a journal, which its job may remove just now."""
    found = 0
    for path in segments(directory):
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def remove(directory: Path) -> bool:
    """Delete a journal, unless a process has it; return whether it is gone."""
    try:
        claimed = claim(directory, wait_s=0)
    except JournalError:  # a process has it, or nobody can say
        return False
    shutil.rmtree(directory, ignore_errors=True)
    os.close(claimed)
    return True


def make_room(
    datadir: Path, most_bytes: int, but: int, deleted: Callable[[int], bool]
) -> list[int]:
    """Delete the oldest journals until all others together have so many bytes at most.

    Those of complete jobs go first, beginning with the one that was not used for the longest time.

    :param but: the calculation whose journal stays
    :param deleted: whether a calculation is no more, so that its journal is of no use
    :returns: the calculations that cannot go on any more
    """
    spare = complete(datadir)[::-1]
    directories = {n: directory_of(datadir, n) for n in (*spare, *numbers(datadir)) if n != but}
    for number, directory in list(directories.items()):
        # without a head: its process was killed when it began
        useless = not (directory / HEAD).exists() or deleted(number)
        if useless and remove(directory):
            del directories[number]
    sizes = {number: size(directory) for number, directory in directories.items()}
    removed = []
    for number, directory in directories.items():
        if sum(sizes.values()) > most_bytes and remove(directory):
            del sizes[number]
            if number not in spare:
                removed.append(number)
    return removed


def segments(directory: Path) -> list[Path]:
    """Return the segments in their order."""
    return sorted(directory.glob(f"{'[0-9]' * 6}.oqj"))


def _segment(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.oqj"


def copy(source: Reader, events: int, directory: Path, head: dict[str, Any]) -> int:
    """Make a journal of the first events of another one.

    :param head: of the new one
    :returns: a descriptor that keeps others from it, as ``claim``

    Raises what ``Writer`` does.
    """
    private.own(directory, places.OTHER_DATADIR)
    claimed = claim(directory)
    try:
        _clear(directory)
        write_atomically(directory / HEAD, _head_text(head))
        if events:
            last = source.records[events - 1]
            for number in range(last.segment + 1):
                most = source.whole_bytes[number]
                if number == last.segment:
                    most = last.offset + last.nbytes
                    most += -most % ALIGN
                _copy(_segment(source.directory, number), _segment(directory, number), most)
    except (JournalError, OSError):
        shutil.rmtree(directory, ignore_errors=True)
        os.close(claimed)
        raise
    return claimed


def _clear(directory: Path) -> None:
    """Remove what is of a job that had this number before, but for the lock."""
    for path in sorted(directory.iterdir()):
        if path.name != LOCK:
            path.unlink()


def _copy(source: Path, target: Path, nbytes: int) -> None:
    """Copy the beginning of a file to a new one; where the file system can, it is shared."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with regular(source) as read, os.fdopen(os.open(target, flags, 0o600), "wb") as written:
        while nbytes > 0:
            wanted = min(nbytes, COPY_BYTES)
            try:
                copied = os.copy_file_range(read.fileno(), written.fileno(), wanted)
            except OSError as exc:
                if exc.errno not in NO_RANGES:
                    raise
                copied = written.write(read.read(wanted))
            if not copied:
                raise JournalError(f"{source} has become shorter")
            nbytes -= copied
        written.flush()
        os.fsync(written.fileno())


def _header(event: bytes, nbytes: int, digest: bytes) -> bytes:
    prefix = PREFIX.pack(MAGIC, KIND, len(event), nbytes)
    return HEADER.pack(
        MAGIC, KIND, len(event), nbytes, xxhash.xxh3_128(prefix + event).digest(), digest
    )


class Writer:
    """Appends to the journal of one job, in a thread of its own.

    :param directory: of the journal, which may be there with what ``Reader.cut_tail`` has left
    :param head: what ``Reader.head`` is to return, in JSON
    :param budget_bytes: what the journal may take on the disk
    :param claimed: what ``claim`` has returned for the journal that is gone on with, closed with
        this; without it the journal begins anew

    Raises ConfigError or OSError when it cannot be made, or others could exchange it, and
    JournalError when another process has it.
    """

    def __init__(
        self,
        directory: Path,
        head: dict[str, Any],
        *,
        budget_bytes: int,
        claimed: int | None = None,
    ) -> None:
        self.directory = private.own(directory, places.OTHER_DATADIR)
        self._claim = claim(directory) if claimed is None else claimed
        if claimed is None:
            _clear(directory)
        self.budget_bytes = budget_bytes
        self.used_bytes = size(directory)
        self.number = len(segments(directory))
        self.waiting_bytes = 0
        self.stopped = self._untold = ""  # why nothing more is written
        self._discarded = False
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[bytes, Buffer] | None] = queue.SimpleQueue()
        try:
            (directory / TOLD).unlink(missing_ok=True)
            write_atomically(directory / HEAD, _head_text(head))
            self._file = self._open()
        except OSError:  # there is no room for it
            if claimed is None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(self._claim)
            raise
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, event: Event, body: Buffer = b"") -> None:
        """Have an event written; never waits.

        A ``Cut`` is written also when nothing more is: what it cuts off is there already.

        :param body: bytes or a view of them, which must not change any more
        """
        data = _encode(event)
        taken = HEADER.size + len(data) + len(body)
        taken += -taken % ALIGN
        with self._lock:
            # one alone may have more, and what has no body needs no memory
            waits = body and self.waiting_bytes and self.waiting_bytes + len(body) > WAITING_BYTES
            if not self.stopped and waits:
                self._stop(f"the disk of {self.directory} is too slow for it")
            full = self.used_bytes + taken > self.budget_bytes and not isinstance(event, Cut)
            if not self.stopped and full:
                self._stop(f"it has the {self.budget_bytes / 1e9:.1f} GB that it may take")
            taking = isinstance(event, Cut) or not self.stopped
            if taking:
                self.used_bytes += taken
                self.waiting_bytes += len(body)
        if taking:
            self._queue.put((data, body))
        self._tell()

    def close(self, tell: Callable[[str], None] | None = None) -> None:
        """Write what waits, and end; what the disk does not take is left out.

        :param tell: is given a line for the user when that takes a while
        """
        self._queue.put(None)
        self._thread.join(WAIT_SECS)
        if self._thread.is_alive() and tell is not None:
            tell(f"waiting for the disk: the end of the journal is written to {self.directory}")
        self._thread.join()
        os.close(self._claim)

    def discard(self) -> None:
        """End, and remove the journal: nothing more of it goes to the disk."""
        self._discarded = True
        for path in segments(self.directory):
            with contextlib.suppress(OSError):  # what is synced just now need not be written
                os.truncate(path, 0)
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _stop(self, reason: str) -> None:
        """Take no more; to be called with the lock, and followed by ``_tell`` without it."""
        self.stopped = self._untold = reason

    def _tell(self) -> None:
        """Say why nothing more is written; the engine's log is a database, maybe on that disk."""
        with self._lock:
            reason, self._untold = self._untold, ""
        if reason:
            with contextlib.suppress(Exception):  # the job goes on without that line
                log.warning("the journal ends here: %s; the job goes on", reason)

    def _open(self) -> FileIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        path = _segment(self.directory, self.number)
        descriptor = os.open(path, flags, 0o600)
        _sync(self.directory)
        return open(descriptor, "wb", buffering=0)

    def _run(self) -> None:
        dirty_since_s: float | None = None
        try:
            while True:
                wait_s = None
                if dirty_since_s is not None:
                    wait_s = dirty_since_s + SYNC_SECS - time.monotonic()
                try:
                    if wait_s is not None and wait_s <= 0:  # also where something waits always
                        raise queue.Empty
                    item = self._queue.get(timeout=wait_s)
                except queue.Empty:
                    os.fdatasync(self._file.fileno())
                    dirty_since_s = None
                    continue
                if item is None:
                    break
                if self._discarded:
                    continue
                self._append(*item)
                dirty_since_s = dirty_since_s or time.monotonic()
                with self._lock:
                    self.waiting_bytes -= len(item[1])
                del item
            if not self._discarded:
                os.fdatasync(self._file.fileno())
        except OSError as exc:
            with self._lock:
                self._stop(f"{self.directory}: {exc.strerror}")
            ended = False
            with contextlib.suppress(queue.Empty):  # at once, for it is memory
                while not ended:
                    ended = self._queue.get_nowait() is None
            self._tell()
            while not ended:
                ended = self._queue.get() is None
        finally:
            self._file.close()

    def _append(self, data: bytes, body: Buffer) -> None:
        view = memoryview(body).cast("B")
        hashed = xxhash.xxh3_128()
        for piece in _pieces(view):
            hashed.update(piece)
        head = _header(data, len(view), hashed.digest()) + data
        padding = bytes(-(len(head) + len(view)) % ALIGN)
        at = self._file.tell()
        try:
            for piece in (memoryview(head), *_pieces(view), memoryview(padding)):
                rest = piece
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(at)
            raise
        if self._file.tell() > SEGMENT_BYTES:
            os.fdatasync(self._file.fileno())
            self._file.close()
            self.number += 1
            self._file = self._open()


def _head_text(head: dict[str, Any]) -> bytes:
    text = json.dumps(head, sort_keys=True)
    check = xxhash.xxh3_128(text.encode()).hexdigest()
    return json.dumps({"format": FORMAT, "check": check, "head": head}, sort_keys=True).encode()


def _pieces(view: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(view), COPY_BYTES):
        yield view[at : at + COPY_BYTES]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file of a directory of ours: whole, or not at all."""
    new = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    with open(new, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular(path: Path) -> BinaryIO:
    """Open a file to read it; raises OSError for what is none, such as a pipe without a writer."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no file", str(path))
    return os.fdopen(descriptor, "rb")


class Reader:
    """A journal as it was left: its head, and the records that are whole.

    :param directory: of the journal

    Raises JournalError when it is not this user's own, or has no head of this format.
    """

    def __init__(self, directory: Path) -> None:
        if not private.is_own(directory):
            raise JournalError(f"{directory} is not a directory of this user alone")
        self.directory = directory
        self.head = self._read_head()
        self.records: list[Record] = []
        self.torn = ""  # where the first record is that is not whole, if there is one
        self.whole_bytes: dict[int, int] = {}  # segment -> bytes of whole records
        self._files: dict[int, BinaryIO] = {}
        for path in segments(directory):
            number = int(path.stem)
            try:
                whole = number == len(self.whole_bytes) and self._scan(number, path)
            except OSError as exc:
                raise JournalError(f"{path}: {exc.strerror}") from exc
            if not whole:
                self.torn = self.torn or f"{path.name} is missing"
                break

    def _read_head(self) -> dict[str, Any]:
        path = self.directory / HEAD
        try:
            with regular(path) as file:
                head = json.loads(file.read(HEAD_BYTES))
        except OSError as exc:
            raise JournalError(f"{path}: {exc.strerror}") from exc
        except ValueError as exc:
            raise JournalError(f"{path} is damaged: {exc}") from exc
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise JournalError(f"{path} is not of a journal of format {FORMAT}")
        found: dict[str, Any] = head.get("head", {})
        if _head_text(found) != json.dumps(head, sort_keys=True).encode():
            raise JournalError(f"{path} is damaged")
        return found

    def _scan(self, number: int, path: Path) -> bool:
        """Take the whole records of a segment; False when one is not."""
        at = 0
        self.whole_bytes[number] = 0
        with regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            while at < size:
                record = self._record(file, number, at, size)
                if record is None:
                    self.torn = f"{path.name} at byte {at}"
                    return False
                if isinstance(record.event, Cut):  # what was not kept need not be cut off
                    del self.records[record.event.events :]
                else:
                    self.records.append(record)
                at = record.offset + record.nbytes
                at += -at % ALIGN  # each record begins at a multiple
                self.whole_bytes[number] = at
        return True

    @staticmethod
    def _record(file: Any, number: int, at: int, size: int) -> Record | None:
        file.seek(at)
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        magic, kind, event_bytes, body_bytes, check, digest = HEADER.unpack(header)
        if magic != MAGIC or kind != KIND or event_bytes > EVENT_BYTES:
            return None
        data = file.read(event_bytes)
        if xxhash.xxh3_128(header[: PREFIX.size] + data).digest() != check:
            return None
        offset = at + HEADER.size + event_bytes
        if offset + body_bytes > size:
            return None
        try:
            event = _decoder.decode(data)
        except msgspec.MsgspecError:
            return None
        return Record(event, number, offset, body_bytes, digest)

    def body(self, record: Record) -> memoryview:
        """Return the body of a record, in memory of its own that may be written.

        Raises JournalError when it is damaged.
        """
        if record.nbytes == 0:
            return memoryview(bytearray())
        name = _segment(self.directory, record.segment).name
        if record.segment not in self._files:
            self._files[record.segment] = regular(_segment(self.directory, record.segment))
        # not by a map: what a disk cannot read would be a signal that ends the process
        copied = memoryview(bytearray(record.nbytes))
        at = 0
        while at < record.nbytes:
            file = self._files[record.segment].fileno()
            try:
                got = os.preadv(file, [copied[at:]], record.offset + at)
            except OSError as exc:
                what = f"{name} at byte {record.offset + at}: {exc.strerror}"
                raise JournalError(what) from None
            if not got:
                raise JournalError(f"{name} at byte {record.offset + at}: the file ends there")
            at += got
        if xxhash.xxh3_128(copied).digest() != record.digest:
            raise JournalError(f"{name} at byte {record.offset}: the body is damaged")
        return copied

    @property
    def results(self) -> int:
        """How many attempts it has."""
        return sum(isinstance(record.event, Consumed) for record in self.records)

    def cut_tail(self) -> None:
        """Cut off what follows the last whole record, so that more can be appended."""
        for path in segments(self.directory):
            if int(path.stem) not in self.whole_bytes:
                path.unlink()
            else:
                os.truncate(path, self.whole_bytes[int(path.stem)])
                _sync(path)  # before what comes after it

    def close(self) -> None:
        for file in self._files.values():
            file.close()
