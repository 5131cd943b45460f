"""What real processes did to a job is named: by the tables that the broker's ledger has filled."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from oq_runtime.report.words import explained

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
planted(1, tasks.slow, [(i, 0.2) for i in range(12)] + [(12, 3.0)])
planted(2, tasks.slow, iter([(0, 2.0)]))  # without a length, or the engine runs it itself
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
    """What there is to tell of each job, all run in one session."""
    tmpdir = tmp_path_factory.mktemp("t")
    code, _, err = run(light_home | {"TMPDIR": str(tmpdir)}, tmpdir, BODY)
    assert code == 0, err
    return {number: explained(Path(tmpdir, f"calc_{number}.hdf5")) for number in range(1, 7)}


@pytest.mark.parametrize(
    "number, cause, words",
    [
        (1, "straggler", "task #12 of slow took 3."),
        (2, "few_tasks", "slow had 1 task, which left"),
        (3, "retries", "6 attempts failed on"),
        (4, "busy_cpus", "of their time for a CPU"),
        (5, "slow_files", "neither CPU nor memory"),
        (6, "swapping", "pages of memory a second were read from the disk"),
    ],
)
def test_cause(
    told: dict[int, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    number: int,
    cause: str,
    words: str,
) -> None:
    kind = ["stat", "-f", "-c", "%T", str(tmp_path_factory.getbasetemp())]
    if cause == "swapping" and subprocess.check_output(kind, text=True).strip() == "tmpfs":
        pytest.skip("the pages of a file in a tmpfs are never read from a disk")
    assert cause in told[number]["causes"], told[number]
    assert any(words in line for line in told[number]["lines"]), told[number]


def test_only_attempts_of_the_job_are_its_own(told: dict[int, dict[str, Any]]) -> None:
    tasks = [line for one in told.values() for line in one["lines"] if line.startswith("tasks:")]
    counts = [line.removeprefix("tasks: ").partition(" (")[0] for line in tasks]
    assert counts[:3] == ["13 slow", "1 slow", "12 dies_once"]
    words = "faults: 6 × worker process was killed by SIGKILL"
    assert any(words in line for line in told[3]["lines"]), told[3]
