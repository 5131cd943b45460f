"""What a member says of itself is shown to people on a terminal, and forges nothing there.

A node and a broker with the key say names, titles and reasons with escapes, marks that turn the
direction of writing, new lines, and a megabyte behind them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import CTRL_PORT, Cluster
from tests.cluster.jobs import SHORT_BEATS, job_file, status
from tests.cluster.liar import FORGED, MARKS
from tests.cluster.netns import MASTER
from tests.conftest import Attacks
from tests.leftovers import wait_for

pytestmark = [pytest.mark.timeout(300), pytest.mark.attack]

HERE = Path(__file__).parent
#: run the rest of the command line on a terminal of its own, and print what appears there
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
#: what the titles of a table are printed in
BOLD = re.compile(r"\x1b\[[01]m")
#: of a line, in which the name of a host begins
HOST_CHARS = len(f"  {FORGED}")
#: of the megabyte behind the words: what is bounded does not fill a screen many times
SCREEN_CHARS = 20_000


def screen(cluster: Cluster, *args: str) -> str:
    """What a command of the runtime shows on a terminal of the master."""
    argv = [sys.executable, "-c", TERMINAL, sys.executable, "-m", f"oq_runtime.commands.{args[0]}"]
    env = cluster.env(MASTER, TERM="xterm-256color")
    done = cluster.net.run(MASTER, [*argv, *args[1:]], env, limit_s=120)
    assert done.stdout, done.stderr
    return done.stdout


def check(shown: str, attacks: Attacks, *, row: str) -> None:
    """Nothing of what was said is on the terminal as it was said; ``row``: something must be."""
    assert row in shown, shown
    # a cell may go on below, in its own column
    forged = [line for line in shown.splitlines() if line[:HOST_CHARS].strip().startswith(FORGED)]
    raw = [mark for mark in MARKS if mark in shown]
    attacks.tried(len(MARKS), len(raw) + len(forged))
    assert not raw and not forged, (raw, forged)
    assert shown.count("y") < SCREEN_CHARS


def test_node_that_lies_about_itself(no_agents: Cluster, attacks: Attacks) -> None:
    no_agents.start_agent("node1", program=[str(HERE / "liar.py"), "status"])
    shown = screen(no_agents, "workers", "status")
    check(shown, attacks, row=no_agents.net.address["node1"])
    lines = BOLD.sub("", shown).splitlines()
    rows = [line.split()[0] for line in lines if line[1:2].strip()]
    known = [no_agents.net.address[node] for node in no_agents.slots]
    assert rows == ["host", *known], "one row per node of the configuration"
    words = json.dumps(status(no_agents)["node1"], ensure_ascii=False)
    check(words, attacks, row='"host"')
    check(screen(no_agents, "workers", "jobs"), attacks, row="low")


@pytest.mark.settings(**SHORT_BEATS)
@pytest.mark.parametrize(
    ("how", "row"),
    [
        pytest.param("refuse", "it refused this job", marks=pytest.mark.slow),
        ("die", "attempt 1: "),
    ],
)
def test_reasons_in_errors(no_agents: Cluster, attacks: Attacks, how: str, row: str) -> None:
    no_agents.configure(**SHORT_BEATS)
    no_agents.start_dbserver()
    no_agents.start_agent("node1", program=[str(HERE / "liar.py"), how])
    shown = screen(no_agents, "run", str(job_file(no_agents)))
    check(shown, attacks, row=row)
    check(screen(no_agents, "workers", "debug"), attacks, row="oq-workers: ")


@pytest.mark.settings(preload="")
def test_broker_that_lies_about_its_job(cluster: Cluster, attacks: Attacks) -> None:
    before = (cluster.log / "agent-node1.log").stat().st_size
    address = cluster.net.address["node1"]
    argv = [sys.executable, str(HERE / "attacker.py"), "boast", address, str(CTRL_PORT), "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    log = cluster.log / "attacker.log"
    process = cluster.net.popen("node2", argv, cluster.env("node2"), log=log, **pipes)
    assert wait_for(lambda: status(cluster)["node1"]["jobs"], 20), log.read_text()
    check(screen(cluster, "workers", "status"), attacks, row=address)
    process.communicate("")
    with (cluster.log / "agent-node1.log").open() as file:
        file.seek(before)
        check(file.read(), attacks, row="granted")
