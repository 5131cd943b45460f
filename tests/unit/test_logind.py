"""What outlives its user's log-in; by a real systemd in ``make system-test``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oq_runtime import logind


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What logind answers: a file that ``busctl`` prints; and nobody lingers, or is root."""
    answer, lingering = tmp_path / "answer", tmp_path / "linger"
    lingering.mkdir()
    program = tmp_path / "busctl"
    program.write_text(
        f"#!/bin/sh\ncase $* in *KillUserProcesses|*RemoveIPC) cat {answer};; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(logind, "LINGERING", lingering)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() or 54321)
    return answer


def test_nothing_is_needed_where_processes_are_left_alone(bus: Path) -> None:
    bus.write_text("b false\n")
    assert logind.outlive() == ([], "")


def test_nothing_is_needed_without_systemd(bus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert logind.outlive() == ([], "")


def test_who_lingers_has_a_manager_that_stays(bus: Path) -> None:
    bus.write_text("b true\n")
    under, unkept = logind.outlive()
    assert under == [] and "loginctl enable-linger " in unkept
    user = unkept.split("enable-linger ")[1].split(",")[0]
    (logind.LINGERING / user).touch()
    under, unkept = logind.outlive()
    assert under[:3] == ["systemd-run", "--user", "--scope"] and unkept == ""


def test_root_is_spared(bus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bus.write_text("b true\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert logind.outlive() == ([], "")


@pytest.mark.parametrize(
    "cgroup, removed",
    [
        ("0::/system.slice/openquake-resume@alice.service\n", True),
        ("0::/user.slice/user-0.slice/session-3.scope\n", True),  # by su, from that of root
        ("0::/user.slice/user-54321.slice/session-7.scope\n", False),
        ("5:cpu:/\n1:name=systemd:/user.slice/user-54321.slice/user@54321.service/x\n", False),
    ],
)
def test_shared_memory_goes_with_a_log_in_that_is_not_this_ones(
    bus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cgroup: str, removed: bool
) -> None:
    (own := tmp_path / "cgroup").write_text(cgroup)
    bus.write_text("b true\n")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert logind.removes_memory(own) is removed
    bus.write_text("b false\n")
    assert not logind.removes_memory(own)
    bus.write_text("b true\n")
    (logind.LINGERING / "54321").touch()
    assert not logind.removes_memory(own)
    monkeypatch.setattr(os, "geteuid", lambda: 880)  # the service account
    assert not logind.removes_memory(own)
