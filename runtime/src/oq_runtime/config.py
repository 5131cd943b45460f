"""Settings of the runtime: section ``[oq_runtime]`` of openquake.cfg, and the environment.

======================  =======  ==================================================================
key                     default  meaning
======================  =======  ==================================================================
code                             ``import oq_runtime.activate`` switches the runtime on
cores                   all      slots of the private agent when no cluster is configured
window_mb               1024     MiB of results staged in the broker at a time
======================  =======  ==================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from oq_runtime.errors import ConfigError

#: names the directory of a session that ``oq-run`` has started for its engine process
SESSION_VARIABLE = "OQ_RUNTIME_SESSION"
#: set in worker processes, in which the runtime must not activate itself
WORKER_VARIABLE = "OQ_RUNTIME_WORKER"
#: ``POINT:TASK:ATTEMPTS``: for tests, a worker kills itself at this point of this task
FAULT_VARIABLE = "OQ_RUNTIME_FAULT"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings after validation; sizes in bytes."""

    cores: int
    window_bytes: int = 1 << 30

    @classmethod
    def from_section(cls, section: Mapping[str, str]) -> Config:
        """Read ``[oq_runtime]``; raises ConfigError naming the key and the allowed values."""
        return cls(
            cores=check_cores(section.get("cores") or os.environ.get("OQ_NUM_CORES") or "-1"),
            window_bytes=_positive(section, "window_mb", 1024) << 20,
        )


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_cores(text: str | int) -> int:
    """Return the number of slots for a setting; -1 stands for all cores.

    Raises ConfigError for anything but -1 or 1 up to the cores of this machine.
    """
    most = available_cores()
    try:
        cores = int(text)
    except ValueError:
        cores = 0
    if cores == -1:
        return most
    if not 1 <= cores <= most:
        raise ConfigError(f"cores={text}: give a number from 1 to {most}, or -1 for all cores")
    return cores


def _positive(section: Mapping[str, str], key: str, default: int) -> int:
    text = section.get(key) or str(default)
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise ConfigError(f"[oq_runtime] {key}={text}: give a whole number above 0")
    return int(text)
