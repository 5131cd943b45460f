"""What is said of a process that has ended."""

from __future__ import annotations

import signal
import subprocess

import pytest

from oq_runtime import processes


@pytest.mark.parametrize(
    "command, words",
    [
        ("exit 1", "ended with exit code 1"),
        ("kill -KILL $$", "was killed by SIGKILL"),
        (f"kill -{signal.SIGRTMIN + 3:d} $$", f"was killed by signal {signal.SIGRTMIN + 3:d}"),
    ],
)
def test_every_ending_has_words(command: str, words: str) -> None:
    code = subprocess.run(["/bin/sh", "-c", command], check=False).returncode
    assert processes.ending(code) == words
