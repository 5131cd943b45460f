"""The job ends before its time, by whatever: its slots are free within 5 s, and nothing is left.

Where the master is cut off from the nodes they notice by themselves, after the 30 s of the beats.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import USER, Cluster
from tests.cluster.jobs import (
    NOTICES,
    SHORT_BEATS,
    broker,
    busy,
    calculate,
    check_calculation,
    notice,
    number,
    result,
    status,
    stream,
    under_way,
)
from tests.cluster.netns import MASTER, Process

pytestmark = pytest.mark.timeout(300)
#: seconds until the slots are free, and where nobody can tell the nodes
FREE_S, CUT_OFF_S = 5.0, 30.0
#: what the command takes that asks for the slots, beside limits shorter than the default ones
ASKING_S = 1.5


def free(cluster: Cluster, host: str = MASTER) -> bool:
    """No slot is busy, and no node has a lease."""
    rows = status(cluster, host)
    return not any(row.get("busy") or row.get("jobs") for row in rows.values())


def check_free(cluster: Cluster, limit_s: float = FREE_S, host: str = MASTER) -> None:
    began_s = time.monotonic()
    assert cluster.wait_for(lambda: free(cluster, host), limit_s + 10), status(cluster, host)
    took_s = time.monotonic() - began_s
    assert took_s < limit_s, f"{took_s:.1f} s"


def engine(run: Process) -> psutil.Process:
    """The engine process of an ``oq-run``."""
    [engine] = psutil.Process(run.pid).children()
    return engine


def state(cluster: Cluster, job: int) -> str:
    code = (
        "import sys; from openquake.commonlib import logs;"
        "print(logs.dbcmd('get_job', int(sys.argv[1])).status)"
    )
    done = cluster.net.run(MASTER, [sys.executable, "-c", code, str(job)], cluster.env(MASTER))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_broker_is_killed(cluster: Cluster) -> None:
    run = under_way(cluster, calculate(cluster))
    broker(run).kill()
    check_free(cluster)
    found = result(run, 20)
    assert found["exit"] == 1 and "broker" in found["error"], found
    assert state(cluster, number(run)) == "failed"


@pytest.mark.slow
def test_engine_is_killed(cluster: Cluster) -> None:
    run = under_way(cluster, calculate(cluster))
    engine(run).kill()
    check_free(cluster)
    found = result(run, 20)
    assert found["exit"] == 1 and "SIGKILL" in found["error"], found
    assert state(cluster, number(run)) == "failed"


@pytest.mark.slow
@pytest.mark.settings(**NOTICES)
def test_oq_run_is_killed(cluster: Cluster) -> None:
    run = under_way(cluster, calculate(cluster))
    run.kill()
    check_free(cluster)
    told = notice(cluster)
    assert (told["state"], told["error"]) == ("failed", "oq-run was killed"), told


@pytest.mark.parametrize(
    "name", ["SIGINT", "SIGHUP", pytest.param("SIGTERM", marks=pytest.mark.slow)]
)
def test_interrupt(cluster: Cluster, name: str) -> None:
    run = under_way(cluster, calculate(cluster))
    run.send_signal(signal.Signals[name])
    check_free(cluster)
    found = result(run, 20)
    assert found["exit"] == 130 and found["error"] == "interrupted", found
    assert state(cluster, number(run)) == "aborted"


@pytest.mark.slow
def test_oq_abort(cluster: Cluster) -> None:
    run = under_way(cluster, calculate(cluster))
    job = number(run)
    argv = [sys.executable, "-m", "openquake.commands", "abort", str(job)]
    env = cluster.env(MASTER, LOGNAME=USER)
    abort = cluster.net.popen(MASTER, argv, env, log=cluster.log / "abort.log")
    cluster.wait_for(lambda: "aborted" in abort.log.read_text(), 30)  # its own start takes 4 s
    check_free(cluster)
    assert abort.wait(30) == 0, abort.log.read_text()
    found = result(run, 20)
    assert found["exit"] == 130 and "aborted" in found["error"], found
    assert state(cluster, job) == "aborted"


def cut_off(cluster: Cluster, limit_s: float) -> Process:
    """Cut the master off from the nodes, of which each then frees its slots by itself."""
    run = under_way(cluster, stream(cluster, 400))
    cluster.net.link_down(MASTER)
    check_free(cluster, limit_s, host="node1")
    return run


@pytest.mark.slow
def test_master_is_cut_off(cluster: Cluster) -> None:
    run = cut_off(cluster, CUT_OFF_S)
    run.kill()


@pytest.mark.settings(**SHORT_BEATS)
def test_job_of_a_master_that_stays_cut_off_ends(cluster: Cluster) -> None:
    run = cut_off(cluster, SHORT_BEATS["lost_s"] + ASKING_S)
    found = result(run, 60)
    assert found["error"] == "NoWorkers", found
    assert "no node left for 6 s" in found["text"], found


@pytest.mark.slow
@pytest.mark.settings(**SHORT_BEATS)
def test_job_of_a_master_that_comes_back_goes_on(cluster: Cluster, undisturbed: Path) -> None:
    run = under_way(cluster, calculate(cluster))
    cluster.net.link_down(MASTER)
    check_free(cluster, SHORT_BEATS["lost_s"] + ASKING_S, host="node1")
    cluster.net.link_up(MASTER)
    check_calculation(run, undisturbed)


@pytest.mark.slow
def test_the_end_of_a_job_leaves_the_others_alone(cluster: Cluster) -> None:
    stays = stream(cluster, 60)
    ends = stream(cluster, 60)
    under_way(cluster, ends)
    ends.kill()
    assert json.loads(stays.communicate(timeout=200)[0])["retries"] == 0
    assert busy(cluster) == 0
