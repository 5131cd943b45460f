"""The engine's Starmap over the runtime: results, errors, deaths; only ``openquake.baselib``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.leftovers import SHM, shm, wait_for

from .conftest import leftovers_of, session_processes, sessions

pytestmark = [pytest.mark.timeout(180), pytest.mark.light]

HEAD = """
import json, operator, os, sys, time
import tasks
from openquake.baselib import parallel
from openquake.baselib.general import AccumDict
def go(func, args, **kw):
    return parallel.Starmap(func, args, **kw).reduce(acc=AccumDict(accum=0))
def say(**row):
    print(json.dumps(row), flush=True)
if __name__ == "__main__":
"""

CASES = {
    "sum": "go(tasks.square, [(i,) for i in range(40)])['sum']",
    "partials": "go(tasks.parts, [(i,) for i in range(10)])['sum']",
    "subtasks": "go(tasks.splits, [(i,) for i in range(10)])['sum']",
    "lazy": "go(tasks.square, ((i,) for i in range(10)))['sum']",
    "raises": "go(tasks.fails, [(i,) for i in range(8)])",
    "after_error": "go(tasks.square, [(i,) for i in range(10)])['sum']",
    "bad_result": "go(tasks.unpicklable, [(i,) for i in range(3)])",
    "bad_argument": "go(tasks.square, [(lambda: 1,), (2,)])",
    "refused_argument": "go(tasks.square, [(tasks.Refused(),), (2,)])",
    "big_monitor": (
        "(lambda s: [setattr(s.monitor, 'note', bytes(3 << 20)), s.reduce()])"
        "(parallel.Starmap(tasks.square, [(1,), (2,)]))"
    ),
    "one_task": "go(tasks.parts, [(5,)])['sum']",
    "one_task_splits": "go(tasks.splits, [(5,)])['sum']",
    "big": (
        "(lambda r: [r['in'],"
        " [(len(r[k]), set(r[k]) == {n}) for n, k in ((1, 'out1'), (2, 'out2'))]])"
        "(go(tasks.grow, [(i, b'abcdefg' * 1_500_000, 50_000_000) for i in (1, 2)]))"
    ),
    "processpool": "go(tasks.square, [(i,) for i in range(10)], distribute='processpool')['sum']",
    "back_to_zmq": "go(tasks.square, [(i,) for i in range(10)])['sum']",
}


def script(body: str) -> str:
    return HEAD + "".join(f"    {line}\n" for line in body.strip().splitlines())


def start(
    env: dict[str, str],
    tmpdir: Path,
    body: str,
    prefix: Sequence[str] = (),
    stdin: int | None = None,
    **more: Any,
) -> subprocess.Popen[str]:
    path = tmpdir / "script.py"
    path.write_text(script(body))
    return subprocess.Popen(
        [*prefix, sys.executable, str(path)],
        env=env | {"OQ_DISTRIBUTE": "zmq", "OQ_NUM_CORES": "2"} | more,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmpdir,
    )


def run(
    env: dict[str, str], tmpdir: Path, body: str, prefix: Sequence[str] = (), **more: Any
) -> tuple[int, list[Any], str]:
    """Run a script to its end: exit code, the rows that it said, stderr."""
    process = start(env, tmpdir, body, prefix=prefix, **more)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture(scope="module")
def outcomes(
    light_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """All harmless and failing cases, one after the other in one session."""
    tmpdir = tmp_path_factory.mktemp("t")
    body = "".join(
        f"try: say(case={name!r}, value={code})\n"
        f"except Exception as exc: say(case={name!r}, error=f'{{type(exc).__name__}}: {{exc}}')\n"
        for name, code in CASES.items()
    )
    body += "parallel.Starmap.shutdown()\n"
    code, rows, err = run(light_home | {"TMPDIR": str(tmpdir)}, tmpdir, body)
    assert code == 0, err
    yield {row["case"]: row.get("value", row.get("error")) for row in rows}
    assert wait_for(lambda: not sessions(tmpdir) and not session_processes(tmpdir))


@pytest.mark.parametrize(
    "case, value",
    [
        ("sum", sum(i * i for i in range(40))),
        ("partials", 6 * 45),
        ("subtasks", 45 + 285 + 6 * 45),
        ("lazy", 285),
        ("after_error", 285),
        ("one_task", 30),
        ("one_task_splits", 5 + 25 + 30),
        ("big", [2 * sum((b"abcdefg" * 1_500_000)[::4099]), [[50_000_000, True]] * 2]),
        ("processpool", 285),
        ("back_to_zmq", 285),
    ],
)
def test_value(outcomes: dict[str, Any], case: str, value: Any) -> None:
    assert outcomes[case] == value


@pytest.mark.parametrize(
    "case, pattern",
    [
        ("raises", r"ValueError: [\s\S]*task with x=3 went wrong"),
        ("bad_result", r"(?i)error: [\s\S]*pickle[\s\S]*lambda|error: [\s\S]*lambda[\s\S]*pickle"),
        ("bad_argument", r"(?i)error: [\s\S]*lambda"),
        ("big_monitor", r"CallTooBig: the call of a task square takes 3\d{6} bytes"),
        ("refused_argument", r"RuntimeError: [\s\S]*this argument cannot be unpickled"),
    ],
)
def test_error(outcomes: dict[str, Any], case: str, pattern: str) -> None:
    assert isinstance(outcomes[case], str) and re.search(pattern, outcomes[case]), outcomes[case]


def test_uncaught_error_ends_the_process(env: dict[str, str], tmpdir: Path) -> None:
    code, _, err = run(env, tmpdir, "go(tasks.fails, [(i,) for i in range(8)])")
    assert code == 1
    assert "task with x=3 went wrong" in err.splitlines()[-1]


def test_poison_task_is_given_up(env: dict[str, str], tmpdir: Path) -> None:
    body = """
