"""What ``oq-run`` shows, in a real terminal (tmux), and how it behaves there.

The screens are recorded at 120 and 60 columns, in ``build/screens``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from oq_runtime.commands.progress import Display
from oq_runtime.wire.protocol import Phase, Status
from tests.leftovers import wait_for
from tests.terminal import COLUMNS, ENDED, FIRST_LINE_S, ROWS, Terminal, needs_tmux

from .test_oq_run import corpus, example, jobs, run, start
from .test_resume import detached_runs

pytestmark = [pytest.mark.timeout(500), needs_tmux]

WHOLE = re.compile(r"^job \d+ .* tasks ", re.MULTILINE)


@pytest.fixture
def terminal(
    env: dict[str, str], tmpdir: Path, tmp_path: Path
) -> Iterator[Callable[[int], Terminal]]:
    opened = []

    def start(columns: int) -> Terminal:
        opened.append(Terminal(env, tmp_path, columns))
        return opened[-1]

    yield start
    for one in opened:
        with contextlib.suppress(subprocess.CalledProcessError):  # a test may have done so
            one("kill-server")


def job_of(job: Path) -> str:
    """The classical example, with fewer ruptures."""
    return f"{job} -p maximum_distance=40 -p width_of_mfd_bin=0.5 --exports csv"


def long_job(tmp_path: Path) -> str:
    """The classical example with more ruptures: it does not end before it is aborted."""
    return f"{example(tmp_path) / 'job.ini'} -p rupture_mesh_spacing=2 -p width_of_mfd_bin=0.05"


SAID = "running hazard_classical/job.ini (Classical hazard on the fictional island of Tarsk) on"


def test_first_line(env: dict[str, str], tmp_path: Path) -> None:
    """It is there within a second, before the engine is imported.

    On a machine with more to do than it has cores the processor time counts instead.
    """
    busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
    took_s = []
    for _ in range(3):
        started_s = time.monotonic()
        process = start(env, example(tmp_path) / "job.ini")
        assert process.stderr is not None
        line = process.stderr.readline()
        used = psutil.Process(process.pid).cpu_times()
        took_s.append(used.user + used.system if busy else time.monotonic() - started_s)
        process.terminate()
        process.communicate()
        shutil.rmtree(tmp_path / "hazard_classical")
        assert re.fullmatch(rf"{re.escape(SAID)} this machine, \d+ slots?\n", line)
    print(f"first line after {', '.join(f'{each_s:.2f}' for each_s in took_s)} s")
    assert min(took_s) < FIRST_LINE_S


@pytest.mark.parametrize("columns", [pytest.param(120, marks=pytest.mark.slow), 60])
def test_screens(terminal: Callable[[int], Terminal], tmp_path: Path, columns: int) -> None:
    one, job = terminal(columns), example(tmp_path) / "job.ini"
    one.start(job_of(job))
    one.until(lambda screen: "loading the engine 0:0" in screen)
    one.record("start")
    assert f"{SAID} this machine, " in one.history()
    one.until(lambda screen: re.search(r"^job \d+ .* left", screen, re.MULTILINE))
    one.record("tasks")
    *_, whole = one.until(lambda screen: "left" in screen).splitlines()
    shown = (
        r"job \d+  [\u2501\u2500]+  \d+/\d+ tasks  \d:\d\d, about \d:\d\d left(  \d/\d slots busy)?"
    )
    assert re.fullmatch(shown, whole)
    assert "slots busy" in whole or columns == 60
    assert "\x1b[32m" in one.colours()
    one.until(ENDED.search)
    one.record("end")
    text = one.history()
    assert ENDED.findall(text) == ["0"]
    assert len(re.findall(r"^classical +\d+/\d+ tasks +\d:\d\d", text, re.MULTILINE)) == 1
    assert not WHOLE.search(text) and " submitted, " not in text
    assert "id | name" not in text and not re.search(r"INFO\]\s*$", text, re.MULTILINE)
    for name, code, words in [
        ("explain", "0", "--explain -1"),
        ("dry-run", "0", f"{job} --dry-run"),
        ("bad-parameter", "2", f"{job} -p maximum_distanc=40"),
        ("no-such-file", "2", f"{job.with_name('jobs.ini')}"),
    ]:
        one.run(words)
        assert ENDED.findall(one.until(ENDED.search)) == [code]
        one.record(name)


@pytest.mark.parametrize("columns", [60, 120])
@pytest.mark.parametrize("meanwhile", ["nothing", "a frame", "a line"])
def test_a_width_that_is_heard_of_late(
    terminal: Callable[[int], Terminal], columns: int, meanwhile: str
) -> None:
    """No piece of a frame is left behind, and no line above it is taken away.

    :param columns: of the terminal after it was changed
    :param meanwhile: what is drawn before that is heard of
    """
    before = sum(COLUMNS) - columns
    one = terminal(before)
    one.type("clear; exec sleep 600")
    assert wait_for(lambda: not one.screen())
    tty = os.open(one("display-message", "-p", "#{pane_tty}").strip(), os.O_WRONLY | os.O_NOCTTY)
    with open(tty, "w") as file:
        console = Console(file=file, force_terminal=True, width=before, height=ROWS)
        display = Display(console, quiet=False)
        display.enter("the engine is at work", "job 7")
        lines = [f"line {number}" for number in range(ROWS)]
        for line in lines:
            display.print(line)
        phases = [Phase(name=name, total=40, done=20, took_s=9.0) for name in ("first", "second")]
        display.show(Status(phases=phases, nodes=[]))
        assert wait_for(lambda: one.screen().endswith(display.drawn[-1]))
        one.resize(columns)
        if meanwhile == "a frame":
            display.show()
        elif meanwhile == "a line":
            display.print(meanwhile)
            lines.append(meanwhile)
        console.width = columns
        display.print("a line")
        lines.append("a line")

        def shown() -> list[str]:
            return one("capture-pane", "-p", "-S", "-").rstrip("\n").splitlines()

        *of_phases, _ = frame = display.drawn
        assert wait_for(lambda: shown() == lines + frame), "\n".join(shown())
        display.close()
        assert wait_for(lambda: shown() == lines + of_phases), "\n".join(shown())


@pytest.mark.slow
def test_a_terminal_that_changes(terminal: Callable[[int], Terminal], tmp_path: Path) -> None:
    """It becomes narrower, and Ctrl-Z and fg come: one frame is left, and the cursor."""
    one = terminal(120)
    one.start(job_of(example(tmp_path) / "job.ini"))
    one.until(WHOLE.search)
    one.resize(60)
    one.until(lambda screen: WHOLE.search(screen) and "slots busy" not in screen)
    one("send-keys", "C-z")
    stopped = one.until(lambda screen: "fg shows them again" in screen and screen.endswith("$"))
    print(stopped)
    assert not WHOLE.search(stopped)
    assert one("display-message", "-p", "#{cursor_flag}").strip() == "1"
    one.type("fg")
    again = one.until(lambda screen: WHOLE.search(screen))
    print(again)
    assert len(WHOLE.findall(again)) == 1
    one("send-keys", "C-c")
    print(one.until(lambda screen: "oq-run: interrupted" in screen))
    assert len(re.findall("^classical ", one.history(), re.MULTILINE)) <= 1


@pytest.mark.slow
def test_waiting_for_another_job(terminal: Callable[[int], Terminal], tmp_path: Path) -> None:
    """It is said whose and since when, and the command that is named ends the waiting."""
    one = terminal(120)
    one.start(long_job(tmp_path))
    one.until(WHOLE.search)
    two = terminal(100)
    two.start(corpus("classical/case_02/job.ini"))
    waits = two.until(
        lambda screen: re.search(r"^job \d+  waiting for another job 0:", screen, re.M)
    )
    two.record("waiting", *COLUMNS)
    said = re.search(r"waiting for job (\d+) of \S+ \(executing since ....-..-.. ..:..\)", waits)
    assert said, waits
    oq = Path(sys.executable).with_name("oq")
    done = subprocess.run([oq, "abort", said[1]], env=one.env, capture_output=True, text=True)
    assert f"Job {said[1]} aborted" in done.stdout
    assert "the job was aborted from elsewhere" in one.until(ENDED.search)
    assert ENDED.findall(two.until(ENDED.search)) == ["0"]


def test_a_detached_job(
    env: dict[str, str], terminal: Callable[[int], Terminal], tmp_path: Path
) -> None:
    """It outlives its terminal, is watched from another one, and aborted."""
    one = terminal(120)
    one.run(long_job(tmp_path), "--detach")
    screen = one.until(ENDED.search)
    said = re.search(r"^job (\d+) runs detached; watch it with oq-run --watch \1", screen, re.M)
    assert said and ENDED.findall(screen) == ["0"], screen
    assert re.search(r"^running .*job\.ini", screen[: said.start()], re.M), "it waited silently"
    one.record("detach", *COLUMNS)
    number = int(said[1])
    one("kill-server")
    two = terminal(80)
    two.run("--watch -1")
    two.until(WHOLE.search)
    two.record("watch", *COLUMNS)
    two("send-keys", "C-z")
    stopped = two.until(lambda screen: "fg shows it again" in screen and screen.endswith("$"))
    assert not WHOLE.search(stopped), stopped
    two.type("fg")
    two.until(WHOLE.search)
    assert jobs(env)[-1] == (number, "executing", 1)
    top = [sys.executable, "-m", "oq_runtime.commands.workers", "top"]
    shown = subprocess.run(top, env=one.env, capture_output=True, text=True).stdout
    assert re.search(rf"^ *{number} +\w+ +\d+/\d+ +\d/\d +0", shown, re.MULTILINE), shown
    three = terminal(100)
    three.type(" ".join(top))
    three.until(lambda screen: re.search(rf"^ *{number} +\w+", screen, re.M))
    three.record("top", *COLUMNS, table=True)
    for one_s in {"TERM": "dumb"}, {"FORCE_COLOR": "1"}:  # neither is renewed for ever
        subprocess.run(top, env=one.env | one_s, capture_output=True, check=True, timeout=60)
    oq = Path(sys.executable).with_name("oq")
    subprocess.run([oq, "abort", str(number)], env=one.env, check=True, capture_output=True)
    two.until(lambda screen: f"job {number} is aborted" in screen)
    output = Path(env["OQ_DATADIR"], f"oq-run_{number}.log")
    assert wait_for(lambda: "the job was aborted from elsewhere" in output.read_text())
    assert jobs(env)[-1] == (number, "aborted", 0)


def test_what_a_detached_job_is_refused_for(env: dict[str, str], tmp_path: Path) -> None:
    job = example(tmp_path) / "job.ini"
    code, out, _ = run(env, job, "--detach", "--json", "-p", "no_such=1")
    assert code == json.loads(out)["exit"] == 2 and "no_such" in out
    before = set(Path(env["OQ_DATADIR"]).glob("oq-run_*.log"))
    code, out, err = run(env, "--detach", "--json", "--", job, tmp_path / "none.ini")
    assert code == json.loads(out)["exit"] == 2, err
    assert "none.ini: No such file" in json.loads(out)["error"]
    assert set(Path(env["OQ_DATADIR"]).glob("oq-run_*.log")) == before
    for option in ("--watch", "--explain=1"):
        code, _, err = run(env, option, "--cores=2")
        assert code == 2 and err.endswith("leave out --cores\n"), err
    code, _, err = run(env, "--watch", "99999")
    assert code == 2 and "--watch: job 99999 does not run on this machine" in err


def test_odd_ends_are_told_to_who_watches(env: dict[str, str], tmp_path: Path) -> None:
    """Its oq-run is killed, or its row is deleted; and a job that runs has no story yet."""
    words = shlex.split(long_job(tmp_path))

    def watching() -> tuple[int, subprocess.Popen[str]]:
        code, out, err = run(env, "--detach", "--json", *words)
        assert code == 0, err
        [row] = json.loads(out)["jobs"]
        process = start(env, "--watch", row["job"])
        assert process.stderr is not None
        assert ": " in process.stderr.readline()  # the first tasks
        return row["job"], process

    number, process = watching()
    code, _, err = run(env, "--explain", number)
    assert code == 2 and f"calc_{number} is executing; wait for its end" in err, err
    [detached] = detached_runs(env)
    detached.kill()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (
        1,
        f"job {number} did not come to its end: its oq-run was killed; the next oq-run sets it to "
        "failed and says whether it can go on\n",
    )
    number, process = watching()
    with contextlib.closing(sqlite3.connect(Path(env["OQ_DATADIR"], "db.sqlite3"))) as db, db:
        db.execute("DELETE FROM job WHERE id=?", [number])
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, f"job {number} was deleted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after",
    [("TERM=dumb", ""), ("", "2>&1 | cat"), ("NO_COLOR=1", "")],
    ids=["dumb", "pipe", "no colour"],
)
def test_plain(terminal: Callable[[int], Terminal], before: str, after: str) -> None:
    one = terminal(120)
    one.start(corpus("classical/case_02/job.ini"), before=before, after=after)
    one.until(ENDED.search)
    text = one.history()
    print(text)
    assert "running case_02/job.ini (" in text
    if "NO_COLOR" not in before:
        assert re.search(
            r"^\w+: 1/1 tasks, \d:\d\d, .*\d/\d slots busy, \d\.\d MB$", text, re.MULTILINE
        )
        assert "loading the engine 0:" not in text  # no frame was drawn
    assert not re.search(r"\x1b\[[1-9]", one.colours())
