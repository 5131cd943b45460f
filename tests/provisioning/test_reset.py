"""``reset.yml`` takes off all that the roles have put on the hosts, but data and accounts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.provisioning.machine import role
from tests.provisioning.machines import Machines
from tests.provisioning.roles import failures

pytestmark = pytest.mark.timeout(400)

RESET = "playbooks/reset.yml"
#: as the roles leave a host; the service notes its end
INSTALLED = r"""
groupadd --gid 880 openquake
useradd --uid 880 --gid openquake --home /var/lib/openquake openquake
install -d -o openquake -g openquake /var/lib/openquake /var/cache/openquake
install -d -m 0700 /var/lib/openquake-ansible /etc/openquake/ssh
mkdir -p /etc/systemd/system/nftables.service.d
for file in authkey firewall.nft firewall.opened swap-masked webui-admin-password \
    webui-secret-key; do
    echo secret >/etc/openquake/$file
done
echo '[Service]' >/etc/systemd/system/nftables.service.d/openquake.conf
printf '[Service]\nExecStart=sleep infinity\n' >/etc/systemd/system/openquake-$1.service
systemctl start openquake-$1.service
"""
EXPORTS = "/etc/exports.d/openquake.exports"
MASTER = f"""
mkdir -p /etc/exports.d
echo '/oq_shared 192.0.2.2(ro) 192.0.2.3(ro)' >{EXPORTS}
mkdir -p /opt/openquake/venv-old/bin
cd /opt/openquake
ln -s venv-old venv
ln -s venv-new changing-from
touch openquake.cfg venv/bin/oq
ln -s /opt/openquake/venv/bin/oq /usr/bin/oq
runuser -u openquake -- sh -c 'umask 077; mkdir ~/oqdata; touch ~/oqdata/db.sqlite3'
"""
DATABASE = "/var/lib/openquake/oqdata/db.sqlite3"
JOB = f"""python3 -c "import sqlite3
with sqlite3.connect('{DATABASE}') as database:
    database.execute('CREATE TABLE job (id, status)')
    database.execute('INSERT INTO job VALUES (7, ?)', ('executing',))"
"""
#: what of the cluster is on a host
TRACES = (
    "ls -d /etc/openquake /usr/bin/oq* /var/cache/openquake* /var/lib/openquake-ansible"
    " /etc/systemd/system/*openquake* /etc/systemd/system/nftables.service.d /opt/openquake"
    " 2>/dev/null || true; pgrep -lu openquake || true"
)
YES = ("-e", "openquake_reset_confirmation=yes")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    made = Machines(tmp_path_factory.mktemp("reset"), openquake_shared_dir="/oq_shared")
    try:
        for name, service in ("m1", "dbserver"), ("w1", "worker"), ("w2", "worker"):
            made[name].sh(INSTALLED.replace("$1", service))
        made["m1"].sh(MASTER)
        yield made
    finally:
        made.close()


def test_refused_without_a_yes_and_while_a_job_runs(cluster: Machines) -> None:
    machine = cluster["m1"]
    before = cluster.sh(TRACES)
    machine.sh(f"cp -p {DATABASE} /tmp/empty; {JOB}")
    done = cluster.play(RESET)
    assert failures(done.stdout)[0].startswith("Nothing was changed; answer yes"), done.stdout
    done = cluster.play(RESET, *YES)
    assert failures(done.stdout)[0].startswith("Job 7 is running; wait for it"), done.stdout
    machine.sh(f"cp -p /tmp/empty {DATABASE}")
    assert cluster.sh(TRACES) == before


#: its agent cannot be stopped
STAYS = r"""
mkdir -p /run/systemd/system/openquake-worker.service.d
printf '[Unit]\nRefuseManualStop=yes\n' >/run/systemd/system/openquake-worker.service.d/stays.conf
systemctl daemon-reload
"""


#: an environment of another installer
ANOTHERS = """
install -D /dev/null /opt/openquake/venv/bin/oq
ln -s /opt/openquake/venv/bin/oq /usr/bin/oq
"""


@pytest.mark.slow
def test_taken_down(cluster: Machines) -> None:
    """An empty job database, which a first run has left that was killed, runs no job.

    Where something fails nobody else is stopped, also where that is all workers, nor by a dead one;
    and their turn comes; until then they may mount what they did. The administrator's own file and
    another's environment are spared.
    """
    cluster.sh(f"echo mine >/etc/openquake/openquake.cfg; {STAYS}", "w1", "w2")
    there = cluster.sh(TRACES, "w1", "w2")
    done = cluster.play(RESET, *YES)
    assert "w1, w2: did not answer, or something failed there" in done.stdout, done.stdout
    assert cluster.sh(TRACES) == {"m1": "", **there}
    assert cluster["m1"].can(f"test -e {DATABASE}", "openquake")
    cluster["w1"].sh("rm -r /run/systemd/system/openquake-*; systemctl daemon-reload")
    cluster.cut("w2")
    cluster["m1"].sh(ANOTHERS)
    done = cluster.play(RESET, *YES)
    assert "w2: did not answer, or something failed there" in done.stdout, done.stdout
    assert done.stdout.count("failed=0") == 4, done.stdout
    assert cluster["m1"].can(f"grep -q 192.0.2.3 {EXPORTS}", "root"), "w2 still mounts it"
    inventory = cluster.folder / "inventory.ini"
    inventory.write_text(re.sub("^w2 .*\n", "", inventory.read_text(), flags=re.MULTILINE))
    done = cluster.play(RESET, *YES)
    assert done.returncode == 0, done.stdout
    assert not cluster["m1"].can(f"test -e {EXPORTS}", "root")
    left = {"m1": "/opt/openquake\n/usr/bin/oq", "w1": "/etc/openquake", "w2": there["w2"]}
    assert cluster.sh(TRACES) == left
    assert cluster["m1"].sh("find /opt/openquake -type f") == "/opt/openquake/venv/bin/oq"
    assert cluster["w1"].sh("ls /etc/openquake") == "openquake.cfg"


@pytest.mark.slow
def test_account_that_still_has_processes(cluster: Machines) -> None:
    """userdel refuses then; one that does not mind SIGTERM is ended as well."""
    machine = cluster["m1"]
    for script in "sleep 999", "trap : TERM; while sleep 1; do :; done":
        machine.sh(f"runuser -u openquake -- sh -c '{script}' >/dev/null 2>&1 &")
    done = machine.play(role("openquake_user", "remove"), openquake_user_remove_account=True)
    assert done.returncode == 0, done.stdout
    assert not machine.can("getent passwd openquake || test -e /var/lib/openquake", "root")
    again = machine.play(role("openquake_user", "remove"), openquake_user_remove_account=True)
    assert "changed=0" in again.stdout, again.stdout
