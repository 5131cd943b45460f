"""Where the time of a job went, and why it did not take less.

Slot time is slots times seconds. ``divide`` splits all that a job had into USES, to the last
second; ``causes`` looks in the parts that were lost for what a person can change. Pure: a job is
what ``ledger`` has noted of its attempts. Not covered: words (``commands.explain``).
"""

from __future__ import annotations

import enum
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from oq_runtime.core.ledger import FAULTS, Outcome

#: fields of an attempt that are moments
TIMES = ("submitted_s", "assigned_s", "started_s", "ended_s", "granted_s", "over_s")
#: part of the slot time that a cause has to have cost to be named
WORTH = 0.05
#: a straggler takes so many times as long as the median of its function, of which there are so many
STRAGGLES, ALIKE = 2.0, 3
#: a slow node takes so many times as long for the same, in at least so many attempts
SLOW, TRIED = 1.5, 3
#: part of the time of tasks that they wait for something else than a CPU, or for a CPU, and it
#: counts; faults of memory per second with which it is the memory that they wait for
WAITS, SWAPS = 0.25, 20.0
#: retries that are a storm: so many, and such a part of all tasks
STORM, STORM_PART = 3, 0.05
#: seconds after the first task, and part of the job, by which a node is late
LATE_SECS, LATE_PART = 2.0, 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """See ``ledger.FIELDS``; times from the start of the job."""

    task: int
    func: str
    attempt: int
    node: str
    slot: int
    outcome: Outcome
    reason: str
    weight: float
    submitted_s: float
    assigned_s: float
    started_s: float
    ended_s: float
    granted_s: float
    over_s: float
    cpu_s: float = 0.0
    queued_s: float = 0.0
    faults: int = 0
    peak_bytes: int = 0
    in_bytes: int = 0
    out_bytes: int = 0

    @property
    def ran_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def counts(self) -> bool:
        return self.outcome is Outcome.COMMITTED

    @property
    def blocked_s(self) -> float:
        """Time in which it neither had a CPU nor wanted one: for files, or memory."""
        return max(0.0, self.ran_s - self.cpu_s - self.queued_s)


@dataclass(frozen=True, slots=True)
class Share:
    """From ``at_s`` on a node has so many slots; ``reason``: why it has none any more."""

    at_s: float
    node: str
    slots: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What is kept of a job.

    ``seconds`` from the start of the job to its end; shares in the order of time.
    """

    seconds: float
    attempts: Sequence[Attempt]
    shares: Sequence[Share]


class Use(enum.StrEnum):
    """What slots were used for, or why they were not; the value is for people."""

    COMPUTED = "computed"
    WASTED = "attempts that did not count"
    ARGUMENTS = "tasks waiting for a worker or arguments"
    RESULTS = "results on their way"
    UNDEALT = "tasks waiting while nodes took none"
    TAIL = "ends of phases"
    FEW = "too few tasks"
    ENGINE = "the engine alone"


class Cause(enum.StrEnum):
    """What a person may be able to change."""

    STRAGGLER = "one straggler"
    FEW_TASKS = "too few tasks"
    SLOW_NODE = "a slow node"
    SWAPPING = "a node that swaps"
    SLOW_FILES = "slow shared files"
    BUSY_CPUS = "CPUs that others use"
    BIG_RESULTS = "results too big for the wire"
    RETRIES = "a retry storm"
    LATE_NODE = "a node that joined late"


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause, the part of the slot time that it has cost, and the figures to tell of it.

    ``node``, ``attempt``: which one, where it is one. ``factor``: times as long, or part of the
    time; ``number``: of what the cause is about; ``seconds``: how late.
    """

    cause: Cause
    part: float
    node: str = ""
    attempt: Attempt | None = None
    factor: float = 0.0
    number: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(slots=True)
