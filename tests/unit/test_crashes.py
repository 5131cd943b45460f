"""Logs that outlive the crash of their process: what is kept, what is said, how many."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from oq_runtime.files import crashes

TRACEBACK = "Traceback (most recent call last):\n  File ...\nKeyError: 3\n"


@pytest.fixture
def session(tmp_path: Path) -> Path:
    directory = tmp_path / "oq-run-x"
    directory.mkdir(mode=0o700)
    return directory


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"2026-11-28 INFO ready\n{TRACEBACK}", "KeyError: 3; its log is "),
        (
            "Fatal Python error: Segmentation fault\n\nCurrent thread\n  File x",
            "Fatal Python error: Segmentation fault; its log is ",
        ),
        ("Assertion failed: ok (mailbox.cpp:72)\n", "Assertion failed: ok (mailbox.cpp:72); its "),
    ],
)
def test_the_log_of_a_crash_outlives_its_session(session: Path, text: str, said: str) -> None:
    (session / "broker.log").write_text(text)
    crash = crashes.find(session, "broker")
    assert crash and str(crash).startswith(said) and str(crash).endswith(str(crash.path))
    assert crash.path.read_text() == text and session not in crash.path.parents
    assert crash.path.parent.stat().st_mode & 0o777 == 0o700
    assert crashes.find(session, "broker") == crash, "kept once"


@pytest.mark.parametrize("text", ["", "2026-11-28 INFO lease ended\n"])
def test_a_process_that_did_not_crash_leaves_nothing(session: Path, text: str) -> None:
    (session / "agent.log").write_text(text)
    assert crashes.find(session, "agent") is None
    assert list(session.parent.iterdir()) == [session]


def test_the_process_keeps_its_own_log(session: Path) -> None:
    handler = logging.FileHandler(session / "broker.log")
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(SystemExit, match="1"), crashes.kept(session, "broker"):
            raise KeyError(3)
    finally:
        logging.getLogger().removeHandler(handler)
    crash = crashes.find(session, "broker")
    assert crash and str(crash).startswith("KeyError: 3; ")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for number in range(crashes.KEPT + 3):
        path = tmp_path / f"{crashes.PREFIX}{number}"
        path.mkdir(mode=0o700)
        os.utime(path, (number, number))
    (tmp_path / f"{crashes.PREFIX}open").mkdir(mode=0o755)  # perhaps somebody else's
    crashes.prune(tmp_path)
    left = {path.name.removeprefix(crashes.PREFIX) for path in tmp_path.iterdir()}
    assert left == {"open", *map(str, range(3, crashes.KEPT + 3))}
