"""The engine's client of its worker pools: ``oq workers``, and the end of a job."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from oq_runtime.cluster import debug, pool
from oq_runtime.config import Config
from oq_runtime.engine.history import History
from oq_runtime.engine.jobtable import JobTable, Status
from oq_runtime.session.client import Session


def install_workerpool(workerpool: Any) -> None:
    """Replace the engine's client of its own worker pools."""
    engine_master = workerpool.WorkerMaster

    class WorkerMaster:
        """Answers in the engine's own terms: for the session of a job, or for the whole cluster.

        The engine makes one with a job id while it runs a job; ``oq workers`` makes one with the
        configuration.
        """

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if os.environ.get("OQ_DISTRIBUTE") != "zmq":
                return engine_master(*args, **kwargs)
            return super().__new__(cls)

        def __init__(self, job: Any = -1, *_: Any, **__: Any) -> None:
            from openquake.baselib import config

            self.job = job if isinstance(job, int) else -1
            cluster = None if isinstance(job, int) else Config.from_sections(config).cluster
            self.pool = pool.Pool(cluster) if cluster else None

        def status(self) -> list[tuple[str, int, int]]:
            if self.pool:
                return pool.triples(self.pool.ask("status"))
            if self.job < 0:
                return Session.current().status()
            try:
                Session.current().call_it(f"calculation {self.job}")
                return Session.current().status()
            except BaseException as exc:
                with contextlib.suppress(Exception):  # the first error says more
                    failed = isinstance(exc, Exception)
                    JobTable.of_engine().end_own(Status.FAILED if failed else Status.ABORTED)
                raise

        def wait(self, seconds: int = 120) -> list[tuple[str, int, int]]:
            if self.pool:
                return pool.triples(self.pool.wait(seconds))
            found, history = self.status(), History.current()
            return history.slots(found) if history is not None else found

        def start(self) -> str:
            hosts = pool.answering(self.pool.start()) if self.pool else self.status()
            return f"starting {hosts}"

        def stop(self) -> str:
            """Stop taking tasks; in a job, cancel its own and touch the workers of nobody else."""
            if self.pool:
                return f"stopped {pool.answering(self.pool.ask('stop'))}"
            if session := Session.existing():
                session.cancel()
            return "released"

        def kill(self) -> str:
            return f"killed {pool.answering(self.pool.kill())}" if self.pool else self.stop()

        def restart(self) -> str:
            if not self.pool:
                return "nothing to restart: the workers belong to this job"
            self.pool.restart()
            return "restarted"

        def debug(self) -> str:
            if not self.pool:
                return "nothing to debug: the workers belong to this job"
            for host in self.pool.cluster.hosts:
                print("Sending to", self.pool.cluster.control_url(host))
            report = debug.examine(self.pool)
            print(f"results={sorted(report.results)}")
            if report.problems:
                raise SystemExit("\n".join(report.problems))
            return "debugged"

    workerpool.WorkerMaster = WorkerMaster
