"""Run the test lanes one after the other and print a table of times and results.

Used by ``make test``, which makes the virtual environments first. All lanes run even if an
earlier one fails. A lane is left out, with the reason, if its folder is missing, if it takes long
and nobody has asked for it, or if its program ends with exit code 77: it cannot run on this
machine, its last line on stderr says why. A lane whose interpreter is missing fails. The exit code
is 1 if any lane failed, or if none ran.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
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


PROVISIONING = (("pytest", "tests/provisioning"),)
MOLECULE = (("molecule/run", "test"),)
LANES = (
    Lane("lint", "tests", (("ruff", "check", "."), ("ruff", "format", "--check", "."))),
    Lane("types", "runtime/src", (("mypy",),)),
    Lane("unit", "tests/unit", (("pytest", "tests/unit"),)),
    Lane("local", "tests/local", (("pytest", "tests/local"),)),
    Lane("cluster", "tests/cluster", (("pytest", "-rs", "-m", "not slow", "tests/cluster"),)),
    Lane("contract", "tests/contract", (("pytest", "tests/contract"),)),
    Lane("contract-3.25", "tests/contract", (("pytest", "tests/contract"),), ".venv-3.25"),
    Lane("contract-3.23", "tests/contract", (("pytest", "tests/contract"),), ".venv-3.23"),
    Lane("provisioning", "tests/provisioning", PROVISIONING, ".venv-provision"),
    Lane("molecule", "molecule/run", MOLECULE, ".venv-provision", asked_by="MOLECULE"),
    Lane("conformance", "tests/conformance/__main__.py", (("tests.conformance", "--fixed"),)),
)


def run(lane: Lane) -> tuple[str, str]:
    """Run one lane; return its result (passed, failed or left out) and the reason."""
    python = ROOT / lane.venv / "bin" / "python"
    if not python.exists():
        return "failed", f"no interpreter in {lane.venv}; run `make {lane.venv}`"
    reason = ""
    for command in lane.commands:
        print(f"\n=== {lane.name}: {' '.join(command)}", flush=True)
        program = command if "/" in command[0] else (str(python), "-m", *command)
        code, last = call(program)
        if code == CANNOT_RUN:
            return "left out", last
        if code:
            reason = reason or f"{' '.join(command)}: exit code {code}"
    return ("failed" if reason else "passed"), reason


def call(program: tuple[str, ...]) -> tuple[int, str]:
    """Run a program, its output going where ours goes; return exit code and last line on stderr."""
    last = ""
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    return process.returncode, last


def main() -> int:
    rows: list[tuple[str, str, str, str]] = []
    for lane in LANES:
        if not (ROOT / lane.needs).exists():
            rows.append((lane.name, "-", "left out", f"{lane.needs} is missing"))
            continue
        if lane.asked_by and not os.environ.get(lane.asked_by):
            reason = f"takes a quarter of an hour; run it with {lane.asked_by}=1"
            rows.append((lane.name, "-", "left out", reason))
            continue
        started = time.monotonic()
        result, reason = run(lane)
        rows.append((lane.name, f"{time.monotonic() - started:.1f} s", result, reason))
    print(f"\n{'lane':<15}{'time':>10}  {'result':<10}")
    for name, seconds, result, reason in rows:
        print(f"{name:<15}{seconds:>10}  {result:<10}{reason}".rstrip())
    results = [row[2] for row in rows]
    passed, failed = results.count("passed"), results.count("failed")
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