class Division:
    """Slot seconds. ``uses``: all; ``few_s``: of too few tasks, by function.

    ``solo_s``: of those lost as that use, in which this attempt alone ran.
    """

    uses: dict[Use, float] = field(default_factory=lambda: dict.fromkeys(Use, 0.0))
    few_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    solo_s: dict[tuple[Attempt, Use], float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total_s(self) -> float:
        return sum(self.uses.values())

    def part(self, use: Use) -> float:
        """Return which part of all slot time it is."""
        return self.uses[use] / self.total_s if self.total_s else 0.0


# ---- the division of the slot time


class Step(enum.Enum):
    """What changes at a moment, in the order in which changes of one moment are taken."""

    SLOTS = 0
    QUEUED = 1
    COMING = 2
    RUNNING = 3
    WAITING = 4
    SENDING = 5


@dataclass(slots=True)
class _Node:
    slots: int = 0
    coming: int = 0
    good: int = 0
    bad: int = 0

    @property
    def figures(self) -> tuple[int, int, int, int]:
        """Slots that compute, that are wasted, to which a task is on its way, and that rest."""
        # a share that shrinks stops nothing that runs
        rest = max(0, self.slots - self.good - self.bad)
        coming = min(rest, self.coming)
        return self.good, self.bad, coming, rest - coming


def divide(job: Job) -> Division:
    """Return what all slots were used for from the start of a job to its end."""
    found = Division()
    nodes: dict[str, _Node] = defaultdict(_Node)
    queued = sending = 0
    live: dict[Attempt, None] = {}  # that run or are on their way
    good = bad = coming = rest = 0  # of all nodes
    # since the wave of tasks began: rests in which nothing was queued, and whether all were busy
    pending: list[tuple[float, Attempt, bool]] = []  # seconds, one that ran, whether alone
    full_at = -1
    before_s = 0.0

    def end_wave() -> None:
        nonlocal full_at
        for number, (lost_s, one, alone) in enumerate(pending):
            use = Use.FEW if full_at < 0 else Use.ENGINE if number < full_at else Use.TAIL
            found.uses[use] += lost_s
            if alone and use is not Use.ENGINE:
                found.solo_s[one, use] += lost_s
            if use is Use.FEW:
                found.few_s[one.func] += lost_s
        pending.clear()
        full_at = -1

    for at_s, step, by, what in sorted(_changes(job), key=lambda change: change[0]):
        lasts_s, before_s = at_s - before_s, at_s
        if lasts_s > 0:
            found.uses[Use.COMPUTED] += good * lasts_s
            found.uses[Use.WASTED] += bad * lasts_s
            found.uses[Use.ARGUMENTS] += coming * lasts_s
            idle_s = rest * lasts_s
            if queued:
                found.uses[Use.UNDEALT] += idle_s
            elif live:
                pending.append((idle_s, next(iter(live)), len(live) == 1))
            else:
                found.uses[Use.RESULTS if sending else Use.ENGINE] += idle_s
            if live and not rest and good + bad + coming:
                full_at = len(pending)
        match step, what:
            case Step.QUEUED, _:
                queued += by
            case Step.SENDING, _:
                sending += by
            case Step.SLOTS, str(name):
                node = nodes[name]
                figures = node.figures
                node.slots = by
            case _, Attempt():
                node = nodes[what.node]
                figures = node.figures
                if step is Step.COMING:
                    node.coming += by
                elif what.counts:
                    node.good += by
                else:
                    node.bad += by
                if step is Step.COMING and by > 0:
                    live[what] = None
                elif step is Step.RUNNING and by < 0:
                    live.pop(what, None)
        if step in (Step.SLOTS, Step.COMING, Step.RUNNING):
            good, bad, coming, rest = (
                total + now - then
                for total, now, then in zip(
                    (good, bad, coming, rest), node.figures, figures, strict=True
                )
            )
        if not live and not queued:
            end_wave()
    end_wave()
    return found


def _changes(job: Job) -> Iterable[tuple[float, Step, int, Attempt | str]]:
    """Yield all that changes, within the time of the job."""

    def within(at_s: float) -> float:
        return min(max(at_s, 0.0), job.seconds)

    for share in job.shares:
        yield within(share.at_s), Step.SLOTS, share.slots, share.node
    for of_task in _by_task(job.attempts).values():
        free_s = of_task[0].submitted_s
        for one in of_task:
            assigned_s, started_s, ended_s = map(
                within, (one.assigned_s, one.started_s, one.ended_s)
            )
            if one.assigned_s > free_s:
                yield within(free_s), Step.QUEUED, 1, one
                yield assigned_s, Step.QUEUED, -1, one
            free_s = max(free_s, one.over_s)
            yield assigned_s, Step.COMING, 1, one
            yield started_s, Step.COMING, -1, one
            yield started_s, Step.RUNNING, 1, one
            yield ended_s, Step.RUNNING, -1, one
            # before the grant it waits for the engine, which has not taken others yet
            yield within(one.granted_s), Step.SENDING, 1, one
            yield within(one.over_s), Step.SENDING, -1, one
    yield job.seconds, Step.SENDING, 0, ""


def _by_task(attempts: Iterable[Attempt]) -> dict[tuple[str, int, float], list[Attempt]]:
    """Return the attempts of each task, in their order."""
    found: dict[tuple[str, int, float], list[Attempt]] = defaultdict(list)
    for one in sorted(attempts, key=lambda one: one.attempt):
        found[one.func, one.task, one.submitted_s].append(one)
    return found


# ---- causes


def causes(job: Job, division: Division) -> list[Finding]:
    """Return what has cost most, at first what has cost most of all."""
    total_s = division.total_s
    if not total_s or not job.attempts:
        return []
    by_node: dict[str, list[Attempt]] = defaultdict(list)
    for one in job.attempts:
        if one.counts:
            by_node[one.node].append(one)
    swapping = _swapping(by_node, total_s)
    swaps = {one.node for one in swapping}
    rest = {node: found for node, found in by_node.items() if node not in swaps}
    files = _everywhere(Cause.SLOW_FILES, "blocked_s", rest, total_s)
    busy = _everywhere(Cause.BUSY_CPUS, "queued_s", rest, total_s)
    slow = _slow_nodes(by_node, total_s, swaps)
    guilty = swaps | {one.node for one in slow}
    straggler = _straggler(job, division, guilty)
    results_bytes = sum(one.out_bytes for one in job.attempts if one.counts)
    big = Finding(Cause.BIG_RESULTS, division.part(Use.RESULTS), number=results_bytes)
    found = [*swapping, *files, *busy, *slow, *_retries(job, division), *_late(job, total_s), big]
    found += _few(job, division, straggler)
    if straggler:
        found.append(straggler)
    return sorted(
        (one for one in found if one.part >= WORTH), key=lambda one: one.part, reverse=True
    )


def _waited(attempts: Sequence[Attempt], wait: str) -> float:
    """Return the part of the time of attempts that they waited; 0 where nobody has measured it."""
    ran_s = sum(one.ran_s for one in attempts if one.cpu_s)
    return sum(getattr(one, wait) for one in attempts if one.cpu_s) / ran_s if ran_s else 0.0


def _swapping(by_node: dict[str, list[Attempt]], total_s: float) -> list[Finding]:
    found = []
    for node, attempts in by_node.items():
        ran_s = sum(one.ran_s for one in attempts)
        faults = sum(one.faults for one in attempts)
        waits = _waited(attempts, "blocked_s")
        if ran_s and faults / ran_s >= SWAPS and waits >= WAITS:
            peak_bytes = max(one.peak_bytes for one in attempts)
            part = waits * ran_s / total_s
            found.append(
                Finding(Cause.SWAPPING, part, node, factor=faults / ran_s, number=peak_bytes)
            )
    return found


def _everywhere(
    cause: Cause, wait: str, by_node: dict[str, list[Attempt]], total_s: float
) -> list[Finding]:
    """Return that tasks wait on most nodes; a single one of several is at fault itself."""
    attempts = [one for of_node in by_node.values() for one in of_node]
    waits = _waited(attempts, wait)
    waiting = [node for node, found in by_node.items() if _waited(found, wait) >= WAITS]
    if waits < WAITS or 2 * len(waiting) <= len(by_node):
        return []
    ran_s = sum(one.ran_s for one in attempts)
    return [Finding(cause, waits * ran_s / total_s, factor=waits)]


def _slow_nodes(by_node: dict[str, list[Attempt]], total_s: float, but: set[str]) -> list[Finding]:
    """Compare how long nodes take for the same function, in relation to the weights."""
    everyone = [one for found in by_node.values() for one in found]
    by_func: dict[str, list[Attempt]] = defaultdict(list)
    for one in everyone:
        by_func[one.func].append(one)
    usual = {func: median(_pace(one) for one in found) for func, found in by_func.items()}

    def paces(attempts: Iterable[Attempt]) -> list[float]:
        return [_pace(one) / usual[one.func] for one in attempts if usual[one.func] > 0]

    found = []
    for node, attempts in by_node.items():
        others = paces(one for one in everyone if one.node != node and one.node not in but)
        own = paces(attempts)
        if node in but or len(own) < TRIED or len(others) < TRIED:
            continue
        factor = median(own) / median(others) if median(others) else math.inf
        if factor >= SLOW:
            part = sum(one.ran_s for one in attempts) * (1 - 1 / factor) / total_s
            reason = ""
            if _waited(attempts, "queued_s") >= WAITS:
                reason = "its tasks wait for a CPU"
            elif _waited(attempts, "blocked_s") >= WAITS:
                reason = "its tasks wait for files"
            found.append(Finding(Cause.SLOW_NODE, part, node, factor=factor, reason=reason))
    return found


def _pace(one: Attempt) -> float:
    return one.ran_s / one.weight if 0 < one.weight < math.inf else one.ran_s


def _straggler(job: Job, division: Division, guilty: set[str]) -> Finding | None:
    """Return the attempt that ran alone for longest, if it ran much longer than those like it."""
    if not division.solo_s:
        return None
    (worst, _), lost_s = max(division.solo_s.items(), key=lambda item: item[1])
    alike = [one.ran_s for one in job.attempts if one.func == worst.func and one.counts]
    usual_s = median(alike) if alike else 0.0
    if worst.node in guilty or len(alike) < ALIKE or worst.ran_s < STRAGGLES * usual_s:
        return None
    factor = worst.ran_s / usual_s if usual_s else math.inf
    part = lost_s / division.total_s
    return Finding(Cause.STRAGGLER, part, worst.node, worst, factor, seconds=usual_s)


def _few(job: Job, division: Division, straggler: Finding | None) -> list[Finding]:
    found = []
    for func, seconds in division.few_s.items():
        if straggler and straggler.attempt and straggler.attempt.func == func:
            seconds -= division.solo_s.get((straggler.attempt, Use.FEW), 0.0)
        tasks = len(_by_task(one for one in job.attempts if one.func == func))
        part = seconds / division.total_s
        found.append(Finding(Cause.FEW_TASKS, part, number=tasks, reason=func))
    return found


def _retries(job: Job, division: Division) -> list[Finding]:
    failed = [one for one in job.attempts if one.outcome in FAULTS]
    part = len(failed) / len(_by_task(job.attempts))
    wasted = sum(one.ran_s for one in failed) / division.total_s
    if len(failed) < STORM or (part < STORM_PART and wasted < WORTH):
        return []
    [(reason, _)] = Counter(one.reason for one in failed).most_common(1)
    hosts = {one.node for one in failed}
    node = hosts.pop() if len(hosts) == 1 else ""
    return [
        Finding(Cause.RETRIES, min(1.0, max(part, wasted)), node, number=len(failed), reason=reason)
    ]


def _late(job: Job, total_s: float) -> list[Finding]:
    began_s = min(one.submitted_s for one in job.attempts)
    last_s = max(one.ended_s for one in job.attempts)
    joined: dict[str, Share] = {}
    for share in job.shares:
        if share.slots:
            joined.setdefault(share.node, share)
    found = []
    for share in joined.values():
        late_s = min(share.at_s, last_s) - max(0.0, began_s)
        if late_s > max(LATE_SECS, LATE_PART * job.seconds) and len(joined) > 1:
            part = late_s * share.slots / (total_s + late_s * share.slots)
            found.append(Finding(Cause.LATE_NODE, part, share.node, seconds=late_s))
    return found
