"""What real processes did to a job is named first by ``oq-run --explain``.

It reads the tables that the broker's ledger has filled. A task that runs alone computes: one that
sleeps would wait as for a file, which costs as much as the slot beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oq_runtime.core.explain import Cause

from .test_starmap import run

pytestmark = [pytest.mark.timeout(180), pytest.mark.light]

BODY = """
import subprocess, threading
import h5py
from oq_runtime.engine import kept
from oq_runtime.session.client import Session
go(tasks.square, [(i,) for i in range(4)])  # the workers are there
def planted(number, func, args):
    session, began_s = Session.current(), time.monotonic()
    session.call_it(f"calculation {number}")
    go(func, args)
    facts = dict(format=1, state="complete", seconds=time.monotonic() - began_s, replayed=0)
    with h5py.File(f"calc_{number}.hdf5", "w") as file:
        kept.write(file, session.attempts(f"calculation {number}"), began_s, facts)
planted(1, tasks.spin, [(i, 0.05) for i in range(12)] + [(12, 3.0)])
planted(2, tasks.spin, iter([(0, 2.0)]))  # without a length, or the engine runs it itself
planted(3, tasks.dies_once, [(i,) for i in range(12)])
others = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2 * os.cpu_count())]
planted(4, tasks.spin, [(i, 0.1) for i in range(8)])
for other in others:
    other.kill()
    other.wait()
os.mkfifo("fifo")
def serve():
    while True:
        time.sleep(0.2)
        with open("fifo", "w") as file:
            file.write("late")
threading.Thread(target=serve, daemon=True).start()
planted(5, tasks.reads, [(i, os.path.abspath("fifo")) for i in range(8)])
with open("pages", "wb") as file:
    file.write(os.urandom(1 << 20) * 32)
    os.fsync(file.fileno())
planted(6, tasks.swaps, [(i, os.path.abspath("pages"), 0.3) for i in range(6)])
parallel.Starmap.shutdown()
"""


@pytest.fixture(scope="module")
def told(
    light_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """What the command tells of each job, all run in one session."""
    tmpdir = tmp_path_factory.mktemp("t")
    code, _, err = run(light_home | {"TMPDIR": str(tmpdir)}, tmpdir, BODY)
    assert code == 0, err
    return {number: asked(light_home, tmpdir, number) for number in range(1, 7)}


def asked(home: dict[str, str], datadir: Path, number: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "oq_runtime.commands.run", "--explain", str(number), "--json"],
        env=home | {"OQ_DATADIR": str(datadir)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "number, cause, words",
    [
        (1, "straggler", "task #12 of spin took "),
        (2, "few_tasks", "spin had 1 task, which left"),
        (3, "retries", "6 attempts failed on"),
        (4, "busy_cpus", "of their time for a CPU"),
        (5, "slow_files", "neither CPU nor memory"),
        (6, "swapping", "pages of memory a second were read from the disk"),
    ],
)
def test_a_planted_cause_is_named_first(
    told: dict[int, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    number: int,
    cause: str,
    words: str,
) -> None:
    kind = ["stat", "-f", "-c", "%T", str(tmp_path_factory.getbasetemp())]
    if cause == "swapping" and subprocess.check_output(kind, text=True).strip() == "tmpfs":
        pytest.skip("the pages of a file in a tmpfs are never read from a disk")
    assert next(iter(told[number]["causes"]), "") == cause, told[number]
    first = next(line for line in told[number]["lines"] if line.startswith("cause"))
    assert first.startswith(f"cause: {Cause[cause.upper()]}: ") and words in first, told[number]


def test_only_attempts_of_the_job_are_its_own(told: dict[int, dict[str, Any]]) -> None:
    tasks = [line for one in told.values() for line in one["lines"] if line.startswith("tasks:")]
    counts = [line.removeprefix("tasks: ").partition(" (")[0] for line in tasks]
    assert counts[:3] == ["13 spin", "1 spin", "12 dies_once"]
    words = "faults: 6 × worker process was killed by SIGKILL"
    assert any(words in line for line in told[3]["lines"]), told[3]