go(tasks.square, [(i,) for i in range(5)])
try: go(tasks.poison, [(i,) for i in range(6)])
except Exception as exc: say(type=type(exc).__name__, text=str(exc))
"""
    code, rows, err = run(env, tmpdir, body)
    assert code == 0, err
    [row] = rows
    assert row["type"] == "WorkerDied", row
    for word in ("#3", "poison", "SIGKILL", socket.gethostname(), "3 attempts"):
        assert word in row["text"], row["text"]
    assert row["text"].count("SIGKILL") == 3, row["text"]


@pytest.mark.parametrize("point", ["before_start", "after_first", "after_last", "before_end"])
def test_death_at(env: dict[str, str], tmpdir: Path, point: str) -> None:
    body = "say(value=go(tasks.parts, [(i,) for i in range(10)])['sum'])"
    code, rows, err = run(env, tmpdir, body, OQ_RUNTIME_FAULT=f"{point}:3:1")
    assert code == 0, err
    assert rows == [{"value": 270}]


SLOW = """
say(started=True)
calls = [(i, 0.5, os.path.abspath(f'begun-{i}')) for i in range(200)]
try: say(value=go(tasks.begins, calls)['sum'])
except Exception as exc: say(type=type(exc).__name__, text=str(exc))
say(s=time.time())
"""


def running(env: dict[str, str], tmpdir: Path, body: str = SLOW) -> subprocess.Popen[str]:
    """Start a long run and return when two of its tasks have begun."""
    process = start(env, tmpdir, body)
    assert wait_for(lambda: len([*tmpdir.glob("begun-*")]) >= 2, 60)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("victim, error", [("broker", "BrokerLost"), ("agent", "NoWorkers")])
def test_death_of(env: dict[str, str], tmpdir: Path, victim: str, error: str) -> None:
    process = running(env, tmpdir)
    [target] = session_processes(tmpdir, victim)
    killed_s = time.time()
    target.kill()
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    rows = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 0, err
    assert rows[0]["type"] == error, rows
    assert rows[-1]["s"] - killed_s < 5, "the error came late"


def test_death_of_the_engine(env: dict[str, str], tmpdir: Path) -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    process = running(env, tmpdir)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert wait_for(lambda: not leftovers_of(tmpdir, before), 5), leftovers_of(tmpdir, before)


def test_death_of_a_random_worker(env: dict[str, str], tmpdir: Path) -> None:
    process = running(env, tmpdir, SLOW.replace("range(200)", "range(20)"))
    session_processes(tmpdir, "worker-")[0].kill()
    out, err = process.communicate(timeout=90)
    assert json.loads(out.splitlines()[0]) == {"value": 190}, (out, err)


def test_results_outlive_their_workers(env: dict[str, str], tmpdir: Path) -> None:
    """Results that the engine has not looked at yet, when the workers that made them die."""
    body = """
