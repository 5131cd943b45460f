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


def test_login_that_always_becomes_root(cluster: Machines) -> None:
    done = cluster.play("playbooks/validate.yml")
    assert "Ansible comes in here as admin, whose home /home/admin" in str(failures(done.stdout))
