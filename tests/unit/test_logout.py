"""Whether a detached job outlives its user's log-in; by a real systemd in ``make system-test``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oq_runtime.commands import logout


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What logind answers: a file that ``busctl`` prints; and nobody lingers, or is root."""
    answer, lingering = tmp_path / "answer", tmp_path / "linger"
    lingering.mkdir()
    program = tmp_path / "busctl"
    program.write_text(f"#!/bin/sh\ncase $* in *KillUserProcesses) cat {answer};; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(logout, "LINGERING", lingering)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() or 54321)
    return answer


def test_nothing_is_needed_where_processes_are_left_alone(bus: Path) -> None:
    bus.write_text("b false\n")
    assert logout.outlive() == ([], "")


def test_nothing_is_needed_without_systemd(bus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert logout.outlive() == ([], "")


def test_who_lingers_has_a_manager_that_stays(bus: Path) -> None:
    bus.write_text("b true\n")
    under, unkept = logout.outlive()
    assert under == [] and "loginctl enable-linger " in unkept
    user = unkept.split("enable-linger ")[1].split(",")[0]
    (logout.LINGERING / user).touch()
    under, unkept = logout.outlive()
    assert under[:3] == ["systemd-run", "--user", "--scope"] and unkept == ""


def test_root_is_spared(bus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bus.write_text("b true\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert logout.outlive() == ([], "")
