"""Syntax and style of the playbooks and roles; and that each step of a scenario is there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.provisioning.roles import PLAIN, PLAYBOOKS, ROOT, ansible

SCENARIOS = sorted(ROOT.glob("molecule/*/molecule.yml"))
#: steps that play that of another one, or none
WITHOUT_PLAYBOOK = ("syntax", "check", "idempotence")


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_syntax(playbook: str) -> None:
    done = ansible("ansible-playbook", "--syntax-check", "-i", "inventory.example.ini", playbook)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_lint() -> None:
    done = ansible("ansible-lint", "--nocolor", "--offline")
    assert done.returncode == 0, done.stdout + done.stderr


def test_sudo_of_a_busy_host_has_a_minute() -> None:
    done = ansible("ansible-config", "dump", "--only-changed")
    assert re.search(r"^DEFAULT_TIMEOUT\(\S+\) = 60$", done.stdout, re.MULTILINE), done.stdout


def test_a_kernel_without_nftables_is_found_before_swap_goes() -> None:
    """By the role itself, which installs the program that asks."""
    plays = yaml.safe_load((ROOT / "playbooks/site.yml").read_text())
    named = [[role["role"] for role in play.get("roles", [])] for play in plays]
    both = [names for names in named if "openquake_swap" in names]
    assert both and all(
        names.index("openquake_firewall") < names.index("openquake_swap") for names in both
    )


def test_lint_is_strict() -> None:
    settings = yaml.safe_load((ROOT / ".ansible-lint").read_text())
    assert settings["profile"] == "production"
    assert not settings["skip_list"]
    assert "warn_list" not in settings


def test_lint_is_not_told_to_look_away() -> None:
    files = [*(ROOT / "roles").rglob("*.yml"), *(ROOT / "playbooks").rglob("*.yml")]
    told = [path for path in files if re.search(r"#\s*noqa", path.read_text())]
    assert told == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.parent.name)
def test_steps_of_a_scenario_are_there(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Molecule passes over a step whose playbook it does not find, and goes on."""
    for name, value in PLAIN.items():  # Molecule puts its own there, for all that follows
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MOLECULE_IMAGE", "none")
    from molecule.config import Config

    common = {"base_config": [str(ROOT / ".config/molecule/config.yml")]}
    config = Config(str(scenario), common, {"subcommand": "test"})
    assert config.provisioner is not None
    for step in config.scenario.test_sequence:
        name, *playbooks = step.split()
        assert name in WITHOUT_PLAYBOOK or getattr(config.provisioner.playbooks, name), step
        assert all((scenario.parent / playbook).is_file() for playbook in playbooks), step
