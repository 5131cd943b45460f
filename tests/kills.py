"""Kill the processes of a master during jobs, let the jobs go on, and compare the results.

    python -m tests.kills --runs N --seed S [--keep DIR]

Both examples and twelve jobs of the corpus, each of another calculation mode, are run once
undisturbed. Then N runs, the jobs in turn: SIGKILL of one process of the master (``oq-run``, the
engine, the broker, the agent), or of all at once as when a machine dies, at a random moment from
the start on or just as the journal is written; in half of the runs the job that goes on is killed
as well, at a random moment or while it replays. ``oq-run --resume`` then brings it to
its end; a job that was killed before it had a journal is begun anew, as its user would. Where the
job was faster than the kill, another one is drawn.

One line per run, then ``jobs=N runs=N equal=N killed=N at_a_write=N in_replay=N left_behind=N
again=X%``: runs in which something was killed, kills within a millisecond or so of a write of the
journal, kills of jobs that replayed; and of the seconds of the tasks that had been committed when
something was killed, each by the mean of its function in the undisturbed run, those that were
computed again. Exit code 1 unless all results are equal, each run had its kill, some had each kind,
nothing is left behind, that part is 5 % at most, and of the jobs of the corpus ten complete
undisturbed.
Not covered: kills of workers, which end no job (``tests.chaos``), and the power cut of a machine,
which takes what no disk has (``tests/system``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import psutil

from oq_runtime.commands.progress import StatusReader
from oq_runtime.errors import JournalError
from oq_runtime.files import journal
from oq_runtime.files.journal import Consumed, Submitted
from oq_runtime.session import launch
from tests.chaos import JOBS, LIMIT_S, command, workers
from tests.conformance.compare import compare
from tests.conformance.corpus import list_jobs, parent_of
from tests.leftovers import shm, unused_shm, wait_for
from tests.own_engine import OQ_RUN, private_engine

#: of the seconds of committed tasks, those that may be computed again
MOST_AGAIN = 0.05
CORES = 2
CORPUS_JOBS, FEWEST_CORPUS_JOBS = 12, 10
VICTIMS = ("oq-run", "engine", "broker", "agent", "all")
#: seconds between two looks at the counts of a job: what is committed since the last one is unseen
LOOK_SECS = 0.05
#: the same where the next write of a journal is waited for, or a moment of a replay
CLOSE_LOOK_SECS = 0.001
#: seconds in which a killed master's other processes end
END_SECS = 30.0
TOOK_OVER = re.compile(r"took over the results of (\d+) tasks")
#: what oq-run says before it replays
GOES_ON = "going on with job"
#: of the first writes of a journal one is drawn
MOST_WRITES = 12
#: seconds after GOES_ON in which most replays are over: the engine is loaded by then
REPLAY_SECS = 0.5
#: plans for a run, of which the first that kills something counts
MOST_PLANS = 10


@dataclass
class Ended:
    """
    A run of ``oq-run`` that has ended, by itself or not.

    :param killed: what was killed; empty where it was faster
    :param at_a_write: it was killed just as the journal was written
    :param committed: tasks of this run that had been committed when the broker was last asked, by
        their functions
    """

    code: int
    report: dict[str, object]
    log: str
    seconds: float
    killed: str = ""
    at_a_write: bool = False
    committed: Counter[str] = field(default_factory=Counter)

    @property
    def datastore(self) -> Path | None:
        rows = self.report.get("jobs") or []
        assert isinstance(rows, list)
        done = [row["datastore"] for row in rows if row.get("state") == "complete"]
        return Path(done[-1]) if self.code == 0 and done else None

    @property
    def in_replay(self) -> bool:
        """Whether it was killed while it replayed."""
        return bool(self.killed) and GOES_ON in self.log and not TOOK_OVER.search(self.log)

    @property
    def error(self) -> str:
        text = str(self.report.get("error") or self.log.strip().rpartition("\n")[2])
        return f"exit {self.code}: {text}"


@dataclass
class Kill:
    """
    :param victim: one of VICTIMS
    :param after_s: seconds from the start of ``oq-run``, or None: at a write of the journal
    :param write: which one of this run, from 1
    :param replay: the seconds are from the beginning of the replay
    """

    victim: str
    after_s: float | None
    write: int = 0
    replay: bool = False

    def __str__(self) -> str:
        moment = f"at write {self.write}" if self.after_s is None else f"at {self.after_s:.1f}s"
        moment += " of the replay" if self.replay else ""
        return f"{self.victim} {moment}"


@dataclass
class Master:
    """One engine with its own data, and what runs on it."""

    env: dict[str, str]

    @property
    def datadir(self) -> Path:
        return Path(self.env["OQ_DATADIR"])

    @property
    def tmpdir(self) -> Path:
        return Path(self.env["TMPDIR"])

    def numbers(self) -> set[int]:
        return set(journal.numbers(self.datadir))

    def forget(self) -> None:
        """Remove all journals."""
        for number in self.numbers():
            journal.remove(journal.directory_of(self.datadir, number))

    def results(self, number: int) -> list[str] | None:
        """The functions of the results that a journal has, in their order; None: it has no head."""
        try:
            records = journal.Reader(journal.directory_of(self.datadir, number)).records
        except (JournalError, FileNotFoundError):
            return None
        events = [record.event for record in records]
        functions = {(e.map, e.task): e.func for e in events if isinstance(e, Submitted)}
        found = [functions[e.map, e.task] for e in events if isinstance(e, Consumed)]
        return [name.rpartition(".")[2] for name in found]

    def run(self, *args: object, kill: Kill | None = None) -> Ended:
        """Run ``oq-run`` with these arguments, and kill what is to be killed."""
        argv = [*OQ_RUN, *map(str, args)]
        log_path = self.tmpdir / "oq-run.log"
        began_s = time.monotonic()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*argv, "--json", f"--cores={CORES}"],
                env=self.env, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        killed, committed = "", Counter[str]()
        if kill is not None:
            killed, committed = self._kill(process, kill, began_s, log_path)
        try:
            out, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
        text = log_path.read_text(errors="replace")
        try:
            report = json.loads(out)
        except ValueError:
            report = {"jobs": []}
        seconds = time.monotonic() - began_s
        at_a_write = bool(killed) and kill is not None and kill.after_s is None
        return Ended(process.returncode, report, text, seconds, killed, at_a_write, committed)

    def _kill(
        self, process: subprocess.Popen[bytes], kill: Kill, began_s: float, log_path: Path
    ) -> tuple[str, Counter[str]]:
        """Wait for the moment and kill; return what was killed, and the tasks committed by then."""
        reader: StatusReader | None = None
        committed = Counter[str]()
        written, writes, next_look_s = None, 0, 0.0
        try:
            while process.poll() is None:
                if time.monotonic() >= next_look_s:
                    next_look_s = time.monotonic() + LOOK_SECS
                    if reader is None and (found := self.session()):
                        reader = StatusReader(found)
                    if reader is not None and (status := reader.poll()):
                        committed = Counter({phase.name: phase.done for phase in status.phases})
                if kill.replay and GOES_ON not in log_path.read_text(errors="replace"):
                    began_s = time.monotonic()
                elif kill.after_s is not None:
                    if time.monotonic() - began_s >= kill.after_s:
                        return self._end(process, kill.victim), committed
                elif (size := self.journal_bytes()) != written:
                    writes += written is not None and size > written
                    written = size
                    if writes >= kill.write:
                        return self._end(process, kill.victim), committed
                close = kill.after_s is None or kill.replay
                time.sleep(CLOSE_LOOK_SECS if close else LOOK_SECS)
        finally:
            if reader is not None:
                reader.close()
        return "", committed

    def journal_bytes(self) -> int:
        """What the segments of all journals have."""
        directories = [journal.directory_of(self.datadir, number) for number in self.numbers()]
        with contextlib.suppress(FileNotFoundError):  # one was removed meanwhile
            return sum(path.stat().st_size for one in directories for path in journal.segments(one))
        return 0

    def session(self) -> Path | None:
        """The directory of the session that runs."""
        found = [path for path in self.tmpdir.glob(f"{launch.PREFIX}*") if launch.pids(path)]
        return found[0] if found else None

    def _end(self, process: subprocess.Popen[bytes], victim: str) -> str:
        """SIGKILL; return what it was, for a process that is not there yet ``oq-run``."""
        found = {"oq-run": [process.pid]}
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid)
            found["engine"] = [child.pid for child in family.children()]
        if directory := self.session():
            for pid in launch.pids(directory):
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = psutil.Process(pid).cmdline()
                    name = "broker" if "oq_runtime.session.broker" in words else "agent"
                    found[name] = [pid]
        found["all"] = [pid for pids in found.values() for pid in pids]
        if not found.get(victim):
            victim = "oq-run"
        for pid in found[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return victim

    def left(self) -> list[str]:
        """What is there when nothing runs: processes, which may have renamed themselves."""

        def processes() -> list[str]:
            mark = f"TMPDIR={self.tmpdir}"
            found = []
            for one in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if one.pid != os.getpid() and mark in (
                        f"{name}={value}" for name, value in one.environ().items()
                    ):
                        found.append(f"process {one.pid} {' '.join(one.cmdline())[:80]}")
            return found + [f"worker {one.pid}" for one in workers(self.tmpdir)]

        wait_for(lambda: not processes(), END_SECS, 0.2)
        return processes()


def chosen(seed: int) -> list[Path]:
    """The examples, and jobs of the corpus: one for each calculation mode, as far as they reach."""
    corpus = list_jobs()
    rng = random.Random(seed)
    by_mode: dict[str, list[Path]] = {}
    for job in corpus:
        text = job.path.read_text(encoding="utf-8-sig", errors="replace")
        alone = parent_of(job, corpus) is None and "hazard_calculation_id" not in text
        if alone and job.mode not in ("unknown", "preclassical"):
            by_mode.setdefault(job.mode, []).append(job.path)
    modes = sorted(by_mode)
    rng.shuffle(modes)
    first = ["disaggregation", "event_based_risk"]
    modes = first + [mode for mode in modes if mode not in first]
    return JOBS + [rng.choice(by_mode[mode]) for mode in modes[:CORPUS_JOBS]]


def plan(rng: random.Random, seconds: float) -> list[Kill]:
    """The kills of one run; the second one comes when the job goes on."""

    def kill(longest_s: float) -> Kill:
        victim = rng.choice(VICTIMS)
        if rng.random() < 0.5:
            return Kill(victim, None, rng.randint(1, MOST_WRITES))
        return Kill(victim, rng.uniform(0.0, longest_s))

    kills = [kill(seconds)]
    if rng.random() < 0.5:
        again = Kill(rng.choice(VICTIMS), rng.uniform(0.0, REPLAY_SECS), replay=True)
        kills.append(again if rng.random() < 0.5 else kill(seconds * 0.9))
    return kills


@dataclass
class Run:
    """
    A job that was killed and brought to its end.

    :param ended: its end
    :param kills: the ends by a kill before that
    :param told: what was killed, and what was taken over
    :param committed: tasks that had been committed when something was killed, by their functions
    :param lost: of these, those that were computed again
    """

    ended: Ended | None = None
    kills: list[Ended] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    committed: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)


def run_to_its_end(master: Master, job: Path, kills: list[Kill]) -> Run:
    """Run a job, kill what is to be killed, and let it go on."""
    run, had = Run(), list[str]()
    args: list[object] = [job]
    before = master.numbers()
    for kill in kills:
        if kill.replay and len(args) == 1:  # there is no journal yet to replay
            kill = replace(kill, replay=False)
        run.ended = ended = master.run(*args, kill=kill)
        if not ended.killed or ended.datastore is not None:
            run.told.append("no kill ended it")
            run.lost += not_taken_over(ended, had)
            return run
        run.kills.append(ended)
        run.told.append(f"{kill}" if ended.killed == kill.victim else f"{kill}, as {ended.killed}")
        master.left()
        new = master.numbers() - before if len(args) == 1 else {int(str(args[1]))}
        kept = master.results(max(new)) if new else None
        run.committed += ended.committed
        # what was taken over does not come to the broker again
        run.lost += ended.committed - (Counter(kept or ()) - Counter(had))
        if kept is not None:
            args, had = ["--resume", max(new)], kept
        else:
            run.lost += Counter(had)
            args, had = [job], []
            run.told[-1] += " (begun anew)"
    run.ended = master.run(*args)
    if len(args) == 2:
        again = not_taken_over(run.ended, had)
        run.told.append(f"took over {len(had) - again.total()} of {len(had)}")
        run.lost += again
    return run


def not_taken_over(ended: Ended, had: list[str]) -> Counter[str]:
    """Of the results that a journal had, those that a job that went on did not take over."""
    found = TOOK_OVER.search(ended.log)
    return Counter(had[int(found[1]) if found else 0 :])


def seconds_of(tasks: Counter[str], datastore: Path) -> float:
    """What tasks take, by the mean of their functions in an undisturbed run."""
    with h5py.File(datastore, "r") as file:
        rows = file["task_info"][:]
    names = [name.decode() for name in rows["taskname"]]
    mean_s = {
        name: statistics.fmean(
            s for one, s in zip(names, rows["duration"], strict=True) if one == name
        )
        for name in set(names)
    }
    return float(sum(count * mean_s.get(name, 0.0) for name, count in tasks.items()))


def drill(runs: int, seed: int, home: Path) -> int:
    rng = random.Random(seed)
    master = Master(private_engine(home))
    undisturbed: dict[Path, Ended] = {}
    jobs = chosen(seed)
    for job in list(jobs):
        name = f"{job.parent.name}/{job.stem}"
        ended = master.run(job)
        if ended.datastore is None:
            print(f"undisturbed {name}: {ended.error}", flush=True)
            jobs.remove(job)
            master.forget()
            continue
        undisturbed[job] = ended
        print(f"undisturbed {name}: {ended.seconds:.1f} s", flush=True)
    if not set(JOBS) <= set(jobs) or len(jobs) < len(JOBS) + FEWEST_CORPUS_JOBS:
        print("an example, or too many jobs of the corpus, fail by themselves")
        return 1
    memory = shm()
    equal = killed = at_a_write = in_replay = left_behind = 0
    committed_s = lost_s = 0.0
    for number in range(runs):
        job = jobs[number % len(jobs)]
        reference = undisturbed[job].datastore
        assert reference is not None
        for _ in range(MOST_PLANS):
            kills = plan(rng, undisturbed[job].seconds)
            run = run_to_its_end(master, job, kills)
            if run.kills:
                break
            master.forget()
        killed += bool(run.kills)
        at_a_write += sum(end.at_a_write for end in run.kills)
        in_replay += sum(end.in_replay for end in run.kills)
        committed_s += seconds_of(run.committed, reference)
        lost_s += seconds_of(run.lost, reference)
        assert run.ended is not None
        ended = run.ended
        if ended.datastore is None:
            verdict = ended.error
        else:
            differences = compare(reference, ended.datastore)
            verdict = f"differs: {differences[:3]}" if differences else "equal"
            equal += not differences
        left = master.left() + [path.name for path in master.tmpdir.glob(f"{launch.PREFIX}*")]
        left += [f"journal of {one}" for one in master.numbers()] if ended.datastore else []
        left += unused_shm(shm() - memory)
        left_behind += bool(left)
        name = f"{job.parent.name}/{job.stem}"
        words = f"{verdict}, {run.lost.total()} of {run.committed.total()} again"
        print(f"{number + 1}/{runs} {name} {'; '.join(run.told)}: {words}"
              + (f"; left behind: {', '.join(left)}" if left else ""), flush=True)  # fmt: skip
        master.forget()  # also what a job has left that was begun anew
    part = lost_s / committed_s if committed_s else 0.0
    print(f"jobs={len(jobs)} runs={runs} equal={equal} killed={killed} at_a_write={at_a_write} "
          f"in_replay={in_replay} left_behind={left_behind} again={part:.1%}",
          flush=True)  # fmt: skip
    good = (
        equal == killed == runs
        and at_a_write
        and in_replay
        and not left_behind
        and part <= MOST_AGAIN
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(command("tests.kills", __doc__, 14, drill))
