"""Kill workers during real jobs and compare the results with undisturbed runs.

    python -m tests.chaos --runs N --seed S [--keep DIR]

Per example three undisturbed runs through ``oq-run`` give the datastore and the duration (the
slowest) to compare with. Then N runs, the examples in turn, alternate between SIGKILLs of random
workers at random moments and the four named fault points with a random task. A run may take the
undisturbed time and, per lost attempt, the longest task and 2 s. One line per run; a final line
``runs=N complete=N equal=N in_time=N longest_delay=S``; exit code 1 unless all are N.
The kills of a run are fewer than the deaths that a task may suffer, so that it must survive them.
Not covered: the death of broker, agent and engine (tests/local).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import psutil

from tests.conformance.compare import compare
from tests.own_engine import OQ_RUN, private_engine

ROOT = Path(__file__).resolve().parents[1]
JOBS = [ROOT / "examples/hazard_classical/job.ini", ROOT / "examples/event_based_risk/job.ini"]
POINTS = ["before_start", "after_first", "after_last", "before_end"]
REFERENCE_RUNS = 3
#: seconds that the loss of an attempt may cost besides the work that is done again
RECOVERY_S = 2.0
#: a task is given up after its third death; two kills can never poison one
MAX_KILLS = 2
LIMIT_S = 1800.0
CORES = 2


@dataclass
class Outcome:
    """One run of ``oq-run``: what it reported, how long it took, and which kills took place."""

    code: int
    datastore: Path | None
    seconds: float
    tasks: int
    lost: int
    kills: list[str]
    error: str

    @property
    def complete(self) -> bool:
        return self.code == 0 and self.datastore is not None


def workers(tmpdir: Path) -> list[psutil.Process]:
    """The worker processes of the session under ``tmpdir``, ready or not.

    They rename themselves when they are ready; what stays is their stderr, a file of the session.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            log = os.readlink(f"/proc/{process.pid}/fd/2")
            if log.startswith(f"{tmpdir}/oq-run-") and Path(log).name.startswith("worker-"):
                found.append(process)
    return found


def run(job: Path, env: dict[str, str], kill_at: list[float], rng: random.Random) -> Outcome:
    """Run a job; SIGKILL a random worker ``kill_at`` seconds after the workers appeared."""
    argv = [*OQ_RUN, str(job), "--json", f"--cores={CORES}"]
    log = Path(env["TMPDIR"]) / "oq-run.log"
    started_s = time.monotonic()
    kills: list[str] = []
    with log.open("wb") as stream:
        process = subprocess.Popen(
            argv, env=env, stdout=subprocess.PIPE, stderr=stream, start_new_session=True
        )
        pending = sorted(kill_at)
        workers_s: float | None = None
        while process.poll() is None and pending:
            time.sleep(0.05)
            if workers_s is None:
                workers_s = time.monotonic() if workers(Path(env["TMPDIR"])) else None
            elif time.monotonic() - workers_s >= pending[0] and (
                alive := workers(Path(env["TMPDIR"]))
            ):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rng.choice(alive).kill()
                kills.append(f"{pending.pop(0):.1f}s")
            if time.monotonic() - started_s > LIMIT_S:
                break
        try:
            out, _ = process.communicate(timeout=max(1.0, LIMIT_S - time.monotonic() + started_s))
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
    seconds = time.monotonic() - started_s
    try:
        result = json.loads(out)
    except ValueError:
        text = log.read_text(errors="replace").strip().splitlines()[-1:]
        result = {"error": f"no report; {text}", "jobs": []}
    done = [row for row in result["jobs"] if row.get("state") == "complete"]
    return Outcome(
        code=process.returncode,
        datastore=Path(done[-1]["datastore"]) if done else None,
        seconds=seconds,
        tasks=done[-1]["tasks"] if done else 0,
        lost=result.get("retries", 0),
        kills=kills,
        error=str(result["error"]).splitlines()[0] if result["error"] else "",
    )


def longest_task_s(datastore: Path) -> float:
    with h5py.File(datastore, "r") as file:
        return float(file["task_info"]["duration"].max())


