"""Who may come in: members with the secret and of the same versions; others are told why not."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from oq_runtime import facts
from oq_runtime.wire import protocol
from tests.cluster.cluster import CTRL_PORT, Cluster
from tests.cluster.jobs import (
    SHORT_BEATS,
    calculate,
    check_stream,
    result,
    status,
    stream,
    under_way,
)
from tests.cluster.netns import MASTER, NetError
from tests.leftovers import wait_for

pytestmark = [pytest.mark.timeout(300), pytest.mark.settings(**SHORT_BEATS)]

DIFFERING = str(Path(__file__).parent / "differing.py")
#: listens, or says hello, without encryption
PLAIN = """
import sys, zmq
context = zmq.Context()
if sys.argv[1] == "bind":
    sock = context.socket(zmq.ROUTER)
    sock.bind(sys.argv[2])
    print("bound", flush=True)
    sock.recv()
else:
    sock = context.socket(zmq.DEALER)
    sock.connect(sys.argv[2])
    sock.send(b"hello")
    sock.poll(10_000)
"""


def other_cfg(cluster: Cluster, path: Path, old: str, new: str) -> str:
    """The name of a configuration file with one text replaced by another."""
    text = cluster.cfg.read_text()
    assert old in text
    path.touch(mode=0o640)
    path.write_text(text.replace(old, new))
    return str(path)


def log_of(cluster: Cluster, node: str) -> str:
    return (cluster.log / f"agent-{node}.log").read_text()


# ---- keys


@pytest.mark.parametrize(
    ("key", "code", "word"),
    [("x" * 32, 3, "wrong authkey"), ("changeme", 2, "the default"), ("tiny", 2, "shorter")],
    ids=["wrong", "default", "short"],
)
def test_job_with_another_key(
    cluster: Cluster, tmp_path: Path, key: str, code: int, word: str
) -> None:
    cfg = other_cfg(cluster, tmp_path / "openquake.cfg", cluster.authkey, key)
    began_s = time.monotonic()
    found = result(calculate(cluster, OQ_CONFIG_FILE=cfg), 60)
    assert found["exit"] == code, found
    assert word in found["error"], found
    assert key not in found["error"] or key == "changeme"
    assert time.monotonic() - began_s < 30
    if code == 3:
        for node in cluster.slots:
            assert cluster.net.address[node] in found["error"], found
            assert "refused a connection" in log_of(cluster, node), "the node says nothing of it"


@pytest.mark.parametrize(("key", "word"), [("changeme", "the default"), ("tiny", "shorter")])
def test_agent_with_a_weak_key_does_not_start(
    no_agents: Cluster, tmp_path: Path, key: str, word: str
) -> None:
    cfg = other_cfg(no_agents, tmp_path / "openquake.cfg", no_agents.authkey, key)
    with pytest.raises(NetError, match=rf"exit code 2\n(?s:.*)authkey is {word}.*token_urlsafe"):
        no_agents.start_agent("node1", OQ_CONFIG_FILE=cfg)


def test_client_without_encryption(cluster: Cluster) -> None:
    cluster.stop_agent("node1")
    cluster.start_agent("node1")  # one that has not said so in the last minute
    before = log_of(cluster, "node1").count("refused a connection")
    url = f"tcp://{cluster.net.address['node1']}:{CTRL_PORT}"
    client = cluster.net.popen(MASTER, [sys.executable, "-c", PLAIN, "connect", url])
    assert wait_for(lambda: log_of(cluster, "node1").count("refused a connection") > before, 10)
    client.kill()
    client.wait()


def test_nodes_with_another_key_or_none(cluster: Cluster, tmp_path: Path) -> None:
    cluster.stop_agent("node1")
    cluster.stop_agent("node2")
    cfg = other_cfg(cluster, tmp_path / "openquake.cfg", cluster.authkey, "y" * 32)
    cluster.start_agent("node1", OQ_CONFIG_FILE=cfg)
    url = f"tcp://{cluster.net.address['node2']}:{CTRL_PORT}"
    plain = cluster.net.popen("node2", [sys.executable, "-c", PLAIN, "bind", url])
    assert wait_for(lambda: cluster.net.listens("node2", CTRL_PORT), 20)
    found = check_stream(stream(cluster, 8, 0.5), 8)
    plain.kill()
    plain.wait()
    for node in ("node1", "node2"):
        address = re.escape(cluster.net.address[node])
        assert re.search(rf"running without.*{address}: wrong authkey", found["log"]), found["log"]
    cluster.stop_agent("node1")


# ---- versions and settings


def check_refused(cluster: Cluster, texts: dict[str, str]) -> None:
    """A job runs on node3 alone; it and the refused nodes say what differs there."""
    run = under_way(cluster, stream(cluster, 40, 0.5), "node3")
    rows = status(cluster)
    assert not any(rows[node].get("jobs") for node in texts), rows
    check_stream(run, 40)
    log = run.log.read_text(errors="replace")
    [line] = [line for line in log.splitlines() if "running without" in line]
    for node, text in texts.items():
        assert re.search(rf"{re.escape(cluster.net.address[node])}: [^;]*{text}", line), line


def differ(cluster: Cluster, node: str, setting: str) -> None:
    cluster.stop_agent(node)
    cluster.start_agent(node, program=[DIFFERING, setting])


@pytest.mark.slow
def test_other_versions_of_engine_and_python(cluster: Cluster) -> None:
    differ(cluster, "node1", "engine=3.20.0")
    differ(cluster, "node2", "python=3.9")
    own = facts.own()
    engine = rf"OpenQuake engine is 3\.20\.0 on the node and {re.escape(own.engine)} on the master"
    python = rf"Python is 3\.9 on the node and {re.escape(own.python)} on the master"
    check_refused(cluster, {"node1": engine, "node2": python})
    assert re.search(engine, log_of(cluster, "node1"))
    assert re.search(python, log_of(cluster, "node2"))


@pytest.mark.slow
def test_other_versions_of_protocol_and_numpy(cluster: Cluster) -> None:
    differ(cluster, "node1", "protocol=99")
    differ(cluster, "node2", "numpy=0")
    version = protocol.PROTOCOL_VERSION
    check_refused(
        cluster,
        {
            "node1": f"peer speaks protocol 99, this is {version}",
            "node2": f"numpy is 0 on the node and {facts.own().numpy} on the master",
        },
    )
    assert f"peer speaks protocol {version}, this is 99" in log_of(cluster, "node1")


def test_other_limits_of_silence(cluster: Cluster, tmp_path: Path) -> None:
    """A master whose user has a configuration of his own would be given up again and again."""
    for node, name, other in (("node1", "beat_s", 0.75), ("node2", "lost_s", 5)):
        cluster.stop_agent(node)
        old, new = f"\n{name} = {SHORT_BEATS[name]}\n", f"\n{name} = {other}\n"
        cluster.start_agent(node, OQ_CONFIG_FILE=other_cfg(cluster, tmp_path / node, old, new))
    check_refused(
        cluster,
        {
            "node1": r"\[oq_runtime\] beat_s is 0\.75 on the node and 0\.5 on the master",
            "node2": r"\[oq_runtime\] lost_s is 5 on the node and 4 on the master",
        },
    )


def test_other_master_and_other_shared_dir(cluster: Cluster, tmp_path: Path) -> None:
    own, shared = cluster.net.address[MASTER], str(cluster.home / "shared")
    for node, old, new in (
        ("node1", f"\nhost = {own}", "\nhost = 192.0.2.99"),
        ("node2", f"\nshared_dir = {shared}", "\nshared_dir = /nowhere"),
    ):
        cluster.stop_agent(node)
        cluster.start_agent(node, OQ_CONFIG_FILE=other_cfg(cluster, tmp_path / node, old, new))
    check_refused(
        cluster,
        {
            "node1": rf"\[dbserver\] host is 192.0.2.99 on the node and {own} on the master",
            "node2": r"\[directory\] shared_dir is /nowhere \(not readable\) on the node and "
            + re.escape(f"{shared} on the master"),
        },
    )
