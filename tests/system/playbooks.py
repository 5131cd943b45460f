"""The shipped playbooks as an administrator runs them: in a terminal, asked for a password."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = ROOT / ".venv-provision/bin/ansible-playbook"
#: packages for all hosts through one line, on a machine with other work
LIMIT_S = 5400.0
_RECAP = re.compile(r"^(\S+) +: ((?:\w+=\d+ *)+)$", re.MULTILINE)
_ERROR = re.compile(r"^(?:fatal: |\[ERROR\]).*", re.MULTILINE)


@dataclass(frozen=True)
class Played:
    """
    What a playbook has done.

    :param code: exit code of ansible-playbook; negative, the signal that ended it
    :param output: all that it has printed
    :param seconds: of the clock
    """

    code: int
    output: str
    seconds: float

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        """Per host: ok, changed, unreachable, failed, ..."""
        rows = _RECAP.findall(self.output.rpartition("PLAY RECAP")[2])
        return {
            host: {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", counts)}
            for host, counts in rows
        }

    def total(self, name: str) -> int:
        """The sum of a column of the recap, which a run that has broken off has not."""
        assert self.recap, self
        return sum(row[name] for row in self.recap.values())

    @property
    def text(self) -> str:
        """The output with a blank for each break of a line."""
        return " ".join(self.output.split())

    @property
    def tasks(self) -> int:
        """How many tasks have begun, those that were skipped included."""
        return self.output.count("\nTASK [")

    @property
    def changed_tasks(self) -> list[str]:
        """The names of tasks that have changed something, with the host."""
        found, task = [], ""
        for line in self.output.splitlines():
            if match := re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\]", line):
                task = match[1]
            elif match := re.match(r"changed: \[(\S+?)\]", line):
                found.append(f"{match[1]}: {task}")
        return found

    @property
    def errors(self) -> str:
        """The lines with errors, and the end of the output."""
        lines = _ERROR.findall(self.output)
        return "\n".join([*lines, "...", *self.output.splitlines()[-30:]])

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.0f} s\n{self.errors}"


def play(
    playbook: str,
    *args: str,
    inventory: Path,
    log: Path,
    env: Mapping[str, str],
    answers: Mapping[str, str],
    kill_after: int = 0,
    limit_s: float = LIMIT_S,
) -> Played:
    """Run a playbook to its end.

    :param playbook: path under the project
    :param args: more of the command line
    :param log: file to which the output is appended
    :param answers: beginning of a question -> what is typed
    :param kill_after: number of tasks after which Ansible is killed; 0 for never
    :raises TimeoutError: when it takes longer; it is killed then
    """
    argv = [str(ANSIBLE), "--inventory", str(inventory), "--ask-become-pass", *args, playbook]
    started_s = time.monotonic()
    terminal, far = pty.openpty()
    process = subprocess.Popen(
        argv, cwd=ROOT, env=os.environ | env, stdin=far, stdout=far, stderr=far,
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(far)
    output, asked = "", 0
    try:
        with log.open("a") as file:
            file.write(f"\n=== {time.strftime('%H:%M:%S')} {' '.join(argv)}\n")
            while True:
                if not select.select([terminal], [], [], 1.0)[0]:
                    if (
                        process.poll() is not None
                    ):  # ssh, which it leaves behind, has the terminal too
                        break
                    if time.monotonic() - started_s > limit_s:
                        raise TimeoutError(
                            f"{playbook} takes longer than {limit_s:.0f} s; see {log}"
                        )
                    continue
                try:
                    text = os.read(terminal, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
                if not text:
                    break
                text = text.replace("\r\n", "\n")
                output += text
                moment = time.strftime("%H:%M:%S")
                file.write(text.replace("\nTASK [", f"\n{moment} TASK ["))
                file.flush()
                for question, answer in answers.items():
                    if (at := output.find(question, asked)) >= 0 and output.endswith(": "):
                        asked = at + len(question)
                        os.write(terminal, f"{answer}\n".encode())
                if kill_after and output.count("\nTASK [") > kill_after:
                    os.killpg(process.pid, signal.SIGKILL)
    except BaseException:  # a limit, or an interrupted test
        os.killpg(process.pid, signal.SIGKILL)
        raise
    os.close(terminal)
    return Played(process.wait(), output, time.monotonic() - started_s)


def _take_terminal() -> None:
    """Make the terminal the controlling one of the new session, where getpass asks."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
