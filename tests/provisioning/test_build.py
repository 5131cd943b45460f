"""The script that makes an environment: one build at a time, whoever was interrupted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.provisioning.roles import ROOT

pytestmark = pytest.mark.timeout(60)

SCRIPT = ROOT / "roles/openquake_engine/files/build_venv.sh"
#: in place of Python: makes an environment whose packages take a moment, and notes what it does
PYTHON = """\
#!/bin/sh
case "$*" in
"-m venv .") mkdir -p bin lib && cp "$0" bin/python ;;
*install*engine*) echo begin >>packages/log; sleep 1; echo end >>packages/log ;;
esac
"""


def test_two_builds_of_one_environment(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/engine-3.26.txt").touch()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    command = ["sh", str(SCRIPT), str(python), str(tmp_path)]
    builds = [subprocess.Popen(command) for _ in range(3)]
    assert [build.wait() for build in builds] == [0, 0, 0]
    assert (tmp_path / "packages/log").read_text() == "begin\nend\n"
    assert (tmp_path / ".complete").exists()
