"""How far jobs replay: each is run once with a journal, and then again from that journal.

    python -m tests.resume [--sample N --seed S | --jobs "p1 p2" | --all]

One table row per calculation mode: jobs that have results, those that replayed to the end, and
results replayed of those that were kept; then each job that did not, with the reason, and each
whose results differ from those of the first run. Exit code 1 when results differ or a job fails in
the replay only.
Then for each mode its parameters that do not matter from the start: what ``oq-run --reuse`` can
take over for other values, up to which function, in the job of the mode where that is least.
Not covered: jobs that are killed (``tests.kills``).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from oq_runtime.engine.reads import ALL
from oq_runtime.files.journal import Consumed, Reader, Submitted, Used
from tests.conformance.__main__ import InOneProcess, Row, choose, parser_of_jobs, with_parents
from tests.conformance.compare import compare
from tests.conformance.corpus import Job, list_jobs


def verdict(job: Job, first: InOneProcess, again: InOneProcess) -> str:
    """Return what is wrong with the replay of a job; nothing when all is well."""
    row = again.rows[job.key]
    if row["state"] != "complete":
        return f"failed: {row['error']}"
    name = f"{job.key}.hdf5"
    if differences := compare(first.out / name, again.out / name):
        return f"other results: {differences[:3]}"
    if row["replayed"] < first.rows[job.key]["results"]:
        return "; ".join([*row["told"], row["stopped"]]).strip("; ")
    if stopped := first.rows[job.key]["stopped"]:
        return f"its journal has ended before it: {stopped}"
    return ""


def matters(directory: Path) -> dict[str, tuple[float, str]]:
    """Return of each parameter of a job how many of its results it does not matter to.

    :returns: as a part of all results, and the function of the last of these
    """
    reader = Reader(directory)
    events = [record.event for record in reader.records]
    names = {name for name in reader.head["values"] if not name.startswith("_")}
    all_results = reader.results
    funcs = {
        (event.map, event.task): event.func for event in events if isinstance(event, Submitted)
    }
    found: dict[str, tuple[float, str]] = {}
    given: dict[tuple[int, int], tuple[float, str]] = {}  # before each result
    now = 0.0, ""
    for event in events:
        if isinstance(event, Consumed):
            key = event.map, event.task
            given[key] = now
            now = (len(given) / all_results, funcs[key].rpartition(".")[2])
        elif isinstance(event, Used):
            at = given.get((event.map, event.task), now)
            for name in names if ALL in event.names else names.intersection(event.names):
                found[name] = min(found.get(name, at), at)
    return {name: (1.0, "all") for name in names} | found


def main() -> int:
    parser = parser_of_jobs("tests.resume")
    parser.add_argument("--build", type=Path, default=Path("build/resume"))
    args = parser.parse_args()

    chosen, parents = with_parents(choose(args, jobs := list_jobs()), jobs)
    base = args.build.resolve() / importlib.metadata.version("openquake.engine")
    journals = base / "journals"
    shutil.rmtree(journals, ignore_errors=True)
    journals.mkdir(parents=True)
    options = ["--journals", str(journals)]
    where = base / "run"  # of both: a job that goes on has the same data directory
    first = InOneProcess("first", "zmq", where, args.cores, keep=False, options=options)
    first.run(chosen, parents)
    shutil.rmtree(base / "first", ignore_errors=True)
    first.out = where.rename(base / "first")
    options.append("--replay")
    again = InOneProcess("replay", "zmq", where, args.cores, keep=False, options=options)
    again.run(chosen, parents)  # also those that have failed, so that each has its number of then
    chosen = [job for job in chosen if first.rows[job.key]["state"] == "complete"]

    bad = 0
    modes: dict[str, list[Row]] = defaultdict(list)
    for job in chosen:
        wrong = verdict(job, first, again)
        replayed = again.rows[job.key].get("replayed", 0)
        modes[job.mode].append(first.rows[job.key] | {"wrong": wrong, "replayed": replayed})
        if wrong:
            bad += wrong.startswith(("failed", "other results"))
            print(f"{job.name}: {wrong}")
    with_results = {mode: [row for row in rows if row["results"]] for mode, rows in modes.items()}
    for mode, rows in sorted(with_results.items()):
        whole = sum(not row["wrong"] for row in rows)
        replayed, kept = (sum(row[name] for row in rows) for name in ("replayed", "results"))
        print(f"{mode}: {whole} of {len(rows)} jobs to the end, {replayed} of {kept} results")
    print("parameters, and the results of their calculation mode that hold for other values:")
    for mode in sorted({job.mode for job in chosen}):
        found: dict[str, tuple[float, str]] = {}
        for job in chosen:
            if job.mode == mode and first.rows[job.key]["results"]:
                for name, part in matters(journals / job.key).items():
                    found[name] = min(found.get(name, part), part)
        for until in dict.fromkeys(sorted(found.values(), reverse=True)):
            names = sorted(name for name, part in found.items() if part == until)
            if until[0]:
                print(f"{mode}, {until[1]} ({until[0]:.0%}): {', '.join(names)}")
    counted = [row for rows in with_results.values() for row in rows]
    whole = sum(not row["wrong"] for row in counted)
    of_them = f"of {len(counted)} with results, {whole / max(len(counted), 1):.1%}"
    print(f"jobs={len(chosen)} replayed_to_the_end={whole} ({of_them}) wrong={bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
