"""Pickles that no client of the engine sends: programs, bombs, and bytes that are no pickle."""

from __future__ import annotations

import functools
import importlib
import operator
import os
import pickle
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call: tuple[Any, ...] = function, args

    def __reduce__(self) -> Any:
        return self.call


class Sets(Calls):
    """The same, with a state that is set afterwards."""

    def __init__(self, function: Any, args: tuple[Any, ...], state: Any) -> None:
        self.call = function, args, state


class Named:
    """Pickles as a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


def programs(path: str) -> Iterator[tuple[str, Any]]:
    """Yield objects that make the file when they are unpickled, or reach for what could do it."""
    touch = f"touch {path}"
    yield "os.system", Calls(os.system, touch)
    yield "eval", Calls(eval, f"open({path!r}, 'w')")
    yield "exec", Calls(exec, f"open({path!r}, 'w')")
    yield "open", Calls(open, path, "w")
    yield "subprocess", Calls(subprocess.call, ["touch", path])
    yield "import", Calls(importlib.import_module, "antigravity")
    yield "getattr", Calls(getattr, Calls(importlib.import_module, "os"), "system")
    yield "partial", Calls(functools.partial, os.system, touch)
    yield "partial called", Calls(Calls(functools.partial, os.system, touch))
    yield "map", Calls(list, Calls(map, os.system, [touch]))
    yield "attrgetter", Calls(operator.attrgetter, "__class__.__base__")
    yield "methodcaller", Calls(operator.methodcaller, "__subclasses__")
    yield "numpy objects", numpy.array([Calls(os.system, touch)], object)
    yield "numpy array", numpy.arange(3)
    yield "numpy scalar", numpy.float64(1)
    yield "numpy dtype", numpy.dtype("O")
    yield "set", {1, 2}
    yield "frozenset", frozenset([1, 2])
    yield "bytearray", bytearray(b"abc")
    yield "type", type("", (), {}).__base__
    yield "class", os.stat_result
    yield "error", KeyError("what only a server sends")
    yield "state", Sets(dict, (), {"a": 1})


def programs_in_messages(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield them by all protocols, in the places of a message where clients have their own."""
    for name, found in programs(path):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            for place, command in {
                "alone": found,
                "as action": (found, 1),
                "as argument": ("get_job", found),
                "deep in one": ("update_job", 1, {"status": [("a", [found])]}),
            }.items():
                try:
                    data = pickle.dumps(command, protocol)
                except (pickle.PicklingError, TypeError):  # not by this protocol
                    continue
                yield f"{name} {place}, protocol {protocol}", data


def text(words: str) -> bytes:
    return b"\x8c" + bytes([len(words)]) + words.encode()


def written_by_hand(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield programs in instructions that Python itself does not write."""
    touch = f"touch {path}"
    yield "GLOBAL", b"cos\nsystem\n(V" + touch.encode() + b"\ntR."
    yield "INST", b"(V" + touch.encode() + b"\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nV" + touch.encode() + b"\no."
    yield "NEWOBJ_EX", b"\x80\x04cos\nsystem\n)}\x92."
    yield "EXT1", b"\x80\x04\x82\x01)R."
    yield "PERSID", b"Pos.system\n."
    yield "BINPERSID", b"\x80\x04" + text("os") + b"Q."
    yield "NEXT_BUFFER", b"\x80\x05\x97."
    for module, name in [
        ("datetime", "sys.modules"),
        ("datetime", "datetime.__class__.__base__"),
        ("datetime", "datetime.fromtimestamp"),
        ("openquake.baselib", "os.system"),
        ("openquake.baselib", "DotDict.__init__.__globals__"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("__main__", "__builtins__"),
    ]:
        yield f"{module}:{name}", b"\x80\x04" + text(module) + text(name) + b"\x93."
    cls = b"\x80\x04" + text("openquake.baselib") + text("DotDict") + b"\x93"
    yield "state of a class", cls + b"}" + text("items") + b"Nsb."
    yield "slots of a class", cls + b"N}" + text("items") + b"Ns\x86b."
    yield "list as class", b"\x80\x04](K\x01e)\x81."


def bombs() -> Iterator[tuple[str, bytes]]:
    """Yield small pickles of big things, and those on which a machine of C breaks."""
    start, action = b"\x80\x04(", text("log")
    yield "memo", start + b"N" + b"r\xff\xff\xff\x7ft."
    yield "memo by text", start + b"N" + b"p999999999999\n0t."
    yield "memo without", start + action + b"h\x07t."
    yield "memo of all", start + b"N" + b"\x94" * 100_000 + b"t."
    yield "long bytes", start + action + b"\x8e" + struct.pack("<Q", 1 << 40) + b"t."
    yield "long text", start + action + b"\x8d" + struct.pack("<Q", 1 << 62) + b"t."
    yield "long number", start + action + b"\x8b" + struct.pack("<i", 1 << 30) + b"t."
    yield "long frame", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b")."
    yield "negative number", start + action + b"\x8b" + struct.pack("<i", -5) + b"t."
    yield "number in text", start + action + b"I" + b"9" * 1_000_000 + b"\nt."
    for levels in (20, 10_000, 100_000):
        yield f"{levels} tuples", start + action + b")" + b"\x85" * levels + b"t."
        yield f"{levels} lists", start + action + b"]" * levels + b"a" * (levels - 1) + b"t."
        yield f"{levels} marks", b"\x80\x04" + b"(" * levels + b"t."
        key = b"}" + b")" + b"\x85" * levels
        yield f"{levels} tuples as a key", start + action + key + b"K\x01st."
        yield f"{levels} tuples as one of the keys", start + action + b"(" + key[1:] + b"K\x01dt."
        section = text("openquake.baselib") + text("DotDict") + b"\x93"
        pairs = b"](" + key[1:] + b"K\x01\x86ea\x85R"
        yield f"{levels} tuples as a key of a call", start + action + section + pairs + b"t."
    yield "a million tuples as a key", start + action + b"})" + b"\x85" * 1_000_000 + b"K\x01st."
    twice = b"](" + text("abcdefgh") * 2 + b"e"
    for number in range(60):
        twice += b"\x94](h" + bytes([number]) + b"h" + bytes([number]) + b"e"
    yield "doubled 60 times", start + action + twice + b"t."
    few = b"](" + b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"\x94"
    yield "text a thousand times", start + action + few + b"h\x00" * 1000 + b"et."
    yield "list in itself", start + action + b"]\x94h\x00at."


def rubbish() -> Iterator[tuple[str, bytes]]:
    """Yield bytes that are no pickle, and pickles of no command."""
    yield "nothing", b""
    yield "zero", b"\0"
    yield "end", b"."
    yield "protocol 9", b"\x80\x09)."
    yield "no end", b"\x80\x04)"
    yield "half", pickle.dumps(("get_job", 1))[:-3]
    yield "request of the web", b"GET / HTTP/1.1\r\n\r\n"
    for found in (None, 1, "get_job", [], (), (1,), (None, 1), ["get_job", 1], {"get_job": 1}):
        yield f"{found!r}", pickle.dumps(found)


def attacks(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield all, each with a name.

    :param path: of a file that is there only if one of them has worked
    """
    yield from programs_in_messages(path)
    yield from written_by_hand(path)
    yield from bombs()
    yield from rubbish()
