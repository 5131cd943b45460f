"""Run the test lanes and print a table of times and results.

Used by ``make test``, which makes the virtual environments first. All lanes run even if an earlier
one fails, two at a time, the longest first; what each prints comes at its end. Where it can be,
each has a /dev/shm of its own, since some of their tests look at what is left there. Tests that are
marked as slow run with SLOW=1; how many a lane has left out is said by its last line. The molecule
and the system lane come last, and alone: they fill the machine. A lane is left out, with the
reason, if its folder is missing, if it takes long and nobody has asked for it, or if its program
ends with exit code 77: it cannot run on this machine, its last line says why. A lane whose
interpreter is missing fails. The exit code is 1 if any lane failed, or if none ran.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ".venv"
CANNOT_RUN = 77


@dataclass(frozen=True)
class Lane:
    name: str
    needs: str  # path under the root without which the lane is left out
    commands: tuple[tuple[str, ...], ...]  # arguments after "python -m", or a program's path first
    venv: str = VENV
    asked_by: str = ""  # variable of the environment without which the lane is left out
    why: str = ""  # reason to give then
    alone: bool = False  # it fills the machine


def tests(folder: str, *more: str, marks: str = "") -> tuple[tuple[str, ...], ...]:
    """Return the command that runs the tests of folders, the slow ones if they are asked for.

    :param more: other folders
    :param marks: of the tests, as pytest's -m has them
    """
    chosen = [marks] if marks else []
    if not os.environ.get("SLOW"):
        chosen.append("not slow")
    expression = ("-m", " and ".join(chosen)) if chosen else ()
    return (("pytest", *expression, *(f"tests/{name}" for name in (folder, *more))),)


CONFORMANCE = (("tests.conformance", "--fixed", "--runtime-mode", "zmq"),)
MOLECULE = (("molecule/run", "test"),)
REPORTS = (("tests.reports", "--browser"),)
DOCS = ("sphinx", "-q", "-W", "--keep-going", "docs", "build/docs")
LANES = (
    Lane("provisioning", "tests/provisioning", tests("provisioning"), ".venv-provision"),
    Lane("local", "tests/local", tests("local", marks="not attack")),
    Lane("cluster", "tests/cluster", tests("cluster", marks="not attack")),
    Lane("attack", "tests/cluster", tests("local", "cluster", marks="attack")),
    Lane("unit", "tests/unit", tests("unit")),
    Lane("contract", "tests/contract", tests("contract")),
    Lane("contract-3.25", "tests/contract", tests("contract"), ".venv-3.25"),
    Lane("contract-3.23", "tests/contract", tests("contract"), ".venv-3.23"),
    Lane("conformance", "tests/conformance/__main__.py", CONFORMANCE),
    Lane("reports", "tests/reports.py", REPORTS, asked_by="SLOW", why="takes minutes"),
    Lane("types", "runtime/src", (("mypy",),)),
    Lane("docs", "docs/conf.py", (DOCS,), ".venv-docs"),
    Lane("lint", "tests", (("ruff", "check", "."), ("ruff", "format", "--check", "."))),
    Lane(
        "molecule",
        "molecule/run",
        MOLECULE,
        ".venv-provision",
        asked_by="MOLECULE",
        why="takes ten minutes and installs podman",
        alone=True,
    ),
    Lane(
        "system",
        "tests/system",
        (("tests.system",),),
        asked_by="SYSTEM",
        why="takes an hour and builds a kernel",
        alone=True,
    ),
)
AT_A_TIME = 2
#: a command in a mount namespace of its own, with nothing in /dev/shm
OWN_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh")


ROW = "{:<15}{:>10}{:>10}  {:<10}{}"


@dataclass(frozen=True)
class Outcome:
    lane: Lane
    result: str  # passed, failed or left out
    reason: str = ""
    seconds: float | None = None
    cpu_seconds: float | None = None

    def __str__(self) -> str:
        times = ("-" if s is None else f"{s:.1f} s" for s in (self.seconds, self.cpu_seconds))
        return ROW.format(self.lane.name, *times, self.result, self.reason).rstrip()


def run(lane: Lane) -> Outcome:
    """Run one lane, or say why not."""
    if not (ROOT / lane.needs).exists():
        return Outcome(lane, "left out", f"{lane.needs} is missing")
    if lane.asked_by and not os.environ.get(lane.asked_by):
        return Outcome(lane, "left out", f"{lane.why}; run it with {lane.asked_by}=1")
    python = ROOT / lane.venv / "bin" / "python"
    if not python.exists():
        return Outcome(lane, "failed", f"no interpreter in {lane.venv}; run `make {lane.venv}`")
    started_s = time.monotonic()
    reason, cpu_seconds = "", 0.0
    for command in lane.commands:
        title = f"\n=== {lane.name}: {' '.join(command)}"
        program = command if "/" in command[0] else (str(python), "-m", *command)
        code, last, used = call(program, title, alone=lane.alone)
        cpu_seconds += used
        if code == CANNOT_RUN:
            return Outcome(lane, "left out", last)
        if code:
            reason = reason or f"{' '.join(command)}: exit code {code}"
    seconds = time.monotonic() - started_s
    return Outcome(lane, "failed" if reason else "passed", reason, seconds, cpu_seconds)


def call(program: tuple[str, ...], title: str, *, alone: bool) -> tuple[int, str, float]:
    """Run a program; return its exit code, the last line of its output, and its CPU seconds.

    :param title: what is printed before its output
    :param alone: print its output as it comes; else at its end, in one piece
    """
    lines = [title]
    print(title if alone else f"{title.strip()} ...", flush=True)
    if not alone and own_shm():
        program = (*OWN_SHM, *program)
    with subprocess.Popen(
        program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if alone:
                print(line, end="", flush=True)
        _, status, used = os.wait4(process.pid, 0)  # with all that it has waited for
        process.returncode = os.waitstatus_to_exitcode(status)
    if not alone:
        print("\n".join(lines), flush=True)
    last = next((line for line in reversed(lines) if line.strip()), "")
    return process.returncode, last, used.ru_utime + used.ru_stime


@functools.cache
def own_shm() -> bool:
    """Whether a program may have a /dev/shm of its own."""
    try:
        return subprocess.run((*OWN_SHM, "true"), capture_output=True).returncode == 0
    except OSError:
        return False


def main() -> int:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        outcomes = list(pool.map(run, [lane for lane in LANES if not lane.alone]))
    outcomes += [run(lane) for lane in LANES if lane.alone]
    print(f"\n{ROW.format('lane', 'time', 'CPU', 'result', '').rstrip()}", *outcomes, sep="\n")
    results = [outcome.result for outcome in outcomes]
    passed, failed = results.count("passed"), results.count("failed")
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
