"""What an error of the engine says to a user: one line, the file, the remedy, whose fault it is.

The engine raises errors of workers again with their traceback in the text, explains parameters in
several lines, and opens files whose name it does not mention when something is wrong with them.
"""

from __future__ import annotations

import builtins
import codecs
import contextlib
import difflib
import errno
import linecache
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from oq_runtime.engine.jobtable import JobTable
from oq_runtime.errors import OqRuntimeError
from oq_runtime.text import clean

#: calculation modes that have sites of their own
HAZARD = ("classical", "disaggregation", "event_based", "preclassical", "scenario")
#: characters of an explanation of the engine that are shown
MOST_CHARACTERS = 1500
ROOM = "free space or set OQ_DATADIR to another directory"
#: what ends a write for want of room, and what to do about it
FULL = {
    os.strerror(errno.ENOSPC): ROOM,
    os.strerror(errno.EDQUOT): ROOM,
    os.strerror(errno.EFBIG): "raise the limit of the size of a file (ulimit -f)",
}
NOT_THERE = f"{os.strerror(errno.ENOENT)}|{os.strerror(errno.EACCES)}"
#: errors whose text alone says nothing: the engine met what nobody had thought of
UNFORESEEN = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NotImplementedError,
    RecursionError, StopIteration, TypeError, UnboundLocalError,
)  # fmt: skip
#: modules of the engine that read what a user has written
READERS = (
    "baselib/node.py",
    "commonlib/oqvalidation.py",
    "commonlib/readinput.py",
    "hazardlib/gsim_lt.py",
    "hazardlib/logictree.py",
    "hazardlib/lt.py",
    "hazardlib/nrml.py",
    "hazardlib/source_reader.py",
    "hazardlib/sourceconverter.py",
    "hazardlib/valid.py",
    "risklib/asset.py",
    "risklib/read_nrml.py",
    "risklib/reinsurance.py",
    "risklib/riskmodels.py",
)
#: errors of the engine that are raised for nothing else
OF_INPUT = ("DuplicatedID", "DuplicatedPoint", "InvalidFile", "SiteAssociationError")
#: what the engine says on purpose, after it has calculated, about what it was given
LATE = re.compile(
    "far from|maximum_distance|minimum_intensity|investigation time|max_sites_disagg|collect_rlzs"
    "|binning"
)
#: of a parameter of the engine that once was of help
IGNORED = (
    "ignore_encoding_errors = true leaves out such characters in engine 3.23, not in 3.25 and 3.26"
)
EXPORT = "set another directory in the job file or with --export-dir"
#: of the files that people edit
TEXTS = (".csv", ".ini", ".txt", ".xml")
#: what a file in a wide encoding begins with; the mark of UTF-32 begins with that of UTF-16
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
#: what begins a file that is taken for a table and is none
NO_TABLES = {
    b"PK\3\4": "is an archive or a spreadsheet, not text; save it as CSV (UTF-8, with commas)",
    b"\x1f\x8b": "is compressed, not text; unpack it",
    b"<!doctype html": "is a web page, not a table; get the file itself",
    b"<html": "is a web page, not a table; get the file itself",
    b"sep=": "begins with sep=, which only spreadsheets read; remove that line",
}
#: what begins a file that lies elsewhere, as a clone without Git LFS has it
POINTER = b"version https://git-lfs"
#: errors that may come of the encoding of a file. A worker's UnicodeDecodeError cannot be raised
#: again with a text, which is a TypeError
ENCODING = re.compile(
    "codec can't decode|function takes exactly 5 arguments|encoding specified in XML declaration"
    r"|not well-formed \(invalid token\)|syntax error"
)
#: of an XML file that says itself that it is not UTF-8, which the engine reads
DECLARED = re.compile(rb"""<\?xml[^>]*encoding=["'](?!utf-8)""", re.IGNORECASE)
#: of an XML file in which the names of others are looked for
MOST_BYTES = 4 << 20
#: a number among the columns of a table
NUMBER = re.compile(rb"(^|[,;\t])\s*[-+.]?\d")
FILE_NAME = re.compile(r"[^\s<>\"']+\.(?:csv|hdf5|xml)")
#: what the engine says for what a user has to know
REWORDED = (
    (r"(\S+ does not end with \S+)", r"\1 (a blank ends a file name here)"),
    (r"\[Errno \d+\] (.+?): '([^']+)'", r"\2: \1"),
    (
        r"<ImtWeight \{'weight': ([\d.e-]+).*?\}> in branchset (\S+)",
        r"gsim_logic_tree_file: the weights of branch set \2 add up to \1, not 1",
    ),
    (
        r"tmap\.risk_id \{(.+?)\} not in the CompositeRiskModel",
        r"the vulnerability or fragility files have no function for \1; add it, or name another "
        "for that taxonomy in a taxonomy_mapping_csv",
    ),
    (
        "(sites are far from all seismic sources included in the hazard model)",
        r"\1; look at their longitudes and latitudes, and at maximum_distance",
    ),
)
#: what begins a text that is values alone
VALUES = ("[", "{")
#: one that an error names: from the root on
PATH = re.compile(r"/[^\s'\"<>:;,()]+")
FRAME = re.compile(r'^  File "(.+)", line \d+, in (.+)\n(?:    (.*)\n)?', re.MULTILINE)


