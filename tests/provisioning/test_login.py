"""No mount locks out the user by whom Ansible comes in, who may become root at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.machines import INVENTORY, SSH, Machines
from tests.provisioning.roles import failures

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Machines]:
    """Machines that admin comes in to, whose home the mount of /home would hide."""
    made = Machines(tmp_path)
    try:
        made.sh("echo 'admin ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/admin")
        made.sh("useradd --uid 1234 --create-home admin", "m1")
        made.sh("useradd --uid 1235 --create-home admin", "w1", "w2")
        made.ssh.write_text(SSH.replace("sh -c", "runuser -u admin -- sh -c"))
        inventory = INVENTORY.replace("become=false", "become=true")
        (tmp_path / "inventory.ini").write_text(inventory)
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_login_that_always_becomes_root(cluster: Machines) -> None:
    done = cluster.play("playbooks/validate.yml")
    assert "Ansible comes in here as admin, whose home /home/admin" in str(failures(done.stdout))


#: what a worker says of the user by whom Ansible comes in, and of root
LIE = """\
#!/bin/sh
case "$2" in admin | root) echo "root:x:0:0::/home/mallory:/bin/sh"; exit ;; esac
exec /usr/bin/getent.real "$@"
"""


def test_word_of_a_worker_is_no_path_on_the_master(cluster: Machines) -> None:
    """Its root would have root of the master read a link that a member has put there."""
    cluster["w1"].sh("cd /usr/bin; mv getent getent.real; cat >getent; chmod 755 getent", stdin=LIE)
    cluster["w2"].sh("usermod --uid 1234 admin")
    cluster["m1"].sh(
        "useradd --create-home mallory; mkdir /home/mallory/.ssh;"
        "echo of-root-alone >/root/kept; chmod 600 /root/kept;"
        "ln -s /root/kept /home/mallory/.ssh/authorized_keys"
    )
    done = cluster.play("playbooks/validate.yml", "-vv")
    assert "Ansible comes in here as root, whose home /home/mallory" in str(failures(done.stdout))
    assert "of-root-alone" not in done.stdout
