"""The systems under test, each started on hosts of its own (network namespaces) and ended again.

    oq-runtime-tcp      our broker and agents, CURVE over TCP between master and nodes
    oq-runtime-ipc      the same embedded in one host, as ``oq-run`` without a cluster
    engine-zmq          the engine's own worker pools, TCP between master and nodes
    engine-processpool  the engine's own multiprocessing pool
    dask, dask-scatter, parsl-htex, ipyparallel    the peers, on the loopback of the master

All of them share the machine, so one runs at a time. What is measured: ``rows``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster.cluster import CTRL_PORT, Cluster
from tests.cluster.netns import HOSTS, MASTER, Net, Process
from tests.leftovers import wait_for

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-bench/bin/python"
#: importing the engine in eight workers at once takes a minute on a busy machine
START_LIMIT_S = 180.0
END_LIMIT_S = 15.0


class Hung(Exception):
    """No answer within the limit."""


class Failed(Exception):
    """The system says that it could not do the work."""


class System:
    """A system that is up, with a driver to talk to."""

    def __init__(self, name: str, driver: Process, cluster: Cluster) -> None:
        self.name = name
        self.driver = driver
        self.cluster = cluster

    def tell(self, row: str, **parameters: Any) -> None:
        assert self.driver.stdin
        with contextlib.suppress(BrokenPipeError):  # its death is reported by ``hear``
            self.driver.stdin.write(json.dumps({"row": row, **parameters}) + "\n")
            self.driver.stdin.flush()

    def hear(self, limit_s: float) -> dict[str, Any]:
        """The answer of the driver; raises Hung or Failed."""
        assert self.driver.stdout
        ready, _, _ = select.select([self.driver.stdout], [], [], limit_s)
        if not ready:
            raise Hung(f"no answer within {limit_s:.0f} s")
        line = self.driver.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the driver has ended"}
        if error := answer.get("error"):
            raise Failed(error)
        return answer

    def ask(self, row: str, limit_s: float, **parameters: Any) -> dict[str, Any]:
        self.tell(row, **parameters)
        return self.hear(limit_s)


class Lab:
    """A network on which systems are started; a context manager that leaves nothing behind.

    :param log: directory for what the systems write
    """

    def __init__(self, log: Path) -> None:
        self.net = Net(HOSTS)
        self.log = log
        self.home = Path()

    def __enter__(self) -> Self:
        self.log.mkdir(parents=True, exist_ok=True)
        self.home = Path(tempfile.mkdtemp(prefix="oqb-"))
        self.net.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.net.__exit__(kind, error, traceback)
        shutil.rmtree(self.home, ignore_errors=True)

    @contextlib.contextmanager
    def running(self, name: str, slots: Mapping[str, int]) -> Iterator[System]:
        """Start a system with these worker processes per node, all of them up; end it afterwards.

        Systems that know no nodes have all their workers on the master.
        """
        home = Path(tempfile.mkdtemp(prefix="s", dir=self.home))
        cluster = Cluster(self.net, home, slots)
        shutil.rmtree(cluster.log)
        cluster.log = self.log
        total = sum(slots.values())
        try:
            driver = START[name](self, cluster, total)
            system = System(name, driver, cluster)
            system.ask("warm_up", START_LIMIT_S, slots=total)
            yield system
            assert driver.stdin
            driver.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(END_LIMIT_S)
        finally:
            with contextlib.suppress(TimeoutError):
                cluster.close()
            for host in self.net.hosts:
                if not wait_for(lambda host=host: not self.net.processes(host), END_LIMIT_S):
                    self.net.kill_all(host)
                self.net.clear(host)
            shutil.rmtree(home)

    def drive(
        self, cluster: Cluster, module: str, *args: str, python: Path | str = sys.executable,
        **env: str,
    ) -> Process:  # fmt: skip
        return self.net.popen(
            MASTER,
            [python, "-m", f"benchmarks.drivers.{module}", *args],
            cluster.env(MASTER, PYTHONPATH=str(ROOT), **env),
            log=self.log / f"driver-{module}.log",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=cluster.tmpdir(MASTER),
        )


def oq_runtime_tcp(lab: Lab, cluster: Cluster, total: int) -> Process:
    for node in cluster.slots:
        cluster.start_agent(node, PYTHONPATH=str(ROOT))
    return lab.drive(cluster, "engine", OQ_DISTRIBUTE="zmq")


def oq_runtime_ipc(lab: Lab, cluster: Cluster, total: int) -> Process:
    _embedded(cluster)
    return lab.drive(cluster, "engine", OQ_DISTRIBUTE="zmq", OQ_NUM_CORES=str(total))


def engine_zmq(lab: Lab, cluster: Cluster, total: int) -> Process:
    _without_runtime(cluster)
    for node, slots in cluster.slots.items():
        pool = lab.net.popen(
            node,
            [sys.executable, "-m", "openquake.baselib.workerpool", str(slots)],
            cluster.env(node, PYTHONPATH=str(ROOT), OQ_DISTRIBUTE="zmq"),
            log=lab.log / f"workerpool-{node}.log",
            cwd=cluster.tmpdir(node),
        )
        cluster.runs.append(pool)  # killed with the cluster: it ends on command only
    for node in cluster.slots:
        if not wait_for(lambda node=node: lab.net.listens(node, CTRL_PORT), START_LIMIT_S):
            raise Failed(f"the worker pool of {node} does not listen")
    return lab.drive(cluster, "engine", OQ_DISTRIBUTE="zmq")


def engine_processpool(lab: Lab, cluster: Cluster, total: int) -> Process:
    _without_runtime(cluster)
    return lab.drive(cluster, "engine", OQ_DISTRIBUTE="processpool", OQ_NUM_CORES=str(total))


def _peer(module: str, *args: str) -> Callable[[Lab, Cluster, int], Process]:
    def start(lab: Lab, cluster: Cluster, total: int) -> Process:
        path = f"{PEERS_PYTHON.parent}:{os.environ['PATH']}"  # Parsl looks for its programs there
        return lab.drive(cluster, module, str(total), *args, python=PEERS_PYTHON, PATH=path)

    return start


START: dict[str, Callable[[Lab, Cluster, int], Process]] = {
    "oq-runtime-tcp": oq_runtime_tcp,
    "oq-runtime-ipc": oq_runtime_ipc,
    "engine-zmq": engine_zmq,
    "engine-processpool": engine_processpool,
    "dask": _peer("dask_distributed"),
    "dask-scatter": _peer("dask_distributed", "--scatter"),
    "parsl-htex": _peer("parsl_htex"),
    "ipyparallel": _peer("ipyparallel_balanced"),
}


def _embedded(cluster: Cluster) -> None:
    """One machine alone: no worker hosts in the configuration."""
    text = cluster.cfg.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("host_cores")]
    cluster.cfg.write_text("\n".join(lines) + "\n")


def _without_runtime(cluster: Cluster) -> None:
    """The engine as it is installed."""
    text = cluster.cfg.read_text()
    cluster.cfg.write_text(text.partition("[oq_runtime]")[0])
