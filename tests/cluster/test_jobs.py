"""Jobs on a cluster that nothing happens to, and what the commands for the workers say of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import (
    EXAMPLE,
    JOB_LIMIT_S,
    MANY_YEARS,
    NOTICES,
    SHORT_BEATS,
    busy,
    calculate,
    check_calculation,
    drive,
    notice,
    result,
    status,
    under_way,
)
from tests.cluster.netns import MASTER
from tests.conformance.compare import compare

METRICS_PORT = 9680
GET = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"
pytestmark = [pytest.mark.timeout(300), pytest.mark.settings(**SHORT_BEATS)]


@pytest.mark.slow
def test_every_node_takes_part(cluster: Cluster, undisturbed: Path) -> None:
    run = calculate(cluster)
    under_way(cluster, run, *cluster.slots)
    check_calculation(run, undisturbed)


def test_node_that_joins_gets_tasks(cluster: Cluster, tmp_path: Path) -> None:
    cluster.stop_agent("node3")
    go, tasks = tmp_path / "go", 30
    run = drive(cluster, "until", [(x, str(go)) for x in range(tasks)])
    under_way(cluster, run, "node1", "node2")
    cluster.start_agent("node3")
    under_way(cluster, run, "node3")
    go.touch()
    assert result(run)["value"] == {"sum": sum(range(tasks))}


@pytest.mark.slow
@pytest.mark.settings(**NOTICES)
def test_a_detached_job_is_watched(cluster: Cluster, undisturbed: Path) -> None:
    """Its command has ended, with a number; who watches it hears of its end, as who is told of it.

    The last line says how many tasks each node has done.
    """
    [row] = result(calculate(cluster, "--detach"))["jobs"]
    watching = cluster.run(["-m", "oq_runtime.commands.run", "--watch", str(row["job"])], {})
    out, _ = watching.communicate(timeout=JOB_LIMIT_S)
    said = Path(row["output"]).read_text()
    assert out == f"job {row['job']} is complete\n", (watching.log.read_text(), said)
    datastore = cluster.datadir / f"calc_{row['job']}.hdf5"
    assert not compare(undisturbed, datastore), said
    [ended] = json.loads(said.strip().splitlines()[-1])["jobs"]
    assert ended["nodes"].keys() == {cluster.net.address[node] for node in cluster.slots}, said
    # the others were alone in their phase: the engine has done these itself
    assert 0 < sum(ended["nodes"].values()) <= ended["tasks"], said
    told = notice(cluster)
    assert (told["state"], told["jobs"]) == ("complete", [row["job"]]), told


def test_a_detached_job_is_shown_and_aborted(cluster: Cluster, undisturbed: Path) -> None:
    [row] = result(calculate(cluster, "-p", MANY_YEARS, "--detach"))["jobs"]
    watching = cluster.run(["-m", "oq_runtime.commands.run", "--watch", str(row["job"])], {})
    assert cluster.wait_for(lambda: busy(cluster), 120), status(cluster)
    top = [sys.executable, "-m", "oq_runtime.commands.workers", "top"]
    seen = rf"^ *{row['job']} +\w+ +\d+/\d+ +\d/8 "
    shown = cluster.wait_for(
        lambda: re.search(seen, cluster.net.run(MASTER, top, cluster.env(MASTER)).stdout, re.M),
        60,
    )
    assert shown, cluster.net.run(MASTER, top, cluster.env(MASTER))
    argv = [sys.executable, "-m", "openquake.commands", "abort", str(row["job"])]
    # its imports compete with the tasks of all slots
    done = cluster.net.run(MASTER, argv, cluster.env(MASTER), limit_s=JOB_LIMIT_S)
    assert "aborted" in done.stdout, done
    out, _ = watching.communicate(timeout=JOB_LIMIT_S)
    assert (watching.returncode, out) == (1, f"job {row['job']} is aborted\n")
    assert cluster.wait_for(lambda: not busy(cluster), 60), status(cluster)


@pytest.mark.settings(metrics_port=METRICS_PORT)
def test_agents_and_sessions_tell_their_figures(cluster: Cluster, tmp_path: Path) -> None:
    """And without the setting nobody listens there."""
    go, tasks = tmp_path / "go", 20
    run = drive(cluster, "until", [(x, str(go)) for x in range(tasks)])
    under_way(cluster, run, "node1")
    node, master = cluster.net.address["node1"], cluster.net.address[MASTER]
    for address, port, figure in (
        (node, METRICS_PORT, "oq_agent_busy_slots 1.0"),
        (master, METRICS_PORT + 1, f"oq_session_open_tasks {tasks}.0"),
    ):
        asked = [sys.executable, "-c", GET, f"http://{address}:{port}/metrics"]

        def told(asked: list[str] = asked, figure: str = figure) -> bool:
            return figure in cluster.net.run(MASTER, asked).stdout

        assert cluster.wait_for(told, 30), cluster.net.run(MASTER, asked)
    go.touch()
    assert result(run)["value"] == {"sum": sum(range(tasks))}
    cluster.configure(preload="")
    cluster.start_agents()
    assert not cluster.net.listens("node1", METRICS_PORT)


@pytest.mark.slow
def test_big_argument_and_results(cluster: Cluster) -> None:
    """All tasks share one argument and change it, each for itself."""
    tasks = 30
    found = result(drive(cluster, "spoils", [(x, "shared") for x in range(tasks)]))
    million, numbers = 1_000_000, tasks * (tasks - 1) // 2
    expected = {"sum": tasks * million + numbers, "array": million * (tasks + numbers)}
    assert found.get("value") == expected, found


@pytest.mark.slow
def test_arguments_come_while_results_go(cluster: Cluster) -> None:
    """What asks for an argument waits behind results, but is not lost."""
    tasks = 60
    found = result(drive(cluster, "spoils", [(x, "own") for x in range(tasks)]))
    million, numbers = 1_000_000, tasks * (tasks - 1) // 2
    assert found.get("value") == {"sum": numbers * (million + 1), "array": 2 * million * numbers}, (
        found
    )


@pytest.mark.slow
def test_job_whose_files_the_workers_do_not_see(cluster: Cluster, tmp_path: Path) -> None:
    # of several source models, which are read in tasks
    job = shutil.copytree(EXAMPLE.parent / "hazard_classical", tmp_path / "job") / "job.ini"
    script = f'mount -t tmpfs tmpfs {job.parent} && exec "$@"'
    for node in cluster.slots:
        cluster.stop_agent(node)
        cluster.start_agent(node, prefix=("unshare", "--mount", "sh", "-c", script, "sh"))
    found = result(cluster.oq_run(job, "--json"))
    assert found["exit"] == 1, found
    expected = rf"{job.parent}/\S+ is on this machine, but a worker says: No such file .*"
    shared_dir = re.escape(str(cluster.home / "shared"))
    assert re.search(rf"{expected}keep the files .* in shared_dir \({shared_dir}\)", found["error"])


def test_status_names_the_host_that_does_not_answer(cluster: Cluster) -> None:
    cluster.stop_agent("node2")
    argv = [sys.executable, "-m", "oq_runtime.commands.workers", "status"]
    done = cluster.net.run(MASTER, argv, cluster.env(MASTER))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if "unreachable" in line]
    assert cluster.net.address["node2"] in line and "no answer" in line


@pytest.mark.slow
def test_oq_workers_status_in_the_format_of_the_engine(dbserver: Cluster, cluster: Cluster) -> None:
    argv = [sys.executable, "-m", "openquake.commands", "workers", "status"]
    done = cluster.net.run(MASTER, argv, cluster.env(MASTER, LOGNAME="openquake"))
    address = cluster.net.address
    expected = [(address[node], 0, slots) for node, slots in cluster.slots.items()]
    assert str(expected) in done.stdout, (done.stdout, done.stderr)
