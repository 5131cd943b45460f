"""``oq-workers debug``: try the whole way of a task, from the engine's Starmap to every slot.

The way to each node is tried with small and with large messages. Then one task per slot says where
and with what it runs and looks for a file that was just written on the master; one more kills its
worker and must come back. Every problem is told with a remedy, and nothing is waited for without a
limit. The tasks below run on the nodes; ``examine`` runs on the master, in a process with the
engine.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oq_runtime.cluster.pool import Killed, Pool, Unreachable
from oq_runtime.config import ATTEMPT_VARIABLE, NODE_VARIABLE
from oq_runtime.errors import OqRuntimeError
from oq_runtime.text import clean
from oq_runtime.wire.protocol import AgentState, AgentStatus, NodeState

#: seconds for a file of the master to be seen on a node
VISIBLE_SECS = 3.0
#: seconds that a task holds its slot, so that each slot gets one
HOLD_SECS = 0.5
#: seconds for the workers to import the engine
READY_SECS = 60.0
#: seconds for the tasks of a function to end
TASKS_SECS = 60.0
#: of a text that the engine or a node gives as a reason
MOST_CHARACTERS = 2000
REMEDY = (
    "jobs will hang or leave it out; all hosts and what is between them need the same MTU: "
    "try ping -M do -s 1472 {host}, and a lower MTU (ip link set dev eth0 mtu 1400)"
)


# ---- tasks


def echo(path: str, token: str, monitor: Any) -> dict[str, Any]:
    """Say where this runs, and after how many seconds the file at ``path`` had ``token`` in it."""
    began_s = time.monotonic()
    seen_s, reason = None, ""
    while seen_s is None and time.monotonic() - began_s < VISIBLE_SECS:
        try:
            if Path(path).read_text() == token:
                seen_s = time.monotonic() - began_s
        except OSError as exc:
            reason = exc.strerror or str(exc)
            time.sleep(0.05)
    time.sleep(max(0.0, HOLD_SECS - (time.monotonic() - began_s)))
    from openquake import baselib

    return {
        "task": monitor.task_no,
        "node": os.environ[NODE_VARIABLE],
        "pid": os.getpid(),
        "engine": str(baselib.__version__),
        "python": platform.python_version(),
        "seen_s": seen_s,
        "reason": reason,
    }


def die_once(victim: bool, monitor: Any) -> dict[str, Any]:
    """Kill the own worker in the first attempt; say which attempt came through, and where."""
    attempt = int(os.environ[ATTEMPT_VARIABLE])
    if victim and attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"attempt": attempt, "node": os.environ[NODE_VARIABLE], "victim": victim}


# ---- on the master


@dataclass(slots=True)
class Host:
    """What was found out about a host; None is what was not.

    :param workers: pids of those that have answered
    :param file_seen_s: seconds until the slowest of them saw the file, infinity if one did not
    :param reason: why it did not
    """

    slots: int = 0
    workers: set[int] = field(default_factory=set)
    engine: str = ""
    python: str = ""
    round_trip_ms: float | None = None
    mb_per_s: float | None = None
    file_seen_s: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        seen = self.file_seen_s
        return {
            "slots": self.slots,
            "answered": len(self.workers),
            "engine": self.engine,
            "python": self.python,
            "round_trip_ms": self.round_trip_ms,
            "mb_per_s": self.mb_per_s,
            "file_seen_s": None if seen == math.inf else seen,
        }


@dataclass(slots=True)
class Report:
    """What was found out about a cluster.

    :param hosts: by address
    :param results: numbers of the tasks that have answered
    :param survived: attempt and host that came through after a worker's death, None if none did
    :param problems: in words, each with a remedy
    """

    hosts: dict[str, Host]
    results: list[int] = field(default_factory=list)
    survived: tuple[int, str] | None = None
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        death = {"attempt": self.survived[0], "host": self.survived[1]} if self.survived else None
        return {
            "hosts": {address: host.as_dict() for address, host in self.hosts.items()},
            "death_survived": death,
            "problems": self.problems,
        }


def examine(pool: Pool) -> Report:
    """Try every host of the cluster; takes some seconds, most of which the workers need to start.

    To be called in the main thread, for the sake of its limits. Leaves the session of this process
    open, as the engine does.
    """
    answers = pool.ask("status")
    report = Report({host: Host() for host in answers})
    for host, answer in answers.items():
        match answer:
            case AgentStatus(state=AgentState.UP):
                _measure(pool, report, host, answer.slots)
                if answer.stuck:
                    report.problems.append(
                        f"{host}: worker processes that were killed do not end, {answer.stuck} of "
                        "them: a device or a file server does not answer; journalctl -u "
                        "openquake-worker names them"
                    )
            case AgentStatus(state=state):
                report.problems.append(f"{host}: it is {state}; try oq-workers start")
            case Unreachable(reason):
                report.problems.append(f"{host}: {reason}; try oq-workers start")
            case Killed():
                raise AssertionError("nobody was killed")
    try:
        _run_tasks(pool, report)
    except OqRuntimeError as exc:
        report.problems.append(clean(str(exc).strip(), MOST_CHARACTERS))
    return report


def _measure(pool: Pool, report: Report, host: str, slots: int) -> None:
    found, way = report.hosts[host], pool.measure(host)
    found.slots = slots
    if way.round_trip_s is not None:
        found.round_trip_ms = round(way.round_trip_s * 1e3, 2)
    if way.bytes_per_s is not None:
        found.mb_per_s = round(way.bytes_per_s / 1e6, 1)
    if way.lost:
        report.problems.append(f"{host}: {way.lost}; {REMEDY.format(host=host)}")


@contextmanager
def _limit(seconds: float, what: str) -> Iterator[None]:
    """Raise OqRuntimeError when what is done in the block does not end in time.

    The engine's own loops have no limit, so a signal ends them.
    """

    def over(*_: object) -> None:
        raise OqRuntimeError(f"{what} did not end in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run_tasks(pool: Pool, report: Report) -> None:
    from openquake.baselib import parallel

    from oq_runtime.session.client import Session

    with _limit(READY_SECS, "the start of a session"):
        session = Session.current()
    for node in session.nodes():
        if node.state is NodeState.REFUSED and node.host in report.hosts:
            report.hosts[node.host].slots = 0
            report.problems.append(f"{node.host}: {node.reason}")
    _await_workers(pool, session.name, report)
    slots = sum(node.slots for node in session.nodes())

    def rows(function: Any, args: Sequence[tuple[Any, ...]]) -> Any:
        # without a length: the engine runs a single task in its own process
        return parallel.Starmap(function, iter(args), distribute="zmq", progress=logging.debug)

    with _file(pool.cluster.shared_dir) as (path, token):
        try:
            with _limit(TASKS_SECS, f"{slots} tasks"):
                for row in rows(echo, [(path, token)] * slots):
                    _note(report, _host(pool, row["node"]), row)
        finally:
            for host, found in report.hosts.items():
                _judge(report, host, found, path)
    with _limit(TASKS_SECS, "a task whose worker dies on purpose"):
        for row in rows(die_once, [(True,)]):
            report.survived = row["attempt"], _host(pool, row["node"])


def _await_workers(pool: Pool, job: str, report: Report) -> None:
    """Wait until every slot that the job may use has a worker that has imported the engine."""
    deadline_s = time.monotonic() + READY_SECS
    while time.monotonic() < deadline_s:
        answers = [a for a in pool.ask("status").values() if isinstance(a, AgentStatus)]
        ours = [a for a in answers if any(lease.startswith(f"{job} ") for lease in a.jobs)]
        if all(answer.ready >= answer.slots for answer in ours):
            return
        time.sleep(0.2)
    report.problems.append(
        f"the workers were not ready after {READY_SECS:.0f} s; see journalctl -u openquake-worker"
    )


@contextmanager
def _file(shared_dir: str) -> Iterator[tuple[str, str]]:
    """Write a file where the engine has its datastores; yield its path and what is in it."""
    from openquake.commonlib import logs

    folder = Path(logs.get_datadir())
    if not folder.resolve().is_relative_to(Path(shared_dir).resolve()):
        raise OqRuntimeError(
            f"the datastores go to {folder}, which is not in [directory] shared_dir = "
            f"{shared_dir}: the nodes cannot read them; unset OQ_DATADIR"
        )
    token = secrets.token_hex(16)
    path = folder / f"oq-workers-debug-{token}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
    except OSError as exc:
        raise OqRuntimeError(f"{path}: {exc.strerror}; no datastore can be written") from exc
    try:
        yield str(path), token
    finally:
        path.unlink(missing_ok=True)


def _host(pool: Pool, url: str) -> str:
    """Return the host of ``host_cores`` whose agent has this control URL."""
    return next(host for host in pool.cluster.hosts if pool.cluster.control_url(host) == url)


def _note(report: Report, address: str, row: dict[str, Any]) -> None:
    host = report.hosts[address]
    host.workers.add(row["pid"])
    host.engine, host.python = row["engine"], row["python"]
    host.reason = row["reason"]
    if row["seen_s"] is None:
        host.file_seen_s = math.inf
    else:
        host.file_seen_s = max(host.file_seen_s or 0.0, round(row["seen_s"], 2))
    report.results.append(row["task"])


def _judge(report: Report, address: str, host: Host, path: str) -> None:
    if host.slots and len(host.workers) < host.slots:
        report.problems.append(
            f"{address}: {len(host.workers)} of {host.slots} slots have answered; the others are "
            "another job's (oq-workers status), or see journalctl -u openquake-worker there"
        )
    if host.file_seen_s == math.inf:
        report.problems.append(
            f"{address}: {path} was not seen in {VISIBLE_SECS:g} s ({host.reason}); mount "
            "[directory] shared_dir there, and let user openquake read it"
        )
