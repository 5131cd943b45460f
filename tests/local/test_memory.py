"""Tasks that run out of memory, in a real cgroup with a small limit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oq_runtime.node.memory import OOM_SCORE
from tests.cgroups import inside, limited

from .test_limits import configured
from .test_starmap import run, script

pytestmark = [pytest.mark.timeout(180), pytest.mark.light]

LIMIT_MIB = 900
#: so slow that the agent, which looks twice a second, sees a limit being passed
MB_PER_S = 60
#: taken before that, well below the limits
MB_AT_ONCE = 400


BODY = """
from oq_runtime.engine import adapter
try: say(value={call}, retries=adapter.Session.current().retries())
except Exception as exc: say(type=type(exc).__name__, text=str(exc))
"""


def run_limited(env: dict[str, str], tmpdir: Path, call: str) -> dict[str, Any]:
    """Say the value of ``call``, or its error, in a session with little memory and two slots."""
    path = tmpdir / "script.py"
    path.write_text(script(BODY.format(call=call)))
    with limited(LIMIT_MIB << 20) as cgroup:
        done = subprocess.run(
            inside(cgroup, [sys.executable, path]),
            env=env | {"OQ_DISTRIBUTE": "zmq", "OQ_NUM_CORES": "2"},
            capture_output=True,
            text=True,
            cwd=tmpdir,
            timeout=150,
        )
    assert done.returncode == 0, done.stderr
    row: dict[str, Any] = json.loads(done.stdout)
    return row


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("percent", "killer"),
    [(90, "killed to free memory"), (100, "was killed by the kernel for lack of memory")],
)
def test_task_that_no_node_can_hold(
    env: dict[str, str], tmpdir: Path, tmp_path: Path, percent: int, killer: str
) -> None:
    env = configured(env, tmp_path, f"memory_hard_percent = {percent}\n")
    tasks = [(i, 3000 if i == 1 else 0, MB_AT_ONCE, MB_PER_S, 0) for i in range(4)]
    call = f"go(tasks.hold, {tasks})"
    row = run_limited(env, tmpdir, call)
    assert row["type"] == "OutOfMemory", row
    last = row["text"].splitlines()[-1]
    assert "task #1 (hold) was given up after 2 attempts" in last, row["text"]
    assert row["text"].count(killer) == 2, row["text"]
    assert "attempt 2: assigned to private, alone" in row["text"]
    assert re.search(r"its worker had 0\.[3-9]\d GiB, 0\.\d\d GiB of 0\.88 GiB were in use", last)
    assert "more memory" in last


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_tasks_that_fit_only_one_after_the_other(env: dict[str, str], tmpdir: Path) -> None:
    tasks = [(i, 350, MB_AT_ONCE // 2, MB_PER_S, 2) for i in (1, 2)]
    row = run_limited(env, tmpdir, f"go(tasks.hold, {tasks})['sum']")
    assert row == {"value": 3, "retries": 1}


def test_the_kernel_kills_workers_first(env: dict[str, str], tmpdir: Path) -> None:
    body = "say(value=go(tasks.oom_score, [(1,), (2,)])['sum'])"
    code, rows, err = run(env, tmpdir, body)
    assert code == 0, err
    assert rows == [{"value": 2 * OOM_SCORE}]
    assert int(Path("/proc/self/oom_score_adj").read_text()) < OOM_SCORE


def test_memory_error_of_python_is_a_result(env: dict[str, str], tmpdir: Path) -> None:
    body = (
        f"try: go(tasks.no_memory, [(i, '{tmpdir}/lines') for i in range(2)])\n"
        "except Exception as exc: say(type=type(exc).__name__, text=str(exc))"
    )
    code, [row], err = run(env, tmpdir, body)
    assert code == 0, err
    assert "MemoryError" in row["type"] and "found no room" in row["text"], row
    lines = (tmpdir / "lines").read_text().split()
    assert len(lines) == len(set(lines)), "it was run again"
