"""A change of the environment: done whole or taken back, whatever fails, dies or is killed.

And one of the secret.

The environments are stand-ins that note in the job database which of them has upgraded it; Ansible,
systemd and the database are real.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import wait_for
from tests.provisioning.machine import NOTIFIES, role
from tests.provisioning.machines import Machines
from tests.provisioning.roles import ROOT, failures

pytestmark = pytest.mark.timeout(600)

UPGRADE = "playbooks/upgrade.yml"
DATABASE = "/var/lib/openquake/oqdata/db.sqlite3"
#: on its own: an upgrade of the database waits while there is a file /tmp/hold
PYTHON = """\
#!/usr/bin/python3
import contextlib, pathlib, sqlite3, sys, time
if "upgrade_db" in sys.argv[2]:
    while pathlib.Path("/tmp/hold").exists():
        pathlib.Path("/tmp/held").touch()
        time.sleep(0.05)
    environment = pathlib.Path(sys.argv[0]).parents[1].name
    with sqlite3.connect("/var/lib/openquake/oqdata/db.sqlite3") as database:
        database.execute(f'CREATE TABLE IF NOT EXISTS "{environment}" (id)')
    print("changed")
else:
    open(sys.argv[3], "w")
"""
#: answers as all workers would, or not at all where there is a file ``broken`` beside it; where
#: there is a file ``job``, somebody starts a job meanwhile
WORKERS = """\
#!/bin/sh
[ "$1" != wait ] || [ ! -e "$0.job" ] || python3 -c "import sqlite3
with sqlite3.connect('/var/lib/openquake/oqdata/db.sqlite3') as database:
    database.execute('INSERT INTO job (status) VALUES (1)')"
