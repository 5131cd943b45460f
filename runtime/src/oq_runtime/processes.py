"""What the kernel offers on processes: to end with a parent, whose one is, another one's end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import getpass
import grp
import io
import os
import pwd
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from oq_runtime.descriptors import patiently
from oq_runtime.errors import ConfigError

#: of pidfd_open(2): there is no process of that number; a thread may have it, says EINVAL, and
#: ENOENT from Linux 6.15 on
GONE = (errno.ESRCH, errno.EINVAL, errno.ENOENT)
#: seconds in which systemd answers
SYSTEMD_SECS = 5.0


@dataclass(frozen=True, slots=True)
class Process:
    """What ``/proc`` says of a process.

    ``name`` is the one it has given itself, of 15 characters at most; ``started_s`` is in seconds
    since 1970, 0 where ``/proc`` hides when this machine was booted.
    """

    name: str
    command: str
    started_s: float


class Lossy(io.TextIOWrapper):
    """A stream that loses what it cannot write: its terminal is gone, or its disk full."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def going_down() -> bool:
    """Whether this machine is being shut down, as systemd says; False where there is none."""
    command = ("systemctl", "is-system-running")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMD_SECS)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.stdout.strip() == "stopping"


def has_group(name: str) -> bool:
    """Whether this process is root's, or has the group, by what the kernel knows of it."""
    if os.geteuid() == 0:
        return True
    try:
        number = grp.getgrnam(name).gr_gid
    except KeyError:
        return False
    return number in (os.getegid(), *os.getgroups())


def name_user() -> None:
    """Give a user without an entry in passwd a name, the number: many places ask for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the latter since Python 3.13
        os.environ["USER"] = str(os.getuid())


def check_user() -> None:
    """Give a user a name and a home.

    :raises ConfigError: where nothing says where that is
    """
    name_user()
    try:
        os.environ.setdefault("HOME", pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        if not os.environ.get("HOME"):
            raise ConfigError(
                f"HOME is not set, and user {os.getuid()} has no entry in passwd; set HOME to a "
                "directory where you may write"
            ) from None


def open_standard() -> None:
    """Give this process streams by which it does not come to harm.

    An empty stdin, stdout or stderr where it was started without one: what it opens next would
    have that number, and be taken for it by what it starts. And nothing ends it that it cannot
    write to stderr, nor a character that the locale lacks.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    given = sys.stderr
    if isinstance(given, io.TextIOWrapper):
        encoding, errors = given.encoding, given.errors
        sys.stderr = Lossy(given.detach(), encoding, errors, line_buffering=True)


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module as a process of its own.

    With ``-P``, since this directory may be the folder of a job, in which others may have put files
    by the names of modules.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def exists(pid: int) -> bool:
    """Whether there is such a process, also where ``/proc`` hides those of other users."""
    try:
        os.close(os.pidfd_open(pid))
    except OSError as exc:
        return exc.errno not in GONE
    return True


def look(pid: int) -> Process | None:
    """Return what ``/proc`` says of a process; None where it is hidden, or gone.

    One that has ended and waits for its parent to notice has the command ``""``.
    """
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            ended = process.status() == psutil.STATUS_ZOMBIE
            command = "" if ended else " ".join(process.cmdline())
            return Process(process.name(), command, process.create_time() if boot_s() else 0.0)
    except psutil.Error:
        return None


def condition(pid: int) -> tuple[str, int]:
    """Return the letter of what a process does, "" if it has ended, and its CPU time in ticks.

    "T": it was stopped by a signal, and waits for SIGCONT; "D": the kernel waits for a device or a
    file server, and nothing ends it. See proc(5), stat.
    """
    with contextlib.suppress(OSError, IndexError):  # it has ended
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])
    return "", 0


def stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return condition(pid)[0] == "T"


def boot_s() -> float:
    """Return when this machine was booted, in seconds since 1970; 0 where ``/proc`` hides it."""
    try:
        return float(psutil.boot_time())
    except (OSError, RuntimeError):
        return 0.0


def ending(code: int) -> str:
    """Say how a process ended.

    :param code: exit code, negative for a signal, as ``subprocess`` gives it
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # the real-time ones between SIGRTMIN and SIGRTMAX have no names
        name = f"signal {-code}"
    return f"was killed by {name}"


def time_limit_s() -> int:
    """Return the limit of processor time, where the children that have ended used as much; 0: no.

    The limit is one of each process, the time here that of all together, as the kernel counts it:
    a process that it has ended for its time may be a little below.
    """
    limit_s, _ = resource.getrlimit(resource.RLIMIT_CPU)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return limit_s if 0 <= limit_s <= 1.1 * (used.ru_utime + used.ru_stime) else 0


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent thread ends (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends; None when it is gone."""
    try:
        return patiently(lambda: os.pidfd_open(pid))
    except OSError as exc:
        if exc.errno not in GONE:
            raise
    return None
