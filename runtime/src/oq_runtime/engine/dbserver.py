"""The DbServer and its clients: neither runs what the other one sends.

The engine's DbServer unpickles whatever reaches its port, and its clients whatever they are
answered. Here both read data only; the server carries out the engine's own actions and SQL, and
nothing else; and SQL opens no other file. What it cannot know is who sent something. At its start
it gives the jobs of the host whose processes are gone their last status.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import signal
import socket
import sqlite3
import time
import traceback
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from types import ModuleType
from typing import Any

import zmq

from oq_runtime.descriptors import raise_limit
from oq_runtime.engine.jobtable import JobTable
from oq_runtime.engine.unpickler import Names, Refused, Section, check_size, loads
from oq_runtime.node.memory import Resident
from oq_runtime.wire import bombs, transport
from oq_runtime.wire.bombs import Bombs
from oq_runtime.wire.strangers import Strangers

#: bytes of a message to the server; those of the engine have some thousand, a long text more
MAX_BYTES = 4 << 20
#: bytes of a part of one beyond which the connection is closed, without an answer
MAX_PART_BYTES = 64 << 20
#: what the engine's client asks the server to do with the workers: before a job it starts them
WORKERS_ACTION = "workers_start"

#: milliseconds in which answers may still go out when the server ends
LINGER_MS = 1000
#: seconds after which a thread of the server notices that it is to end
POLL_SECS = 1
#: seconds that a query may take, bytes that the server may hold meanwhile, and the steps of SQLite
#: between two looks at both
QUERY_SECS, MOST_MEMORY_BYTES, STEPS = 60, 1 << 30, 100_000
#: how the WebUI's tables of accounts and sessions begin; it opens the file itself
ACCOUNTS = ("auth_", "django_", "user_profile_")
#: steps of SQL that open another file, or leave behind what acts later, in the name of the WebUI
REFUSED_STEPS = (sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_ATTACH)
#: settings of SQL that name directories, or let the database be damaged
REFUSED_PRAGMAS = ("temp_store_directory", "data_store_directory", "writable_schema")

#: what clients send besides plain data, from 3.23 to 3.26: times, and in 3.23 a section of settings
REQUESTS: Names = {
    ("datetime", "datetime"): datetime,
    ("datetime", "timedelta"): timedelta,
    ("datetime", "timezone"): timezone,
    ("openquake.baselib", "DotDict"): Section,
}

log = logging.getLogger("oq_runtime")


class Record:
    """Whatever attributes the server gives it: a result, or a part of one."""


class Value:
    """What a result holds, which has been read already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def unpickle(self) -> Any:
        return self.value


def read_answer(data: bytes) -> Any:
    """Return what the server has answered, as the engine's client expects it; raises Refused."""
    from openquake.baselib import parallel
    from openquake.commonlib import dbapi

    names = {
        ("datetime", "datetime"): datetime,
        ("openquake.baselib.parallel", "Result"): Record,
        ("openquake.baselib.parallel", "Pickled"): Record,
        ("openquake.baselib.performance", "Monitor"): Record,
    } | {
        (cls.__module__, cls.__name__): cls
        for cls in (dbapi.Row, dbapi.Table, *errors_of(dbapi), *errors_of(sqlite3))
    }
    answer = loads(data, names, errors=True)
    if not isinstance(answer, Record):
        return answer
    try:
        pickled = answer.pik  # type: ignore[attr-defined]
        inner = parallel.decompress(pickled.pik) if pickled.compressed else pickled.pik
        result = parallel.Result.__new__(parallel.Result)
        result.tb_str = str(answer.tb_str)  # type: ignore[attr-defined]
        result.pik = Value(loads(inner, names, errors=True))
    except (AttributeError, TypeError) as exc:
        raise Refused(f"a result without its parts: {exc}") from None
    return result


def errors_of(module: ModuleType) -> Iterator[type[Exception]]:
    """Yield the exceptions of a module's own."""
    for found in vars(module).values():
        own = getattr(found, "__module__", "") == module.__name__
        if own and isinstance(found, type) and issubclass(found, Exception):
            yield found


class Asking(zmq.Socket[Any]):
    """A client's socket."""

    def recv_pyobj(self, flags: int = 0) -> Any:
        data = self.recv(flags)
        try:
            return read_answer(data)
        except Refused as exc:
            server = self.getsockopt_string(zmq.LAST_ENDPOINT)
            raise Refused(f"what answers at {server} is no DbServer of the engine: {exc}") from None


class Context(zmq.Context[Any]):
    """Makes the engine's sockets."""

    def socket(self, socket_type: int, *args: Any, **kwargs: Any) -> Any:
        if socket_type == zmq.REQ:
            return super().socket(socket_type, socket_class=Asking)
        made = super().socket(socket_type, *args, **kwargs)
        made.linger = LINGER_MS
        if socket_type == zmq.ROUTER:
            made.maxmsgsize = MAX_PART_BYTES
            Strangers(made, keys=False)  # clients connect for one question
        return made


