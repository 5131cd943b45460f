"""A process of a session that crashes: the user reads why, and where its log is kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .test_starmap import run

pytestmark = [pytest.mark.timeout(180), pytest.mark.light]

#: read by every Python of the session: one of its processes has a fault
FAULT = """
import sys
if "oq_runtime.{module}" in sys.orig_argv:
    from {where} import {what} as target
    original = target.{method}
    def broken(self, *args):
        if {condition}:
            {fault}
        return original(self, *args)
    target.{method} = broken
"""
BODY = """
try: go(tasks.square, [(i,) for i in range(8)])
except Exception as exc: say(type=type(exc).__name__, text=str(exc))
"""
BROKER = {
    "module": "session.broker",
    "where": "oq_runtime.core.scheduler",
    "what": "Scheduler",
    "method": "_assign",
    "condition": "args[0].id == 3",
}
AGENT = {
    "module": "node.daemon",
    "where": "oq_runtime.node.agent",
    "what": "Agent",
    "method": "_take",
    "condition": "args[-1].task == 3",
}


@pytest.mark.parametrize(
    ("process", "at", "fault", "said", "error"),
    [
        ("broker", BROKER, "raise KeyError('lost')", "KeyError: 'lost'", "BrokerLost"),
        ("broker", BROKER, "import os; os.abort()", "Fatal Python error: Aborted", "BrokerLost"),
        ("agent", AGENT, "raise KeyError('lost')", "KeyError: 'lost'", "NoWorkers"),
    ],
)
def test_crash_of(
    env: dict[str, str],
    tmpdir: Path,
    tmp_path: Path,
    process: str,
    at: dict[str, str],
    fault: str,
    said: str,
    error: str,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(fault=fault, **at))
    code, rows, err = run(env, tmpdir, BODY, PYTHONPATH=f"{tmp_path}:{env['PYTHONPATH']}")
    assert code == 0, err
    [row] = rows
    assert row["type"] == error, row
    last = row["text"].splitlines()[-1]
    assert f"{said}; its log is " in last, last
    path = re.search(r"its log is (\S+\.log)", last)
    assert path and said in Path(path.group(1)).read_text()
    assert f"the {process} of this job has ended; its log says:" in err and "File " in err
