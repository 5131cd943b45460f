"""``oq-workers`` and ``oq-agent``: what an administrator sees and does, also over ssh; memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from oq_runtime.wire.protocol import PROTOCOL_VERSION
from tests.cgroups import limited
from tests.cluster.cluster import CTRL_PORT, Cluster
from tests.cluster.jobs import (
    SHORT_BEATS,
    busy,
    calculate,
    drive,
    result,
    status,
    under_way,
)
from tests.cluster.jobs import workers as processes
from tests.cluster.netns import MASTER, Direction, NetError
from tests.leftovers import wait_for

SLOW = pytest.mark.slow
pytestmark = [pytest.mark.timeout(300), pytest.mark.settings(**SHORT_BEATS)]

#: the import of the command itself, on a busy machine, beside the 2 s for a host
STARTUP_S = 8.0
DIFFERING = str(Path(__file__).parent / "differing.py")
OQ_WORKERS = """
import sys
from openquake.baselib import config, workerpool
for command in sys.argv[1:]:
    print(getattr(workerpool.WorkerMaster(config.zworkers), command)())
"""
#: an agent on whose host the directory of the datastores is empty
BLIND = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0, ctypes.get_errno()
assert libc.mount(None, b"/", None, 0x44000, None) == 0, ctypes.get_errno()
assert libc.mount(b"none", {path!r}, b"tmpfs", 0, None) == 0, ctypes.get_errno()
from oq_runtime.node.daemon import daemon
daemon()
"""

#: an agent in a cgroup
CONFINED = """
import os
with open({path!r}, "w") as file:
    file.write(str(os.getpid()))
from oq_runtime.node.daemon import daemon
daemon()
"""