class Frame(NamedTuple):
    """A line of a traceback: source file, function, and the text of the line where it is known."""

    file: str
    function: str
    line: str


def frames(exc: BaseException) -> list[Frame]:
    """Return the traceback of an error, the worker's in its text included, innermost last."""
    found = [
        Frame(frame.filename, frame.name, linecache.getline(frame.filename, number).strip())
        for frame in traceback.extract_tb(exc.__traceback__)
        if (number := frame.lineno) is not None
    ]
    return found + [Frame(*(part or "" for part in m.groups())) for m in FRAME.finditer(str(exc))]


def explain(exc: BaseException) -> str:
    """Return the whole text of an error on one line, without the traceback of a worker in it."""
    text = str(exc).strip("\n")
    if found := list(FRAME.finditer(f"{text}\n")):  # the error itself follows the last frame
        text = re.sub(r"\A(?: {4}.*\n)+", "", text[found[-1].end() :])
    if isinstance(exc, OqRuntimeError):  # of a lost task: the engine puts a line before it
        text = text.rpartition(f"{type(exc).__name__}: ")[2]
    name = type(exc).__name__
    while text.startswith(f"{name}: "):
        text = text.removeprefix(f"{name}: ")
    said = " ".join(text.split())
    text = reworded(said)
    if "No such file" in text:
        text += " (folders are parted by / here)" if "\\" in text else similar(text)
    if (isinstance(exc, UNFORESEEN) and text == said) or not text or text.startswith(VALUES):
        text = f"{name}: {text}" if text else name
    if unforeseen(text) and (trace := in_engine(exc)):
        own = [frame for frame in trace if "/baselib/" not in frame.file]  # a library of its own
        path, function, line = (own or trace)[-1]
        text += f" ({function} in {path.rpartition('/openquake/')[2]}: {line})"
    return clean(text, MOST_CHARACTERS)


def reworded(text: str) -> str:
    """Return what the engine says in the words of a user."""
    for pattern, words in REWORDED:
        text = re.sub(pattern, words, text)
    return text


def other_sites(own: Path, results: Path, parent: int) -> str:
    """Say that a job has other sites than the one that it starts from; nothing where it has not.

    The engine takes them for the same, and fails, if it does, at some place later.

    :param own: the datastore of the job
    :param results: that of job ``parent``
    """
    import h5py  # which the others do not want: it is there where a job has run

    places = []
    with contextlib.suppress(Exception):  # one of them has none, or cannot be read
        there = map(h5py.File, h5py.h5f.get_obj_ids(types=h5py.h5f.OBJ_FILE))
        opened = {file.filename: file for file in there}  # to write, by the engine
        for path in map(str, (own, results)):
            file = opened.get(path) or h5py.File(path, "r", locking=False)
            places.append([file[f"sitecol/{axis}"][:].tolist() for axis in ("lon", "lat")])
    if len(places) < 2 or places[0] == places[1]:
        return ""
    ours, theirs = (len(lon) for lon, _ in places)
    return (
        f"; its sites ({ours}) are not those of job {parent} ({theirs}), from which it starts: "
        "give it the same sites, or none"
    )


def starting_elsewhere(table: JobTable, context: Any) -> str:
    """Say that a hazard calculation has other sites than the one that it starts from.

    :param context: the engine's, of the job
    """
    parent = str(context.params.get("hazard_calculation_id") or "")
    if not parent.isdigit() or context.params["calculation_mode"] not in HAZARD:
        return ""  # those of a risk calculation are the sites of its assets
    own, theirs = table.job(context.calc_id), table.job(int(parent))
    if own is None or theirs is None:
        return ""
    return other_sites(Path(own.path), Path(theirs.path), theirs.id)


