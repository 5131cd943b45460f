"""The jobs of the cluster as ``oq-workers jobs`` shows them, from what the nodes say."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from oq_runtime.cluster.jobs import Job, at_work, jobs
from oq_runtime.cluster.pool import Unreachable
from oq_runtime.commands.workers import CLUSTER_TITLES, _job_row, main, print_table
from oq_runtime.errors import ConfigError
from oq_runtime.priority import Priority
from oq_runtime.settings import Settings
from oq_runtime.wire import security
from oq_runtime.wire.protocol import AgentState, AgentStatus, LeaseStatus


def node(*leases: LeaseStatus) -> AgentStatus:
    return AgentStatus(
        host="n", pid=1, slots=8, busy=0, jobs=[], memory=0.1, engine="3", state=AgentState.UP,
        leases=list(leases),
    )  # fmt: skip


def lease(name: str, age_s: float, busy: int, done: int, **more: Any) -> LeaseStatus:
    return LeaseStatus(
        name=name, user="anna", title="calculation 12", priority=Priority.NORMAL, age_s=age_s,
        slots=4, busy=busy, done=done, total=100, **more,
    )  # fmt: skip


def test_a_job_is_put_together_from_its_leases() -> None:
    found = jobs(
        {
            "192.0.2.2": node(lease("b", 50.0, 1, 20, left_s=9.0), lease("a", 60.0, 2, 7)),
            "192.0.2.3": node(lease("b", 70.0, 4, 10, left_s=30.0)),
            "192.0.2.4": Unreachable("it is off"),
        }
    )
    assert list(found) == ["b", "a"], "the oldest first"
    both = found["b"]
    assert (both.slots, both.busy, both.done, both.total, both.left_s) == (8, 5, 20, 100, 9.0)
    assert 70 <= time.time() - both.since_s < 75


def test_who_is_at_work_is_said() -> None:
    now = time.time()
    several = [
        Job(f"user{busy}", f"calculation {busy}", Priority.NORMAL, now, 9, busy, 1, 2, None)
        for busy in range(9)
    ]
    said = at_work(several)
    assert re.match(r"job 8 of user8 \(normal, since ..[:-]..\) on 8 slots, job 7 of user7", said)
    assert said.endswith(" on 4 slots, 3 more")
    assert at_work(several[:1]) == ""


@pytest.mark.parametrize("columns", [60, 120])
def test_the_table_of_jobs_is_tidy(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    now = time.time()
    rows = [
        Job("anna", "calculation 12345", Priority.URGENT, now, 6, 4, 1200, 3000, 3723.0),
        Job("boris.long-name", "calculation 13", Priority.LOW, now - 9e5, 2, 2, 0, 0, None),
    ]
    print_table(CLUSTER_TITLES, [_job_row(job) for job in rows])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(cell_len(line) for line in lines) <= columns
    assert len(lines) == 3, lines
    first, second = (line.split() for line in lines[1:])
    assert first[:3] == ["anna", "12345", "urgent"]
    assert first[4:] == ["4/6", "1200/3000", "1", "h", "2", "min"]
    assert second[:3] + second[4:] == ["boris.lon…", "13", "low", "2/2", "0/0", "-"]


def test_a_key_for_urgent_jobs_is_made_once(tmp_path: Path) -> None:
    file = tmp_path / "urgent"
    made = CliRunner().invoke(main, ["make-urgent-key", str(file)])
    key, where = (line.partition(" = ")[2] for line in made.output.splitlines())
    assert where == str(file) and file.stat().st_mode & 0o777 == 0o600
    keys = security.Keys.derive(b"a secret of this test")
    assert security.calling_with(keys, file, key).client_public != keys.client_public
    assert Settings.from_section({"urgent_key": key}).urgent_key == key
    with pytest.raises(ConfigError, match="give 64 hexadecimal digits"):
        Settings.from_section({"urgent_key": key[1:]})
    again = CliRunner().invoke(main, ["make-urgent-key", str(file)])
    assert again.exit_code == 2 and "File exists" in again.output
