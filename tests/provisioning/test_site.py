"""``site.yml`` from bare machines to a cluster, with stand-ins for the engine and for NFS.

Accounts, names, the packet filter, ssh with its gate, systemd's units, the second run and one after
a kill are real.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import wait_for
from tests.provisioning.machine import NOTIFIES
from tests.provisioning.machines import Machines
from tests.provisioning.packages import download

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DBSERVER = """\
#!/usr/bin/python3
import socket, time
with socket.create_server(("192.0.2.1", 1908)):
    time.sleep(3600)
"""
PYTHON = """\
#!/bin/sh
case "$*" in
*upgrade_db*) touch "$HOME/oqdata/db.sqlite3" ;;
*) touch "$3" ;;
esac
"""
ENVIRONMENT = f"""
mkdir -p /opt/openquake/venv-new/bin
cd /opt/openquake/venv-new
touch .complete bin/oq-run bin/oq-workers
cat >bin/oq-agent <<'EOF'
{NOTIFIES}
EOF
cat >bin/oq <<'EOF'
{DBSERVER}
EOF
cat >bin/python <<'EOF'
{PYTHON}
EOF
chmod +x bin/*
printf '#!/bin/sh\\n' >/usr/sbin/exportfs
chmod +x /usr/sbin/exportfs
rm -f /etc/ssh/ssh_host_* /run/nologin
ssh-keygen -A
systemctl start ssh
"""
#: on a machine that nobody logs in to
SSHD = """
ln -sf /bin/true /usr/sbin/policy-rc.d
DEBIAN_FRONTEND=noninteractive dpkg --install {packages}/*.deb >/dev/null
"""
MOUNTS = """
ln -s venv-new /opt/openquake/venv
mkdir /oq_shared
for path in /opt/openquake /oq_shared; do
    mount --bind $path $path
    mount -o remount,bind,ro $path
done
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Machines]:
    (tmp_path / "oq_runtime.whl").write_text("as built")
    made = Machines(
        tmp_path,
        openquake_engine_runtime=str(tmp_path / "oq_runtime.whl"),
        __openquake_engine_wanted="/opt/openquake/venv-new",
        openquake_nfs_client_provider="external",
        openquake_nfs_server_provider="external",
        openquake_shared_dir="/oq_shared",
    )
    try:
        made.connect()
        if shutil.which("sshd") is None:
            made.sh(SSHD.format(packages=download("openssh-server")))
        made.sh(ENVIRONMENT)
        made.sh(MOUNTS, "w1", "w2")
        yield made
    finally:
        made.close()


def changed(output: str) -> dict[str, int]:
    return {
        host: int(n) for host, n in re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", output, re.M)
    }


def check_serves(cluster: Machines) -> None:
    ping = "ssh openquake@192.0.2.2 ping; ssh openquake@192.0.2.3 ping"
    assert cluster["m1"].sh(ping, "openquake") == "pong\npong"
    assert cluster["m1"].can("systemctl is-active openquake-dbserver openquake-firewall", "root")
    for name in "w1", "w2":
        assert cluster[name].can("systemctl is-active openquake-worker", "root")
        assert "1909" in cluster[name].sh("nft list table inet openquake")


def test_whole(cluster: Machines) -> None:
    """The first run is killed after the packet filter; a worker dies before the second."""
    process = cluster.start("site.yml")
    assert wait_for(lambda: cluster["w1"].can("nft list table inet openquake", "root"), 300)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cluster.cut("w2")
    done = cluster.play("site.yml")
    assert done.stdout.count("failed=0") == 4, done.stdout
    assert cluster["w1"].can("systemctl is-active openquake-worker", "root")
    assert "192.0.2.3" in cluster["m1"].sh("cat /opt/openquake/openquake.cfg")
    cluster.join("w2")
    done = cluster.play("site.yml")
    assert done.returncode == 0, done.stdout
    check_serves(cluster)
    done = cluster.play("site.yml")
    assert changed(done.stdout) == {"localhost": 0, "m1": 0, "w1": 0, "w2": 0}, done.stdout
