"""What travels as bytes: pickles with their big buffers apart, laid out so that they can be mapped.

A *part* is one pickled object as frames: the pickle, and then the buffers that it refers to (pickle
protocol 5, PEP 574). A *body* is any number of parts, one after the other::

    part = number of frames (u64), bytes of each (u64), padding, then per frame: bytes, padding

Everything starts at a multiple of ALIGN, so that arrays can stay where they are received. A body
is the same in a message, in a file and in shared memory. Not covered: where bodies are kept
(``store``, ``spool``) and how they are sent (``protocol``).
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oq_runtime.descriptors import patiently
from oq_runtime.errors import ProtocolError

#: bytes to which every frame is aligned: a cache line, and what vector instructions want
ALIGN = 64
#: bytes from which a buffer travels beside its pickle; below, one more frame costs more than a copy
APART_BYTES = 16 * 1024
PROTOCOL = 5

Buffer = bytes | bytearray | memoryview


def dump(obj: Any) -> list[Buffer]:
    """Return an object as frames that refer to its memory: to be written before it can change.

    Raises what ``pickle.dumps`` raises.
    """
    apart: list[Buffer] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < APART_BYTES:
            return True  # stays in the pickle
        apart.append(view)
        return False

    head = pickle.dumps(obj, PROTOCOL, buffer_callback=take)
    return [head, *apart]


def load(frames: Sequence[Buffer]) -> Any:
    """Return the object of a part; its arrays lie in the frames, so these belong to it from now on.

    Raises what ``pickle.loads`` raises.
    """
    return pickle.loads(frames[0], buffers=frames[1:])


def lay_out(frames: Sequence[Buffer]) -> list[Buffer]:
    """Return the buffers to be written, one after the other, for a part of these frames."""
    sizes = [len(frame) for frame in frames]
    header = struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes)
    out: list[Buffer] = []
    for piece in (header, *frames):
        out.append(piece)
        if padding := -len(piece) % ALIGN:
            out.append(bytes(padding))
    return out


def parts(body: Buffer) -> Iterator[list[memoryview]]:
    """Yield the frames of each part of a body, as views of it.

    Raises ProtocolError for a body that ends in the middle of a part.
    """
    view = memoryview(body)
    at = 0

    def take(nbytes: int) -> memoryview:
        nonlocal at
        piece = view[at : at + nbytes]
        if len(piece) != nbytes:
            raise ProtocolError(f"a body of {len(view)} bytes ends before byte {at + nbytes}")
        at += nbytes
        return piece

    while at < len(view):
        (count,) = struct.unpack("<Q", take(8))
        sizes = struct.unpack(f"<{count}Q", take(8 * min(count, len(view))))
        frames = []
        for nbytes in sizes:
            at += -at % ALIGN
            frames.append(take(nbytes))
        at += -at % ALIGN
        yield frames


def writable(body: Buffer) -> memoryview:
    """Return a copy of a small body in memory of its own, in which arrays may be changed."""
    return memoryview(bytearray(body))


def map_file(path: Path | str, *, private: bool) -> memoryview:
    """Map a file for reading and writing; ``private``: what is written is seen by nobody else.

    Raises OSError, with what may have been the cause where the file is not there, or empty.
    """
    mode, access = ("rb", mmap.ACCESS_COPY) if private else ("r+b", mmap.ACCESS_WRITE)
    try:
        with patiently(lambda: open(path, mode)) as file:
            return memoryview(patiently(lambda: mmap.mmap(file.fileno(), 0, access=access)))
    except (FileNotFoundError, ValueError) as exc:  # the latter for one that is empty
        raise FileNotFoundError(
            f"{path} is not there any more: were files of this session deleted, or its user logged "
            "out with RemoveIPC=yes in logind.conf?"
        ) from exc


def nbytes(buffers: Iterable[Buffer]) -> int:
    return sum(map(len, buffers))


class Pickled:
    """Stands in for the engine's class of this name: pickled once, with big buffers apart.

    Pickling it again copies nothing: its frames travel beside the new pickle. As long as it has not
    travelled it refers to the memory of the object, which must not change meanwhile.

    Raises TypeError, with the object in the message as the engine has it, for what pickle refuses.
    """

    compressed = False

    def __init__(self, obj: Any) -> None:
        self.clsname = type(obj).__name__
        self.calc_id = str(getattr(obj, "calc_id", ""))
        try:
            self.frames: Sequence[Buffer] = dump(obj)
        except TypeError as exc:
            raise TypeError(f"{exc}: {obj}") from exc

    def __repr__(self) -> str:
        return f"<Pickled {self.clsname} #{self.calc_id} {len(self)} bytes>"

    def __len__(self) -> int:
        return nbytes(self.frames)

    def unpickle(self) -> Any:
        """Return the object; to be called once, since its arrays take over the frames."""
        return load(self.frames)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        frames = [pickle.PickleBuffer(frame) for frame in self.frames]
        return _unreduce, (self.clsname, self.calc_id, frames)


def _unreduce(clsname: str, calc_id: str, frames: Sequence[Buffer]) -> Pickled:
    new = Pickled.__new__(Pickled)
    new.clsname, new.calc_id, new.frames = clsname, calc_id, frames
    return new
