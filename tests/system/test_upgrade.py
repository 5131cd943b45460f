"""Another version of the engine, and back; when it does not work; when a worker is dead."""

from __future__ import annotations

from tests.system.cluster import USERS, VENV, WORKERS, Cluster
from tests.system.playbooks import Played

OLD, NEW = "3.25.1", "3.26.2"
UPGRADE = "playbooks/upgrade.yml"


def upgrade(cluster: Cluster, version: str) -> Played:
    cluster.settings["openquake_engine_version"] = version
    return cluster.play(UPGRADE)


def version(cluster: Cluster) -> str:
    return cluster.master.out(f"{VENV}/bin/python -c 'import openquake.baselib as b; "
                              "print(b.__version__)'").split()[-1]  # fmt: skip


def check_serves(cluster: Cluster, wanted: str, jobs: dict[int, str]) -> None:
    """This version runs; the jobs are there, and the outputs of the last one can be exported."""
    assert version(cluster) == wanted
    assert jobs.items() <= cluster.jobs().items()
    user, last = USERS[0], max(number for number, state in jobs.items() if state == "complete")
    listed = cluster.master.out(f"oq engine --list-outputs {last}", user)
    output = next(line.split()[0] for line in listed.splitlines() if line.split()[0].isdigit())
    exported = f"rm -rf exported; oq engine --export-output {output} exported; ls exported"
    assert cluster.master.out(exported, user)
    job = cluster.submit(user, cluster.give_example(user, "hazard"))
    job.complete()


def test_there_and_back(cluster: Cluster) -> None:
    for wanted in (NEW, OLD):
        jobs = cluster.jobs()
        played = upgrade(cluster, wanted)
        assert played.code == 0, played
        cluster.wait_all_up()
        check_serves(cluster, wanted, jobs)


def test_a_version_that_does_not_work_is_taken_back(cluster: Cluster) -> None:
    jobs = cluster.jobs()
    environment = f"/opt/openquake/venv-*{NEW}*"
    cluster.master.run(f"for f in {environment}/bin/oq-agent; do mv $f $f.kept; done")
    played = upgrade(cluster, NEW)
    cluster.master.run(f"for f in {environment}/bin/oq-agent; do mv $f.kept $f; done", check=False)
    assert played.code != 0
    assert OLD in played.errors, played
    cluster.settings["openquake_engine_version"] = OLD
    cluster.wait_all_up()
    check_serves(cluster, OLD, jobs)


def test_with_a_dead_worker(cluster: Cluster) -> None:
    """It is left out and named, and the next run takes it in; no database is lost."""
    dead = cluster.hosts[WORKERS[1]]
    dead.cut()
    jobs = cluster.jobs()
    played = upgrade(cluster, NEW)
    assert {name for name, row in played.recap.items() if row["unreachable"]} == {dead.name}, played
    assert played.total("failed") == 0, played
    check_serves(cluster, NEW, jobs)
    dead.start()
    dead.wait_up()
    played = cluster.play("site.yml")
    assert played.code == 0, played
    cluster.wait_all_up()
    check_serves(cluster, NEW, jobs)