def workers(
    cluster: Cluster, *args: str, prefix: tuple[str, ...] = (), **env: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``oq-workers args`` on the master."""
    argv = [*prefix, sys.executable, "-m", "oq_runtime.commands.workers", *args]
    return cluster.net.run(MASTER, argv, cluster.env(MASTER, **env), limit_s=120)


def rows(cluster: Cluster, *args: str, **env: Any) -> dict[str, dict[str, Any]]:
    """Per node what ``oq-workers args --json`` says; it must not fail."""
    done = workers(cluster, *args, "--json", **env)
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = json.loads(done.stdout)
    return {node: found[cluster.net.address[node]] for node in cluster.slots}


def table(text: str) -> list[list[str]]:
    """The cells of a printed table, titles first."""
    lines = text.splitlines()
    starts = [i for i, c in enumerate(lines[0]) if c != " " and lines[0][i - 2 : i].isspace()]
    starts = [lines[0].index("host"), *starts] if 1 not in starts else starts
    ends = [*starts[1:], None]
    return [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines]


@contextmanager
def holding(cluster: Cluster, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A job with a task on every slot; when the block ends, so do they, and their sum is right.

    Yields what becomes the output of the job.
    """
    go, number = tmp_path / "go", sum(cluster.slots.values())
    run = drive(cluster, "until", [(x, str(go)) for x in range(number)])
    found: dict[str, Any] = {}
    try:
        under_way = cluster.wait_for(lambda: busy(cluster) == number or run.poll() is not None, 120)
        assert under_way and run.poll() is None, f"no tasks: {status(cluster)}"
        yield found
    finally:
        go.touch()
        found |= result(run)
    assert found.get("value") == {"sum": sum(range(number))}, found


def agent_log(cluster: Cluster, node: str) -> str:
    return (cluster.log / f"agent-{node}.log").read_text()


# ---- status, start, stop, wait, restart, kill


def test_status_of_a_working_cluster(cluster: Cluster, tmp_path: Path) -> None:
    idle = workers(cluster, "status")
    assert idle.returncode == 0, idle.stderr
    titles, *lines = table(idle.stdout)
    assert titles == ["host", "slots", "jobs", "memory", "engine", "state", "beat age"]
    assert [line[:3] for line in lines] == [
        [cluster.net.address[node], f"0/{slots}", "-"] for node, slots in cluster.slots.items()
    ]
    assert all(line[3].endswith("%") and line[5:] == ["up", "-"] for line in lines), lines
    with holding(cluster, tmp_path):
        _, *lines = table(workers(cluster, "status").stdout)
    for line, slots in zip(lines, cluster.slots.values(), strict=True):
        assert line[1] == f"{slots}/{slots}"
        assert re.fullmatch(r"oq-run-\w+ of root", line[2])
        assert 0 <= float(line[6].removesuffix(" s")) < SHORT_BEATS["lost_s"], lines


@pytest.mark.slow
def test_status_names_the_calculation(cluster: Cluster) -> None:
    run = under_way(cluster, calculate(cluster), "node3")
    jobs = status(cluster)["node3"]["jobs"]
    number = result(run)["jobs"][0]["job"]
    assert jobs == [f"calculation {number} of root"]


def test_stop_drain_start_and_restart(cluster: Cluster) -> None:
    for name in ("stop", "drain"):
        assert {row["state"] for row in rows(cluster, name).values()} == {"stopped"}
        run = cluster.run(["-m", "oq_runtime.commands.workers", "status"], {})
        assert run.communicate()[0].count("stopped") == len(cluster.slots)
        assert {row["state"] for row in rows(cluster, "start").values()} == {"up"}
    rows(cluster, "stop")
    assert {row["state"] for row in rows(cluster, "restart").values()} == {"up"}
    assert {row["state"] for row in rows(cluster, "kill").values()} == {"up"}


def test_kill_runs_the_tasks_again(cluster: Cluster, tmp_path: Path) -> None:
    with holding(cluster, tmp_path) as job:
        rows(cluster, "kill")
    assert job["retries"] == sum(cluster.slots.values())


def test_wait(cluster: Cluster) -> None:
    assert {row["state"] for row in rows(cluster, "wait").values()} == {"up"}
    cluster.stop_agent("node2")
    for args in (["--seconds=1"], ["--seconds=1", "--json"]):
        done = workers(cluster, "wait", *args)
        assert done.returncode == 1
        assert f"after 1 s: {cluster.net.address['node2']}: no answer" in done.stderr
    assert json.loads(done.stdout)[cluster.net.address["node2"]]["state"] == "unreachable"
    done = workers(cluster, "wait", "--seconds=60", cluster.net.address["node1"])  # not for node2
    assert done.returncode == 0, done.stderr
    assert "not in host_cores: 192.0.2.99" in workers(cluster, "wait", "192.0.2.99").stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["status", "stop", "start", *(pytest.param(c, marks=SLOW) for c in ("kill", "restart"))],
)
def test_silent_host_costs_little_time_and_fails(cluster: Cluster, command: str) -> None:
    cluster.net.drop("node2", "in")
    began_s = time.monotonic()
    done = workers(cluster, command, "--json")
    took_s = time.monotonic() - began_s
    assert done.returncode == 1
    found = json.loads(done.stdout)
    row = found.pop(cluster.net.address["node2"])
    assert row["state"] == "unreachable" and "no answer in 2 s" in row["reason"]
    assert len(found) == len(cluster.slots) - 1
    assert all(other["state"] in ("up", "stopped") for other in found.values())
    asks = {"status": 1, "stop": 1, "start": 1, "kill": 1, "restart": 2}[command]
    over_ssh = 4 if command in ("start", "kill", "restart") else 0
    assert took_s < asks * (2 + over_ssh) + STARTUP_S, f"{command} took {took_s:.1f} s"
    if over_ssh:
        assert f"ssh openquake@{cluster.net.address['node2']} " in row["reason"]
    cluster.net.undrop("node2")
    rows(cluster, "start")


def oq_workers(cluster: Cluster, *commands: str) -> subprocess.CompletedProcess[str]:
    """What ``oq workers COMMAND`` does, for several; without importing all of the engine each time.

    The way through the engine's own command line is that of ``status`` in test_jobs.
    """
    argv = [sys.executable, "-c", OQ_WORKERS, *commands]
    env = cluster.env(MASTER, LOGNAME="openquake", OQ_DISTRIBUTE="zmq")
    return cluster.net.run(MASTER, argv, env, limit_s=200)


