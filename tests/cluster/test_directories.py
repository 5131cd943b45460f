"""Directories of an agent: nobody else has made them, looks into them or exchanges them."""

from __future__ import annotations

import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import CTRL_PORT, Cluster
from tests.cluster.jobs import drive, result
from tests.conftest import Attacks
from tests.leftovers import SHM
from tests.squatter import Squatter

pytestmark = [pytest.mark.timeout(300), pytest.mark.attack]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for everybody, as /tmp is one."""
    path = Path("/tmp", f"oq-t{os.getpid()}")
    path.mkdir()
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
def test_nobody_takes_the_directories_of_an_agent(
    cluster: Cluster, temporary: Path, attacks: Attacks
) -> None:
    node, number = "node3", 10
    name = f"oq-agent-{cluster.net.address[node]}-{CTRL_PORT}"
    # what a name was made of that could be computed
    suffix = zlib.crc32(os.fsencode(temporary / name))
    cluster.stop_agent(node)
    with Squatter(temporary, SHM, names=(f"{name}-{suffix:08x}",)) as squatter:
        for end in (signal.SIGKILL, signal.SIGTERM):
            options = {"RUNTIME_DIRECTORY": "", "TMPDIR": str(temporary)}
            agent = cluster.start_agent(node, prefix=squatter.victim, **options)
            found = result(drive(cluster, "spoils", [(x, "shared") for x in range(number)]))
            assert "value" in found, found
            os.kill(agent.pid, end)
            agent.wait()
            del cluster.agents[node]
        left = squatter.run("find", str(SHM), "-name", f"{name}*", "-uid", str(os.getuid()))
    attacks.tried(squatter.tried, len(squatter.found))
    assert not squatter.found
    assert not left, "what a killed one has left was not found"
    assert not (temporary / name).exists()
