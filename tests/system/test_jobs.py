"""Two people run both examples at the same time; somebody else cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.compare import compare
from tests.system.cluster import OUTSIDER, OWNER, WORKERS, Cluster, Job, sampled


def busy(cluster: Cluster) -> dict[str, int]:
    return {name: row.get("busy", 0) for name, row in cluster.status().items()}


def test_both_examples_by_two_people_at_the_same_time(
    cluster: Cluster, embedded: dict[str, Path], tmp_path: Path
) -> None:
    jobs: dict[str, Job] = {}
    for example, user in OWNER.items():
        jobs[example] = cluster.submit(user, cluster.give_example(user, example))
    most: dict[str, int] = {}
    for job in jobs.values():
        for name, number in sampled(lambda: busy(cluster), job).items():
            most[name] = max(most.get(name, 0), number)
    for example, job in jobs.items():
        datastore = job.complete()
        found = job.fetch(datastore, tmp_path / f"{example}.hdf5")
        assert not compare(embedded[example], found), example
    assert all(most.get(worker, 0) for worker in WORKERS), f"tasks under way: {most}"


@pytest.mark.parametrize("command", ["oq-run", "oq engine --run"])
def test_somebody_outside_the_group_runs_nothing(cluster: Cluster, command: str) -> None:
    job = cluster.give_example(OUTSIDER, "hazard")
    before = cluster.jobs()
    done = cluster.master.run(f"{command} {job}", OUTSIDER, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    assert "openquake" in done.stderr, done.stderr
    assert cluster.jobs() == before


def test_somebody_outside_the_group_reads_no_secret(cluster: Cluster) -> None:
    done = cluster.master.run("cat /etc/openquake/authkey", OUTSIDER, check=False)
    assert done.returncode != 0
    assert "Permission denied" in done.stderr
    assert not done.stdout