[ ! -e "$0.broken" ] || { echo "no answer" >&2; exit 1; }
case $1 in
wait) echo "$@" >/tmp/waited; echo '{"192.0.2.2": {"state": "up"}, "192.0.2.3": {"state": "up"}}' ;;
debug) echo '{"hosts": {"192.0.2.2": {"answered": 2}, "192.0.2.3": {"answered": 2}}}' ;;
esac
"""
SETUP = f"""
groupadd --gid 880 openquake
useradd --uid 880 --gid openquake --home /var/lib/openquake openquake
install -d -o openquake -g openquake /var/lib/openquake /var/cache/openquake
for name in old new; do
    mkdir -p /opt/openquake/venv-$name/bin
    cd /opt/openquake/venv-$name
    touch .complete bin/oq bin/oq-run
    cat >bin/python <<'EOF'
{PYTHON}
EOF
    cat >bin/oq-workers <<'EOF'
{WORKERS}
EOF
    printf '#!/bin/sh\\nexec sleep infinity\\n' >bin/serve
    chmod +x bin/*
done
ln -s venv-old /opt/openquake/venv
"""
SERVICE = """
printf '[Service]\\nExecStart=/opt/openquake/venv/bin/serve\\n' >/etc/systemd/system/{name}
systemctl start {name}
"""
#: today's database with 500 jobs, and the copy of an upgrade in March, which had three
JOBS = f"""
python3 - <<'EOF'
import sqlite3
for path, count in ("{DATABASE}", 500), ("{DATABASE}.before-venv-new", 3), (
    "{DATABASE}.of-venv-old", 3
):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, status TEXT)")
        database.executemany("INSERT INTO job (status) VALUES (?)", count * [("complete",)])
EOF
"""
AGENT, DBSERVER = "openquake-worker.service", "openquake-dbserver.service"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Machines]:
    (tmp_path / "oq_runtime.whl").write_text("as built")
    made = Machines(
        tmp_path,
        openquake_engine_runtime=str(tmp_path / "oq_runtime.whl"),
        __openquake_engine_wanted="/opt/openquake/venv-new",
        openquake_nfs_client_provider="external",
    )
    try:
        made.sh(SETUP)
        made.sh(SERVICE.format(name=AGENT), "w1", "w2")
        made.sh(SERVICE.format(name=DBSERVER), "m1")
        made["m1"].sh("install -d -o openquake -g openquake -m 0700 /var/lib/openquake/oqdata")
        made["m1"].sh(JOBS, "openquake")
        yield made
    finally:
        made.close()


def environment(cluster: Machines) -> str:
    return cluster["m1"].sh("readlink /opt/openquake/venv")


def database(cluster: Machines, path: str = DATABASE) -> tuple[int, str]:
    """How many jobs it has, and which environments have upgraded it."""
    count = "SELECT count(*) FROM job"
    names = "SELECT name FROM sqlite_master WHERE name LIKE 'venv-%'"
    program = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
        "print(*(row[0] for query in sys.argv[2:] for row in db.execute(query)))"
    )
    output = cluster["m1"].run("python3", "-c", program, path, count, names).stdout
    jobs, _, who = output.strip().partition(" ")
    return int(jobs), who


def running(cluster: Machines, *names: str) -> list[str]:
    """On which machines the service of the cluster runs."""
    service = {"m1": DBSERVER, "w1": AGENT, "w2": AGENT}
    active = "systemctl is-active {}".format
    return [name for name in names if cluster[name].can(active(service[name]), "root")]


ALL = ["m1", "w1", "w2"]


#: one of long ago, one that a process uses, two that are half built, the second right now
OTHERS = """
cd /opt/openquake
mkdir -p venv-older venv-used venv-half/packages venv-building/packages
touch venv-older/.complete
cp /bin/sleep venv-used/sleep
/opt/openquake/venv-used/sleep 999 >/dev/null 2>&1 &
touch venv-half/packages/lock
flock venv-building/packages/lock sleep 999 >/dev/null 2>&1 &
"""


def test_change(cluster: Machines) -> None:
    """What nothing uses goes; the environment of before stays, to go back to."""
    cluster["m1"].sh(OTHERS)
    done = cluster.play(UPGRADE)
    assert done.returncode == 0, done.stdout
    assert (environment(cluster), database(cluster)) == ("venv-new", (500, "venv-new"))
    assert running(cluster, *ALL) == ALL
    again = cluster.play(UPGRADE)
    assert again.returncode == 0
    assert again.stdout.count("changed=0") == 4, again.stdout
    left = cluster["m1"].sh("cd /opt/openquake; ls -d venv-*").split()
    assert left == ["venv-building", "venv-new", "venv-old", "venv-used"]


#: no agent starts with the environment
NO_AGENT = """
mkdir /etc/systemd/system/openquake-worker.service.d
printf '[Service]\\nExecStartPre=test ! -e /opt/openquake/venv/bin/no-agent\\n' \
    >/etc/systemd/system/openquake-worker.service.d/wants.conf
systemctl daemon-reload
touch /opt/openquake/venv-new/bin/no-agent
ln -sfn venv-new /opt/openquake/venv
"""


@pytest.mark.slow
def test_environment_that_does_not_work_is_taken_back(cluster: Machines) -> None:
    """Also where all workers fail, with which Ansible ends a playbook."""
    cluster.sh("touch /opt/openquake/venv-new/bin/oq-workers.broken")
    silent = cluster.play(UPGRADE)
    assert "192.0.2.2, 192.0.2.3 does not answer (no answer)" in silent.stdout, silent.stdout
    assert running(cluster, *ALL) == ALL
    cluster.sh(f"rm /opt/openquake/venv-new/bin/oq-workers.broken; {NO_AGENT}", "w1", "w2")
    refused = cluster.play(UPGRADE)
    assert "w1, w2 do not start with it" in refused.stdout, refused.stdout
    assert running(cluster, "m1") == ["m1"]
    for done in silent, refused:
        assert done.returncode != 0
        assert "the cluster runs venv-old again" in done.stdout
    assert (environment(cluster), database(cluster)) == ("venv-old", (500, ""))


@pytest.mark.slow
def test_job_database_is_not_replaced_by_an_old_copy(cluster: Machines) -> None:
    """The copy of today cannot be made; those of other changes must not come back for it."""
    cluster["m1"].sh("chmod 0500 /var/lib/openquake/oqdata")
    done = cluster.play(UPGRADE)
    assert done.returncode != 0
    assert (environment(cluster), database(cluster)) == ("venv-old", (500, ""))
    assert running(cluster, *ALL) == ALL


@pytest.mark.slow
def test_jobs_that_have_started_since_are_not_lost(cluster: Machines) -> None:
    cluster["m1"].sh("cd /opt/openquake/venv-new/bin; touch oq-workers.job oq-workers.broken")
    done = cluster.play(UPGRADE)
    assert done.returncode != 0
    assert f"venv-old again, and {DATABASE} was kept, for its jobs are not" in done.stdout
    assert (environment(cluster), database(cluster)) == ("venv-old", (501, "venv-new"))
    assert running(cluster, *ALL) == ALL


@pytest.mark.parametrize(
    ("since", "kept"),
    [
        ("", ""),
        ("UPDATE auth_user SET last_login = 'now'", ""),
        ("INSERT INTO job VALUES (2)", "jobs"),
        ("DELETE FROM job WHERE id > 0", "jobs"),
        ("UPDATE auth_user SET password = 'new'", "accounts"),
        ("INSERT INTO auth_user VALUES ('bob', 'his', 1, 0, 0, NULL)", "accounts"),
    ],
)
def test_what_people_have_done_since_keeps_the_job_database(
    tmp_path: Path, since: str, kept: str
) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    with contextlib.closing(sqlite3.connect(before)) as database, database:
        database.executescript(
            "CREATE TABLE job (id); INSERT INTO job VALUES (0), (1);"
            "CREATE TABLE auth_user (username, password, is_active, is_staff, is_superuser,"
            "                        last_login);"
            "INSERT INTO auth_user VALUES ('admin', 'first', 1, 1, 1, NULL)"
        )
    shutil.copy(before, now)
    with contextlib.closing(sqlite3.connect(now)) as database, database:
        database.execute("CREATE TABLE of_the_new_version (x)")
        database.execute(since or "SELECT 1")
    command = [sys.executable, ROOT / "roles/openquake_engine/files/copy_database.py"]
    done = subprocess.run([*command, before, now, "back"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    told = f"{now} was kept, for its {kept} are not those of {before}\n"
    assert done.stdout == (told if kept else "")
    with contextlib.closing(sqlite3.connect(now)) as database:
        new = database.execute("SELECT * FROM sqlite_master WHERE name = 'of_the_new_version'")
        assert bool(new.fetchall()) == bool(kept)


def kill_in_the_midst(cluster: Machines) -> None:
    cluster["m1"].sh("touch /tmp/hold")
    process = cluster.start(UPGRADE)
    assert wait_for(lambda: cluster["m1"].can("test -e /tmp/held", "root"), 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cluster["m1"].sh("rm /tmp/hold")


@pytest.mark.slow
def test_killed_in_the_midst(cluster: Machines) -> None:
    kill_in_the_midst(cluster)
    assert running(cluster, *ALL) == []
    done = cluster.play(UPGRADE)
    assert done.returncode == 0, done.stdout
    assert (environment(cluster), database(cluster)) == ("venv-new", (500, "venv-new"))
    assert running(cluster, *ALL) == ALL


@pytest.mark.slow
def test_killed_in_the_midst_and_taken_back(cluster: Machines) -> None:
    """What was begun with one environment is undone by asking for the other."""
    kill_in_the_midst(cluster)
    cluster.settings["__openquake_engine_wanted"] = "/opt/openquake/venv-old"
    done = cluster.play(UPGRADE)
    assert done.returncode == 0, done.stdout
    assert (environment(cluster), database(cluster)) == ("venv-old", (500, ""))
    assert running(cluster, *ALL) == ALL


@pytest.mark.slow
def test_dead_worker_is_left_out(cluster: Machines) -> None:
    cluster.cut("w2")
    done = cluster.play(UPGRADE)
    assert "w2 " in done.stdout and "unreachable=1" in done.stdout
    waited = cluster["m1"].sh("cat /tmp/waited")
    assert "192.0.2.2" in waited
    assert "192.0.2.3" not in waited
    assert (environment(cluster), database(cluster)) == ("venv-new", (500, "venv-new"))
    assert running(cluster, "m1", "w1") == ["m1", "w1"]


#: the software is a mount that shows the environment of before until it is mounted anew
CACHED = """
cp -a /opt/openquake /srv/old
cp -a /opt/openquake /srv/new
ln -sfn venv-new /srv/new/venv
ln -s old /srv/now
printf '[Mount]\\nWhat=/srv/now\\nWhere=/opt/openquake\\nType=none\\nOptions=bind\\n' \
    >/etc/systemd/system/opt-openquake.mount
systemctl daemon-reload
systemctl start opt-openquake.mount
ln -sfn new /srv/now
printf '[Service]\\nExecStart=true\\nType=oneshot\\nRemainAfterExit=yes\\n' \
    >/etc/systemd/system/openquake-firewall.service
touch /var/cache/openquake/venv-new.compiled
"""
#: for site.yml refuses a mount that is not of NFS
WORKERS_ALONE = """
- hosts: w1:w2
  gather_facts: false
  pre_tasks: [ansible.builtin.setup: {gather_subset: [min]}]
  roles: [openquake, openquake_worker]
"""


@pytest.mark.slow
def test_worker_that_was_away_changes_with_the_next_run(cluster: Machines) -> None:
    cluster["m1"].sh("ln -sfn venv-new /opt/openquake/venv")
    agent = "cd /opt/openquake; cat >venv-old/bin/oq-agent; chmod +x venv-old/bin/oq-agent; "
    for name in "w1", "w2":
        cluster[name].sh(agent + "cp -a venv-old/bin/oq-agent venv-new/bin", stdin=NOTIFIES)
    cluster.sh(CACHED, "w1", "w2")
    book = cluster.folder / "workers.yml"
    book.write_text(WORKERS_ALONE)
    done = cluster.play(str(book), "-e", "openquake_nfs_client_provider=kernel")
    assert done.returncode == 0, done.stdout
    assert set(cluster.sh("readlink /opt/openquake/venv", "w1", "w2").values()) == {"venv-new"}
    assert running(cluster, "w1", "w2") == ["w1", "w2"]


@pytest.mark.slow
def test_worker_that_dies_meanwhile_is_left_out(cluster: Machines) -> None:
    cluster["m1"].sh("touch /tmp/hold")
    process = cluster.start(UPGRADE)
    assert wait_for(lambda: cluster["m1"].can("test -e /tmp/held", "root"), 120)
    cluster.cut("w2")
    cluster["m1"].sh("rm /tmp/hold")
    output, _ = process.communicate()
    assert "unreachable=1" in output
    assert (environment(cluster), database(cluster)) == ("venv-new", (500, "venv-new"))
    assert running(cluster, "m1", "w1") == ["m1", "w1"]


def test_the_backup_of_the_page(cluster: Machines) -> None:
    """The commands of docs/operating.md, with jobs that come between."""
    text = (ROOT / "docs/operating.md").read_text().partition("## Backups")[2].partition("\n## ")[0]
    kept, back = (block[1:] for block in re.findall(r"\n\n((?:    .+\n)+)", text))
    machine = cluster["m1"]
    machine.sh("printf '[Service]\\nExecStart=sleep infinity\\n' >/etc/systemd/system/"
               "openquake-webui.service; systemctl daemon-reload")  # fmt: skip
    machine.sh(kept)
    machine.sh(f"rm {DATABASE}; touch {DATABASE}", "openquake")
    machine.sh(back)
    assert database(cluster) == (500, "") and running(cluster, "m1") == ["m1"]
    assert machine.can(f"test -O {DATABASE} -a ! -e {DATABASE[:-7]}backup", "openquake")


THEIRS = "/opt/openquake/oqdata/db.sqlite3"
#: as GEM's installer leaves a server: a directory, and the job database of its openquake.cfg
ANOTHER = f"""
install -d -o openquake -g openquake /opt/openquake/oqdata
mv {DATABASE} {THEIRS}
rm -r $(dirname {DATABASE})
cd /opt/openquake
rm venv
cp -a venv-old venv
touch venv/of-another /tmp/oq_runtime.whl
printf '[dbserver]\\nhost = localhost\\nfile = {THEIRS}\\n[directory]\\n' >venv/openquake.cfg
"""


@pytest.mark.slow
def test_environment_of_another_installer_is_taken_over(cluster: Machines) -> None:
    """A directory in place of the link, as the engine's own installer makes it."""
    machine = cluster["m1"]
    machine.sh(ANOTHER)
    assert database(cluster, THEIRS) == (500, "")
    book = role("openquake_engine")
    args = ("-e", "__openquake_engine_wanted=/opt/openquake/venv-new")
    all_are = f"""
import sqlite3, sys
with sqlite3.connect("{THEIRS}") as db:
    db.execute("UPDATE job SET status = ?", sys.argv[1:])
"""
    machine.sh("python3 - executing", "openquake", stdin=all_are)
    refused = machine.play(book, args=args, openquake_engine_runtime="/tmp/oq_runtime.whl")
    assert "Job 1, 2, 3" in refused.stdout, refused.stdout
    assert running(cluster, "m1") == ["m1"]
    machine.sh("python3 - complete", "openquake", stdin=all_are)
    for _ in range(2):
        done = machine.play(book, args=args, openquake_engine_runtime="/tmp/oq_runtime.whl")
        assert done.returncode == 0, done.stdout
    kept = "cd /opt/openquake/venv.kept; test -e of-another -a -e openquake-dbserver.service"
    assert machine.can(kept, "root")
    assert (environment(cluster), database(cluster)) == ("venv-new", (500, "venv-new"))
    assert database(cluster, f"{DATABASE}.of-venv.kept") == database(cluster, THEIRS) == (500, "")
    assert running(cluster, "m1") == []
    assert not machine.can(f"systemctl cat {DBSERVER}", "root")


@pytest.mark.slow
def test_job_databases_of_both_stay(cluster: Machines) -> None:
    machine = cluster["m1"]
    machine.sh(f"cp -p {DATABASE} /tmp/ours; {ANOTHER}")
    machine.sh(f"umask 077; mkdir $(dirname {DATABASE}); cp /tmp/ours {DATABASE}", "openquake")
    args = ("-e", "__openquake_engine_wanted=/opt/openquake/venv-new")
    done = machine.play(
        role("openquake_engine"), args=args, openquake_engine_runtime="/tmp/oq_runtime.whl"
    )
    assert f"{DATABASE} stays as it is; {THEIRS} is not used" in done.stdout
    assert database(cluster) == (500, "venv-new") and database(cluster, THEIRS) == (500, "")
    machine.sh("cd /opt/openquake; rm venv; mkdir venv")
    done = machine.play(
        role("openquake_engine"), args=args, openquake_engine_runtime="/tmp/oq_runtime.whl"
    )
    assert "move that one elsewhere" in failures(done.stdout)[0]


def test_new_secret_with_a_dead_worker(cluster: Machines) -> None:
    cluster.sh("mkdir -p /etc/openquake; echo the-secret-of-yesterday >/etc/openquake/authkey")
    cluster.cut("w2")
    done = cluster.play("playbooks/rotate_authkey.yml")
    assert done.stdout.count("failed=0") == 4, done.stdout
    secrets = cluster.sh("cat /etc/openquake/authkey")
    assert secrets["m1"] == secrets["w1"] != secrets["w2"] == "the-secret-of-yesterday"
    assert running(cluster, "m1", "w1") == ["m1", "w1"]


@pytest.mark.slow
def test_new_secret_that_cannot_be_written_stops_nobody(cluster: Machines) -> None:
    cluster.sh("mkdir -p /etc/openquake; echo the-secret-of-yesterday >/etc/openquake/authkey")
    kept = "/etc/openquake"
    cluster["m1"].sh(f"mount --bind {kept} {kept}; mount -o remount,bind,ro {kept}")
    done = cluster.play("playbooks/rotate_authkey.yml")
    assert done.returncode != 0, done.stdout
    assert running(cluster, "m1", "w1", "w2") == ["m1", "w1", "w2"]
    assert set(cluster.sh("cat /etc/openquake/authkey").values()) == {"the-secret-of-yesterday"}


ROTATE, VERIFY = "playbooks/rotate_authkey.yml", "playbooks/verify.yml"
CHECKED = [*(pytest.param(name, marks=pytest.mark.slow) for name in (UPGRADE, ROTATE)), VERIFY]
#: which processes serve, and what is where
STATE = f"""
systemctl show --value --property=MainPID {AGENT} {DBSERVER}
ls -l --time-style=full-iso /opt/openquake /etc/openquake $(dirname {DATABASE}) 2>&1 || true
sha256sum {DATABASE} /etc/openquake/* 2>&1 || true
"""


@pytest.mark.parametrize("playbook", CHECKED)
def test_check_mode_changes_nothing(cluster: Machines, playbook: str) -> None:
    cluster.sh("mkdir -p /etc/openquake; echo the-secret-of-yesterday >/etc/openquake/authkey")
    cluster["m1"].sh("rm -r /opt/openquake/venv-new")
    before = cluster.sh(STATE)
    done = cluster.play(playbook, "--check")
    assert done.returncode == 0, done.stdout
    assert cluster.sh(STATE) == before
