"""The page for newcomers: its commands, in their order, as they stand there; and what they make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reports import SEEN
from tests.system.browser import Browser

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/first-job.md"
MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def made(engine_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory with what the commands of the page make, and what they say."""
    folder = tmp_path_factory.mktemp("first")
    env = engine_home | {"TMPDIR": str(tmp_path_factory.mktemp("t")), "MPLBACKEND": "Agg"}
    commands = re.findall(r"^    (.+)$", PAGE.read_text(), re.MULTILINE)
    assert commands[0] == "make demo"
    # the environment that there is, results elsewhere
    demo = f'OQ_DATADIR="{folder}/oqdata" oq-run examples/hazard_classical/job.ini'
    data = f'export OQ_DATADIR="{folder}/oqdata"'
    made_there = r"\bresults\b|\w+\.png|\w+\.html"
    in_folder = [re.sub(made_there, rf"{folder}/\g<0>", one) for one in commands[2:]]
    script = "\n".join(["set -eux", demo, data, *in_folder])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=env | {"PATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_commands_of_the_page(made: tuple[Path, str]) -> None:
    folder, said = made
    assert "Hazard Maps" in said
    assert list((folder / "results").glob("hazard_map-mean*.csv"))
    assert (folder / "map.png").stat().st_size and (folder / "curves.png").stat().st_size
    assert "sites" in said.splitlines()[-1]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_report_in_a_browser(made: tuple[Path, str], tmp_path: Path) -> None:
    """Every picture is drawn, nothing is asked for, and a telephone needs no sideways scrolling."""
    with Browser(tmp_path) as browser:
        browser.open(f"file://{made[0]}/report.html")
        seen = browser.run(SEEN)
        assert seen["outputs"][-4:] == ["slot time", "timeline", "memory", "bytes"]
        assert {"hcurves", "hmaps", "uhs"} < set(seen["outputs"])
        assert seen["drawn"] == seen["pictures"] == len(seen["outputs"])
        assert seen["asked"] == [] and browser.complaints() == []
        browser.resize(400, 800)
        assert not browser.run(SEEN)["wide"]