def test_oq_workers_in_the_format_of_the_engine(cluster: Cluster) -> None:
    address = cluster.net.address
    triples = [(address[node], 0, slots) for node, slots in cluster.slots.items()]
    hosts = [address[node] for node in cluster.slots]
    expected = {
        "status": f"{triples}",
        "stop": f"stopped {hosts}",
        "start": f"starting {hosts}",
        "kill": f"killed {hosts}",
        "restart": "restarted",
        "wait": f"{triples}",
    }
    done = oq_workers(cluster, *expected)
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == list(expected.values())


def test_node_of_another_protocol_version_is_named(cluster: Cluster) -> None:
    cluster.stop_agent("node1")
    own, other = PROTOCOL_VERSION, PROTOCOL_VERSION + 1
    before = agent_log(cluster, "node1")  # other tests have spoken other versions
    cluster.start_agent("node1", program=[DIFFERING, f"protocol={other}"])
    done = workers(cluster, "status", "--json")
    row = json.loads(done.stdout)[cluster.net.address["node1"]]
    assert done.returncode == 1 and row["reason"] == f"peer speaks protocol {other}, this is {own}"
    said = agent_log(cluster, "node1").removeprefix(before)
    lines = [line for line in said.splitlines() if "speaks" in line]
    assert lines and all(f"peer speaks protocol {own}, this is {other}" in line for line in lines)


# ---- the service manager


