"""One process per node imports the engine once, and forks the workers from it.

    agent --Fork(worker), Kill(worker)--> fork server --Exited(worker)--> agent
                                               | fork
                                            workers

Why: a process that imports the engine by itself takes 3 s of CPU and 380 MiB of memory that it
shares with nobody; a forked one 16 ms and 1 MiB (engine 3.26.2, one core). On a node of 64 slots
that is the start of a job, 24 GiB, and what the death of a worker costs. The agent itself never
forks: it has ZeroMQ sockets, which do not survive that (libzmq #3223, pyzmq #1049). The fork server
and the workers have none, and a single thread; it lives while workers are wanted, so that the next
job finds the settings of its own time. When it dies the kernel ends its workers.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, NoReturn

import msgspec

from oq_runtime import cgroups, config, processes
from oq_runtime.files import compiling
from oq_runtime.node import worker
from oq_runtime.node.channel import read

#: of one message
MAX_BYTES = 4096
#: of a fork or a new file, where a limit is reached
LIMITED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
#: seconds for killed workers to be gone: more only where the kernel waits for a device
END_SECS = 1.0


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Descriptors for the worker's output and of its channel come with it."""

    worker: int


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """The worker is to be killed."""

    worker: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """The end of a worker process, as its parent has seen it.

    :param code: exit code, negative for a signal
    :param peak_bytes: the most memory that the worker has had
    :param refused: why there never was a process
    """

    worker: int
    pid: int
    code: int
    peak_bytes: int = 0
    refused: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Fork | Kill).decode
decode_exited = msgspec.msgpack.Decoder(Exited).decode


def refusal(exc: OSError) -> str:
    """Say what stands in the way of another process: a limit, or that its program is not there."""
    if exc.filename and exc.errno not in LIMITED:
        return f"no process for a worker: {exc.filename}: {exc.strerror}; is it mounted there?"
    return (
        f"no process for a worker: {exc.strerror}; the limits are {cgroups.process_limit()}: "
        "raise them, or use fewer cores"
    )


