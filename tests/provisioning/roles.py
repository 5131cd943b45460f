"""The roles as data, and Ansible as a command; for the tests of this lane."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
#: in the order of site.yml
ROLES = [
    "openquake",
    "openquake_user",
    "openquake_swap",
    "openquake_firewall",
    "openquake_config",
    "openquake_ssh",
    "openquake_shared_dir",
    "openquake_engine",
    "openquake_nfs_server",
    "openquake_dbserver",
    "openquake_nfs_client",
    "openquake_worker",
    "openquake_webui",
    "openquake_verify",
]
#: output without colours, whatever the environment asks for
PLAIN = {"NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
PLAYBOOKS = ["site.yml", *(f"playbooks/{path.name}" for path in (ROOT / "playbooks").glob("*.yml"))]


def read(role: str, path: str) -> dict[str, Any]:
    """Return a YAML file of a role; an empty one as an empty dictionary."""
    return yaml.safe_load((ROOT / "roles" / role / path).read_text()) or {}


def options(role: str) -> dict[str, dict[str, Any]]:
    """Return the variables that a role's argument specification names."""
    spec = read(role, "meta/argument_specs.yml")["argument_specs"]["main"]
    return spec.get("options", {})


def tasks_of(node: Any) -> Iterator[dict[str, Any]]:
    """All that has a name in a file of tasks or a playbook: plays, blocks and tasks."""
    if isinstance(node, dict):
        if "name" in node:
            yield node
        for value in node.values():
            yield from tasks_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from tasks_of(value)


def ansible(
    program: str, *args: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in the repository, as a user would."""
    path = Path(sys.executable).parent
    return subprocess.run(
        [str(path / program), *args],
        cwd=ROOT,
        env=os.environ
        | PLAIN
        | {"PATH": f"{path}:{os.environ['PATH']}"}
        | {"ANSIBLE_CACHE_PLUGIN": "memory"}  # not what another test has found out
        | (env or {}),
        capture_output=True,
        text=True,
    )


def failures(output: str) -> list[str]:
    """Return the messages of the failed tasks in the output of ansible-playbook."""
    found = re.findall(r"^(?:fatal|failed): \[[^]]*\].*?=> (\{.*\})$", output, re.MULTILINE)
    return [json.loads(text)["msg"] for text in found]