def test_service_manager_hears_how_the_agent_is(cluster: Cluster) -> None:
    cluster.stop_agent("node1")
    path = cluster.home / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(20)
        agent = cluster.start_agent("node1", NOTIFY_SOCKET=str(path))
        assert manager.recv(64) == b"READY=1"
        assert [manager.recv(64) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        agent.send_signal(signal.SIGSTOP)
        manager.settimeout(4 * SHORT_BEATS["beat_s"])
        with pytest.raises(TimeoutError):  # systemd then ends it: WatchdogSec= of its unit
            while manager.recv(64) == b"WATCHDOG=1":
                pass
        agent.send_signal(signal.SIGCONT)
        cluster.stop_agent("node1")
        while (word := manager.recv(64)) != b"STOPPING=1":
            assert word == b"WATCHDOG=1"
    path.unlink()


# ---- debug


def test_debug(cluster: Cluster) -> None:
    done = workers(cluster, "debug", "--json")
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert list(found["hosts"]) == [cluster.net.address[node] for node in cluster.slots]
    for node, slots in cluster.slots.items():
        row = found["hosts"][cluster.net.address[node]]
        assert (row["slots"], row["answered"]) == (slots, slots)
        assert row["engine"].startswith("3.") and row["python"] == sys.version.split()[0]
        assert 0 < row["round_trip_ms"] < 1000 and row["mb_per_s"] > 1
        assert row["file_seen_s"] < 3
    assert found["death_survived"]["attempt"] == 2
    assert found["death_survived"]["host"] in found["hosts"]
    assert "by SIGKILL" in "".join(agent_log(cluster, node) for node in cluster.slots)


@SLOW
def test_debug_as_a_table_shows_a_slow_way(cluster: Cluster) -> None:
    cluster.net.netem("node1", delay_ms=50)
    done = workers(cluster, "debug")
    assert done.returncode == 0, (done.stdout, done.stderr)
    titles, *lines = table(done.stdout.partition("a worker died")[0].rstrip())
    trips = {line[0]: float(line[titles.index("round_trip_ms")]) for line in lines}
    assert trips.pop(cluster.net.address["node1"]) >= 100 > max(trips.values()), trips
    assert "a worker died on purpose: attempt 2 came through on 192.0.2." in done.stdout


@pytest.mark.slow
def test_debug_names_what_is_wrong_with_the_remedy(cluster: Cluster, tmp_path: Path) -> None:
    cluster.stop_agent("node1")
    cluster.stop_agent("node2")
    blind = BLIND.format(path=os.fsencode(cluster.datadir))
    cluster.start_agent("node2", program=("-c", blind))
    done = workers(cluster, "debug", "--json")
    assert done.returncode == 1
    first, second, *more = json.loads(done.stdout)["problems"]
    assert cluster.net.address["node1"] in first and "try oq-workers start" in first
    assert second.startswith(f"{cluster.net.address['node2']}: {cluster.datadir}/")
    assert "was not seen in 3 s (No such file or directory); mount" in second
    assert not more and all(line in done.stderr for line in (first, second))
    assert json.loads(done.stdout)["death_survived"], "the rest of the cluster works"


#: a frame that holds a beat or a handshake, and no full packet
SHORT_FRAME_BYTES = 1000
MEASURE = """
import sys
from oq_runtime.cluster.pool import Pool
from oq_runtime.config import Config, read
print(Pool(Config.from_sections(read()).cluster).measure(sys.argv[1]).lost)
"""


@pytest.mark.parametrize(
    ("directions", "lost"),
    [
        (["in"], "large messages get lost from here to {0}\n"),
        (["out"], "large messages get lost from {0} to here\n"),
        (["in", "out"], "large messages get lost from here to {0} and from {0} to here\n"),
    ],
)
def test_direction_in_which_large_messages_get_lost(
    cluster: Cluster, directions: list[Direction], lost: str
) -> None:
    address = cluster.net.address["node1"]
    cluster.net.shorten("node1", SHORT_FRAME_BYTES, *directions)
    argv = [sys.executable, "-c", MEASURE, address]
    done = cluster.net.run(MASTER, argv, cluster.env(MASTER))
    assert done.stdout == lost.format(address), done


@pytest.mark.slow
def test_debug_ends_where_large_messages_get_lost(cluster: Cluster) -> None:
    address = cluster.net.address["node1"]
    cluster.net.shorten("node1", SHORT_FRAME_BYTES)
    assert status(cluster)["node1"]["state"] == "up"
    done = workers(cluster, "debug", "--json")  # in less than two minutes
    assert done.returncode == 1, (done.stdout, done.stderr)
    first, *_ = json.loads(done.stdout)["problems"]
    assert first.startswith(f"{address}: large messages get lost from here to {address} and from")
    assert f"ping -M do -s 1472 {address}" in first


@pytest.mark.slow
def test_debug_of_datastores_outside_of_the_shared_directory(
    cluster: Cluster, tmp_path: Path
) -> None:
    done = workers(cluster, "debug", OQ_DATADIR=str(tmp_path))
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "unset OQ_DATADIR" in done.stderr


@pytest.mark.slow
def test_oq_workers_debug(cluster: Cluster) -> None:
    done = oq_workers(cluster, "debug")
    assert done.returncode == 0, (done.stdout, done.stderr)
    address = cluster.net.address
    slots = range(sum(cluster.slots.values()))
    assert done.stdout.splitlines() == [
        *(f"Sending to tcp://{address[node]}:{CTRL_PORT}" for node in cluster.slots),
        f"results={list(slots)}",
        "debugged",
    ]


# ---- over ssh


GATE = """#!/bin/sh
# stands for the forced command of a deployed node; the rest of the way is real
echo "$SSH_ORIGINAL_COMMAND" >> {home}/told
case "$SSH_ORIGINAL_COMMAND" in
start) . {home}/env; exec setsid {python} -m oq_runtime.node.daemon --address {address} \\
    </dev/null >>{home}/agent.log 2>&1 & ;;
kill) kill -9 $(cat {home}/pids) ;;
*) echo "only start and kill" >&2; exit 126 ;;
esac
"""
SSHD = """
Port 22
ListenAddress {address}
HostKey {home}/host_key
PidFile {home}/sshd.pid
AuthorizedKeysFile {home}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
ForceCommand {home}/gate
"""
CLIENT = """
IdentityFile {home}/key
UserKnownHostsFile {home}/known_hosts
StrictHostKeyChecking accept-new
"""


@pytest.fixture
def sshd(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """An ssh server on node2 for user openquake; yields its directory.

    Both sides see a passwd file of their own, in mount namespaces: nobody is added to the machine.
    """
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if not (program and shutil.which("ssh") and shutil.which("ssh-keygen")):
        pytest.skip("no ssh server and client (Debian: apt-get install openssh-server)")
    home = tmp_path
    node, address = "node2", cluster.net.address["node2"]
    (home / ".ssh").mkdir(mode=0o700)
    (home / "empty").mkdir(mode=0o755)
    (home / ".ssh/config").write_text(CLIENT.format(home=home))
    (home / "passwd").write_text(
        f"root:x:0:0:root:{home}:/bin/sh\nopenquake:x:0:0::{home}:/bin/sh\n"
        f"sshd:x:100:65534::{home}/empty:/bin/false\n"
    )
    (home / "shadow").write_text("root:*:1::::::\nopenquake:*:1::::::\n")
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True)
    env = cluster.env(node)
    names = ("OQ_CONFIG_FILE", "OQ_DATADIR", "TMPDIR", "PATH", "CI", "PYTHONPATH")
    (home / "env").write_text("".join(f"export {name}='{env[name]}'\n" for name in names))
    (home / "gate").write_text(GATE.format(home=home, python=sys.executable, address=address))
    (home / "gate").chmod(0o755)
    (home / "sshd_config").write_text(SSHD.format(home=home, address=address))
    cluster.stop_agent(node)
    argv = [*own_passwd(home), program, "-D", "-e", "-f", str(home / "sshd_config")]
    process = cluster.net.popen(node, argv, log=home / "sshd.log")
    if not wait_for(lambda: process.poll() is not None or cluster.net.listens(node, 22), 10):
        raise NetError((home / "sshd.log").read_text())
    assert process.poll() is None, (home / "sshd.log").read_text()
    yield home
    cluster.net.kill_all(node)
    cluster.start_agent(node)


def own_passwd(home: Path) -> tuple[str, ...]:
    """The beginning of a command that sees the passwd file of ``home``."""
    mounts = "mount -t tmpfs none /run && mkdir -m 755 /run/sshd"
    for name in ("passwd", "shadow"):
        mounts += f" && mount --bind {home}/{name} /etc/{name}"
    return ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")


def test_start_and_kill_over_ssh(cluster: Cluster, sshd: Path) -> None:
    address = cluster.net.address["node2"]
    assert status(cluster)["node2"]["state"] == "unreachable"
    workers(cluster, "start", prefix=own_passwd(sshd))
    assert (sshd / "told").read_text() == "start\n", (sshd / "sshd.log").read_text()
    assert workers(cluster, "wait").returncode == 0, (sshd / "agent.log").read_text()
    assert rows(cluster, "start")["node2"]["state"] == "up", "it is there, nobody needs ssh"
    with holding(cluster, sshd):
        assert status(cluster)["node2"]["busy"] == cluster.slots["node2"]

    [agent] = [p for p in cluster.net.processes("node2") if _is_agent(p)]
    (sshd / "pids").write_text(str(agent))
    os.kill(agent, signal.SIGSTOP)  # it hangs
    done = workers(cluster, "kill", prefix=own_passwd(sshd))
    assert done.returncode == 0, (done.stdout, done.stderr)
    [line] = [line for line in done.stdout.splitlines() if address in line]
    assert "killed over ssh" in line
    assert (sshd / "told").read_text() == "start\nkill\n"
    assert wait_for(lambda: not any(map(_is_agent, cluster.net.processes("node2"))))


def test_reason_when_ssh_fails_too(cluster: Cluster, sshd: Path) -> None:
    (sshd / "gate").write_text(
        "#!/bin/sh\necho 'openquake-worker.service: no such unit' >&2; exit 5"
    )
    done = workers(cluster, "start", prefix=own_passwd(sshd))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if cluster.net.address["node2"] in line]
    assert "unreachable: no answer in 2 s" in line
    assert "openquake-worker.service: no such unit" in line