from oq_runtime.session.client import Session
results = iter(parallel.Starmap(tasks.array, [(n, 200_000) for n in range(6)]))
found = [next(results)]
while sum(map(len, Session.current().inbox.values())) < 5:
    Session.current().status()
say(ready=True)
input()
say(value=go(tasks.square, [(1,), (2,)])['sum'])
found += results
say(sizes=[len(r['array']) for r in found], values=sorted(r['array'][-1] for r in found))
"""
    process = start(env, tmpdir, body, stdin=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline()
        workers = session_processes(tmpdir, "worker-")
        for worker in workers:
            worker.kill()
        out, err = process.communicate("\n", timeout=90)
    finally:
        process.kill()
    rows = [json.loads(line) for line in out.splitlines()]
    assert workers and rows == [{"value": 5}, {"sizes": [200_000] * 6, "values": [*range(6)]}], err


def test_death_of_the_fork_server(env: dict[str, str], tmpdir: Path) -> None:
    process = running(env, tmpdir, SLOW.replace("range(200)", "range(20)"))
    [target] = session_processes(tmpdir, "forkserver")
    workers = session_processes(tmpdir, "worker-")
    target.kill()
    assert wait_for(lambda: not any(worker.is_running() for worker in workers), 5)
    out, err = process.communicate(timeout=90)
    assert json.loads(out.splitlines()[0]) == {"value": 190}, (out, err)


@pytest.mark.parametrize(
    "body, expected",
    [
        ("import no_such_module", {"value": 6}),
        ("raise SystemExit('broken')", {"type": "WorkerDied"}),
    ],
)
def test_module_to_preload(env: dict[str, str], tmpdir: Path, body: str, expected: Any) -> None:
    (tmpdir / "extra.py").write_text(body)
    cfg = tmpdir / "openquake.cfg"
    cfg.write_text(Path(env["OQ_CONFIG_FILE"]).read_text().replace("preload =", "preload = extra"))
    code, [row], err = run(
        env,
        tmpdir,
        "try: say(value=go(tasks.square, [(1,), (1,), (2,)])['sum'])\n"
        "except Exception as exc: say(type=type(exc).__name__, text=str(exc))",
        OQ_CONFIG_FILE=str(cfg),
        PYTHONPATH=f"{env['PYTHONPATH']}:{tmpdir}",
    )
    assert code == 0, err
    text = row.pop("text", None)
    assert row == expected
    assert not text or re.search(r"worker could not start: .*exit code 1 \(broken\)", text), text


def test_two_sessions_side_by_side(env: dict[str, str], tmpdir: Path) -> None:
    body = "say(value=go(tasks.square, [(i,) for i in range(40)])['sum'], pid=os.getpid())"
    both = [start(env, tmpdir, body) for _ in range(2)]
    rows = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert [row["value"] for row in rows] == [20540] * 2
    assert os.getpid() not in [row["pid"] for row in rows]


def test_death_of_the_broker_while_submitting(env: dict[str, str], tmpdir: Path) -> None:
    # more lazy arguments than a socket queues: sending must not wait for a dead broker
    process = start(env, tmpdir, """
