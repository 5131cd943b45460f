"""The systems under test, each started on hosts of its own (network namespaces) and ended again.

    oq-runtime-tcp      our broker and agents, CURVE over TCP between master and nodes
    oq-runtime-tcp-journal, oq-runtime-tcp-no-journal
                        the same with a journal where the first has none, and without where it has
    oq-runtime-ipc      the same embedded in one host, as ``oq-run`` without a cluster
    engine-zmq          the engine's own worker pools, TCP between master and nodes
    engine-processpool  the engine's own multiprocessing pool
    dask, dask-scatter, parsl-htex, ipyparallel    the peers, on the loopback of the master
    sealed-zmq          no system: AES-256-GCM over ZeroMQ between two processes there

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.cluster.cluster import CTRL_PORT, Cluster
from tests.cluster.netns import HOSTS, MASTER, Net, Process
from tests.leftovers import remove_unused_shm, shm, wait_for

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-bench/bin/python"
#: importing the engine in eight workers takes ten seconds, on a machine with other work minutes
START_LIMIT_S = 600.0
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

    def processes(self, module: str) -> list[psutil.Process]:
        """The processes of all hosts that run this module of our runtime."""
        pids = [pid for host in self.cluster.net.hosts for pid in self.cluster.net.processes(host)]
        found = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"oq_runtime.{module}" in psutil.Process(pid).cmdline():
                    found.append(psutil.Process(pid))
        return found

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
        total = sum(slots.values())
        with self._cluster(slots) as cluster:
            if name in ENGINES:
                driver = self._drive(cluster, "engine", **ENGINES[name](self, cluster))
            elif name == SEALED:
                driver = self._drive(cluster, "sealed_zmq")
            else:
                driver = self._peer(cluster, *PEERS[name], total)
            system = System(name, driver, cluster)
            system.ask("warm_up", START_LIMIT_S, slots=total)
            yield system
            assert driver.stdin
            driver.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(END_LIMIT_S)

    @contextlib.contextmanager
    def calculation(
        self, name: str, slots: Mapping[str, int], job: Path, *params: str
    ) -> Iterator[tuple[Process, Cluster]]:
        """Run a job by the command that a user of the system types; end it afterwards.

        The process writes the engine's log to its stdout.

        :param params: as after ``-p``
        """
        with self._cluster(slots) as cluster:
            env = ENGINES[name](self, cluster)
            if "-tcp" in name or "-zmq" in name:
                cluster.start_dbserver()
            else:
                shutil.copytree(self._empty_database(), cluster.home / "oqdata", dirs_exist_ok=True)
            if name.startswith("oq-runtime"):
                argv = ["-m", "oq_runtime.commands.run", str(job), "--no-progress"]
                argv += ["--no-journal"] if name == NO_JOURNAL else []
            else:
                argv = ["-m", "openquake.commands", "engine", "--run", str(job)]
            yield (
                self._start(
                    cluster,
                    [sys.executable, *argv, *(["-p", ",".join(params)] if params else [])],
                    f"calculation-{name}",
                    env,
                    stderr=subprocess.STDOUT,
                ),
                cluster,
            )

    @contextlib.contextmanager
    def _cluster(self, slots: Mapping[str, int]) -> Iterator[Cluster]:
        """Files and names of a cluster; whatever was started on its hosts is ended afterwards."""
        cluster = Cluster(self.net, Path(tempfile.mkdtemp(prefix="s", dir=self.home)), slots)
        shutil.rmtree(cluster.log)
        cluster.log = self.log
        before = shm()
        try:
            yield cluster
        finally:
            with contextlib.suppress(TimeoutError):
                cluster.close()
            for host in self.net.hosts:
                if not wait_for(partial(self._is_empty, host), END_LIMIT_S):
                    self.net.kill_all(host)
                self.net.clear(host)
            remove_unused_shm(shm() - before, "sem.mp-")  # Python's, of pools that were killed
            shutil.rmtree(cluster.home)

    def _is_empty(self, host: str) -> bool:
        return not self.net.processes(host)

    def _empty_database(self) -> Path:
        """The directory of a job database without jobs; made once, for it takes seconds."""
        directory = self.home / "database"
        if not directory.exists():
            with self._cluster({"node1": 1}) as cluster:
                _one_host(cluster)
                _without_runtime(cluster)
                argv = [sys.executable, "-m", "openquake.commands", "engine", "--upgrade-db"]
                done = self.net.run(MASTER, argv, cluster.env(MASTER), limit_s=START_LIMIT_S)
                if done.returncode:
                    raise Failed(f"no database: {done.stderr[-300:]}")
                shutil.copytree(cluster.home / "oqdata", directory)
        return directory

    def _drive(
        self, cluster: Cluster, module: str, *args: str, python: Path | str = sys.executable,
        **env: str,
    ) -> Process:  # fmt: skip
        argv = [python, "-m", f"benchmarks.drivers.{module}", *args]
        log = f"driver-{module}"
        return self._start(cluster, argv, log, env, stdin=subprocess.PIPE)

    def _peer(self, cluster: Cluster, module: str, args: Sequence[str], total: int) -> Process:
        path = f"{PEERS_PYTHON.parent}:{os.environ['PATH']}"  # Parsl looks for its programs there
        return self._drive(cluster, module, str(total), *args, python=PEERS_PYTHON, PATH=path)

    def _start(
        self, cluster: Cluster, argv: Sequence[str | Path], log: str, env: Mapping[str, str],
        stdin: int | None = None, stderr: int | None = None,
    ) -> Process:  # fmt: skip
        options = {name: v for name, v in (("stdin", stdin), ("stderr", stderr)) if v is not None}
        process = self.net.popen(
            MASTER,
            argv,
            cluster.env(MASTER, PYTHONPATH=str(ROOT), **env),
            log=self.log / f"{log}.log",
            stdout=subprocess.PIPE,
            cwd=cluster.tmpdir(MASTER),
            **options,
        )
        cluster.runs.append(process)  # killed with the cluster if it has not ended by then
        return process


# ---- the engines: each starts what it needs and returns the environment of the master's process


def oq_runtime_tcp(lab: Lab, cluster: Cluster) -> dict[str, str]:
    for node in cluster.slots:
        cluster.start_agent(node, PYTHONPATH=str(ROOT))
    return {"OQ_DISTRIBUTE": "zmq"}


def oq_runtime_tcp_journal(lab: Lab, cluster: Cluster) -> dict[str, str]:
    return oq_runtime_tcp(lab, cluster) | {"BENCH_JOURNAL": str(cluster.home / "journal")}


def oq_runtime_ipc(lab: Lab, cluster: Cluster) -> dict[str, str]:
    _one_host(cluster)
    return {"OQ_DISTRIBUTE": "zmq", "OQ_NUM_CORES": str(sum(cluster.slots.values()))}


def engine_zmq(lab: Lab, cluster: Cluster) -> dict[str, str]:
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
        if not wait_for(partial(lab.net.listens, node, CTRL_PORT), START_LIMIT_S):
            raise Failed(f"the worker pool of {node} does not listen")
    return {"OQ_DISTRIBUTE": "zmq"}


def engine_processpool(lab: Lab, cluster: Cluster) -> dict[str, str]:
    _one_host(cluster)
    _without_runtime(cluster)
    return {"OQ_DISTRIBUTE": "processpool", "OQ_NUM_CORES": str(sum(cluster.slots.values()))}


#: pairs with oq-runtime-tcp: rows that ask a system that is up have no journal, jobs have one
JOURNAL, NO_JOURNAL = "oq-runtime-tcp-journal", "oq-runtime-tcp-no-journal"
ENGINES: dict[str, Callable[[Lab, Cluster], dict[str, str]]] = {
    "oq-runtime-tcp": oq_runtime_tcp,
    JOURNAL: oq_runtime_tcp_journal,
    NO_JOURNAL: oq_runtime_tcp,
    "oq-runtime-ipc": oq_runtime_ipc,
    "engine-zmq": engine_zmq,
    "engine-processpool": engine_processpool,
}
#: of which row b is a part
SEALED = "sealed-zmq"
#: module of the driver and its options
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dask": ("dask_distributed", ()),
    "dask-scatter": ("dask_distributed", ("--scatter",)),
    "parsl-htex": ("parsl_htex", ()),
    "ipyparallel": ("ipyparallel_balanced", ()),
}


def _one_host(cluster: Cluster) -> None:
    """One machine alone: a local database, no DbServer, and no worker hosts."""
    text = cluster.cfg.read_text()
    for host in cluster.net.address.values():
        text = text.replace(f"host = {host}\n", "host = 127.0.0.1\n")
    lines = [line for line in text.splitlines() if not line.startswith("host_cores")]
    cluster.cfg.write_text("\n".join(lines) + "\n")


def _without_runtime(cluster: Cluster) -> None:
    """The engine as it is installed."""
    text = cluster.cfg.read_text()
    cluster.cfg.write_text(text.partition("[oq_runtime]")[0])
