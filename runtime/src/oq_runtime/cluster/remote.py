"""Start or kill the service of a node over ssh, as user openquake: for agents that do not answer.

Nothing but one word is sent; a forced command on the node knows what to do (role openquake_ssh).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from typing import Literal

USER = "openquake"
#: seconds for ssh to connect (a whole number), and for all of it
CONNECT_SECS, LIMIT_SECS = 2, 4.0
Word = Literal["start", "kill"]


def tell(hosts: Sequence[str], word: Word) -> dict[str, str]:
    """Tell all hosts at once; return per host an empty string, or in words why it failed."""
    deadline_s = time.monotonic() + LIMIT_SECS
    started = {host: _start(host, word) for host in hosts}
    return {host: _outcome(found, host, word, deadline_s) for host, found in started.items()}


def _start(host: str, word: Word) -> subprocess.Popen[str] | OSError:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECS}"]
    try:
        return subprocess.Popen(
            ["ssh", *options, f"{USER}@{host}", word],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as exc:
        return exc


def _outcome(
    process: subprocess.Popen[str] | OSError, host: str, word: Word, deadline_s: float
) -> str:
    told = f"ssh {USER}@{host} {word}"
    if isinstance(process, OSError):
        return f"{told}: {process.strerror}; install the ssh client"
    try:
        _, err = process.communicate(timeout=max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"{told}: did not end in {LIMIT_SECS:g} s"
    if process.returncode == 0:
        return ""
    lines = err.strip().splitlines() or [f"exit code {process.returncode}"]
    return f"{told}: {lines[-1].strip()}"
