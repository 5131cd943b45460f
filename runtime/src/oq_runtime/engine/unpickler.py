"""Pickles of which nothing is believed: what the DbServer reads, and what its clients read.

A pickle is a program. Of its language only what builds data is carried out here, and of names only
those of a table are looked up. Python's own machine for pickles does the work, the one written in
Python: the one in C takes the memory that a pickle asks for before it has seen the bytes.

Not covered: who reads what from which socket (``dbserver``).
"""

from __future__ import annotations

import builtins
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from oq_runtime.errors import OqRuntimeError
from oq_runtime.text import clean

#: levels of lists in lists; those of the engine have three
MAX_LEVELS = 16
#: bytes of data when what is in it more than once is written out each time
MAX_UNFOLDED_BYTES = 32 << 20
#: bytes that are counted for each object
OBJECT_BYTES = 8
#: what a name stands for, by module and name
Names = Mapping[tuple[str, str], Any]

# left out of the opcodes are sets and persistent ids, what refers to buffers or to a registry
# elsewhere, and INST and OBJ, which no protocol of today writes
OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2,
    pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT,
    pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING,
    pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
    pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
    pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS,
    pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.GET, pickle.BINGET, pickle.LONG_BINGET,
    pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip


class Refused(OqRuntimeError):
    """A pickle that holds something else than it may, or that is none; the text says what."""


class Section(dict[str, Any]):
    """An empty dictionary, whatever a pickle wants to make it of."""

    __slots__ = ()

    def __new__(cls) -> Section:
        return super().__new__(cls)

    def __init__(self) -> None:
        super().__init__()


class Unpickler(pickle._Unpickler):
    """Reads a pickle that may be anybody's: names stand for what is listed, or are refused.

    :param data: the pickle
    :param names: what each name that may occur in it stands for
    :param errors: whether it may name Python's own exceptions
    """

    stack: list[Any]

    def __init__(self, data: bytes, names: Names, *, errors: bool) -> None:
        super().__init__(io.BytesIO(data))
        self.names = names
        self.errors = errors

    def find_class(self, module: str, name: str) -> Any:
        if found := self.names.get((module, name)):
            return found
        found = getattr(builtins, name, None) if module == "builtins" and self.errors else None
        if isinstance(found, type) and issubclass(found, Exception):
            return found
        raise Refused(f"it names {clean(f'{module}.{name}', 100)}")

    # the machine looks its instructions up in ``dispatch``

    def set_attributes(self) -> None:
        if isinstance(self.stack[-2], type):  # that would change it for everybody
            raise Refused("it changes a class")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    def set_item(self) -> None:
        self._check_keys(self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def set_items(self) -> None:
        self._check_keys(self.stack[::2])
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def make_dict(self) -> None:
        self._check_keys(self.stack[::2])
        pickle._Unpickler.load_dict(self)  # type: ignore[attr-defined]

    def _check_keys(self, keys: Sequence[Any]) -> None:
        """Python hashes a tuple of tuples without end until the stack of the thread is full."""
        if not all(isinstance(key, (str, int)) for key in keys):
            raise Refused("a key is neither text nor number")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES
    } | {
        pickle.BUILD[0]: set_attributes,
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_items,
        pickle.DICT[0]: make_dict,
    }


def loads(data: bytes, names: Names, *, errors: bool = False) -> Any:
    """Return the object of a pickle; raises Refused, and nothing else.

    :param names: what each name that may occur in it stands for, by module and name; to call one
        must do no harm, whatever the arguments
    :param errors: whether it may name Python's own exceptions
    """
    try:
        return Unpickler(data, names, errors=errors).load()
    except Refused:
        raise
    except Exception as exc:  # the bytes of a stranger may raise anything
        raise Refused(clean(f"{type(exc).__name__}: {exc}", 100)) from None


def check_size(data: Any) -> None:
    """Raise Refused for what would be big if it were written out, as in a message or in SQL.

    A list may hold the same one twice, which holds the same one twice, and so on.
    """
    _, nbytes = _measure(data, {}, 0)
    if nbytes > MAX_UNFOLDED_BYTES:
        raise Refused(f"it unfolds to {nbytes} bytes, at most {MAX_UNFOLDED_BYTES} are read")


def _measure(data: Any, known: dict[int, tuple[int, int]], level: int) -> tuple[int, int]:
    """Return the levels of lists in lists, and the bytes.

    :param known: these figures by the identity of a list
    :param level: at which the data are
    """
    if isinstance(data, (str, bytes)):
        return 0, OBJECT_BYTES + len(data)
    if isinstance(data, int):
        return 0, OBJECT_BYTES + data.bit_length() // 8
    if not isinstance(data, (tuple, list, dict)):
        return 0, OBJECT_BYTES
    if id(data) not in known:
        known[id(data)] = MAX_LEVELS, 0  # what holds itself has no end
        items = [*data, *data.values()] if isinstance(data, dict) else data
        below = [_measure(item, known, level + 1) for item in items if level < MAX_LEVELS]
        levels = 1 + max((levels for levels, _ in below), default=0)
        known[id(data)] = levels, OBJECT_BYTES + sum(nbytes for _, nbytes in below)
    levels, nbytes = known[id(data)]
    if level + levels > MAX_LEVELS:
        raise Refused(f"it has more than {MAX_LEVELS} levels")
    return levels, nbytes