def lazy():
    for i in range(3000):
        if i == 10:
            say(at=i)
            sys.stdin.readline()
        yield (i,)
try: say(value=go(tasks.square, lazy())['sum'])
except Exception as exc: say(type=type(exc).__name__)
""", stdin=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    [broker] = session_processes(tmpdir, "broker")
    broker.kill()
    try:
        out, err = process.communicate("\n", timeout=10)
    finally:
        process.kill()
        process.communicate()
    assert json.loads(out)["type"] == "BrokerLost", err


def test_long_temporary_directory(env: dict[str, str], tmpdir: Path) -> None:
    # longer than the path of a socket may be
    long = tmpdir / ("x" * 100)
    long.mkdir()
    body = """
try: go(tasks.square, [(i,) for i in range(4)])
except Exception as exc: say(module=type(exc).__module__, text=str(exc))
"""
    _, [row], err = run(env, tmpdir, body, TMPDIR=str(long))
    assert row["module"] == "oq_runtime.errors" and "TMPDIR" in row["text"], (row, err)
    assert wait_for(lambda: not sessions(long))


#: with a /dev/shm of its own that holds next to nothing; lock files of the engine need some pages
NO_MEMORY = ("unshare", "--mount", "sh", "-c",
             'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh")  # fmt: skip


def test_without_room_in_shared_memory_the_disk_is_used(env: dict[str, str], tmpdir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small /dev/shm")
    body = f"say(value={CASES['big']})\nparallel.Starmap.shutdown()"
    code, rows, err = run(env, tmpdir, body, prefix=NO_MEMORY)
    assert code == 0, err
    expected = [2 * sum((b"abcdefg" * 1_500_000)[::4099]), [[50_000_000, True]] * 2]
    assert rows == [{"value": expected}], err


def test_shared_memory_that_is_removed_in_the_midst(env: dict[str, str], tmpdir: Path) -> None:
    """As systemd does at a last log-out (RemoveIPC): right results, or a line that says so."""
    before = shm()
    process = start(env, tmpdir, """
big = bytes(range(256)) * 40_000
def lazy():
    for i in range(24):
        if i == 12:
            say(at=i)
            sys.stdin.readline()
        yield (i, big, 4_000_000) if i % 2 else (i, big + bytes([i]), 4_000_000)
try: say(value=go(tasks.grow, lazy())['in'])
except Exception as exc: say(type=type(exc).__name__, text=str(exc))
""", stdin=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    for name in shm() - before:
        for path in [*(SHM / name).rglob("*"), SHM / name]:
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
    try:
        out, err = process.communicate("\n", timeout=60)
    finally:
        process.kill()
        process.communicate()
    [row] = [json.loads(line) for line in out.splitlines()]
    big = bytes(range(256)) * 40_000
    right = 12 * sum(big[::4099]) + sum(sum((big + bytes([i]))[::4099]) for i in range(0, 24, 2))
    assert row.get("value") == right or "RemoveIPC" in row["text"], (row, err)


def test_no_room_anywhere_says_where(env: dict[str, str], tmpdir: Path) -> None:
    """Neither shared memory nor the temporary directory can hold the results."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmpdir / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=8m tmpfs "{disk}" && '
    prefix = [word.replace("mount", mount + "mount", 1) if "size=64k" in word else word
              for word in NO_MEMORY]  # fmt: skip
    body = "go(tasks.grow, [(i, b'a', 20_000_000) for i in (1, 2)])"
    code, _, err = run(env, tmpdir, body, prefix=prefix, TMPDIR=str(disk))
    assert code == 1
    # the last line, but for what h5py says where the full disk does not take its buffers at exit
    [*_, told] = [line for line in err.splitlines() if "given up after 3 attempts" in line] or [""]
    assert "no room for its results" in told and "No space left on device" in told, err
    assert err.count("attempt 3:") and "attempt 4:" not in err, "tried elsewhere, not for ever"
