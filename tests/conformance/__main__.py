"""Run jobs with the engine's process pool and by ``oq-run``, and compare the datastores.

    python -m tests.conformance [--sample N --seed S | --jobs "p1 p2" | --all | --fixed]

Covers the two runs (the reference is kept under ``build/conformance/<engine version>/reference``,
the runtime run is always done again, of the jobs that complete there), the comparison, the
progress, the report and the exit code: 1 when a job differs or fails in the runtime only. Not
covered: what counts as equal (``compare``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any

from tests.conformance.compare import compare
from tests.conformance.corpus import Job, list_jobs, parent_of, sample
from tests.own_engine import private_engine, run

ROOT = Path(__file__).resolve().parents[2]
FIXED = Path(__file__).with_name("fixed.txt")
BATCH = 40
LIMIT = 400  # seconds per job
Row = dict[str, Any]


class Side:
    """One way to run the jobs: a folder with its database, datastores and results.

    :param keep: the results that are there already
    """

    def __init__(self, name: str, out: Path, cores: int, keep: bool) -> None:
        self.name, self.out, self.cores = name, out, cores
        if out.exists() and not keep:
            shutil.rmtree(out)
        self.oqdata = out / "oqdata"
        self.oqdata.mkdir(parents=True, exist_ok=True)
        self.results = out / "results.jsonl"
        self.rows: dict[str, Row] = {}
        if self.results.exists():
            for line in self.results.read_text().splitlines():
                row = json.loads(line)
                complete = row["state"] == "complete" and (out / f"{row['key']}.hdf5").exists()
                if (complete or row["state"] == "failed") and row["cores"] == cores:
                    self.rows[row["key"]] = row

    def record(self, row: Row) -> None:
        row["cores"] = self.cores
        self.rows[str(row["key"])] = row
        with self.results.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        name = str(row["key"]).replace("__", "/")
        text = f"{self.name} {name} {row['state']} {row['seconds']}s {row['error']}"
        print(text.rstrip(), flush=True)


class Command(Side):
    """The jobs by ``oq-run``, each by itself, as their user runs them."""

    def run(self, jobs: Sequence[Job], parents: dict[str, Job]) -> None:
        env = private_engine(self.out)
        for number, job in enumerate(jobs):
            if number % BATCH == 0:
                print(f"{self.name}: {len(jobs) - number} jobs left", flush=True)
            options = [f"--cores={self.cores}", "--param=exports="]
            if parent := parents.get(job.key):
                if "number" not in self.rows[parent.key]:
                    self.record(_row(job.key, "failed", "its parent failed", 0))
                    continue
                options.append(f"--hc={self.rows[parent.key]['number']}")
            began = time.monotonic()
            try:
                datastore, said = run(env, job.path, *options, limit_s=LIMIT)
            except subprocess.TimeoutExpired:
                self.record(_row(job.key, "timeout", "", LIMIT))
                continue
            row = _row(job.key, "complete", "", round(time.monotonic() - began, 2))
            if datastore is None:
                row |= {"state": "failed", "error": said}
            else:
                row["number"] = int(datastore.stem.removeprefix("calc_"))
                os.link(datastore, self.out / f"{job.key}.hdf5")
            self.record(row)


class InOneProcess(Side):
    """Many jobs in one process, which imports the engine once.

    :param mode: the engine's ``oq_distribute``: ``processpool``, or ``zmq`` for the runtime
    :param options: of the runner
    """

    def __init__(
        self, name: str, mode: str, out: Path, cores: int, keep: bool, options: Sequence[str] = ()
    ) -> None:
        super().__init__(name, out, cores, keep)
        self.mode, self.options = mode, options

    def environment(self) -> dict[str, str]:
        config = self.out / "openquake.cfg"
        text = f"[dbserver]\nfile = {self.out / 'db.sqlite3'}\n"
        if self.mode == "zmq":
            text += "[distribution]\noq_distribute = zmq\n"
            text += f"[oq_runtime]\ncode = import oq_runtime.activate\ncores = {self.cores}\n"
        config.write_text(text)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {
            **os.environ,
            "OQ_CONFIG_FILE": str(config),
            "OQ_DATADIR": str(self.oqdata),
            "OQ_NUM_CORES": str(self.cores),
            "OQ_DISTRIBUTE": self.mode,
            "CI": "true",
            "PYTHONPATH": path,
            "PYTHONHASHSEED": "0",  # the engine stores lists made from sets
        }

    def run(self, jobs: Sequence[Job], parents: dict[str, Job]) -> None:
        left = [job for job in jobs if job.key not in self.rows]
        while left:
            print(f"{self.name}: {len(left)} jobs left", flush=True)
            self._batch(_cases(left[:BATCH], parents))
            for job in left:
                parent = parents.get(job.key)
                if parent and self.rows.get(parent.key, {}).get("state", "complete") != "complete":
                    self.record(_row(job.key, "failed", "its parent failed", 0))
            left = [job for job in left if job.key not in self.rows]

    def _batch(self, cases: list[list[str | None]]) -> None:
        """Run the cases in one process, as far as it lives, and record their rows."""
        # a job that was killed stays "executing", and the engine would wait for it for ever
        shutil.rmtree(self.oqdata)
        self.oqdata.mkdir()
        (self.out / "db.sqlite3").unlink(missing_ok=True)
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "tests.conformance.runner", "--mode", self.mode]
        command += ["--out", str(self.out), "--report-fd", str(writer)]
        command += self.options
        with (self.out / "stdout").open("a") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                pass_fds=[writer],
                start_new_session=True,
                text=True,
            )
        os.close(writer)
        assert process.stdin is not None
        process.stdin.write(json.dumps(cases))
        process.stdin.close()
        try:
            with os.fdopen(reader, "rb", buffering=0) as stream:
                for row in _read_rows(stream, process, [str(case[0]) for case in cases]):
                    self.record(row)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read_rows(stream: RawIOBase, process: subprocess.Popen[str], keys: list[str]) -> Iterator[Row]:
    for key in keys:
        row = _read_row(stream, process, key)
        yield row
        if row["state"] in ("died", "timeout"):
            return
    _wait(process)


def _read_row(stream: RawIOBase, process: subprocess.Popen[str], key: str) -> Row:
    """The row of one job; a worker may hold the pipe open, so the process is watched as well."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ready, _, _ = select.select([stream], [], [], 1)
        if ready and (line := stream.readline()):
            row: Row = json.loads(line)
            if row["state"] != "started":
                return row
        elif ready or process.poll() is not None:
            return _row(key, "died", f"exit code {_wait(process)}", 0)
    return _row(key, "timeout", "", LIMIT)


