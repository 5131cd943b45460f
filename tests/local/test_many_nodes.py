"""One broker and more nodes than the sockets of a ZeroMQ context would do for, see ``peers``."""

from __future__ import annotations

import pytest

from benchmarks import peers

#: at three sockets each a context (1,023 sockets) would do for 341
NODES = 400


@pytest.mark.light
def test_each_of_400_nodes_has_a_task_and_one_is_lost_and_back() -> None:
    figures = peers.measure(NODES, idle_s=0.2, hold_s=1.0)
    assert set(figures) == set(peers.UNITS)
