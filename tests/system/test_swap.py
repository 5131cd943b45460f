"""Swap is off where tasks run, and stays off."""

from __future__ import annotations

import pytest

from tests.system.cluster import WORKERS, Cluster


@pytest.mark.parametrize("worker", WORKERS)
def test_swap_is_off_also_after_a_restart(cluster: Cluster, worker: str) -> None:
    host = cluster.hosts[worker]
    assert host.out("swapon --show --noheadings") == ""
    host.reboot()
    assert host.out("swapon --show --noheadings") == ""
    assert host.out("grep -c swap /etc/fstab") == "1"  # its line is there, as a comment
    cluster.wait_all_up()
