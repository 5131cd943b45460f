"""A job on one machine opens no port: whole jobs of each kind, in a network of their own.

The network has no interface that is up, not even ``lo``. It is the job's alone, so that whatever
listens in it belongs to one of the job's processes.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Attacks
from tests.local.test_oq_run import corpus
from tests.local.test_starmap import script

pytestmark = pytest.mark.timeout(300)

ALONE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
LISTEN = "0A"
#: flag of a Unix socket that listens, see unix(7) and proc(5)
ACCEPTS = 0x10000
PAUSE_S, LIMIT_S = 0.01, 200.0

JOBS = {
    "classical": "classical/case_18/job.ini",
    "preclassical and disaggregation": "disagg/case_12/job.ini",
    "event_based": "event_based/case_16/job.ini",
    "scenario_risk": "scenario_risk/case_8/job.ini",
    "classical_risk": "classical_risk/case_1/job.ini",
    "event_based_risk": "event_based_risk/reinsurance_1/job.ini",
}
MORE_JOBS = {
    "scenario": "scenario/case_21/job.ini",
    "scenario_damage": "scenario_damage/case_12/job.ini",
    "classical_bcr": "classical_bcr/case_2/job.ini",
    "classical_damage": "classical_damage/case_2/job_interpolation.ini",
    "event_based_damage": "event_based_damage/case_14/job.ini",
    "multi_risk": "multi_risk/case_1/job_2.ini",
    "conditional_spectrum": "conditional_spectrum/case_2/job.ini",
}


def open_doors(pid: int) -> Iterator[str]:
    """Yield what others than the owner could connect to in the network of a process."""
    net = Path(f"/proc/{pid}/net")
    for name in ("tcp", "tcp6"):
        for line in (net / name).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTEN:
                yield f"{name} port {int(local.rpartition(':')[2], 16)} of {local}"
    for name in ("udp", "udp6", "raw", "raw6"):
        yield from (f"{name} {line}" for line in (net / name).read_text().splitlines()[1:])
    for line in (net / "unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *path = line.split(maxsplit=7)
        if int(flags, 16) & ACCEPTS and not is_private(path[0] if path else ""):
            yield f"unix {path}"


def is_private(path: str) -> bool:
    """Whether the file of a socket is in a directory that only its owner may enter."""
    try:
        return not path.startswith("@") and stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    except FileNotFoundError:  # it has just ended
        return bool(path)


def watch(process: subprocess.Popen[str]) -> set[str]:
    """Return all open doors that there were until the process has ended."""
    found: set[str] = set()
    own = os.readlink("/proc/self/ns/net")
    over = threading.Event()

    def look() -> None:
        while not over.wait(PAUSE_S):
            try:
                if os.readlink(f"/proc/{process.pid}/ns/net") != own:  # unshare has done its work
                    found.update(open_doors(process.pid))
            except OSError:  # it has ended
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        process.wait(timeout=LIMIT_S)
    finally:
        over.set()
        watcher.join()
    return found


def alone(env: dict[str, str], tmpdir: Path, *command: str) -> tuple[str, set[str]]:
    """Run a command to its end without a network; return its output and the open doors."""
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a network namespace")
    out, err = tmpdir / "out", tmpdir / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [*ALONE, *command], env=env, stdout=stdout, stderr=stderr, text=True
        )
        try:
            found = watch(process)
        finally:
            process.kill()
    assert process.returncode == 0, out.read_text() + err.read_text()
    return out.read_text(), found


@pytest.mark.attack
@pytest.mark.parametrize(
    "path",
    [pytest.param(JOBS[mode], id=mode) for mode in JOBS]
    + [pytest.param(MORE_JOBS[mode], id=mode, marks=pytest.mark.slow) for mode in MORE_JOBS],
)
def test_a_job_listens_nowhere(
    env: dict[str, str], tmpdir: Path, attacks: Attacks, path: str
) -> None:
    command = [sys.executable, "-m", "oq_runtime.commands.run", str(corpus(path)), "--json"]
    out, found = alone(env, tmpdir, *command)
    attacks.tried(successes=len(found))
    assert not found
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["complete"]


KINDS = {
    "in this process": "go(tasks.parts, [(i,) for i in range(9)], distribute='no')['sum']",
    "one task": "go(tasks.splits, [(5,)])['sum']",
    "one task of a pool": "go(tasks.splits, [(5,)], distribute='processpool')['sum']",
    "threads": "go(tasks.splits, [(i,) for i in range(9)], distribute='threadpool')['sum']",
    "pool": "go(tasks.splits, [(i,) for i in range(9)], distribute='processpool')['sum']",
    "more results than a socket queues": "go(tasks.many, [(5000,)], distribute='no')['sum']",
}
VALUES = {"in this process": 216, "one task": 60, "one task of a pool": 60,
          "pool": 36 + 204 + 216, "threads": 36 + 204 + 216,
          "more results than a socket queues": 5000}  # fmt: skip


@pytest.mark.attack
@pytest.mark.light
@pytest.mark.parametrize("mode", ["zmq", "processpool"])
def test_tasks_of_the_engine_itself(
    env: dict[str, str], tmpdir: Path, attacks: Attacks, mode: str
) -> None:
    path = tmpdir / "script.py"
    path.write_text(script("".join(f"say(kind={k!r}, value={v})\n" for k, v in KINDS.items())))
    env = env | {"OQ_DISTRIBUTE": mode, "OQ_NUM_CORES": "2"}
    out, found = alone(env, tmpdir, sys.executable, str(path))
    attacks.tried(len(KINDS), successes=len(found))
    assert not found
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["kind"]: row["value"] for row in rows} == VALUES


@pytest.mark.light
def test_two_kinds_at_once(env: dict[str, str], tmpdir: Path) -> None:
    """The engine keeps the kind of distribution in the class, where a later Starmap changes it."""
    path = tmpdir / "script.py"
    path.write_text(script("""
first = parallel.Starmap(tasks.square, [(i,) for i in range(9)])
other = parallel.Starmap(tasks.square, [(i,) for i in range(9)], distribute="no")
say(first=first.reduce(acc=AccumDict(accum=0))["sum"])
say(other=other.reduce(acc=AccumDict(accum=0))["sum"])
"""))  # fmt: skip
    env = env | {"OQ_DISTRIBUTE": "zmq", "OQ_NUM_CORES": "2"}
    out = subprocess.run(
        [sys.executable, str(path)], env=env, text=True, capture_output=True, timeout=100
    ).stdout
    assert [json.loads(line) for line in out.splitlines()] == [{"first": 204}, {"other": 204}]
