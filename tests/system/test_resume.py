"""A detached job goes on by itself after a power cut of the master, where the site wants that.

And it outlives the log-in of its user, also where systemd ends what users leave.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from tests.conformance.compare import compare
from tests.leftovers import wait_for
from tests.system.cluster import JOB_LIMIT_S, OWNER, Cluster

#: what a journal has shown for so long no power cut takes away
DURABLE_S = 2.0


def test_a_detached_job_goes_on_after_a_power_cut(
    cluster: Cluster, embedded: dict[str, Path], tmp_path: Path
) -> None:
    cluster.settings["openquake_dbserver_resume_jobs"] = True
    played = cluster.play("site.yml", "--tags=dbserver")
    assert played.code == 0, played
    user, master = OWNER["risk"], cluster.master
    file = cluster.give_example(user, "risk")
    [row] = json.loads(master.out(f"oq-run --json --detach {file}", user))["jobs"]
    number = row["job"]

    def kept() -> int:
        """How many results its journal has."""
        shown = master.run("/opt/openquake/venv/bin/oq-journal show", user, check=False).stdout
        found = re.search(rf"job {number}: (\d+) results", shown)
        return int(found[1]) if found else 0

    assert wait_for(lambda: kept() > 0, JOB_LIMIT_S, 2.0), master.out(f"cat {row['output']}", user)
    results = kept()
    time.sleep(DURABLE_S)
    master.cut()
    master.start()
    master.wait_up()
    running = f"pgrep -u {user} -f oq_runtime"
    assert wait_for(lambda: master.run(running, check=False).returncode == 0, 120.0)
    master.run("true", user)  # who logs out takes his shared memory with him
    ended = wait_for(
        lambda: cluster.jobs()[number] in ("complete", "failed", "aborted"), JOB_LIMIT_S, 2.0
    )
    said = master.out(f"cat {cluster.shared}/{user}/oqdata/oq-run_{number}.log", user)
    unit = master.out(f"journalctl -b --no-pager -u openquake-resume@{user}")
    assert ended and cluster.jobs()[number] == "complete", (said, unit)
    taken = re.search(r"took over the results of (\d+) tasks", said)
    assert taken and int(taken[1]) >= results, (results, said, unit)
    datastore = f"{cluster.shared}/{user}/oqdata/calc_{number}.hdf5"
    found = cluster.fetch(user, datastore, tmp_path / "risk.hdf5")
    assert not compare(embedded["risk"], found)


def test_a_detached_job_outlives_its_users_log_in(
    cluster: Cluster, embedded: dict[str, Path], tmp_path: Path
) -> None:
    user, master = OWNER["risk"], cluster.master
    folder = "/etc/systemd/logind.conf.d"
    master.run(
        f"mkdir -p {folder} && printf '[Login]\nKillUserProcesses=yes\n' > {folder}/kill.conf && "
        "systemctl restart systemd-logind"
    )
    try:
        file = cluster.give_example(user, "risk")
        told = master.run(f"oq-run --json --detach {file}", user)
        lost = json.loads(told.stdout)["jobs"][0]["job"]
        assert f"loginctl enable-linger {user}" in told.stderr, told.stderr

        master.run(f"loginctl enable-linger {user}")
        told = master.run(f"oq-run --json --detach {file}", user)
        kept = json.loads(told.stdout)["jobs"][0]["job"]
        assert not told.stderr, told.stderr

        def ended() -> bool:
            return cluster.jobs()[kept] in ("complete", "failed", "aborted")

        assert wait_for(ended, JOB_LIMIT_S, 2.0)
        said = master.out(f"cat {cluster.shared}/{user}/oqdata/oq-run_{kept}.log", user)
        assert cluster.jobs()[kept] == "complete", said
        datastore = f"{cluster.shared}/{user}/oqdata/calc_{kept}.hdf5"
        found = cluster.fetch(user, datastore, tmp_path / "risk.hdf5")
        assert not compare(embedded["risk"], found)
        assert cluster.jobs()[lost] != "complete", "the log-in's end has ended it"
    finally:
        master.run(
            f"loginctl disable-linger {user}; rm {folder}/kill.conf; "
            "systemctl restart systemd-logind"
        )