def _is_agent(pid: int) -> bool:
    try:
        return b"oq_runtime.node.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# ---- the daemon


def test_log_has_a_line_per_event(cluster: Cluster, tmp_path: Path) -> None:
    before = len(agent_log(cluster, "node3"))
    with holding(cluster, tmp_path):
        victim = processes(cluster, "node3")[0]
        victim.kill()
        assert wait_for(lambda: "SIGKILL" in agent_log(cluster, "node3")[before:])
    assert wait_for(lambda: "ended" in agent_log(cluster, "node3")[before:])
    lines = agent_log(cluster, "node3")[before:].splitlines()
    granted, died, ended = (line.partition(" INFO ")[2] for line in lines)
    name = granted.split()[2]
    assert granted == f"lease of {name} of root granted: 5 slots"
    end = rf"worker process {victim.pid} was killed by SIGKILL"
    task = rf"task #\d+ \(until\) of {name} of root, attempt 1: {end}"
    assert re.fullmatch(task, died), died
    assert ended == f"lease of {name} of root ended: released"


def test_log_level(cluster: Cluster) -> None:
    def told(*args: str) -> str:
        before = len(agent_log(cluster, "node1"))
        cluster.start_agent("node1", *args)
        cluster.stop_agent("node1")
        return agent_log(cluster, "node1")[before:]

    cluster.stop_agent("node1")
    assert told("--log-level", "error") == ""
    assert "ready on" in told("--log-level", "info")
    cluster.configure(log_level="error")
    assert told() == ""
    assert "ready on" in told("--log-level", "info")


