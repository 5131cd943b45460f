"""Jobs that begin with the results of another one, held against jobs that begin with nothing.

    python -m tests.reuse [--sample N --seed S | --jobs "p1 p2" | --all] [--changes N]

Each job is run with ``--reuse``, and then with N changes of its parameters, taken by chance from
the job file: a number becomes a tenth less, an integer one more, true becomes false. Each change is
run twice, with ``--reuse`` and without a journal, and the datastores are compared. One line per
change: what was taken over of the results, and what differs. Exit code 1 when something does, or
when a job fails with ``--reuse`` alone.
"""

from __future__ import annotations

import configparser
import random
import re
import sys
import tempfile
from pathlib import Path

from tests.conformance.__main__ import choose, parser_of_jobs
from tests.conformance.compare import compare
from tests.conformance.corpus import list_jobs, parent_of
from tests.own_engine import private_engine, run

NUMBERS = re.compile(r"[-+.\deE]+([\s,]+[-+.\deE]+)*")
TOOK_OVER = re.compile(r"took over the results of (\d+) tasks")


def changed(text: str) -> str:
    """Return another value of a parameter; nothing where none is known."""
    if text.lower() in ("true", "false"):
        return str(text.lower() == "false").lower()
    if not NUMBERS.fullmatch(text):
        return ""
    if text.isdecimal():
        return str(int(text) + 1)
    return re.sub(r"[-+.\deE]+", lambda found: f"{float(found.group()) * 0.9:.6g}", text)


def changes(path: Path) -> list[str]:
    """Return the changes that can be made to a job file, as ``name=value``."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.read_string(path.read_text(encoding="utf-8-sig"))
    found = {name: value for section in parser.sections() for name, value in parser.items(section)}
    return [f"{name}={other}" for name, value in found.items() if (other := changed(value))]


def held_against(env: dict[str, str], job: Path, change: str) -> tuple[str, bool]:
    """Return a line about a change, and whether all is well."""
    fresh, said = run(env, job, "-p", change, "--no-journal")
    if fresh is None:
        return f"not possible: {said[:100]}", True
    begun, said = run(env, job, "-p", change, "--reuse")
    if begun is None:
        return f"failed: {said}", False
    found = TOOK_OVER.search(said)
    differences = compare(fresh, begun)
    what = f"results of {found.group(1) if found else 0} tasks taken over, "
    return what + (f"differs: {differences[:3]}" if differences else "equal"), not differences


def main() -> int:
    parser = parser_of_jobs("tests.reuse")
    parser.add_argument("--changes", type=int, default=4)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    jobs = list_jobs()
    tried = wrong = 0
    with tempfile.TemporaryDirectory() as name:
        env = private_engine(Path(name))
        for job in choose(args, jobs):
            possible = [] if parent_of(job, jobs) else changes(job.path)
            if not possible:
                print(f"{job.name}: needs another job, or nothing in it can be changed")
                continue
            begun, said = run(env, job.path, "--reuse")
            if begun is None:
                wrong += run(env, job.path, "--no-journal")[0] is not None
                print(f"{job.name}: {said}")
                continue
            for change in rng.sample(possible, min(args.changes, len(possible))):
                said, good = held_against(env, job.path, change)
                tried, wrong = tried + 1, wrong + (not good)
                print(f"{job.name} {change}: {said}", flush=True)
    print(f"changes={tried} wrong={wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
