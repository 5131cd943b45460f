"""Where the time of a job went, in ten lines at most.

Reads the datastore without the engine. Of a job whose attempts are not kept, because the engine ran
it alone, it tells what the engine's own tables have, and what is missing.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import h5py

from oq_runtime.core import explain
from oq_runtime.core.explain import Cause, Division, Finding, Job, Use
from oq_runtime.core.ledger import FAULTS
from oq_runtime.engine import kept
from oq_runtime.errors import InputError
from oq_runtime.text import clean, counted, duration, nbytes

MOST_LINES = 10
#: functions, nodes, reasons and causes that are told of
MOST = 3
#: characters of a description, and of a reason
DESCRIPTION_CHARACTERS, REASON_CHARACTERS = 60, 110
#: of a line
LINE_CHARACTERS = 500
#: part of the slot time from which a use is told
TOLD = 0.005


def find(datadir: Path, number: int) -> Path:
    """Return the datastore of a job; -1 stands for the last one, -2 for the one before.

    :raises InputError: where there is none
    """
    if number < 0:
        there = sorted(
            int(found[1])
            for path in datadir.glob("calc_*.hdf5")
            if (found := re.fullmatch(r"calc_(\d+)\.hdf5", path.name))
        )
        if len(there) < -number:
            raise InputError(f"job {number}: {datadir} has {counted(len(there), 'job')}")
        number = there[number]
    path = datadir / f"calc_{number}.hdf5"
    try:
        path.stat()
    except OSError as exc:
        remedy = "oq engine --lhc lists the jobs"
        raise InputError(f"job {number}: {path}: {exc.strerror}; {remedy}") from exc
    return path


def explained(path: Path) -> dict[str, Any]:
    """Return what there is to tell of a datastore.

    :returns: ``lines`` for people; ``uses``, parts of the slot time, and ``causes``, the parts that
        they have cost, where the attempts are kept
    :raises InputError: where it cannot be read
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _explained(path, file)
    except Exception as exc:  # what is damaged, or made by others, may be so in any way
        what = clean(str(exc)) or type(exc).__name__
        raise InputError(f"{path}: {what}; is it the datastore of a job?") from exc


def _explained(path: Path, file: h5py.File) -> dict[str, Any]:
    about, job = _about(path, file), kept.read(file)
    if job is None:
        first, *others = _engines(file)
        return {"lines": [about + first, *others], "uses": {}, "causes": {}}
    facts = file[kept.GROUP].attrs
    division = explain.divide(job)
    causes = explain.causes(job, division)
    first, *others = lines(job, division, causes, int(facts["replayed"]))
    return {
        "lines": [f"{about}: {facts['state']}, {first}", *others],
        "uses": {use.name.lower(): round(division.part(use), 4) for use in Use},
        "causes": parts(causes),
    }


def parts(causes: Sequence[Finding]) -> dict[str, float]:
    """Return what each cause has cost, of all nodes or functions that have it; the worst first."""
    found: dict[str, float] = defaultdict(float)
    for one in causes:
        found[one.cause.name.lower()] += one.part
    return {name: round(part, 4) for name, part in found.items()}


def _about(path: Path, file: h5py.File) -> str:
    """Say what the job is."""
    text = file["oqparam"][()] if isinstance(file.get("oqparam"), h5py.Dataset) else b"{}"
    params = json.loads(text)
    mode = params.get("calculation_mode", "unknown")
    what = clean(str(params.get("description", "")), DESCRIPTION_CHARACTERS)
    number = path.stem.removeprefix("calc_")
    return f"job {number}, {mode}" + (f" ({what})" if what else "")


# ---- of a job whose attempts are kept


def lines(job: Job, division: Division, causes: Sequence[Finding], replayed: int = 0) -> list[str]:
    """Return what there is to tell: first how long it took, last what to do.

    :param replayed: tasks whose results were taken over from an earlier run
    """
    nodes = {one.node: 0 for one in job.shares}
    for one in job.shares:
        nodes[one.node] = max(nodes[one.node], one.slots)
    slots = sum(nodes.values())
    place = counted(slots, "slot")
    place = f"{counted(len(nodes), 'node')}, {place}" if len(nodes) > 1 else place
    told = [f"{duration(job.seconds)}, {place}"]
    if replayed:
        told[0] += f"; {counted(replayed, 'task')} taken over from an earlier run"
    if not job.attempts:
        return [*told, "no task was run on a slot"]
    told += [_tasks(job), _efficiency(division)]
    if waits := _waits(job):
        told.append(waits)
    told.append(_bytes(job))
    if len(nodes) > 1:
        told.append(_nodes(job, nodes))
    told.append(_retried(job))
    for number, cause in enumerate(causes[: min(MOST, MOST_LINES - len(told) - 1)]):
        told.append(f"cause{', too' if number else ''}: {WORDS[cause.cause](cause, job)}")
    if causes:
        told.append(f"to do: {REMEDIES[causes[0].cause](causes[0], job)}")
    else:
        told.append("nothing stands out that you could change")
    return told


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.095 or part == 0 else f"{100 * part:.1f} %"


