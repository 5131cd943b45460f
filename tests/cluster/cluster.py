"""The cluster of the deployment page on a ``Net``: DbServer, WebUI, one agent per node, oq-run.

One directory holds all of it::

    openquake.cfg       of all hosts, with a new authkey
    oqdata/db.sqlite3   the database
    shared/oqdata       the datastores
    t/<host>            TMPDIR of the host; t/<node>/agent is the RuntimeDirectory of its agent
    log/<name>.log      what the processes write to stderr

Shared memory and files are those of the machine: a host can be cut off, but fills its own disk only
where a test mounts one as its TMPDIR. Not covered: the network and its faults (``netns``).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.cluster import netns
from tests.cluster.netns import MASTER, Net, NetError, Process
from tests.leftovers import SHM, remove_unused_shm, shm, unused_shm, wait_for

#: slots of the nodes
SLOTS = {"node1": 1, "node2": 2, "node3": 5}
DBSERVER_PORT = 1908
CTRL_PORT = 1909
RECEIVER_PORTS = "1912-1920"
WEBUI_PORT = 8800
#: an engine imports in 3 s, on a very busy machine in minutes
START_LIMIT_S = 300.0
STOP_LIMIT_S = 10.0
#: the services run as this user; an engine installed by root starts a DbServer for nobody else
USER = "openquake"
#: the modules of the task functions, for drivers and workers; and this package
TASKS, ROOT = Path(__file__).parents[1] / "local", Path(__file__).parents[2]
TAIL_LINES = 20
AGENT = ("-m", "oq_runtime.node.daemon")

CFG = """\
[distribution]
oq_distribute = zmq
serialize_jobs = {serialize_jobs}

[dbserver]
multi_user = false
file = {home}/oqdata/db.sqlite3
listen = {master}
host = {master}
port = {dbserver_port}
receiver_ports = {receiver_ports}
receiver_host = {master}
authkey = {authkey}

[zworkers]
host_cores = {host_cores}
ctrl_port = {ctrl_port}

[webapi]
server = http://{master}:{webui_port}

[directory]
shared_dir = {home}/shared

[oq_runtime]
code = import oq_runtime.activate
{settings}
"""

# the DbServer's own protocol, without the seconds that importing the engine takes
_ASK_DBSERVER = """
import sys, zmq
with zmq.Context() as context, context.socket(zmq.REQ) as sock:
    sock.linger = 0
    sock.connect(sys.argv[1])
    sock.send_pyobj(("getpid",))
    if not sock.poll(float(sys.argv[2]) * 1000):
        sys.exit(1)
    print(sock.recv_pyobj())
"""

_GET = """
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    print(opener.open(sys.argv[1], timeout=float(sys.argv[2])).read().decode(), end="")
except OSError as error:
    sys.exit(str(error))
