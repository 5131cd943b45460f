"""The rows of the system test, in their order, on one cluster; see README.md.

The first row makes the cluster; the others need it, and leave it as they have found it. A row that
fails prints the journals of the hosts; a table of the rows with their times comes at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system import cluster as clusters
from tests.system import image
from tests.system.cluster import Cluster
from tests.system.playbooks import ROOT, Played

HERE = Path(__file__).parent
#: the modules, in the order of the rows
ORDER = (
    "test_site",
    "test_shares",
    "test_firewall",
    "test_jobs",
    "test_swap",
    "test_power",
    "test_resume",
    "test_memory",
    "test_verify",
    "test_moving",
    "test_newcomer",
    "test_webui",
    "test_leaving",
    "test_kills",
    "test_upgrade",
)
ROW_LIMIT_S = 7200
#: set by ``python -m tests.system``, which makes what the rows need
STARTED = "OQ_SYSTEM_STARTED"
#: per row the outcome and the seconds that it took, with what it made first
ROWS = pytest.StashKey[dict[str, tuple[str, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in (item for item in items if HERE in item.path.parents):
        item.add_marker(pytest.mark.timeout(ROW_LIMIT_S))
        if STARTED not in os.environ:
            item.add_marker(pytest.mark.skip(reason="the hosts are made by make system-test"))
    places = {name: place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.stem, -1))


@pytest.fixture(scope="session")
def hosts() -> Iterator[Cluster]:
    """Bare hosts, switched on, with the accounts of the site.

    ``OQ_SYSTEM_KEEP`` names a directory for the disks, which then stay there; what stands on them
    from an earlier run is used.
    """
    kept = os.environ.get("OQ_SYSTEM_KEEP")
    directory = Path(kept) if kept else ROOT / "build/system-test"
    if not kept:
        shutil.rmtree(directory, ignore_errors=True)
    with Cluster(directory, image.wanted()) as cluster:
        cluster.start(one.name for one in cluster.members)
        cluster.make_people()
        yield cluster
        if kept:
            for one in cluster.running:
                one.shut_down()
        else:
            for one in cluster.hosts.values():
                one.disk.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def site(hosts: Cluster) -> Played | None:
    """What the first run of ``site.yml`` has done; None where the cluster stood already."""
    if hosts.tasks:
        return None
    played = hosts.play("site.yml")
    if played.code == 0:
        hosts.tasks = played.tasks
    return played


@pytest.fixture(scope="session")
def provisioned(hosts: Cluster, site: Played | None) -> Cluster:
    """The cluster after ``site.yml``."""
    assert site is None or site.code == 0, "site.yml has failed, see the first row"
    hosts.wait_all_up()
    return hosts


@pytest.fixture(scope="session")
def embedded(hosts: Cluster) -> dict[str, Path]:
    """The datastores of the examples, run on this machine alone."""
    return {name: clusters.embedded(name, hosts.directory) for name in clusters.EXAMPLES}


@pytest.fixture
def cluster(provisioned: Cluster) -> Cluster:
    """The cluster with all its hosts on and all its workers up."""
    provisioned.cut_silent()
    provisioned.start(one.name for one in provisioned.members)
    provisioned.wait_all_up()
    return provisioned


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    hosts = item.funcargs.get("hosts") or item.funcargs.get("provisioned")
    if report.failed and isinstance(hosts, Cluster):
        for one in hosts.running:
            report.sections.append((f"journal of {one.name}", one.journal()))
    if HERE in item.path.parents and STARTED in os.environ:
        rows = item.config.stash[ROWS]
        outcome, seconds = rows.get(item.nodeid, ("not ended", 0.0))
        if report.when == "call" or not report.passed:  # what comes before it is no outcome
            outcome = report.outcome
        rows[item.nodeid] = (outcome, seconds + call.duration)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash[ROWS]
    if rows:
        terminalreporter.section("rows")
        for name, (outcome, seconds) in rows.items():
            text = name.rpartition("/")[2].replace("test_", "").replace(".py::", ": ")
            terminalreporter.write_line(f"{text.replace('_', ' '):<70}{seconds:8.1f} s  {outcome}")
