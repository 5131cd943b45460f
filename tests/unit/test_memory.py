"""Memory as the kernel tells it: of the machine, of cgroups of both versions, real and made up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from oq_runtime.node import memory
from oq_runtime.node.memory import Usage
from tests.cgroups import inside, limited

MIB = 1 << 20
V1_UNLIMITED = 9223372036854771712


def proc(tmp_path: Path, cgroup: str, root: str, options: str = "rw,memory") -> Path:
    """A /proc whose own cgroup is ``cgroup``, with the memory cgroups from ``root`` at tmp/cg."""
    kind = "cgroup" if "memory" in options else "cgroup2"
    number = "4:memory" if kind == "cgroup" else "0:"
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(f"9:pids:/elsewhere\n{number}:{cgroup}\n")
    (proc / "self/mountinfo").write_text(
        "22 1 0:21 / /proc rw,relatime shared:5 - proc  rw\n"
        f"35 31 0:32 {root} {tmp_path}/cg rw,relatime - {kind} cgroup {options}\n"
    )
    (proc / "vmstat").write_text("nr_free_pages 9\noom_kill 7\n")
    return proc


def write(directory: Path, **files: str | int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("memory_", "memory.")).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("cgroup", "root", "inner"),
    [
        ("/system.slice/a.service", "/", "system.slice/a.service"),
        ("/docker/abc", "/docker/abc", ""),
        ("/docker/abc/x", "/docker/abc", "x"),
        ("/../outside", "/", ""),
    ],
)
def test_version_2(tmp_path: Path, cgroup: str, root: str, inner: str) -> None:
    fake = proc(tmp_path, cgroup, root, "rw")
    write(
        tmp_path / "cg" / inner,
        memory_current=50 * MIB,
        memory_max=60 * MIB,
        memory_stat=f"anon 1\ninactive_file {10 * MIB}\n",
        memory_events="low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\noom_group_kill 0",
    )
    assert memory.usage(fake) == Usage(40 * MIB, 60 * MIB)
    assert memory.oom_kills(fake) == 2


def test_version_1(tmp_path: Path) -> None:
    fake = proc(tmp_path, "/a", "/")
    write(
        tmp_path / "cg/a",
        memory_usage_in_bytes=50 * MIB,
        memory_limit_in_bytes=60 * MIB,
        memory_stat=f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n",
        memory_oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 4",
    )
    assert memory.usage(fake) == Usage(40 * MIB, 60 * MIB)
    assert memory.oom_kills(fake) == 4


def test_the_cgroup_with_least_to_give_counts(tmp_path: Path) -> None:
    fake = proc(tmp_path, "/outer/inner", "/", "rw")
    write(tmp_path / "cg/outer", memory_current=50 * MIB, memory_max=60 * MIB)
    write(tmp_path / "cg/outer/inner", memory_current=10 * MIB, memory_max=40 * MIB)
    assert memory.usage(fake) == Usage(50 * MIB, 60 * MIB)


@pytest.mark.parametrize(
    ("most", "high", "limit"),
    [("max", 40, 40), (60, 40, 40), (40, 60, 40), (40, "max", 40), (0, 0, 0)],
)
def test_what_slows_all_down_is_a_limit(
    tmp_path: Path, most: int | str, high: int | str, limit: int
) -> None:
    fake = proc(tmp_path, "/o\\x2d/a", "/o\\134x2d", "rw")
    sizes = [n if isinstance(n, str) else n * MIB for n in (most, high)]
    inner = tmp_path / "cg/a"
    write(inner, memory_current=30 * MIB, memory_max=sizes[0], memory_high=sizes[1])
    assert memory.usage(fake) == Usage(30 * MIB, max(1, limit * MIB))


def test_what_is_no_number_is_no_limit(tmp_path: Path) -> None:
    fake = proc(tmp_path, "/a", "/", "rw")
    write(tmp_path / "cg/a", memory_current="", memory_max="", memory_events="oom_kill x")
    assert memory.usage(fake).limit_bytes == psutil.virtual_memory().total
    assert memory.oom_kills(fake) == 7


@pytest.mark.parametrize(("options", "limit"), [("rw", "max"), ("rw,memory", V1_UNLIMITED)])
def test_without_a_limit_the_machine_counts(tmp_path: Path, options: str, limit: str | int) -> None:
    fake = proc(tmp_path, "/a", "/", options)
    write(tmp_path / "cg/a", memory_current=1, memory_max=limit)
    write(tmp_path / "cg/a", memory_usage_in_bytes=1, memory_limit_in_bytes=limit)
    assert memory.usage(fake).limit_bytes == psutil.virtual_memory().total


def test_without_cgroups_the_kills_of_the_machine_count(tmp_path: Path) -> None:
    fake = proc(tmp_path, "/a", "/", "rw")
    assert memory.oom_kills(fake) == 7


def test_resident_memory_of_a_process() -> None:
    own = psutil.Process().memory_info().rss
    asked = memory.Resident(os.getpid())
    assert asked.nbytes == pytest.approx(own, rel=0.2)
    more = b"x" * (own + 1)
    assert asked.nbytes > own + len(more) * 0.8, "it is read anew"
    asked.close()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    asked = memory.Resident(process.pid)
    assert asked.nbytes > 0
    process.communicate(b"\n")
    assert asked.nbytes == memory.Resident(process.pid).nbytes == 0
    asked.close()


ASK = "from oq_runtime.node import memory; print(memory.usage().limit_bytes, memory.oom_kills())"
FILL = "x = bytearray(1 << 30)"


def test_a_real_cgroup_and_a_real_kill() -> None:
    with limited(200 * MIB) as cgroup:

        def run(code: str) -> subprocess.CompletedProcess[str]:
            command = inside(cgroup, [sys.executable, "-c", code])
            return subprocess.run(command, capture_output=True, text=True, timeout=60)

        assert run(ASK).stdout.split() == [str(200 * MIB), "0"]
        assert run(FILL).returncode == -signal.SIGKILL
        assert run(ASK).stdout.split() == [str(200 * MIB), "1"]
