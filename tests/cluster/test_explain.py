"""What a node or the network did to a job is named by ``oq-run --explain``, on the master.

It reads the attempts of real nodes. What one machine does to a job is in ``tests/local``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oq_runtime.core.explain import Cause
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import broker_status, drive, result, under_way
from tests.cluster.netns import Process

#: the file for what is kept, as a datastore is called
KEPT = "calc_1.hdf5"
EXPLAIN = ("-m", "oq_runtime.commands.run", "--explain", "1", "--json")


def told(cluster: Cluster, run: Process, folder: Path) -> dict[str, Any]:
    """What the command says of a job that has come to its end."""
    found = result(run)
    assert "value" in found, found
    return result(cluster.run(EXPLAIN, {"OQ_DATADIR": str(folder)}))


def line_of(found: dict[str, Any], cause: Cause) -> str:
    """The line that names a cause, which is there."""
    assert cause.name.lower() in found["causes"], found
    [line] = [one for one in found["lines"] if cause in one]
    return str(line)


def done(run: Process) -> int:
    """How many tasks are done."""
    status = broker_status(run)
    return sum(phase.done for phase in status.phases) if status else 0


def test_retries_are_named_first(cluster: Cluster, tmp_path: Path) -> None:
    arguments = [(x,) for x in range(12)]
    run = drive(cluster, "dies_once", arguments, KEPT=str(tmp_path / KEPT))
    found = told(cluster, run, tmp_path)
    line = line_of(found, Cause.RETRIES)
    assert next(iter(found["causes"])) == "retries" and "6 attempts failed" in line, found


def test_a_slow_node_is_named(cluster: Cluster, tmp_path: Path) -> None:
    cluster.stop_agent("node2")
    cluster.start_agent("node2", PACE="4")
    try:
        run = drive(cluster, "spin", [(x, 0.1) for x in range(40)], KEPT=str(tmp_path / KEPT))
        line = line_of(told(cluster, run, tmp_path), Cause.SLOW_NODE)
    finally:
        cluster.stop_agent("node2")  # the next test starts it as it was
    assert cluster.net.address["node2"] in line, line


@pytest.mark.slow
def test_a_node_that_joins_late_is_named(cluster: Cluster, tmp_path: Path) -> None:
    cluster.stop_agent("node3")
    go = tmp_path / "go"
    arguments = [(x, 1.0, str(go)) for x in range(150)]
    run = drive(cluster, "unless", arguments, KEPT=str(tmp_path / KEPT))
    assert cluster.wait_for(lambda: done(run) >= 9, 60), result(run)  # 3 s on three slots
    cluster.start_agent("node3")
    under_way(cluster, run, "node3")
    go.touch()
    line = line_of(told(cluster, run, tmp_path), Cause.LATE_NODE)
    assert cluster.net.address["node3"] in line, line


@pytest.mark.slow
def test_results_that_are_too_big_for_the_network_are_named(
    cluster: Cluster, tmp_path: Path
) -> None:
    for node in cluster.slots:
        cluster.net.netem(node, loss_percent=1, delay_ms=40)
    arguments = [(x, 1_000_000) for x in range(sum(cluster.slots.values()))]
    run = drive(cluster, "array", arguments, KEPT=str(tmp_path / KEPT))
    line = line_of(told(cluster, run, tmp_path), Cause.BIG_RESULTS)
    assert "were on their way to the engine" in line, line
