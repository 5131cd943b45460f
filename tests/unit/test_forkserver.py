"""The fork server, its end and that of its workers; a real process."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

from oq_runtime.node.forkserver import END_SECS, ForkServer, refusal

#: more than the watchdog has seconds
STUCK = 40


def test_what_stands_in_the_way_of_a_worker() -> None:
    assert "raise them" in refusal(OSError(errno.EAGAIN, "Resource temporarily unavailable"))
    gone = refusal(OSError(errno.ESTALE, "Stale file handle", "/opt/engine/bin/python"))
    assert gone.endswith("/opt/engine/bin/python: Stale file handle; is it mounted there?")


def test_the_ends_of_many_stuck_workers_take_one_time_limit(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        server = ForkServer(log, [str(tmp_path), str(tmp_path)], os.environ)
    # nobody kills these, as the kernel does not kill what waits for a device
    stuck = [subprocess.Popen(["sleep", "60"]) for _ in range(STUCK)]
    try:
        before, began_s = len(os.listdir("/proc/self/fd")), time.monotonic()
        assert server.close([process.pid for process in stuck]) == -9
        assert END_SECS <= time.monotonic() - began_s < END_SECS + 3
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        for process in stuck:
            process.kill()
            process.wait()
