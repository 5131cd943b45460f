"""The limits of [oq_runtime] hold in a session on one machine too."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_starmap import run

pytestmark = [pytest.mark.timeout(180), pytest.mark.light]

BODY = """
try: go(tasks.{function}, [{arguments} for i in range(4)])
except Exception as exc: say(type=type(exc).__name__, text=str(exc))
"""
NEVER_RETURNS = BODY.format(function="slow", arguments="(i, 1000 if i == 1 else 0)")
CRASHES = BODY.format(function="crash", arguments="(i,)")


def configured(env: dict[str, str], tmp_path: Path, lines: str) -> dict[str, str]:
    """The environment with more lines at the end of openquake.cfg, in [oq_runtime]."""
    cfg = tmp_path / "openquake.cfg"
    cfg.write_text(Path(env["OQ_CONFIG_FILE"]).read_text() + lines)
    return env | {"OQ_CONFIG_FILE": str(cfg)}


def test_task_that_never_returns(env: dict[str, str], tmpdir: Path, tmp_path: Path) -> None:
    env = configured(env, tmp_path, "task_timeout_s = 2\nmax_attempts = 2\nbeat_s = 0.5\n")
    code, [row], err = run(env, tmpdir, NEVER_RETURNS)
    assert code == 0, err
    assert row["type"] == "WorkerDied", row
    assert "task #1 (slow) was given up after 2 attempts" in row["text"].splitlines()[-1]
    assert row["text"].count("task_timeout_s is 2 s") == 2, row["text"]


def test_crash_in_native_code_says_where(env: dict[str, str], tmpdir: Path, tmp_path: Path) -> None:
    env = configured(env, tmp_path, "max_attempts = 1\n")
    code, [row], err = run(env, tmpdir, CRASHES)
    assert code == 0, err
    assert row["type"] == "WorkerDied" and "after 1 attempts" in row["text"], row
    assert "SIGSEGV (Fatal Python error: Segmentation fault; File " in row["text"]
    assert "tasks.py" in row["text"] and "in crash" in row["text"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("lost_s = 5", "[oq_runtime] lost_s=5: give more than suspect_s, 10"),
        ("lost = 5", "[oq_runtime] lost is not a setting; did you mean lost_s?"),
    ],
)
def test_wrong_limit_stops_the_job_in_one_line(
    env: dict[str, str], tmpdir: Path, tmp_path: Path, line: str, text: str
) -> None:
    env = configured(env, tmp_path, line + "\n")
    code, [row], err = run(env, tmpdir, NEVER_RETURNS)
    assert code == 0, err
    assert row["text"] == text
