"""Commands whose output cannot be written end in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["workers", "journal", "report"])
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_stdout_without_room(command: str, argument: str) -> None:
    code = f"import sys; from oq_runtime.commands.{command} import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, argument], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == f"oq-{command}: stdout: No space left on device\n"