def _tasks(job: Job) -> str:
    by_func: dict[str, list[float]] = defaultdict(list)
    for one in job.attempts:
        if one.counts:
            by_func[one.func].append(one.ran_s)
    longest = sorted(by_func.items(), key=lambda item: -sum(item[1]))
    told = [
        f"{len(ran)} {func} (median {_short_time(median(ran))}, longest {_short_time(max(ran))})"
        for func, ran in longest[:MOST]
    ]
    if rest := longest[MOST:]:
        told.append(f"{sum(len(ran) for _, ran in rest)} others")
    return f"tasks: {', '.join(told) or 'none came to its end'}"


def _short_time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 0.1 else duration(seconds)


def _efficiency(division: Division) -> str:
    uses = [use for use in Use if use is not Use.COMPUTED and division.part(use) >= TOLD]
    uses.sort(key=division.part, reverse=True)
    lost = ", ".join(f"{_percent(division.part(use))} {use}" for use in uses)
    told = f"slot efficiency {_percent(division.part(Use.COMPUTED))}"
    return f"{told}; lost: {lost}" if lost else told


def _waits(job: Job) -> str:
    measured = [one for one in job.attempts if one.counts and one.cpu_s]
    if not (ran_s := sum(one.ran_s for one in measured)):
        return ""
    queued = sum(one.queued_s for one in measured) / ran_s
    blocked = sum(one.blocked_s for one in measured) / ran_s
    on_cpu = max(0.0, 1 - queued - blocked)
    return (
        f"time of the tasks: {_percent(on_cpu)} on a CPU, {_percent(queued)} waiting for one, "
        f"{_percent(blocked)} waiting for files or memory"
    )


def _bytes(job: Job) -> str:
    results = sum(one.out_bytes for one in job.attempts if one.counts)
    told = f"results {nbytes(results)}"
    if peak := max(job.attempts, key=lambda one: one.peak_bytes).peak_bytes:
        told += f"; memory of a task at most {nbytes(peak)}"
    return told


def _nodes(job: Job, nodes: dict[str, int]) -> str:
    done = Counter(one.node for one in job.attempts if one.counts)
    named = sorted(nodes, key=lambda node: -done[node])
    told = [
        f"{node} {counted(done[node], 'task')} on {counted(nodes[node], 'slot')}"
        for node in named[:MOST]
    ]
    if rest := named[MOST:]:
        told.append(f"{sum(done[node] for node in rest)} on {len(rest)} others")
    return f"nodes: {', '.join(told)}"


def _retried(job: Job) -> str:
    failed = Counter(one.reason for one in job.attempts if one.outcome in FAULTS)
    if not failed:
        return "retries: none"
    told = [f"{count} × {_short(reason)}" for reason, count in failed.most_common(2)]
    if len(failed) > 2:
        told.append(f"{sum(failed.values()) - sum(c for _, c in failed.most_common(2))} more")
    return f"faults: {'; '.join(told)}"


def _short(reason: str) -> str:
    return clean(reason, REASON_CHARACTERS)


Words = Callable[[Finding, Job], str]


def _straggler(one: Finding, job: Job) -> str:
    assert one.attempt is not None
    return (
        f"{one.cause}: task #{one.attempt.task} of {one.attempt.func} took "
        f"{duration(one.attempt.ran_s)} on {one.node}, the median is {duration(one.seconds)}; "
        f"while it ran alone {_percent(one.part)} of the slot time passed"
    )


def _late(one: Finding, job: Job) -> str:
    return (
        f"{one.cause}: {one.node} came {duration(one.seconds)} after the first task; its slots "
        f"would have been {_percent(one.part)} more"
    )


def _slow(one: Finding, job: Job) -> str:
    why = f"; {one.reason}" if one.reason else ""
    return (
        f"{one.cause}: {one.node} takes {one.factor:.1f} times as long as the others for the same"
        f"{why}; that cost {_percent(one.part)} of the slot time"
    )