def similar(text: str) -> str:
    """Name a file that is there beside one that a text says is not, and is called almost so."""
    for found in PATH.findall(text):
        path = Path(found)
        with contextlib.suppress(OSError):
            there = {name.lower(): name for name in os.listdir(path.parent)}
            near = difflib.get_close_matches(path.name.lower(), there, 1, 0.8)
            if near and there[near[0]] != path.name:
                return f" (there is {there[near[0]]})"
    return ""


def unforeseen(text: str) -> bool:
    """Whether a text begins with the name of an error of which it alone says nothing."""
    kind = getattr(builtins, text.partition(":")[0], None)
    return isinstance(kind, type) and issubclass(kind, UNFORESEEN)


def in_engine(exc: BaseException) -> list[Frame]:
    """Return the frames of an error that are the engine's, the innermost last."""
    return [frame for frame in frames(exc) if "/openquake/" in frame.file]


def no_room(exc: BaseException) -> str:
    """Say which device is full, if that is at the root of an error.

    HDF5 raises other errors while it cleans up after one.
    """
    for link in chain(exc):
        for reason, remedy in FULL.items():
            if reason in str(link):
                where = re.search(r"filename = '([^']+)'|: '([^']+)'$", str(link))
                name = f": {where.group(1) or where.group(2)}" if where else ""
                return clean(f"{reason}{name}; {remedy}")
    return ""


def chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those during whose handling it came."""
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def unseen(exc: BaseException, shared_dir: str) -> str:
    """Say which file a worker did not find or could not read although it is here, if that is so."""
    found = re.search(rf"({NOT_THERE}): '([^'\n]+)'", str(exc))
    # what this process did not find itself has a number, which the engine leaves out for workers
    if found is None or getattr(exc, "errno", None) or not os.access(found.group(2), os.R_OK):
        return ""
    reason, path = found.groups()
    remedy = f"keep the files of the job in shared_dir ({shared_dir or 'not set in openquake.cfg'})"
    if shared_dir and Path(path).resolve().is_relative_to(Path(shared_dir).resolve()):
        remedy = "let the user of the workers read it"
    return clean(f"{path} is on this machine, but a worker says: {reason}; {remedy}")


def of_user(exc: BaseException, inputs: Iterable[str], shared_dir: str) -> str:
    """Say what the user can do something about, if an error is about that.

    :param inputs: the files of the job
    """
    if found := no_room(exc) or unseen(exc, shared_dir):
        return found
    return input_text(exc, inputs) if of_input(exc) else ""


def of_input(exc: BaseException) -> bool:
    """Whether an error is about what the user gave, as far as its traceback tells.

    Then it comes from where the engine reads that, or the engine raised it on purpose: before it
    calculated, or with words of ``LATE``.
    """
    if isinstance(exc, (OqRuntimeError, MemoryError)) or no_room(exc):
        return False
    if type(exc).__name__ in OF_INPUT:
        return True
    trace = in_engine(exc)
    if any(frame.file.endswith(READERS) for frame in trace):
        return True
    if not trace or "/calculators/" not in trace[-1].file:
        return False
    early = any(frame.function == "pre_execute" for frame in trace)
    return trace[-1].line.startswith("raise ") and (early or bool(LATE.search(str(exc))))


def input_text(exc: BaseException, inputs: Iterable[str]) -> str:
    """Return what is wrong with the input of a job: in which file, and what to do.

    :param inputs: the files of the job
    """
    near = next(iter(found := open_in(exc)), "")
    if wrong := no_table(Path(near)) or encoding(exc, (*found, *inputs)):
        return wrong
    text = explain(exc)
    if unforeseen(text) and has_no_rows(Path(near)):
        return clean(f"{near} has a header and no rows")
    if near and Path(near).name not in text:
        return clean(f"{near}: {text}", MOST_CHARACTERS)
    return text


def encoding(exc: BaseException, inputs: Iterable[str]) -> str:
    """Say which file is not UTF-8, if an error is about that.

    :param inputs: the files that it may be
    """
    if ENCODING.search(str(exc)):
        for given in map(Path, inputs):
            for path in (given, *named_in(given)):
                if not (path.suffix in TEXTS and os.path.isfile(path)):
                    continue
                if wrong := no_text(path, path.read_bytes()):
                    return clean(wrong)
    return ""


def open_in(exc: BaseException) -> list[str]:
    """Return the files that the functions of a traceback were about, the innermost first."""
    found: dict[str, None] = {}
    walked: list[FrameType] = []
    for link in chain(exc):  # of an error in a source model the engine names the logic tree
        walked += [frame for frame, _ in traceback.walk_tb(link.__traceback__)]
    for frame in reversed(walked):
        if "/openquake/" not in frame.f_code.co_filename:
            continue
        for value in frame.f_locals.values():
            name = getattr(value, "name", value)
            if not isinstance(name, str) or not name.startswith("/"):
                continue
            if name.endswith(TEXTS) and os.path.isfile(name):
                found[name] = None
    return list(found)


def files(inputs: object) -> Iterator[str]:
    """Yield the paths in the ``inputs`` of a job, which are nested."""
    if isinstance(inputs, str):
        yield inputs
    elif isinstance(inputs, dict):
        yield from files(list(inputs.values()))
    elif isinstance(inputs, list | tuple):
        for one in inputs:
            yield from files(one)


def named_in(path: Path) -> Iterator[Path]:
    """Yield the files that a small XML file names, such as a logic tree those of its sources."""
    with contextlib.suppress(OSError):
        if path.suffix == ".xml" and path.is_file() and path.stat().st_size < MOST_BYTES:
            for name in dict.fromkeys(FILE_NAME.findall(path.read_text(errors="replace"))):
                yield path.parent / name


def no_file(inputs: Iterable[str]) -> str:
    """Say which input would be waited for without an end, such as a pipe; nothing: none would."""
    for path in map(Path, inputs):
        for one in (path, *named_in(path)):
            if os.path.exists(one) and not (os.path.isfile(one) or os.path.isdir(one)):
                return clean(f"{one} is not a file, but a pipe or device; give a file")
    return ""


def no_text(path: Path, data: bytes) -> str:
    """Say why the engine cannot read the text of a file; nothing when it can."""
    if data.startswith(POINTER):
        return f"{path} is a pointer of Git LFS; git lfs pull gets the file itself"
    # a wide encoding has zeros between the letters of this line
    declared = path.suffix == ".xml" and DECLARED.search(data[:400].replace(b"\0", b""))
    return "" if declared else not_utf8(path, data)


def not_utf8(path: Path, data: bytes) -> str:
    """Say where a text file is not UTF-8 and how to convert it; nothing when it is."""
    if wide := next((name for mark, name in MARKS.items() if data.startswith(mark)), ""):
        return f"{path} is {wide}; save it as UTF-8, e.g. iconv -f {wide} -t UTF-8 {path.name}"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        remedy = f"save it as UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        if path.suffix == ".csv":
            remedy += f" ({IGNORED})"
        return f"{path} is not UTF-8 at byte {exc.start} (line {line}); {remedy}"
    if (zero := data.find(0)) >= 0:  # of UTF-16 without a mark, or where a disk lost something
        line = data.count(b"\n", 0, zero) + 1
        return f"{path} is not UTF-8: it has a zero at byte {zero} (line {line}); save it as UTF-8"
    return ""


def no_table(path: Path) -> str:
    """Say why a CSV file, about which there is an error, is none; nothing when it is one.

    Of such a file the engine says which columns are missing, or that something is no number.
    """
    if path.suffix != ".csv":
        return ""
    data = path.read_bytes()
    begin = data[:80].removeprefix(codecs.BOM_UTF8).lower()
    for mark, what in NO_TABLES.items():
        if begin.startswith(mark.lower()):
            return clean(f"{path} {what}")
    if not data.strip():
        return clean(f"{path} is empty")
    head = data.partition(b"\n")[0]
    for mark, what in ((b";", "semicolons"), (b"\t", "tabs")):
        if mark in head and b"," not in head:
            return clean(f"{path} has columns between {what}; save it with commas")
    return clean(no_text(path, data))


def has_no_rows(path: Path) -> bool:
    """Whether a table has nothing but names of columns."""
    if path.suffix != ".csv":
        return False
    lines = [line for line in path.read_bytes().splitlines() if line.strip() and line[:1] != b"#"]
    return len(lines) == 1 and not NUMBER.search(lines[0])


def unknown(names: list[str], known: Iterable[str]) -> str:
    """Say which parameters are unknown, each with the nearest known name where there is one."""
    choices = [name for name in known if not name.startswith(("_", "is_valid_"))]
    told = []
    for name in sorted(names):
        near = difflib.get_close_matches(name, choices, 1)
        told.append(f"{clean(name)} (did you mean {near[0]}?)" if near else clean(name))
    plural = "s" if len(told) > 1 else ""
    return f"unknown parameter{plural} {', '.join(told)}; correct or remove"
