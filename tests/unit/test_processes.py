"""What is said of a process that has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

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


def test_number_of_a_thread_is_no_process() -> None:
    """Whose job had that number as a process is over, whatever the kernel calls it."""
    ready, over = threading.Event(), threading.Event()
    number = 0

    def live() -> None:
        nonlocal number
        number = threading.get_native_id()
        ready.set()
        over.wait()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        ready.wait()
        assert not processes.exists(number)
        assert processes.pidfd(number) is None
    finally:
        over.set()
        thread.join()


def test_characters_that_the_locale_lacks_are_escaped() -> None:
    code = "from oq_runtime import processes; processes.open_standard(); print('Z\xfcrich \u2026')"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Z\\xfcrich \\u2026\n"), done.stderr
