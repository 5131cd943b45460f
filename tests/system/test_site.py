"""From bare hosts to a cluster, with nothing set but who may use it."""

from __future__ import annotations

import pytest

from tests.system.cluster import Cluster
from tests.system.playbooks import Played


def test_bare_hosts_become_a_cluster(hosts: Cluster, site: Played | None) -> None:
    if site is None:
        pytest.skip("the disks were kept from an earlier run")
    assert site.code == 0, site
    assert site.total("failed") == site.total("unreachable") == 0, site
    assert set(site.recap) >= {one.name for one in hosts.members}
    hosts.wait_all_up()


def test_a_second_run_changes_nothing(provisioned: Cluster) -> None:
    again = provisioned.play("site.yml")
    assert again.code == 0, again
    assert again.total("changed") == 0, again.changed_tasks
