"""``make bench-slow-disk``: what a journal costs where the data directory is on a slow disk.

    python -m benchmarks.slow_disk [--rounds 3] [--iops 20] [--bps 2000000]

A file system of its own, in a file, is throttled to so many writes and bytes per second. With the
data directory there, and the database elsewhere (it syncs as well), both examples are run without a
journal, with one, and with one that is kept (``--reuse``), in turn in each round. Printed are the
delay of one synced write, seconds from the command to its end (median, lowest and highest), and
what was said of the journal. Needs root, and the blkio controller of cgroup version 1.
Not covered: jobs whose results come faster than the disk takes them (row b of ``make bench``).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.systems import ROOT
from tests.own_engine import OQ_RUN, private_engine

JOBS = ("hazard_classical", "event_based_risk")
WAYS = ("--no-journal", "", "--reuse")
THROTTLE = Path("/sys/fs/cgroup/blkio")
IMAGE_BYTES = 3 << 30
LIMIT_S = 600.0


def run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def slow_disk(where: Path, iops: int, bps: int) -> Iterator[Path]:
    """Mount a throttled file system; nothing of it is left afterwards."""
    image, mounted = where / "image", where / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, mounted)
    try:
        device = run("findmnt", "-no", "SOURCE", mounted)
        number = run("lsblk", "-dno", "MAJ:MIN", device)

        def throttle(writes: int, size: int) -> None:
            (THROTTLE / "blkio.throttle.write_iops_device").write_text(f"{number} {writes}")
            (THROTTLE / "blkio.throttle.write_bps_device").write_text(f"{number} {size}")

        os.sync()
        throttle(iops, bps)
        try:
            yield mounted
        finally:
            throttle(0, 0)
    finally:
        # what a run that was cut off has left may still hold it, for as long as it ends
        run("umount", "--lazy", mounted)


def synced_write_s(directory: Path) -> float:
    """Seconds that a write of 4 KiB takes until it is on the disk: the median of ten."""
    seconds = []
    with (directory / "probe").open("wb") as file:
        for _ in range(10):
            began_s = time.monotonic()
            file.write(bytes(4096))
            file.flush()
            os.fdatasync(file.fileno())
            seconds.append(time.monotonic() - began_s)
    return statistics.median(seconds)


def measure(home: Path, disk: Path, rounds: int) -> None:
    env = private_engine(home) | {"OQ_DATADIR": str(disk)}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    said: dict[tuple[str, str], set[str]] = defaultdict(set)
    for number in range(rounds + 1):  # what is read, compiled and made in the first is no figure
        for name in JOBS:
            for way in WAYS:
                job = ROOT / "examples" / name / "job.ini"
                argv = [*OQ_RUN, str(job), "--no-progress"]
                began_s = time.monotonic()
                done = subprocess.run(
                    [*argv, *([way] if way else [])],
                    env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                    timeout=LIMIT_S,
                )  # fmt: skip
                if done.returncode:
                    sys.exit(f"{name} {way}: exit code {done.returncode}: {done.stdout[-300:]}")
                lines = done.stdout.splitlines()
                said[name, way].update(line for line in lines if "the journal" in line)
                took_s = time.monotonic() - began_s
                what = f"{name} {way or 'with a journal'}"
                print(f"round {number}: {what}: {took_s:.1f} s", flush=True)
                if number:
                    seconds[name, way].append(took_s)
    for (name, way), found in seconds.items():
        figure = f"{statistics.median(found):.1f} s ({min(found):.1f}-{max(found):.1f})"
        print(f"{name:18} {way or 'with a journal':15} {figure}")
        for line in sorted(said[name, way]):
            print(f"    {line}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.slow_disk", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iops", type=int, default=20, help="writes per second")
    parser.add_argument("--bps", type=int, default=2_000_000, help="bytes per second")
    args = parser.parse_args()
    if os.geteuid() or not (THROTTLE / "blkio.throttle.write_iops_device").exists():
        sys.exit(f"this needs root, and the blkio controller of cgroup version 1 at {THROTTLE}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the disk is removed
    with (
        tempfile.TemporaryDirectory(prefix="oq-slow-disk-") as name,
        slow_disk(Path(name), args.iops, args.bps) as disk,
    ):
        print(f"{args.iops} writes and {args.bps / 1e6:g} MB per second: "
              f"a synced write takes {synced_write_s(disk) * 1e3:.0f} ms")  # fmt: skip
        measure(Path(name) / "home", disk, args.rounds)


if __name__ == "__main__":
    main()
