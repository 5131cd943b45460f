"""``make bench-peers``: one broker and up to 2,000 nodes, over real sockets with encryption.

    python -m benchmarks.peers [20 200 2000]

The nodes are ``standins``; the broker is the real one in a process of its own, and so is the
client of the engine's side, here. For each number of nodes:

- ``idle``: CPU of the broker in per cent of a core while nothing happens but beats;
- ``leased``: seconds until all nodes have a lease;
- ``first``: seconds from the submission until every node has a task;
- ``lost``, ``back``: seconds until the broker knows that a node was killed, and until one that was
  started again has a lease;
- ``memory``: MiB of the broker at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.standins import address
from oq_runtime.files import private
from oq_runtime.session.client import Session
from oq_runtime.wire import payload
from tests.leftovers import wait_for

ROOT = Path(__file__).resolve().parent.parent
CTRL_PORT, DATA_PORT = 21909, 21912
#: agents of a process: each takes five descriptors
PER_PROCESS = 500
#: seconds for which an idle broker is watched
IDLE_S = 10.0
#: seconds that a task is held by a node
HOLD_S = 3.0
LIMIT_S = 180.0
UNITS = {"leased": "s", "idle": "%", "first": "s", "lost": "s", "back": "s", "memory": "MiB"}

BROKER = """
import json, sys
from pathlib import Path
from oq_runtime import descriptors, facts, logs
from oq_runtime.core.limits import DEFAULTS
from oq_runtime.files import private
from oq_runtime.session.broker import Broker
from oq_runtime.wire import security
logs.start()
descriptors.raise_limit()
spec = json.loads(sys.argv[1])
directory = Path(spec["directory"])
Broker(
    directory=directory, memory=private.memory_of(directory), agents=spec["agents"],
    data_urls=[spec["data_url"]],
    agent_pid=None, owner=spec["owner"], window_bytes=1 << 30, limits=DEFAULTS,
    own_facts=facts.own(), keys=security.Keys.derive(spec["secret"].encode()),
).run()
"""


class Nodes:
    """Stand-ins in processes of their own.

    :param secret: of the cluster
    """

    def __init__(self, secret: str, hold_s: float) -> None:
        self.secret = secret
        self.hold_s = hold_s
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, first: int, count: int) -> subprocess.Popen[str]:
        argv = [first, count, CTRL_PORT, self.hold_s]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.standins", *map(str, argv)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.processes.append(process)
        assert process.stdin and process.stdout
        process.stdin.write(self.secret + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"bound": count}
        return process

    def first_tasks(self, count: int) -> list[float]:
        """Return when each of so many nodes got its first task (s, monotonic)."""
        found: list[float] = []
        streams = {process.stdout.fileno(): b"" for process in self.processes if process.stdout}
        while len(found) < count:
            ready, _, _ = select.select(streams, [], [], LIMIT_S)
            if not ready:
                raise TimeoutError(f"{len(found)} of {count} nodes got a task in {LIMIT_S:.0f} s")
            for stream in ready:
                *lines, streams[stream] = (streams[stream] + os.read(stream, 1 << 20)).split(b"\n")
                found += [float(json.loads(line)["first_s"]) for line in lines]
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def broker(directory: Path, secret: str, count: int) -> Iterator[psutil.Process]:
    """Run a broker that calls so many nodes."""
    spec = {
        "directory": str(directory),
        "agents": {address(n): f"tcp://{address(n)}:{CTRL_PORT}" for n in range(count)},
        "data_url": f"tcp://127.0.0.1:{DATA_PORT}",
        "owner": os.getpid(),
        "secret": secret,
    }
    with (directory / "broker.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", BROKER, json.dumps(spec)], stderr=log, cwd=ROOT
        )
    try:
        assert wait_for((directory / "engine").exists, LIMIT_S), directory / "broker.log"
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def leased(session: Session) -> int:
    return sum(node.state == "leased" for node in session.nodes())


def submit(session: Session, map_: int, count: int) -> None:
    for number in range(count):
        session.submit(
            map_, "hold", (number, None), [number], dump=payload.dump, weight=1.0, unchanged={}
        )


def collect(session: Session, map_: int, count: int) -> None:
    results = session.results(map_)
    for _ in range(count):
        _, objects, error = next(results)
        assert error is None and list(objects) == ["done"], error


def measure(count: int, idle_s: float = IDLE_S, hold_s: float = HOLD_S) -> dict[str, float]:
    """Return the figures for so many nodes."""
    secret = secrets.token_urlsafe(32)
    with contextlib.ExitStack() as stack:
        directory = private.make(Path(tempfile.gettempdir()), "oq-peers-")
        memory = private.memory_name(directory)
        private.add_memory(directory, memory)
        stack.callback(private.remove, directory, memory)
        nodes = Nodes(secret, hold_s)
        stack.callback(nodes.close)
        for first in range(0, count - 1, PER_PROCESS):
            nodes.start(first, min(PER_PROCESS, count - 1 - first))
        victim = nodes.start(count - 1, 1)
        began_s = time.monotonic()
        process = stack.enter_context(broker(directory, secret, count))
        session = Session(directory)
        assert wait_for(lambda: leased(session) == count, LIMIT_S), leased(session)
        found = {"leased": time.monotonic() - began_s}
        before_s = cpu_s(process)
        time.sleep(idle_s)  # what is measured is that nothing happens
        found["idle"] = 100 * (cpu_s(process) - before_s) / idle_s
        began_s = time.monotonic()
        submit(session, 1, count)
        found["first"] = max(nodes.first_tasks(count)) - began_s
        collect(session, 1, count)
        victim.kill()
        victim.wait()
        began_s = time.monotonic()
        assert wait_for(lambda: leased(session) == count - 1, LIMIT_S)
        found["lost"] = time.monotonic() - began_s
        nodes.start(count - 1, 1)
        began_s = time.monotonic()
        assert wait_for(lambda: leased(session) == count, LIMIT_S)
        found["back"] = time.monotonic() - began_s
        session.context.destroy(linger=0)
        found["memory"] = process.memory_info().rss / (1 << 20)
        return found


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [20, 200, 2000]
    table = Table("nodes", *(f"{name} ({unit})" for name, unit in UNITS.items()), box=None)
    console = Console()
    for count in counts:
        try:
            found = measure(count)
        except (AssertionError, TimeoutError) as exc:
            table.add_row(str(count), f"failed: {exc}")
            continue
        table.add_row(str(count), *(f"{found[name]:.2f}" for name in UNITS))
    console.print(table)


if __name__ == "__main__":
    main()
