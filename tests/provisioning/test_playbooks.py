"""Syntax and style of the playbooks and roles."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.provisioning.roles import PLAYBOOKS, ROOT, ansible


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_syntax(playbook: str) -> None:
    done = ansible("ansible-playbook", "--syntax-check", "-i", "inventory.example.ini", playbook)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_lint() -> None:
    done = ansible("ansible-lint", "--nocolor", "--offline")
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_is_strict() -> None:
    settings = yaml.safe_load((ROOT / ".ansible-lint").read_text())
    assert settings["profile"] == "production"
    assert not settings["skip_list"]
    assert "warn_list" not in settings


def test_lint_is_not_told_to_look_away() -> None:
    files = [*(ROOT / "roles").rglob("*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    told = [path for path in files if re.search(r"#\s*noqa", path.read_text())]
    assert told == []
