"""How far jobs replay: each is run once with a journal, and then again from that journal.

    python -m tests.resume [--sample N --seed S | --jobs "p1 p2" | --all]

One table row per calculation mode: jobs, those that replayed to the end, and results replayed of
those that were kept; then each job that did not, with the reason, and each whose results differ
from those of the first run. Exit code 1 when results differ or a job fails in the replay only.
Not covered: jobs that are killed (``tests/local/test_resume.py``).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from tests.conformance.__main__ import Row, Side, choose, parser_of_jobs, with_parents
from tests.conformance.compare import compare
from tests.conformance.corpus import Job, list_jobs


def verdict(job: Job, first: Side, again: Side) -> str:
    """Return what is wrong with the replay of a job; nothing when all is well."""
    row = again.rows[job.key]
    if row["state"] != "complete":
        return f"failed: {row['error']}"
    name = f"{job.key}.hdf5"
    if differences := compare(first.out / name, again.out / name):
        return f"other results: {differences[:3]}"
    if row["replayed"] < first.rows[job.key]["results"]:
        return "; ".join(row["told"]) or row["stopped"]
    return ""


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
    first = Side("first", "zmq", where, args.cores, keep=False, options=options)
    first.run(chosen, parents)
    shutil.rmtree(base / "first", ignore_errors=True)
    first.out = where.rename(base / "first")
    chosen = [job for job in chosen if first.rows[job.key]["state"] == "complete"]
    options.append("--replay")
    again = Side("replay", "zmq", where, args.cores, keep=False, options=options)
    again.run(chosen, parents)

    bad = 0
    modes: dict[str, list[Row]] = defaultdict(list)
    for job in chosen:
        wrong = verdict(job, first, again)
        replayed = again.rows[job.key].get("replayed", 0)
        modes[job.mode].append(first.rows[job.key] | {"wrong": wrong, "replayed": replayed})
        if wrong:
            bad += wrong.startswith(("failed", "other results"))
            print(f"{job.name}: {wrong}")
    for mode, rows in sorted(modes.items()):
        whole = sum(not row["wrong"] for row in rows)
        replayed, kept = (sum(row[name] for row in rows) for name in ("replayed", "results"))
        print(f"{mode}: {whole} of {len(rows)} jobs to the end, {replayed} of {kept} results")
    whole = sum(not row["wrong"] for rows in modes.values() for row in rows)
    print(f"jobs={len(chosen)} replayed_to_the_end={whole} wrong={bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
