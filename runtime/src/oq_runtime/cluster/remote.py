"""Start or kill the service of a node over ssh, as user openquake: for agents that do not answer.

Nothing but one word is sent; a forced command on the node knows what to do (role openquake_ssh).
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Literal

from oq_runtime.text import clean

USER = "openquake"
#: seconds for ssh to connect (a whole number), and for all of it
CONNECT_SECS, LIMIT_SECS = 2, 4.0
Word = Literal["start", "kill"]


def tell(hosts: Sequence[str], word: Word) -> dict[str, str]:
    """Tell all hosts at once; return per host an empty string, or in words why it failed."""
    deadline_s = time.monotonic() + LIMIT_SECS
    with contextlib.ExitStack() as stack:
        # not pipes: a connection that ssh keeps for the next time would hold them open
        errors = {host: stack.enter_context(tempfile.TemporaryFile()) for host in hosts}
        started = {host: _start(host, word, errors[host]) for host in hosts}
        return {
            host: _outcome(process, errors[host], f"ssh {USER}@{host} {word}", deadline_s)
            for host, process in started.items()
        }


def _start(host: str, word: Word, errors: IO[bytes]) -> subprocess.Popen[bytes] | OSError:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECS}"]
    try:
        return subprocess.Popen(
            ["ssh", *options, f"{USER}@{host}", word],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    except OSError as exc:
        return exc


def _outcome(
    process: subprocess.Popen[bytes] | OSError, errors: IO[bytes], told: str, deadline_s: float
) -> str:
    if isinstance(process, OSError):
        return f"{told}: {process.strerror}; install the ssh client"
    try:
        code = process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"{told}: did not end in {LIMIT_SECS:g} s"
    if code == 0:
        return ""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"{told}: {clean(lines[-1].strip()) if lines else f'exit code {code}'}"