def _swapping(one: Finding, job: Job) -> str:
    return (
        f"{one.cause}: on {one.node} {one.factor:.0f} pages of memory a second were read from the "
        f"disk; waiting for them cost {_percent(one.part)} of the slot time"
    )


def _files(one: Finding, job: Job) -> str:
    return (
        f"{one.cause}: tasks waited {_percent(one.factor)} of their time for something that is "
        f"neither CPU nor memory; that cost {_percent(one.part)} of the slot time"
    )


def _retries(one: Finding, job: Job) -> str:
    where = f" on {one.node}" if one.node else ""
    return f"{one.cause}: {one.number} attempts failed{where}, most: {_short(one.reason)}"


WORDS: dict[Cause, Words] = {
    Cause.STRAGGLER: _straggler,
    Cause.FEW_TASKS: lambda one, job: (
        f"{one.cause}: {one.reason} had {counted(one.number, 'task')}, which left "
        f"{_percent(one.part)} of the slot time without work"
    ),
    Cause.SLOW_NODE: _slow,
    Cause.SWAPPING: _swapping,
    Cause.SLOW_FILES: _files,
    Cause.BUSY_CPUS: lambda one, job: (
        f"{one.cause}: tasks waited {_percent(one.factor)} of their time for a CPU; that cost "
        f"{_percent(one.part)} of the slot time"
    ),
    Cause.BIG_RESULTS: lambda one, job: (
        f"{one.cause}: slots had nothing to do for {_percent(one.part)} of the slot time while "
        f"{nbytes(one.number)} were on their way to the engine"
    ),
    Cause.RETRIES: _retries,
    Cause.LATE_NODE: _late,
}
REMEDIES: dict[Cause, Words] = {
    Cause.STRAGGLER: lambda one, job: (
        "raise concurrent_tasks in the job file, so that the engine cuts its work into smaller "
        "tasks"
    ),
    Cause.FEW_TASKS: lambda one, job: (
        "raise concurrent_tasks in the job file; where the work cannot be cut further, fewer slots "
        "do as well"
    ),
    Cause.SLOW_NODE: lambda one, job: (
        f"see what else runs on {one.node}, or give it fewer slots in host_cores of openquake.cfg"
    ),
    Cause.SWAPPING: lambda one, job: (
        f"give {one.node} fewer slots in host_cores of openquake.cfg, or more memory: one task "
        f"there had {nbytes(one.number)}"
    ),
    Cause.SLOW_FILES: lambda one, job: (
        "look at the disk, or the file server, that has the datastore (shared_dir)"
    ),
    Cause.BUSY_CPUS: lambda one, job: (
        "end what else runs there, or give the nodes no more slots than they have CPUs"
    ),
    Cause.BIG_RESULTS: lambda one, job: (
        "ask for less (ground_motion_fields, individual_rlzs, asset-level results), or give the "
        "master a faster network"
    ),
    Cause.RETRIES: lambda one, job: (
        f"find out why{f' on {one.node}' if one.node else ''}: oq-workers debug, and journalctl -u "
        "openquake-worker on the node"
    ),
    Cause.LATE_NODE: lambda one, job: "let oq-workers wait end before the job begins",
}


# ---- of a job of the engine alone


def _engines(file: h5py.File) -> list[str]:
    """Return what the engine's own tables say; the first one goes on with the line of the job."""
    seconds = 0.0
    if "performance_data" in file:
        for row in file["performance_data"][:]:
            if row["operation"].endswith(b".run"):
                seconds = max(seconds, float(row["time_sec"]))
    told = [f": {duration(seconds)}" if seconds else ""]
    by_func: dict[str, list[Any]] = defaultdict(list)
    for row in file["task_info"][:] if "task_info" in file else ():
        by_func[row["taskname"].decode()].append(row)
    for func, rows in sorted(
        by_func.items(), key=lambda item: -sum(r["duration"] for r in item[1])
    ):
        ran = [float(row["duration"]) for row in rows]
        worst = max(rows, key=lambda row: row["duration"])
        told.append(
            f"{func}: {counted(len(ran), 'task')}, {duration(sum(ran))} in all, "
            f"{duration(median(ran))} median; the longest, #{worst['task_no']}, took "
            f"{duration(max(ran))}; results {nbytes(float(sum(row['received'] for row in rows)))}"
        )
        if len(told) > MOST:
            break
    if len(told) == 1:
        told.append("no task was run on a worker")
    return [
        *told,
        "not known: when, where and on how many slots the tasks ran, and what failed; a job of "
        "oq-run has that at its end, unless its process was killed",
    ]
