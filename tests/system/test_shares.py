"""NFS: what is mounted and how, on which ports, and when a worker sees what the master writes."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.system.cluster import USERS, WORKERS, Cluster
from tests.system.host import Host

FILES = 50
#: answers each line of its input: ``write PATH TEXT`` appends and flushes, ``read PATH`` prints
FILE_SERVER = """
import os, sys
for line in sys.stdin:
    verb, path, *text = line.split()
    if verb == "write":
        with open(path, "a") as file:
            file.write(text[0])
            file.flush()
            os.fsync(file.fileno())
        print("written", flush=True)
    else:
        try:
            with open(path) as file:
                print(file.read(), flush=True)
        except OSError as error:
            print(error.strerror, flush=True)
"""


def paths(cluster: Cluster) -> tuple[str, str]:
    """What the master exports."""
    return "/opt/openquake", cluster.shared


@contextlib.contextmanager
def file_server(host: Host, user: str) -> Iterator[subprocess.Popen[str]]:
    """Reads and writes files on a host as a user, for a few milliseconds each."""
    command = host.ssh(f"runuser -u {user} -- python3 -u -c '{FILE_SERVER}'")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def ask(server: subprocess.Popen[str], line: str) -> str:
    assert server.stdin and server.stdout
    server.stdin.write(f"{line}\n")
    server.stdin.flush()
    return server.stdout.readline().strip()


def check_mounts(cluster: Cluster, host: Host) -> None:
    for path in paths(cluster):
        host.run(f"ls {path}/ >/dev/null", check=False)  # mounted at the first use, also by nobody
        found = json.loads(host.out(f"findmnt --json --types nfs,nfs4 --mountpoint {path}"))
        [mount] = found["filesystems"]
        options = mount["options"].split(",")
        assert mount["fstype"] == "nfs4"
        assert mount["source"] == f"{cluster.master.address}:{path}"
        assert {"ro", "vers=4.2", "proto=tcp"} <= set(options), options


@pytest.mark.parametrize("worker", WORKERS)
def test_mounts_are_of_nfs_4_2_and_read_only(cluster: Cluster, worker: str) -> None:
    check_mounts(cluster, cluster.hosts[worker])


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("user", ["root", "openquake"])
def test_nobody_writes_on_a_worker(cluster: Cluster, worker: str, user: str) -> None:
    for path in (*paths(cluster), f"{cluster.shared}/{USERS[0]}/oqdata"):
        done = cluster.hosts[worker].run(f"runuser -u {user} -- touch {path}/written", check=False)
        assert done.returncode != 0
        expected = ("Read-only file system", "Permission denied")  # the latter in a private home
        assert any(text in done.stderr for text in expected), done.stderr
    assert "Read-only file system" in done.stderr or user == "root", done.stderr


def check_exports(cluster: Cluster) -> None:
    """They are for the workers alone."""
    rows = cluster.master.out("exportfs -s").splitlines()
    found = {(row.split()[0], row.split()[1].partition("(")[0]) for row in rows}
    addresses = [cluster.hosts[name].address for name in cluster.workers]
    assert found == {(path, address) for path in paths(cluster) for address in addresses}
    for row in rows:
        options = set(row.partition("(")[2].rstrip(")").split(","))
        assert {"ro", "root_squash"} <= options, row


def test_exports_are_for_the_workers_alone(cluster: Cluster) -> None:
    check_exports(cluster)


def test_nfs_listens_on_one_port(cluster: Cluster) -> None:
    """All that listens to other hosts is ssh and what the cluster has."""
    allowed = {"master": {22, 1908, 2049}, "worker1": {22, 1909}, "worker2": {22, 1909}}
    for name, ports in allowed.items():
        lines = cluster.hosts[name].out("ss -Hltun").splitlines()
        found = {
            (line.split()[0], int(line.split()[4].rpartition(":")[2]))
            for line in lines
            if not line.split()[4].startswith(("127.", "[::1]"))
        }
        assert found <= {("tcp", port) for port in ports}, f"{name}: {found}"


def test_a_worker_sees_at_once_what_the_master_flushes(cluster: Cluster) -> None:
    """50 new files, and 50 additions to one that the worker has read before; each at once."""
    user, worker = USERS[0], cluster.hosts[WORKERS[0]]
    directory = f"{cluster.shared}/{user}/oqdata"
    cluster.master.run(f"mkdir -p {directory}", user)
    late = []
    with file_server(cluster.master, user) as writer, file_server(worker, "openquake") as reader:
        for number in range(FILES):
            path = f"{directory}/flushed-{number}"
            assert ask(writer, f"write {path} {number}") == "written"
            if (answer := ask(reader, f"read {path}")) != str(number):
                late.append(f"new file {number}: {answer}")
            assert ask(writer, f"write {directory}/grows x") == "written"
            if (answer := ask(reader, f"read {directory}/grows")) != "x" * (number + 1):
                late.append(f"addition {number}: {len(answer)} characters")
    cluster.master.run(f"rm {directory}/flushed-* {directory}/grows", user)
    assert not late, f"{len(late)} of {2 * FILES}: {late}"
