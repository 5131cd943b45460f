"""The jobs of the installed engine's own corpus (``openquake/qa_tests_data``).

Covers finding the job files without importing the engine, their calculation modes, an even sample
over the modes, and which job is the first stage (``--hc``) of another one. Not covered: running
jobs (``runner``, ``__main__``) and comparing results (``compare``).
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODE = re.compile(r"^[ \t]*calculation_mode[ \t]*[=:][ \t]*(\w+)", re.MULTILINE)

# stem of a second stage -> stems of its first stage; they pair when both are in the same folder
FIRST_STAGES = {
    "job_risk": ("job_haz", "job_hazard"),
    "job_r": ("job_h",),
    "job": ("prejob", "pre-job", "prepare_job"),
    "job_zipped": ("prepare_job",),
}


@dataclass(frozen=True)
class Job:
    key: str  # relative path without .ini and with __ for /
    path: Path
    mode: str

    @property
    def name(self) -> str:
        return self.key.replace("__", "/")


def corpus_dir() -> Path:
    spec = importlib.util.find_spec("openquake.baselib")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no engine: openquake.baselib is not importable")
    folder = Path(next(iter(spec.submodule_search_locations))).parent / "qa_tests_data"
    if not folder.is_dir():
        raise SystemExit(f"the engine was installed without its corpus: {folder}")
    return folder


def calculation_mode(path: Path) -> str:
    found = MODE.search(path.read_text(encoding="utf-8-sig", errors="replace"))
    return found.group(1) if found else "unknown"


def list_jobs() -> list[Job]:
    """Every ``job*.ini``, and the few first stages with another name (``pre*job.ini``)."""
    base = corpus_dir()
    paths = {*base.glob("**/job*.ini"), *base.glob("**/pre*job.ini")}
    return [
        Job(
            path.relative_to(base).with_suffix("").as_posix().replace("/", "__"),
            path,
            calculation_mode(path),
        )
        for path in sorted(paths)
    ]


def sample(jobs: Sequence[Job], n: int, seed: int) -> list[Job]:
    """Draw up to ``n`` jobs, one calculation mode after the other."""
    by_mode: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_mode[job.mode].append(job)
    rng = random.Random(seed)
    pools = [by_mode[mode] for mode in sorted(by_mode)]
    for pool in pools:
        rng.shuffle(pool)
    drawn: list[Job] = []
    while len(drawn) < n and any(pools):
        for pool in pools:
            if pool and len(drawn) < n:
                drawn.append(pool.pop())
    return drawn


def parent_of(job: Job, jobs: Sequence[Job]) -> Job | None:
    """The job of the same folder whose results ``job`` starts from, by its name."""
    by_path = {other.path: other for other in jobs}
    for stem in FIRST_STAGES.get(job.path.stem, ()):
        parent = by_path.get(job.path.with_name(f"{stem}.ini"))
        if parent:
            return parent
    return None