def test_strangers_make_one_line(cluster: Cluster, tmp_path: Path) -> None:
    cluster.stop_agent("node1")
    cluster.start_agent("node1")
    before = len(agent_log(cluster, "node1"))
    cfg = tmp_path / "openquake.cfg"
    cfg.write_text(cluster.cfg.read_text().replace(cluster.authkey, "x" * 32))
    for _ in range(3):
        done = workers(cluster, "status", OQ_CONFIG_FILE=str(cfg))
        assert done.returncode == 1 and "wrong authkey" in done.stdout
    [line] = agent_log(cluster, "node1")[before:].splitlines()
    assert "refused a connection: wrong authkey" in line


def test_sigterm_lets_tasks_end(cluster: Cluster, tmp_path: Path) -> None:
    agent = cluster.agents["node3"]
    with holding(cluster, tmp_path) as job:
        agent.send_signal(signal.SIGTERM)
        assert wait_for(lambda: status(cluster)["node3"]["state"] == "draining", 20)
        assert agent.poll() is None
    assert agent.wait(20) == 0
    assert job["retries"] == 0
    log = agent_log(cluster, "node3")
    assert "draining: no new tasks" in log and log.endswith("ended\n")


@pytest.mark.slow
def test_files_of_a_killed_predecessor_are_removed(cluster: Cluster, tmp_path: Path) -> None:
    node = "node1"
    runtime, disk = (cluster.tmpdir(node) / name for name in ("runtime", "disk"))
    cluster.stop_agent(node)
    for place in (runtime, disk):
        place.mkdir()
    env = {"RUNTIME_DIRECTORY": str(runtime), "CACHE_DIRECTORY": str(disk)}
    agent = cluster.start_agent(node, **env)
    with holding(cluster, tmp_path):
        [logs], [spool] = runtime.iterdir(), disk.iterdir()
        (spool / "oq-run-gone-1-1").write_text("results that nobody wants any more")
        (logs / "worker-99.log").write_text("its last words")
        agent.kill()
        agent.wait()
        cluster.start_agent(node, **env)
        assert [path.name for path in spool.iterdir()] == ["memory"]
        assert not (logs / "worker-99.log").exists()
    cluster.stop_agent(node)
    assert list(runtime.iterdir()) == list(disk.iterdir()) == []
    cluster.start_agent(node)


# ---- memory


@pytest.mark.slow
def test_task_out_of_memory_moves_to_the_node_with_most(cluster: Cluster) -> None:
    before = len(agent_log(cluster, "node1"))
    with limited(700 << 20) as cgroup:
        cluster.stop_agent("node1")
        code = CONFINED.format(path=str(cgroup / "cgroup.procs"))
        cluster.start_agent("node1", program=("-c", code))
        # one on each slot: 600 MB each, which only the machine has
        tasks = range(sum(cluster.slots.values()))
        found = result(drive(cluster, "hold", [(x, 600, 0, 100, 0) for x in tasks]))
        cluster.stop_agent("node1")
    assert found.get("value") == {"sum": sum(tasks)}, found
    assert found["retries"] == 1
    [line] = [text for text in agent_log(cluster, "node1")[before:].splitlines() if "task " in text]
    assert re.search(r"attempt 1: killed to free memory: its worker had 0\.[4-7]\d GiB", line), line
    assert "of 0.68 GiB were in use, the limit is 90%" in line
    cluster.start_agent("node1")
