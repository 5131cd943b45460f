"""What cgroups of both versions say of processors and processes: made up, and real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oq_runtime import cgroups, config
from oq_runtime.errors import ConfigError
from tests.cgroups import inside

V1_CPU, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
ASK = "from oq_runtime import config; print(*config.available_cores())"


@pytest.fixture(params=[1, 2])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, Path]:
    """A version, and a /proc of a process in the cgroup /outer/inner, mounted at tmp/cg."""
    v1 = request.param == 1
    kind, line, options = ("cgroup", "4:cpu,pids", "rw,cpu,pids") if v1 else ("cgroup2", "0:", "rw")
    self = tmp_path / "proc/self"
    self.mkdir(parents=True)
    (self / "cgroup").write_text(f"9:memory:/elsewhere\n{line}:/outer/inner\n")
    (self / "mountinfo").write_text(
        f"35 31 0:32 / {tmp_path}/cg rw,relatime - {kind} cgroup {options}\n"
    )
    (tmp_path / "cg/outer/inner").mkdir(parents=True)
    return request.param, tmp_path


def limit(made: tuple[int, Path], where: str, quota: str) -> Path:
    """Write a quota of CPU time in µs of 100,000, as either version has it."""
    version, tmp_path = made
    directory = tmp_path / "cg" / where
    if version == 1:
        (directory / "cpu.cfs_quota_us").write_text("-1" if quota == "max" else quota)
        (directory / "cpu.cfs_period_us").write_text("100000")
    else:
        (directory / "cpu.max").write_text(f"{quota} 100000\n" if quota else "")
    return directory


def quota(made: tuple[int, Path]) -> tuple[float, Path] | None:
    return cgroups.cpu_quota(made[1] / "proc")


@pytest.mark.parametrize("text", [None, "", "max", "junk"])
def test_without_a_quota_there_is_no_bound(made: tuple[int, Path], text: str | None) -> None:
    if text is not None:
        limit(made, "outer/inner", text)
    assert quota(made) is None


def test_the_quota_of_the_nearest_that_has_one_counts(made: tuple[int, Path]) -> None:
    outer = limit(made, "outer", "150000")
    assert quota(made) == (1.5, outer)
    limit(made, "outer/inner", "max")
    assert quota(made) == (1.5, outer)
    inner = limit(made, "outer/inner", "50000")
    assert quota(made) == (0.5, inner)


def test_an_outer_quota_holds_as_well(made: tuple[int, Path]) -> None:
    limit(made, "outer/inner", "400000")
    outer = limit(made, "outer", "200000")
    assert quota(made) == (2.0, outer)


def test_without_cgroups_there_is_no_bound(tmp_path: Path) -> None:
    assert cgroups.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("found", "cores"), [(0.1, 1), (1.0, 1), (1.5, 2), (3.99, 4), (64.0, 4), (None, 4)]
)
def test_cores_follow_the_quota(
    monkeypatch: pytest.MonkeyPatch, found: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    bound = None if found is None else (found, Path("/cg"))
    monkeypatch.setattr(cgroups, "cpu_quota", lambda: bound)
    number, why = config.available_cores()
    assert number == cores
    assert why == (
        f"a CPU quota of {found:.3g} in /cg" if found is not None and found < 4 else "all CPUs"
    )


def test_the_limit_of_processes_is_named(made: tuple[int, Path]) -> None:
    _, tmp_path = made
    (tmp_path / "cg/outer/pids.max").write_text("30\n")
    (tmp_path / "cg/outer/inner/pids.max").write_text("max\n")
    (tmp_path / "cg/outer/pids.current").write_text("7\n")
    assert f"30 of {tmp_path}/cg/outer (pids.max)" in cgroups.process_limit(tmp_path / "proc")
    cgroups.check_processes(5, tmp_path / "proc")
    said = "24 processes .* needed here, and 7 are in use of the 30 of .*/cg/outer"
    with pytest.raises(ConfigError, match=said):
        cgroups.check_processes(6, tmp_path / "proc")


def ask(*before: str | Path) -> tuple[int, str]:
    out = subprocess.check_output([*before, sys.executable, "-c", ASK], text=True, timeout=60)
    number, _, why = out.strip().partition(" ")
    return int(number), why


def test_one_cpu_by_affinity() -> None:
    if len(allowed := os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one CPU")
    number, why = ask("taskset", "-c", str(min(allowed)))
    assert (number, why) == (1, f"1 of {os.cpu_count()} CPUs by affinity")


@pytest.fixture
def half() -> Iterator[Path]:
    """A real cgroup with half a processor."""
    v1 = (V1_CPU / "cpu.cfs_quota_us").exists()
    path = (V1_CPU if v1 else V2) / f"oq-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"{path} cannot be made: {exc.strerror}")
    try:
        name, text = ("cpu.cfs_quota_us", "50000") if v1 else ("cpu.max", "50000 100000")
        if not (path / name).exists():
            pytest.skip("no CPU controller of cgroups at /sys/fs/cgroup")
        (path / name).write_text(text)
        yield path
    finally:
        path.rmdir()


def test_a_real_cgroup(half: Path) -> None:
    assert ask(*inside(half, [])) == (1, f"a CPU quota of 0.5 in {half}")
