"""Telling a node over ssh: what is told when it fails; stands in for ssh: a script of this name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from oq_runtime.cluster import remote

TOLD = "ssh openquake@192.0.2.2 start"


def ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> str:
    """What ``tell`` says when ssh is this script."""
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return remote.tell(["192.0.2.2"], "start")["192.0.2.2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exit 0", ""),
        ("exit 3", f"{TOLD}: exit code 3"),
        ("echo a >&2; echo 'no such host' >&2; exit 255", f"{TOLD}: no such host"),
        (r"printf 'a\n\033[31mred\342\200\256' >&2; exit 1", f"{TOLD}: \\x1b[31mred\\u202e"),
    ],
)
def test_outcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, said: str) -> None:
    assert ssh(monkeypatch, tmp_path, text) == said


def test_without_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = remote.tell(["192.0.2.2"], "start")["192.0.2.2"]
    assert found == f"{TOLD}: No such file or directory; install the ssh client"


@pytest.mark.parametrize("code", [0, 1])
def test_a_connection_that_is_kept_does_not_hold_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    began_s = time.monotonic()
    said = ssh(monkeypatch, tmp_path, f"sleep 8 & exit {code}")
    assert said == ("" if code == 0 else f"{TOLD}: exit code 1")
    assert time.monotonic() - began_s < remote.LIMIT_SECS


def test_one_that_does_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "LIMIT_SECS", 0.3)
    began_s = time.monotonic()
    said = ssh(monkeypatch, tmp_path, "sleep 8 & wait")
    assert said == f"{TOLD}: did not end in 0.3 s"
    assert time.monotonic() - began_s < 2
