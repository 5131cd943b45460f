"""Start and end a session: a broker and a private agent, children of nobody, in a 0700 directory.

They are started by a short-lived process of this module and so are adopted by init: the engine
(3.26 and later) reaps and misreads every child that it has. Both end with the owner process. The
directory's file ``lock`` is locked as long as one of them lives, see flock(2), and the next start
removes the directories of which none lives.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from oq_runtime import descriptors, logind, processes
from oq_runtime.config import Config
from oq_runtime.errors import ConfigError, OqRuntimeError
from oq_runtime.files import crashes, places, private
from oq_runtime.priority import Priority
from oq_runtime.wire import security, strangers

log = logging.getLogger(__name__)

#: seconds for the broker to be there, which takes one, on a machine that has much else to do
START_SECS = 90.0
#: seconds for all of the start: a file server that is away would hold it up for ever
ANSWER_SECS = START_SECS + 10.0
#: seconds that broker and agent have to end by themselves
STOP_SECS = 2.5
#: of the names of session directories
PREFIX = "oq-run-"
#: in the environment of all that a session starts: its directory
MARK = "OQ_RUNTIME_OF"
#: bytes of a socket's path, see unix(7)
SOCKET_PATH_BYTES = 107


def start(config: Config, owner: int, priority: Priority = Priority.NORMAL) -> Path:
    """Start broker and agent for ``owner`` (a pid) and return the session's directory.

    With a cluster there is only the broker, and ``priority`` says what the job counts for there.
    Raises ConfigError as ``check`` does, and OqRuntimeError when the temporary directory is full or
    not writable.
    """
    check(config)
    slots = config.cores if config.cluster is None else 0
    command = processes.python("oq_runtime.session.launch", str(owner), str(slots))
    # not run(): inside an engine whose SIGCHLD handler reaps first, the exit code may be lost
    process = subprocess.Popen(
        [*command, str(config.window_bytes), config.limits.as_text(), config.log_level, priority],
        stdin=subprocess.DEVNULL,  # it may be closed here, and a lock must not get its number
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=ANSWER_SECS)
    except subprocess.TimeoutExpired:
        process.kill()  # it need not end: the kernel does not kill what waits for a file server
        temporary = os.environ.get("TMPDIR") or tempfile.gettempdir()
        raise OqRuntimeError(
            f"the session could not be started in {ANSWER_SECS:g} s: this machine has too much to "
            f"do, or the file server of {temporary} or of Python is away"
        ) from None
    try:
        return Path(json.loads(out)["directory"])
    except ValueError:
        text = err.decode(errors="replace").strip() or "no message"
        if len(lines := text.splitlines()) > 1:
            log.error(text)
        raise OqRuntimeError(f"the session could not be started: {lines[-1]}") from None


def check(config: Config) -> None:
    """Raise ConfigError for a secret that is weak or not this user's to read, and a low limit."""
    if config.cluster is None:
        descriptors.check(config.cores)
    else:
        security.read_secret(config.cluster.authkey)
        descriptors.check(len(config.cluster.hosts), strangers.MOST)


def pids(directory: Path) -> list[int]:
    """Return the processes of a session, broker and agent; none if it is only being started."""
    with contextlib.suppress(OSError, ValueError):
        return list(json.loads((directory / "pids").read_text()))
    return []


def stop(directory: Path) -> None:
    """End the broker and the agent of a session and remove its directory.

    :param directory: spelt as its processes know it
    """
    ends = [end for pid in pids(directory) if (end := _end_of(pid, directory)) is not None]
    left = selectors.DefaultSelector()
    for end in ends:
        left.register(end, selectors.EVENT_READ)
    for number, limit_s in ((signal.SIGTERM, STOP_SECS), (signal.SIGKILL, 0.0)):
        for key in left.get_map().values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(key.fd, number)
        deadline_s = time.monotonic() + limit_s
        while left.get_map() and time.monotonic() < deadline_s:
            for key, _ in left.select(0.1):
                left.unregister(key.fd)
    for end in ends:
        os.close(end)
    _end_strays(directory)
    private.remove(directory)


def _end_strays(directory: Path) -> None:
    """End what tasks have started, where a SIGKILL has kept the agent from it."""
    mark = os.fsencode(f"{MARK}={directory}")
    for environ in Path("/proc").glob("[0-9]*/environ"):
        if (end := processes.pidfd(int(environ.parent.name))) is None:
            continue
        with contextlib.suppress(OSError):  # somebody else's, or gone
            if mark in environ.read_bytes().split(b"\0"):
                signal.pidfd_send_signal(end, signal.SIGKILL)
        os.close(end)