def _row(key: str, state: str, error: str, seconds: float) -> Row:
    return {"key": key, "state": state, "error": error, "seconds": seconds}


def _wait(process: subprocess.Popen[str]) -> int | None:
    """Let the process close its workers; the caller kills what is left of the group."""
    try:
        return process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        return None


def _cases(jobs: Sequence[Job], parents: dict[str, Job]) -> list[list[str | None]]:
    """The cases of one process: a parent goes before its child, also when it ran before."""
    cases: dict[str, list[str | None]] = {}
    for job in jobs:
        parent = parents.get(job.key)
        if parent:
            cases.setdefault(parent.key, [parent.key, str(parent.path), None])
        cases.setdefault(job.key, [job.key, str(job.path), parent.key if parent else None])
    return list(cases.values())


def parser_of_jobs(program: str) -> argparse.ArgumentParser:
    """Return a parser of what ``choose`` reads, and of the number of cores."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", type=int, metavar="N", help="N jobs, evenly over the modes")
    which.add_argument("--jobs", metavar="NAMES", help="jobs by path, separated by blanks")
    which.add_argument("--all", action="store_true", help="the whole corpus")
    which.add_argument("--fixed", action="store_true", help="the jobs of fixed.txt (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--cores", type=int, default=2)
    return parser


def choose(args: argparse.Namespace, jobs: list[Job]) -> list[Job]:
    if args.all:
        return jobs
    if args.sample:
        return sample(jobs, args.sample, args.seed)
    text = args.jobs or FIXED.read_text()
    names = [word for line in text.splitlines() for word in line.partition("#")[0].split()]
    keys = {name.removesuffix(".ini").replace("/", "__") for name in names}
    unknown = keys - {job.key for job in jobs}
    if unknown and not args.jobs:
        print(f"not in the corpus of this engine: {' '.join(sorted(unknown))}")
    elif unknown:
        raise SystemExit(f"not in the corpus: {' '.join(sorted(unknown))}")
    return [job for job in jobs if job.key in keys]


def with_parents(chosen: list[Job], jobs: list[Job]) -> tuple[list[Job], dict[str, Job]]:
    parents = {job.key: parent for job in chosen if (parent := parent_of(job, jobs))}
    ordered: dict[str, Job] = {}
    for job in chosen:
        for each in (parents.get(job.key), job):
            if each:
                ordered.setdefault(each.key, each)
    return list(ordered.values()), parents


def judge(job: Job, reference: Side, runtime: Side) -> dict[str, object]:
    ref, ours = reference.rows[job.key], runtime.rows.get(job.key)
    report: dict[str, object] = {
        "job": job.name,
        "mode": job.mode,
        "reference_seconds": ref["seconds"],
        "runtime_seconds": ours["seconds"] if ours else None,
        "differences": [],
    }
    if ours is None:
        report["state"] = "reference_failed"
        report["differences"] = [f"reference {ref['state']}: {ref['error']}"]
    elif ours["state"] != "complete":
        report["state"] = "runtime_failed"
        report["differences"] = [f"runtime {ours['state']}: {ours['error']}"]
    else:
        name = f"{job.key}.hdf5"
        diffs = compare(reference.out / name, runtime.out / name)
        report["state"] = "different" if diffs else "identical"
        report["differences"] = diffs[:5]
    return report


def main() -> int:
    parser = parser_of_jobs("tests.conformance")
    parser.add_argument("--build", type=Path, default=Path("build/conformance"))
    parser.add_argument("--report", type=Path, help="JSON file with the result of each job")
    parser.add_argument("--runtime-mode", help="in one process, with this of the engine's modes")
    args = parser.parse_args()

    jobs = list_jobs()
    chosen, parents = with_parents(choose(args, jobs), jobs)
    base = args.build.resolve() / importlib.metadata.version("openquake.engine")
    reference = InOneProcess("reference", "processpool", base / "reference", args.cores, keep=True)
    reference.run(chosen, parents)
    runtime: Command | InOneProcess = Command("runtime", base / "runtime", args.cores, keep=False)
    if mode := args.runtime_mode:
        runtime = InOneProcess("runtime", mode, base / "runtime", args.cores, keep=False)
    possible = [job for job in chosen if reference.rows[job.key]["state"] == "complete"]
    runtime.run(possible, parents)

    reports = [judge(job, reference, runtime) for job in chosen]
    for report in reports:
        if report["state"] in ("different", "runtime_failed"):
            print(report["state"], report["job"], report["differences"])
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(reports, indent=1) + "\n")
    states = [report["state"] for report in reports]
    failed = states.count("reference_failed")
    different = states.count("different") + states.count("runtime_failed")
    print(
        f"compared={len(states) - failed} identical={states.count('identical')}"
        f" different={different} reference_failed={failed}"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