def proxy(frontend: Any, backend: Any) -> None:
    """Pass messages on, both ways, until a signal raises an exception.

    That of libzmq misses a signal that comes between two of its waits, and never ends then. To be
    called by the main thread, which is the one that gets signals.
    """
    woken, waker = socket.socketpair()
    with woken, waker:
        waker.setblocking(False)
        poller = zmq.Poller()
        for source in (frontend, backend, woken):
            poller.register(source, zmq.POLLIN)
        before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            while True:
                for source, _ in poller.poll():
                    if source == woken.fileno():
                        # the handler's exception is lost where it falls into a destructor
                        if signal.SIGINT in woken.recv(4096):
                            raise KeyboardInterrupt
                    elif source is backend:
                        frontend.send_multipart(backend.recv_multipart(copy=False), copy=False)
                    elif frames := transport.receive_frames(frontend):
                        backend.send_multipart(frames, copy=False)
        finally:
            signal.set_wakeup_fd(before)


def install_zeromq(zeromq: Any) -> None:
    """Make the engine's sockets ours, in clients and server."""
    zeromq.context = Context()


class Patience:
    """Ends a query that takes too long, or whose rows fill the memory; for one thread.

    SQLite calls it as a progress handler, and ends the query where it returns True.
    """

    def __init__(self) -> None:
        self.until_s = math.inf
        self.memory = Resident(os.getpid())

    def begin(self) -> None:
        """A query is to come."""
        self.until_s = time.monotonic() + QUERY_SECS

    def __call__(self) -> bool:
        return time.monotonic() > self.until_s or self.memory.own_nbytes > MOST_MEMORY_BYTES


def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Decide about a step of SQL.

    It opens no other file, which VACUUM INTO and ATTACH would make, and does not touch the accounts
    of the WebUI: who reads a session of an administrator is that administrator.

    :param action: a code of ``sqlite3``
    :param first: the file, the table, or the name of the setting
    :param second: the column, the value, or the table
    """
    if any(name and name.lower().startswith(ACCOUNTS) for name in (first, second)):
        return sqlite3.SQLITE_DENY
    if action in REFUSED_STEPS:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_PRAGMA and str(first).lower() in REFUSED_PRAGMAS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def read_command(frames: list[bytes]) -> tuple[Any, ...]:
    """Return action and arguments of a message to the server; raises Refused."""
    nbytes = sum(map(len, frames))
    if len(frames) != 1 or nbytes > MAX_BYTES:
        raise Refused(f"{len(frames)} parts, {nbytes} bytes; one part of {MAX_BYTES} is read")
    command = loads(frames[0], REQUESTS)
    if not isinstance(command, tuple) or not command or not isinstance(command[0], str):
        raise Refused("it is no tuple of an action and its arguments")
    check_size(command)
    return command


def portable(exc: Exception) -> Exception:
    """Return an exception that clients read: one of those in ``read_answer``."""
    module = type(exc).__module__
    if module in ("builtins", "sqlite3", "openquake.commonlib.dbapi"):
        return exc
    return RuntimeError(f"{type(exc).__name__}: {exc}")


def install_dbserver(dbserver: Any) -> None:
    """Replace the loop of the engine's DbServer."""
    actions, parallel, workerpool = dbserver.actions, dbserver.p, dbserver.w

    def perform(self: Any, action: str, *args: Any) -> Any:
        """Return the value of an action or a query."""
        if action == "getpid":
            return self.pid
        if action == WORKERS_ACTION:
            return workerpool.WorkerMaster(*args).start()
        known = getattr(actions, action, None)
        if inspect.isfunction(known) and known.__module__ == actions.__name__:
            value = known(self.db, *args)
        elif action.upper() == "VACUUM":  # it copies all tables inside the file
            self.db.conn.set_authorizer(None)
            try:
                value = self.db(action, *args)
            finally:
                self.db.conn.set_authorizer(authorize)
        else:
            value = self.db(action, *args)
        return value.lastrowid if isinstance(value, sqlite3.Cursor) else value

    def answer(self: Any, frames: list[bytes]) -> Any:
        """Return what the client gets: for the server's own two actions the bare value."""
        error: Exception
        try:
            action, *args = read_command(frames)
            value = perform(self, action, *args)
            bare = action in (WORKERS_ACTION, "getpid")
            return value if bare else parallel.Result(value, parallel.dummy_mon)
        except Refused as exc:
            log.warning("refused a message: %s", exc)
            error, trace = ValueError(f"the DbServer has refused this message: {exc}"), "refused\n"
        except Exception as exc:
            error, trace = portable(exc), "".join(traceback.format_tb(exc.__traceback__))
        return parallel.Result(error, parallel.dummy_mon, trace)

    def dworker(self: Any, sock: Any) -> None:
        self.db.conn.set_authorizer(authorize)
        patience = Patience()
        self.db.conn.set_progress_handler(patience, STEPS)
        # not that of ``sock``, which the main thread would close at the end, in the midst of a poll
        with dbserver.z.connect(self.backend, zmq.REP) as own:
            while self.serving:  # not ``sock.running``, which a thread that begins late would set
                if own.poll(POLL_SECS * 1000):
                    frames = own.recv_multipart()
                    patience.begin()
                    own.send_pyobj(answer(self, frames))

    engines_start = dbserver.DbServer.start

    def start(self: Any) -> None:
        """Serve, once the jobs that went down with the machine have their last status."""
        raise_limit()
        Bombs(bombs.MOST_BYTES)
        for job in JobTable(lambda *command: perform(self, *command)).mend():
            log.warning("job %d has failed: its process is gone", job.id)
        zmq.proxy = proxy  # type: ignore[assignment]  # which the engine calls
        self.serving = True
        try:
            engines_start(self)
        finally:
            self.serving = False

    dbserver.DbServer.dworker = dworker
    dbserver.DbServer.start = start
