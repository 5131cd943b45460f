"""The pages for users: each command that stands there is run, in the order of the page.

In a block of its own, or in the first column of a table. What they name, a job file, a number, a
directory, is there. Not covered: the page for newcomers (``test_first_job``), the WebUI's
(``test_webui``), those for administrators (``tests/provisioning``, ``molecule``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.leftovers import wait_for

from .test_oq_run import corpus, jobs
from .test_resume import begin

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
#: commands that need a cluster: ``cluster/test_workers``, ``cluster/test_users``
ELSEWHERE = {"oq-workers jobs", "oq-run --priority"}
#: what their words stand for
NAMES = {
    "DIR": "results",
    "FILE": "page.html",
    "~/oqdata": "there",
    "NAME=VALUE": "poes_disagg=0.3",
    "--cores 4": "--cores 2",
}


def commands(page: str) -> list[str]:
    """The commands of a page in their order; what may be left out of one is in it."""
    found = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        spans = [line[4:].partition("  #")[0]] if line.startswith("    ") else []
        if line.startswith("| `"):
            spans = re.findall("`(.+?)`", line[2:].partition(" | ")[0])
        program = ""
        for span in spans:
            program = span.partition(" -")[0] if not span.startswith("-") else program
            whole = span if not span.startswith("-") else f"{program} {span}"
            if re.match(r"oq[ -]", whole):
                found.append(re.sub(r"[\[\]]", "", whole).strip())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the files that the pages speak of."""
    shutil.copytree(corpus("classical_risk/case_4"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "job_haz.ini").rename(tmp_path / "hazard.ini")
    shutil.copy(tmp_path / "job_risk.ini", tmp_path / "risk_2.ini")
    (tmp_path / "job_risk.ini").rename(tmp_path / "risk.ini")
    shutil.copytree(corpus("disagg/case_1"), tmp_path / "input")
    text = (tmp_path / "input/job.ini").read_text()
    (tmp_path / "job.ini").write_text(re.sub(r"\w+_logic_tree\.xml", r"input/\g<0>", text))
    return tmp_path


@pytest.fixture
def shell(env: dict[str, str], folder: Path) -> Callable[[str], str]:
    """Runs a command in that directory, with a yes for what it asks; returns what it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], env=env | {"PATH": path, "MPLBACKEND": "Agg"}, cwd=folder,
            input="y\n", capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-1000:]} {done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.mark.parametrize("page", ["explain.md", "report.md", "running.md", "journal.md"])
def test_commands_of_the_page(page: str, env: dict[str, str], shell: Callable[[str], str]) -> None:
    def number_of(command: str) -> int:
        """Run a job; return its number."""
        number: int = json.loads(shell(f"{command} --json"))["jobs"][0]["job"]
        return number

    hazard, complete = number_of("oq-run hazard.ini"), number_of("oq-run job.ini")
    kept = 0  # a job that can go on
    listed = [command for command in commands(page) if command not in ELSEWHERE]
    assert listed, page
    for command in listed:
        number = complete
        if re.search("--resume|verify|prune", command):
            number = kept or begin(env)
            kept = number if "verify" in command else 0
        elif "--hc" in command:
            number = hazard
        elif "abort" in command or "--watch" in command:
            number = number_of("oq-run --detach job.ini")
        for word, value in NAMES.items():
            command = command.replace(word, value)
        shell(re.sub(r"\b(ID|12|42)\b", str(number), command))
        if "--detach" in command:
            assert wait_for(lambda: jobs(env)[-1][1] == "complete", 240), jobs(env)
