"""How many files and connections this process may have open, and what to do when all are in use.

Whoever reaches a port can use them up for a moment, until his connections are closed (see
``wire.strangers``). What is opened meanwhile by way of ``patiently`` comes a little later.
"""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Callable
from typing import TypeVar

from oq_runtime.errors import ConfigError

#: the most that a broker or an agent has open, and besides for each of its nodes or slots
BASE, EACH = 28, 2
#: seconds to wait for a descriptor, and between two tries
WAIT_SECS, AGAIN_SECS = 0.5, 0.002
T = TypeVar("T")


def raise_limit() -> None:
    """Let this process have as many open as the system admits, and what it starts as well."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check(number: int, strangers: int = 0) -> None:
    """Raise ConfigError where the limit is too low for a broker of ``number`` nodes, or an agent.

    Without a descriptor libzmq ends its process in the midst, by an assertion.

    :param number: of nodes, or of slots
    :param strangers: connections that anybody may have open with it
    """
    needed = BASE + EACH * number + strangers
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != most < needed:
        raise ConfigError(
            f"only {most} files may be open at a time, and {needed} are needed here; raise the "
            "hard limit (ulimit -n, or LimitNOFILE= of a service)"
        )


def patiently(make: Callable[[], T]) -> T:
    """Return what ``make`` returns, which opens something; try again when too much is open.

    Raises its OSError, after WAIT_SECS also that one.
    """
    deadline_s = 0.0
    while True:
        try:
            return make()
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            deadline_s = deadline_s or time.monotonic() + WAIT_SECS
            if time.monotonic() > deadline_s:
                raise
        time.sleep(AGAIN_SECS)