def _end_of(pid: int, directory: Path) -> int | None:
    """Return a descriptor of a process of a session; None where the number is another one's now."""
    end = processes.pidfd(pid)
    found = processes.look(pid)
    if end is not None and not (found and str(directory) in found.command):
        os.close(end)
        return None
    return end


def lock(directory: Path) -> int:
    """Lock a new session's directory; return the descriptor, which its processes are to inherit.

    A pid could not tell whether one is left: it may be another process's by now, and a process that
    has just been started has no command line by which to know it.
    """
    new = directory / "lock.new"  # until it is locked: one without a lock is dead, or very young
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks; then it stays empty
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, os.fsencode(socket.gethostname()))
    new.rename(directory / "lock")
    return descriptor


def sweep(temporary: Path) -> None:
    """Remove what sessions of this user have left in a directory when all their processes died.

    One process that is left would have removed it; a power cut or a SIGKILL to all leaves none.

    :param temporary: where sessions have their directories; other hosts may have theirs there too,
        and their locks need not be seen here
    """
    for directory in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is locked, or somebody else removes it
            if not private.is_own(directory):
                continue
            if not (directory / "lock").exists():
                # killed in its first moment; else what cleans up by age has taken the lock of one
                # that may be alive
                if {*os.listdir(directory)} <= {"lock.new"}:
                    private.remove_stale(directory)
                continue
            with (directory / "lock").open("r+b") as file:
                if file.read() != os.fsencode(socket.gethostname()):
                    continue  # another host's, or of a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            private.remove(directory)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("owner", type=int)
    parser.add_argument("slots", type=int, help="of the private agent; 0: none, use the cluster")
    parser.add_argument("window_bytes", type=int)
    parser.add_argument("limits")
    parser.add_argument("log_level")
    parser.add_argument("priority")
    args = parser.parse_args()
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    sweep(temporary)
    crashes.prune(temporary)
    try:
        directory = private.make(temporary, PREFIX)
    except ConfigError as exc:
        sys.exit(str(exc))
    try:
        locked = lock(directory)
        (directory / "pids").write_bytes(b" " * 65536)  # before there are processes
    except OSError as exc:
        shutil.rmtree(directory)
        sys.exit(str(places.refusal(temporary, exc, private.REMEDY)))
    if len(os.fsencode(directory / "control")) > SOCKET_PATH_BYTES:
        shutil.rmtree(directory)
        sys.exit(f"TMPDIR {directory.parent} is too long for sockets; set a shorter TMPDIR")
    try:
        stays = not logind.removes_memory()
        private.add_memory(directory, private.memory_name(directory), stays=stays)
    except ConfigError as exc:
        private.remove(directory)
        sys.exit(str(exc))
    control = f"ipc://{directory}/control"
    common = ["--directory", str(directory), "--owner", str(args.owner)]
    common += ["--limits", args.limits, "--log-level", args.log_level]
    window = ["--window-bytes", str(args.window_bytes), "--priority", args.priority]
    started = []
    if args.slots:
        more = ["--control-url", control, "--slots", str(args.slots)]
        agent = _spawn(directory, locked, "agent", "node.daemon", *common, *more)
        started.append(agent)
        window += ["--agent-pid", str(agent.pid)]
    broker = _spawn(directory, locked, "broker", "session.broker", *common, *window)
    (directory / "pids").write_text(json.dumps([p.pid for p in (broker, *started)]))
    with (directory / "broker.log").open() as log:
        deadline_s = time.monotonic() + START_SECS
        while not (directory / "engine").exists():
            if broker.poll() is not None or time.monotonic() > deadline_s:
                for process in (broker, *started):
                    process.terminate()
                if crash := crashes.find(directory, "broker"):
                    sys.exit(f"the broker crashed: {crash}")
                late = f"the broker did not start in {START_SECS:g} s; what else runs here?"
                sys.exit((log.read().strip().splitlines() or [late])[-1])
            time.sleep(0.01)
    print(json.dumps({"directory": str(directory)}))


def _spawn(
    directory: Path, locked: int, name: str, module: str, *args: str
) -> subprocess.Popen[bytes]:
    with (directory / f"{name}.log").open("wb") as stream:
        return subprocess.Popen(
            processes.python(f"oq_runtime.{module}", *args),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            pass_fds=[locked],
            cwd="/",
            env=os.environ | {MARK: str(directory)},
        )


if __name__ == "__main__":
    main()