def end_group(worker: int) -> None:
    """Kill a worker and all that its tasks have started and left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)


class ForkServer:
    """The agent's end: starts the process, passes orders on, hears of ends.

    Orders never wait: those that the process does not take yet are sent by ``flush``.

    :param log: file for what the process prints while it imports the engine
    :param args: of ``worker.work``, without the channel
    :param env: environment of the workers
    """

    def __init__(self, log: IO[bytes], args: Sequence[str], env: Mapping[str, str]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.setblocking(False)
        self.orders: deque[tuple[bytes, tuple[IO[bytes] | socket.socket, ...]]] = deque()
        with theirs:
            self.process = subprocess.Popen(
                processes.python(__name__, str(theirs.fileno()), str(os.getpid()), *args),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
            )

    def fileno(self) -> int:
        """Readable when there are ends to be heard of, or the process has ended itself."""
        return self.channel.fileno()

    def fork(self, worker: int, log: IO[bytes], channel: socket.socket) -> None:
        """Have a worker made with this log and its end of a channel, which are closed here."""
        self.orders.append((encode(Fork(worker)), (log, channel)))
        self.flush()

    def kill(self, worker: int) -> None:
        """Have a worker killed, now or as soon as there is one; nothing when it has ended."""
        self.orders.append((encode(Kill(worker)), ()))
        self.flush()

    def flush(self) -> None:
        while self.orders:
            data, files = self.orders[0]
            try:
                socket.send_fds(self.channel, [data], [file.fileno() for file in files])
            except ConnectionError:
                pass  # its end is heard, and is that of all its workers
            except OSError as exc:
                # full, or as many descriptors are on their way as the user may have open
                if exc.errno in (errno.EAGAIN, errno.ETOOMANYREFS):
                    return
                raise
            for file in files:
                file.close()
            self.orders.popleft()

    def hear(self) -> Exited | None:
        """Return the next end of a worker, None when there is none to be read.

        Raises EOFError when the process has ended.
        """
        data = read(self.channel, MAX_BYTES)
        return None if data is None else decode_exited(data)

    def close(self, workers: Sequence[int] = ()) -> int:
        """End the process and its workers, of which these are the pids; return its exit code.

        Takes END_SECS at most, whatever becomes of the workers.
        """
        ends = set()
        with contextlib.suppress(OSError):  # too many are open: then it is not waited for them
            ends = {end for pid in workers if (end := processes.pidfd(pid)) is not None}
        self.channel.close()
        for _, files in self.orders:
            for file in files:
                file.close()
        for pid in workers:
            end_group(pid)  # of which nobody hears any more when the process has gone
        self.process.kill()
        code = self.process.wait()
        poll = select.poll()
        for end in ends:
            poll.register(end, select.POLLIN)
        deadline_s = time.monotonic() + END_SECS  # for all together: the watchdog waits as well
        while ends and (left_s := deadline_s - time.monotonic()) > 0:
            for end, _ in poll.poll(left_s * 1000):
                poll.unregister(end)
                ends.remove(end)
                os.close(end)
        for end in ends:
            os.close(end)
        return code


class Children:
    """The fork server's end.

    :param channel: to the agent
    :param work: what a worker does, given the descriptor of its channel
    """

    def __init__(self, channel: socket.socket, work: Callable[[int], None]) -> None:
        self.channel = channel
        self.work = work
        self.pids: dict[int, int] = {}
        self.by_pidfd: dict[int, int] = {}
        self.poll = select.poll()
        self.poll.register(channel, select.POLLIN)

    def serve(self) -> None:
        """Return when the agent closes the channel."""
        while True:
            for descriptor, _ in self.poll.poll():
                if descriptor in self.by_pidfd:
                    self._reap(descriptor)
                elif not self._order():
                    return

    def _order(self) -> bool:
        flags = socket.MSG_CMSG_CLOEXEC
        data, files, _, _ = socket.recv_fds(self.channel, MAX_BYTES, 2, flags)
        if not data:
            return False
        order = decode_order(data)
        if isinstance(order, Fork):
            self._fork(order.worker, *files)
            for file in files:
                os.close(file)
        elif order.worker in self.pids:
            os.kill(self.pids[order.worker], signal.SIGKILL)  # not reaped yet, so it is this one
        return True

    def _fork(self, number: int, log: int, channel: int) -> None:
        try:
            pid = os.fork()
        except OSError as exc:
            self.channel.send(encode(Exited(number, 0, 1, refused=refusal(exc))))
            return
        if not pid:
            self._become(log, channel)
        self.pids[number] = pid
        self.by_pidfd[descriptor := os.pidfd_open(pid)] = number
        self.poll.register(descriptor, select.POLLIN)

    def _become(self, log: int, channel: int) -> NoReturn:
        """The life of a worker, up to the end of its process."""
        code = 1
        try:
            parent = os.getppid()
            processes.die_with_parent()
            os.setsid()  # what a task starts is of the worker's group, and ends with it
            for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
                os.dup2(log, descriptor)
            self.channel.close()
            for descriptor in (log, *self.by_pidfd):
                os.close(descriptor)
            if parent == os.getppid():
                self.work(channel)
            code = 0
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _reap(self, descriptor: int) -> None:
        self.poll.unregister(descriptor)
        os.close(descriptor)
        number = self.by_pidfd.pop(descriptor)
        end_group(self.pids[number])  # its number stays its own until it is waited for
        pid, status, used = os.wait4(self.pids.pop(number), 0)
        code = os.waitstatus_to_exitcode(status)
        # ru_maxrss is in KiB, see getrusage(2)
        self.channel.send(encode(Exited(number, pid, code, used.ru_maxrss * 1024)))


def preload() -> None:
    """Import what the workers are going to need; what cannot be imported fails in the task."""
    with compiling.once():
        worker.prepare()
        for module in config.read_preload():
            try:
                importlib.import_module(module)
            except Exception:
                traceback.print_exc()
    gc.collect()
    gc.freeze()  # what is here stays, and the workers' collectors need not write to it


def main() -> None:
    channel, agent, *args = sys.argv[1:]
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes.die_with_parent()
    if os.getppid() != int(agent):
        sys.exit("the agent has ended")
    preload()
    with socket.socket(fileno=int(channel)) as ours:
        Children(ours, lambda end: worker.work(end, *args)).serve()


if __name__ == "__main__":
    main()