"""


class Cluster:
    """
    Starts nothing by itself; as a context manager it stops what was started.

    :param net: a network that has ``master`` and the nodes
    :param home: an empty directory with a short path: sockets have paths of at most 107 bytes
    :param slots: worker processes per node
    """

    def __init__(self, net: Net, home: Path, slots: Mapping[str, int] = SLOTS) -> None:
        self.net = net
        self.home = home
        self.slots = dict(slots)
        self.authkey = secrets.token_urlsafe(32)
        self.cfg = home / "openquake.cfg"
        self.datadir = home / "shared/oqdata"
        self.log = home / "log"
        self.dbserver: Process | None = None
        self.webui: Process | None = None
        self.agents: dict[str, Process] = {}
        self.runs: list[Process] = []
        self._agent_files: dict[str, set[Path]] = {}
        self._agent_cfg: dict[str, str] = {}  # of those that were started with nothing special
        self._webui_children: set[int] = set()
        self._numbers = itertools.count(1)
        self._shm = shm()
        for path in (home / "oqdata", self.datadir, self.log, *map(self.tmpdir, net.hosts)):
            path.mkdir(parents=True, exist_ok=True)
        self.cfg.touch(mode=0o640)  # before the secret is in it
        self.configure()

    def configure(self, serialize_jobs: Any = 1, **settings: Any) -> None:
        """Write openquake.cfg; ``start_agents`` then starts those anew that have read another.

        :param settings: of the section [oq_runtime], besides the defaults
        """
        address = self.net.address
        self.cfg.write_text(
            CFG.format(
                home=self.home,
                master=address[MASTER],
                dbserver_port=DBSERVER_PORT,
                receiver_ports=RECEIVER_PORTS,
                authkey=self.authkey,
                host_cores=",".join(f"{address[node]} {n}" for node, n in self.slots.items()),
                ctrl_port=CTRL_PORT,
                webui_port=WEBUI_PORT,
                serialize_jobs=serialize_jobs,
                settings="\n".join(f"{name} = {value}" for name, value in settings.items()),
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything that was started here, the services by SIGTERM; may be called again."""
        for process in self.runs:
            self.net.kill_session(process)
        for service in (*self.agents.values(), self.webui, self.dbserver):
            if service:
                self._stop(service)
        remove_unused_shm(shm() - self._shm, "oq-agent-")  # of one that was killed
        self.runs.clear()
        self.agents.clear()
        self._agent_files.clear()
        self._webui_children.clear()
        self.dbserver = self.webui = None

    def tmpdir(self, host: str) -> Path:
        return self.home / "t" / host

    def env(self, host: str, **more: str) -> dict[str, str]:
        """The environment of processes on this host."""
        foreign = ("OQ_", "PYTEST_")
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and not name.lower().endswith("_proxy")
        }
        return env | {
            "OQ_CONFIG_FILE": str(self.cfg),
            "OQ_DATADIR": str(self.datadir),
            "TMPDIR": str(self.tmpdir(host)),
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": f"{ROOT}/runtime/src:{TASKS}:{ROOT}",
            "CI": "true",
            "COLUMNS": "200",
            **more,
        }

    # -- services

    def start_dbserver(self) -> Process:
        """Start the engine's DbServer on the master if it does not run; returns when it answers."""
        if self.dbserver is not None:
            return self.dbserver
        argv = [sys.executable, "-m", "openquake.commands", "dbserver", "start", "-f"]
        self.dbserver = self._start(MASTER, "dbserver", argv, {"LOGNAME": USER})
        self._await(self.dbserver, lambda: self.net.listens(MASTER, DBSERVER_PORT))
        self._await(self.dbserver, self.dbserver_answers)
        return self.dbserver

    def dbserver_answers(self, host: str = MASTER, limit_s: float = 5.0) -> bool:
        """Does the DbServer answer a command from this host?"""
        url = f"tcp://{self.net.address[MASTER]}:{DBSERVER_PORT}"
        done = self.net.run(host, [sys.executable, "-c", _ASK_DBSERVER, url, str(limit_s)])
        return self.dbserver is not None and done.stdout.strip() == str(self.dbserver.pid)

    def start_webui(self) -> Process:
        """Start the engine's WebUI on the master, all addresses; returns when it answers."""
        self.start_dbserver()
        argv = [sys.executable, "-m", "openquake.commands", "webui", "start",
                f"0.0.0.0:{WEBUI_PORT}", "--skip-browser"]  # fmt: skip
        self.webui = self._start(MASTER, "webui", argv, {"LOGNAME": USER})
        self._await(self.webui, lambda: self.net.listens(MASTER, WEBUI_PORT))
        self._await(self.webui, lambda: self.get("/v1/engine_version") is not None)
        children = psutil.Process(self.webui.pid).children()  # one, the server proper
        self._webui_children = {child.pid for child in children}
        return self.webui

    def get(self, path: str, host: str = MASTER, limit_s: float = 10.0) -> str | None:
        """GET a path of the WebUI from a host; None when there is no answer or an error."""
        url = f"http://{self.net.address[MASTER]}:{WEBUI_PORT}{path}"
        argv = [sys.executable, "-I", "-S", "-c", _GET, url, str(limit_s)]
        done = self.net.run(host, argv, limit_s=limit_s + netns.COMMAND_LIMIT_S)
        return done.stdout if done.returncode == 0 else None

    def start_agent(
        self,
        node: str,
        *args: str,
        prefix: Sequence[str | Path] = (),
        program: Sequence[str] = AGENT,
        **env: str,
    ) -> Process:
        """Start the node's agent; returns when it listens on its control port.

        :param args: more options of the command
        :param prefix: a command that runs the rest of its command line
        :param program: what Python runs
        :param env: more of the environment
        """
        directory = self.tmpdir(node) / "agent"
        shutil.rmtree(directory, ignore_errors=True)  # as the service manager does
        directory.mkdir(mode=0o700)
        argv = [*prefix, sys.executable, *program, "--address", self.net.address[node]]
        special = {"RUNTIME_DIRECTORY": str(directory), **env}
        process = self._start(node, f"agent-{node}", [*argv, *args], special)
        self._await(process, lambda: self.net.listens(node, CTRL_PORT))
        self.agents[node] = process
        self._agent_files[node] = set(self._session_files(node))
        plain = not args and not env and not prefix and program == AGENT
        self._agent_cfg[node] = self.cfg.read_text() if plain else ""
        return process

    def start_agents(self) -> None:
        """Start the agents that do not run, or not with the configuration and nothing else."""
        for node in self.slots:
            running = node in self.agents and self.agents[node].poll() is None
            if running and self._agent_cfg[node] != self.cfg.read_text():
                self.stop_agent(node)
                running = False
            if not running:
                self.start_agent(node)

    def stop_agent(self, node: str) -> int:
        """SIGTERM; returns the exit code. Raises TimeoutError, after a SIGKILL, if that fails."""
        self._agent_files.pop(node, None)
        return self._stop(self.agents.pop(node))

    def stop_agents(self) -> None:
        """SIGTERM to the agents that run; returns when they have ended."""
        for node in list(self.agents):
            self.stop_agent(node)

    def oq_run(self, job: Path | str, *args: str, **env: str) -> Process:
        """Start ``oq-run JOB args`` on the master; stdout is a pipe, stderr a file (``log``)."""
        self.start_dbserver()
        return self.run(["-m", "oq_runtime.commands.run", str(job), *args], env)

    def run(self, args: Sequence[str], env: Mapping[str, str]) -> Process:
        """Start ``python args`` on the master; stdout is a pipe, stderr a file (``log``)."""
        name = f"run-{next(self._numbers)}"
        argv = [sys.executable, *args]
        process = self._start(MASTER, name, argv, env, stdout=subprocess.PIPE)
        self.runs.append(process)
        return process

    def wait_for(self, condition: Callable[[], object], limit_s: float) -> bool:
        """Wait until ``condition()`` is true; False when that takes longer than ``limit_s``."""
        return wait_for(condition, limit_s)

    # -- what is left

    def leftovers(self, shm_before: set[str] | None = None) -> list[str]:
        """
        One line per thing that outlived its job: processes, session directories, sockets, memory.

        :param shm_before: names in /dev/shm that do not count; those of the beginning if None
        """
        lines = [f"{host}: process {pid} {_command_line(pid)}" for host, pid in self._strangers()]
        lines += [f"{host}: {path}" for host, path in self._unexpected_files()]
        lines += [str(path) for path in self._spooled()]
        new = shm() - (self._shm if shm_before is None else shm_before)
        return lines + ([f"/dev/shm/{name}" for name in unused_shm(new)] if new else [])

    def remove_leftovers(self) -> None:
        """SIGKILL the processes that ``leftovers`` lists; remove the directories and sockets."""
        for _, pid in self._strangers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for _, path in self._unexpected_files():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _strangers(self) -> list[tuple[str, int]]:
        services = self._service_pids()
        return [
            (host, pid)
            for host in self.net.hosts
            for pid in self.net.processes(host)
            if pid not in services
        ]

    def _unexpected_files(self) -> list[tuple[str, Path]]:
        found = []
        for host in self.net.hosts:
            running = host in self.agents and self.agents[host].poll() is None
            expected = self._agent_files.get(host, set()) if running else set()
            found += [(host, path) for path in self._session_files(host) if path not in expected]
        return found

    def _spooled(self) -> list[Path]:
        """Results and blobs that agents hold in shared memory; those on disk are session files."""
        return [path for path in SHM.glob("oq-agent-*/**/*") if path.is_file()]

    def _service_pids(self) -> set[int]:
        services = [*self.agents.values(), self.dbserver, self.webui]
        pids = {process.pid for process in services if process} | self._webui_children
        # Python's own helper of the server, from the first job that it starts until its end
        if self.webui:
            with contextlib.suppress(psutil.NoSuchProcess):
                below = psutil.Process(self.webui.pid).children(recursive=True)
                pids |= {p.pid for p in below if "resource_tracker" in _command_line(p.pid)}
        return pids

    def _session_files(self, host: str) -> list[Path]:
        """Session directories and sockets in the TMPDIR of a host."""
        found = []
        for path in sorted(self.tmpdir(host).rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                if path.name.startswith("oq-run-") or stat.S_ISSOCK(path.lstat().st_mode):
                    found.append(path)
        return found

    # -- processes

    def _start(
        self,
        host: str,
        name: str,
        argv: Sequence[str | Path],
        env: Mapping[str, str],
        stdout: int | None = None,
    ) -> Process:
        options = {} if stdout is None else {"stdout": stdout}
        log = self.log / f"{name}.log"
        return self.net.popen(
            host, argv, self.env(host, **env), log=log, cwd=self.tmpdir(host), **options
        )

    def _await(self, process: Process, ready: Callable[[], bool]) -> None:
        """Wait until a service is ready; raises NetError with its last words if it never is."""
        if wait_for(lambda: process.poll() is not None or ready(), START_LIMIT_S) and (
            process.poll() is None
        ):
            return
        code = process.poll()
        what = f"not ready after {START_LIMIT_S:.0f} s" if code is None else f"exit code {code}"
        self.net.kill_session(process)
        lines = process.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        raise NetError(f"{process.log.stem}: {what}\n" + "\n".join(lines))

    def _stop(self, process: Process) -> int:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)  # a test may have stopped it
        try:
            return process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            name = f"{process.log.stem} (pid {process.pid})"
            raise TimeoutError(f"{name} survived SIGTERM for {STOP_LIMIT_S:.0f} s") from None
        finally:
            self.net.kill_session(process)


def _command_line(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return " ".join(process.cmdline()) or process.name()
    return "(gone)"
