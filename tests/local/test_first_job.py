"""The page for newcomers: its commands, in their order, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/first-job.md"


@pytest.mark.timeout(600)
def test_commands_of_the_page(env: dict[str, str], tmp_path: Path) -> None:
    commands = re.findall(r"^    (.+)$", PAGE.read_text(), re.MULTILINE)
    assert commands[0] == "make demo"
    # the environment that there is, results elsewhere
    demo = f'OQ_DATADIR="{tmp_path}/oqdata" oq-run examples/hazard_classical/job.ini'
    data = f'export OQ_DATADIR="{tmp_path}/oqdata"'
    in_folder = [re.sub(r"\bresults\b|\w+\.png", rf"{tmp_path}/\g<0>", one) for one in commands[2:]]
    script = "\n".join(["set -eux", demo, data, *in_folder])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env=env | {"PATH": path, "MPLBACKEND": "Agg"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Hazard Maps" in done.stdout
    assert list((tmp_path / "results").glob("hazard_map-mean*.csv"))
    assert (tmp_path / "map.png").stat().st_size and (tmp_path / "curves.png").stat().st_size
    assert "sites" in done.stdout.splitlines()[-1]