def leftovers(tmpdir: Path) -> list[str]:
    return [str(path) for path in tmpdir.glob("oq-run-*")] + [str(p.pid) for p in workers(tmpdir)]


def command(program: str, about: str, runs: int, drill: Callable[[int, int, Path], int]) -> int:
    """Read the command line of a drill, and do it.

    :param runs: how many there are without ``--runs``
    :param drill: is given runs, seed and a directory; returns the exit code
    """
    parser = argparse.ArgumentParser(prog=program, description=about.splitlines()[0])
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="Keep datastores and logs in this directory.")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs: give a number above 0")
    if args.keep:
        return drill(args.runs, args.seed, args.keep.resolve())
    with tempfile.TemporaryDirectory(prefix="oq-chaos-") as name:
        return drill(args.runs, args.seed, Path(name))


def drill(runs: int, seed: int, home: Path) -> int:
    rng = random.Random(seed)
    env = private_engine(home)
    tmpdir = Path(env["TMPDIR"])
    reference: dict[Path, Outcome] = {}
    for job in JOBS[: min(runs, len(JOBS))]:
        for _ in range(REFERENCE_RUNS):
            ref = run(job, env, [], rng)
            state = "complete" if ref.complete else f"failed: {ref.error}"
            print(f"reference {job.parent.name}: {state}, {ref.seconds:.1f} s, {ref.tasks} tasks",
                  flush=True)  # fmt: skip
            if not ref.complete:
                print(f"runs={runs} complete=0 equal=0 in_time=0 longest_delay=0.0")
                return 1
            reference[job] = max(reference.get(job, ref), ref, key=lambda found: found.seconds)
    # per pair of runs (both jobs) the same kind of fault: each job meets each of them
    faults = itertools.cycle(["kill", POINTS[0], "kill", POINTS[1], "kill", POINTS[2], "kill",
                              POINTS[3]])  # fmt: skip
    fault = ""
    complete = equal = in_time = 0
    longest_s = 0.0
    for number in range(runs):
        job = JOBS[number % len(JOBS)]
        ref = reference[job]
        assert ref.datastore is not None
        if number % len(JOBS) == 0:
            fault = next(faults)
        if fault == "kill":
            moments = [
                rng.uniform(0.0, ref.seconds * 0.8) for _ in range(rng.randint(1, MAX_KILLS))
            ]
            outcome = run(job, env, moments, rng)
            what = f"SIGKILL at {', '.join(outcome.kills) or 'no moment (the job was faster)'}"
        else:
            # the session numbers its tasks over all phases; task_info counts one row per task
            what = f"{fault}:{rng.randrange(max(1, ref.tasks))}:1"
            outcome = run(job, env | {"OQ_RUNTIME_FAULT": what}, [], rng)
        delay_s = outcome.seconds - ref.seconds
        longest_s = max(longest_s, delay_s)
        if outcome.complete and outcome.datastore is not None:
            diffs = compare(ref.datastore, outcome.datastore)
            verdict = "equal" if not diffs else f"{len(diffs)} differences: {diffs[0]}"
            complete += 1
            equal += not diffs
            if not diffs:
                outcome.datastore.unlink(missing_ok=True)
        else:
            verdict = f"exit {outcome.code}: {outcome.error}"
        allowed_s = outcome.lost * (longest_task_s(ref.datastore) + RECOVERY_S)
        # nothing lost, nothing to allow for: what is left is the noise between undisturbed runs
        in_time += delay_s <= max(allowed_s, RECOVERY_S)
        if left := leftovers(tmpdir):
            verdict += f"; left behind: {', '.join(left)}"
        print(f"{number + 1}/{runs} {job.parent.name} {what}: {verdict}, {outcome.lost} lost, "
              f"{delay_s:+.1f} s of {allowed_s:.1f} s",
              flush=True)  # fmt: skip
    print(f"runs={runs} complete={complete} equal={equal} in_time={in_time} "
          f"longest_delay={longest_s:.1f}")  # fmt: skip
    return 0 if complete == equal == in_time == runs else 1


if __name__ == "__main__":
    sys.exit(command("tests.chaos", __doc__, 6, drill))
