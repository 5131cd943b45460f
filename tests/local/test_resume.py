"""Jobs that did not complete and go on: equal results, and what is refused.

Not covered: the bytes of a journal (``unit/test_journal``), how far each calculation mode replays
(``python -m tests.resume``), kills at random moments (``python -m tests.kills``).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from oq_runtime.errors import JournalError
from oq_runtime.files import journal
from oq_runtime.files.journal import Reader
from tests.conformance.compare import compare
from tests.leftovers import wait_for

from .test_oq_run import EXAMPLES, corpus, example, jobs, one_line, run, start

pytestmark = pytest.mark.timeout(300)

#: a job of several phases, and what may change without another word
JOB = EXAMPLES / "event_based_risk/job.ini"


def datadir(env: dict[str, str]) -> Path:
    return Path(env["OQ_DATADIR"])


def results(env: dict[str, str], number: int) -> int:
    """Return how many results the journal of a job has by now."""
    try:
        return Reader(journal.directory_of(datadir(env), number)).results
    except JournalError:
        return 0


def last(env: dict[str, str]) -> int:
    if not (datadir(env) / "db.sqlite3").exists():
        return 0
    return max((number for number, *_ in jobs(env)), default=0)


def kill(env: dict[str, str], number: int, least: int, *args: object) -> str:
    """Kill the engine process of a job when its journal has some results; return stderr."""
    process = start(env, *args, "--no-progress", "--cores=1")
    wait_for(lambda: results(env, number) >= least or process.poll() is not None, 200)
    assert process.poll() is None, process.communicate()
    [engine] = psutil.Process(process.pid).children()
    engine.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    return err


def done(out: str) -> tuple[int, Path]:
    """Return number and datastore of the job of a report."""
    [row] = json.loads(out)["jobs"]
    return row["job"], Path(row["datastore"])


@pytest.fixture(scope="module")
def undisturbed(engine_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    env = engine_home | {"TMPDIR": str(tmp_path_factory.mktemp("undisturbed"))}
    code, out, err = run(env, JOB, "--json", "--no-journal")
    assert code == 0, err
    number, datastore = done(out)
    assert number not in journal.numbers(datadir(env))
    return datastore


@pytest.mark.slow
def test_goes_on_after_each_kill(env: dict[str, str], undisturbed: Path) -> None:
    """Killed, and again when it has gone on; then complete, with equal results."""
    env = env | {"PYTHONHASHSEED": "random"}  # which each process would take otherwise
    number = last(env) + 1
    err = kill(env, number, 8, JOB)
    assert "killed by SIGKILL" in err
    assert f"oq-run --resume {number}" in err
    before = results(env, number)
    [segment] = journal.segments(journal.directory_of(datadir(env), number))
    with segment.open("ab") as tail:
        tail.write(b"torn")
    kill(env, number, before + 5, "--resume", number)
    kept, began_s = results(env, number), time.time()
    assert kept > before
    more = datadir(env) / f"calc_{number}/0.hdf5"  # as the engine leaves rates there
    more.parent.mkdir()
    more.touch()
    code, out, err = run(env, "--resume", "-1", "--json")
    assert code == 0, err
    assert f"took over the results of {kept} tasks" in err
    again, datastore = done(out)
    assert again == number
    assert compare(undisturbed, datastore) == []
    assert not more.exists(), "or it would count for this job"
    more.parent.rmdir()
    assert not journal.directory_of(datadir(env), number).exists(), "a complete job needs none"
    assert jobs(env)[-1] == (number, "complete", 0)
    database = sqlite3.connect(datadir(env) / "db.sqlite3")
    [[seconds]] = database.execute(
        "SELECT strftime('%s') - strftime('%s', start_time) FROM job WHERE id = ?", [number]
    )
    assert seconds < time.time() - began_s, "the process would be too young for its row"


@pytest.mark.slow
def test_job_that_runs_is_not_begun_again(env: dict[str, str], undisturbed: Path) -> None:
    number = last(env) + 1
    process = start(env, JOB, "--cores=1", "--json")
    assert wait_for(lambda: results(env, number) > 2 or process.poll() is not None, 200)
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert f"job {number} runs" in one_line(err)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert compare(undisturbed, done(out)[1]) == []


@pytest.mark.slow
def test_reuse(env: dict[str, str]) -> None:
    """What does not matter to a task costs none; what matters is computed, and all is right."""
    job = corpus("disagg/case_1/job.ini")
    code, out, err = run(env, job, "--reuse", "--json")
    assert code == 0 and "no complete job has results" in err, err
    [first] = json.loads(out)["jobs"]
    number, kept = first["job"], results(env, first["job"])
    assert number not in journal.numbers(datadir(env))
    code, _, err = run(env, "--resume", number)
    assert code == 2 and f"job {number} is complete" in one_line(err), err
    for change, least, most in (
        ("description=again", kept, kept),
        ("poes_disagg=0.2", kept // 2, kept - 1),  # of the second of two calculations
        ("truncation_level=2", 0, 0),
    ):
        code, out, err = run(env, job, "-p", change, "--reuse", "--json")
        assert code == 0, err
        found = re.search(r"took over the results of (\d+) tasks", err)
        assert least <= int(found.group(1) if found else 0) <= most, err
        undisturbed = run(env, job, "-p", change, "--no-journal", "--json")[1]
        assert compare(done(undisturbed)[1], done(out)[1]) == []
    code, _, err = run(env, job, "--reuse", "--no-journal")
    assert code == 2 and "--reuse needs a journal" in one_line(err)


@pytest.mark.slow
def test_others_begin_with_the_results_of_a_job_that_went_on(env: dict[str, str]) -> None:
    """What it was asked to be kept for holds after a kill as well."""
    job, number = corpus("disagg/case_1/job.ini"), last(env) + 1
    kill(env, number, 1, job, "--reuse")
    code, _, err = run(env, "--resume", number)
    assert code == 0 and "took over the results of" in err, err
    kept = results(env, number)
    code, out, err = run(env, job, "-p", "description=again", "--reuse", "--json")
    assert code == 0 and f"beginning with the results of job {number}" in err, err
    assert f"took over the results of {kept} tasks" in err, err
    undisturbed = run(env, job, "-p", "description=again", "--no-journal", "--json")[1]
    assert compare(done(undisturbed)[1], done(out)[1]) == []


@pytest.mark.slow
def test_reuse_of_one_hazard_by_three_risks(env: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(corpus("classical_risk/case_4"), tmp_path / "job")
    hazard, risk = (tmp_path / "job" / name for name in ("job_haz.ini", "job_risk.ini"))
    kept = 0
    for steps in "5", "2", "1":
        text = risk.read_text().replace(
            "lrem_steps_per_interval = 5", f"lrem_steps_per_interval = {steps}"
        )
        one = risk.with_name(f"risk_{steps}.ini")
        one.write_text(text)
        code, out, err = run(env, hazard, one, "--reuse", "--json")
        assert code == 0, err
        first, second = json.loads(out)["jobs"]
        if kept:
            assert f"took over the results of {kept} tasks" in err, err
        kept = results(env, first["job"])
        undisturbed = run(env, "--hc", first["job"], one, "--no-journal", "--json")[1]
        assert compare(done(undisturbed)[1], Path(second["datastore"])) == []
    # what the risk lacked before there was a hazard does not keep others from its results
    _, _, err = run(env, "--hc", first["job"], one, "--reuse")
    assert f"beginning with the results of job {second['job']}" in err, err


def detached_runs(env: dict[str, str]) -> list[psutil.Process]:
    """The ``oq-run`` without terminal of this TMPDIR."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            here = process.environ().get("TMPDIR") == env["TMPDIR"]
            if here and any(word.startswith("--tell=") for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_detached_job_goes_on_by_itself(env: dict[str, str], undisturbed: Path) -> None:
    """After a kill of its ``oq-run``; not after an end of any other kind."""
    number = last(env) + 1
    code, _, err = run(env, JOB, "--cores=1", "--detach")
    assert code == 0, err
    [process] = detached_runs(env)
    assert wait_for(lambda: results(env, number) > 8, 200)
    assert journals(env, "resume") == (0, ""), "it runs"
    process.kill()
    assert wait_for(lambda: "can go on" in journals(env, "show")[1], 60)
    code, text = journals(env, "resume")
    assert code == 0 and f"job {number} runs detached" in text, text
    assert wait_for(lambda: not detached_runs(env), 200)
    output = datadir(env) / f"oq-run_{number}.log"
    assert "took over the results of" in output.read_text()
    assert jobs(env)[-1] == (number, "complete", 0)
    assert compare(undisturbed, datadir(env) / f"calc_{number}.hdf5") == []
    assert journals(env, "resume") == (0, "")


def test_second_job_goes_on_alone(env: dict[str, str]) -> None:
    """From the hazard that is complete, as long as that is the same; with other slots than then."""
    files = [corpus(f"scenario_damage/case_5/job_{name}.ini") for name in ("haz", "risk")]
    code, out, err = run(env, *files, "--json", "--cores=1")
    assert code == 0, err
    _, undisturbed = json.loads(out)["jobs"]
    dying = {"OQ_RUNTIME_FAULT": "before_end:2:3"}  # the second task of the risk
    code, _, err = run(env | dying, *files, "--no-progress", "--cores=1")
    number = last(env)
    assert code == 1
    assert f"oq-run --resume {number}" in err
    kept = results(env, number)
    assert kept > 0
    before = datadir(env) / f"calc_{number - 1}.hdf5"
    time_ns = before.stat().st_mtime_ns
    before.touch()
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert f"the results of job {number - 1}" in err
    os.utime(before, ns=(time_ns, time_ns))
    code, out, err = run(env, "--resume", number, "--json")
    assert code == 0, err
    assert f"took over the results of {kept} tasks" in err
    again, datastore = done(out)
    assert again == number
    assert compare(Path(undisturbed["datastore"]), datastore) == []


def begin(env: dict[str, str], job: Path = JOB) -> int:
    """Return a job that was killed in its midst."""
    number = last(env) + 1
    kill(env, number, 8, job)
    return number


def test_the_next_run_tells_of_a_job_whose_row_others_have_mended(env: dict[str, str]) -> None:
    """As the DbServer does after a power cut. Once, and not to who goes on with the job."""
    number = last(env) + 1
    process = start(env, JOB, "--cores=1", "--no-progress")
    assert wait_for(lambda: results(env, number) > 2 or process.poll() is not None, 200)
    family = psutil.Process(process.pid)
    for one in [family, *family.children(recursive=True)]:
        one.kill()
    process.communicate()
    with contextlib.closing(sqlite3.connect(datadir(env) / "db.sqlite3")) as db, db:
        db.execute("UPDATE job SET status='failed', is_running=0 WHERE id=?", [number])
    said = f"job {number} did not come to its end; to go on with it: oq-run --resume {number}\n"
    for told in (1, 0):
        code, _, err = run(env, corpus("classical/case_02/job.ini"), "--no-progress")
        assert code == 0 and err.count(said) == told, err


@pytest.mark.slow
def test_what_has_changed_is_named(env: dict[str, str], tmp_path: Path) -> None:
    """A byte of an input, a parameter, others who can read it: one line each."""
    folder = example(tmp_path, "event_based_risk")
    number = begin(env, folder / "job.ini")
    exposure = next(folder.glob("*exposure*.csv"))
    text = exposure.read_bytes()
    exposure.write_bytes(text + b"\n")
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert f"the input {exposure}" in err
    assert "run it anew" in err
    exposure.write_bytes(text)
    job = (folder / "job.ini").read_text()
    (folder / "job.ini").write_text(job.replace("ses_seed = ", "ses_seed = 1"))
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert "the parameter ses_seed" in err
    (folder / "job.ini").write_text(job)
    directory = journal.directory_of(datadir(env), number)
    directory.chmod(0o755)
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert "no journal" in err
    directory.chmod(0o700)
    with sqlite3.connect(datadir(env) / "db.sqlite3") as database:
        database.execute("UPDATE job SET status = 'complete' WHERE id = ?", [number])
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert "the job is complete" in err
    with sqlite3.connect(datadir(env) / "db.sqlite3") as database:
        database.execute("UPDATE job SET status = 'failed', user_name = 'x' WHERE id = ?", [number])
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert f"job {number} in " in err and " is x's" in err
    with sqlite3.connect(datadir(env) / "db.sqlite3") as database:
        user = getpass.getuser()
        database.execute("UPDATE job SET user_name = ? WHERE id = ?", [user, number])
    other = journal.directory_of(datadir(env), number + 1)  # which has a row, too
    with sqlite3.connect(datadir(env) / "db.sqlite3") as database:
        database.execute("UPDATE job SET id = ? WHERE id = ?", [number + 1, number])
    directory.rename(other)
    code, _, err = run(env, "--resume", number + 1)
    assert code == 2, err
    assert f"the journal is that of job {number} in " in err
    other.rename(directory)
    with sqlite3.connect(datadir(env) / "db.sqlite3") as database:
        database.execute("UPDATE job SET id = ? WHERE id = ?", [number, number + 1])
    head = directory / journal.HEAD
    head.write_bytes(head.read_bytes().replace(b"1", b"2", 1))
    code, _, err = run(env, "--resume", number)
    assert code == 2
    assert "damaged" in err
    assert jobs(env)[-1] == (number, "failed", 0)


@pytest.mark.slow
def test_damaged_result_is_computed(env: dict[str, str], undisturbed: Path) -> None:
    number = begin(env)
    directory = journal.directory_of(datadir(env), number)
    reader = Reader(directory)
    half = [record for record in reader.records if record.nbytes][reader.results // 2]
    [segment] = journal.segments(directory)
    data = bytearray(segment.read_bytes())
    data[half.offset + half.nbytes // 2] ^= 1
    segment.write_bytes(data)
    code, out, err = run(env, "--resume", number, "--json")
    assert code == 0, err
    assert f"took over the results of {reader.results // 2} tasks" in err
    assert "the body is damaged" in err
    assert compare(undisturbed, done(out)[1]) == []


@pytest.mark.parametrize(
    "args, words",
    [
        (["--resume", "12345"], "no journal of job"),
        (["--resume", "nonsense"], "no journal of job"),
        (["--resume", "-1", "-p", "a=b"], "leave out"),
        (["--resume", "-1", "--no-journal"], "leave out --no-journal"),
        (["--resume", "-1", str(JOB)], "--resume ID alone"),
        ([], "--resume ID alone"),
    ],
)
def test_refused(env: dict[str, str], args: list[str], words: str) -> None:
    code, _, err = run(env, *args)
    assert code == 2
    assert words in one_line(err)


def journals(env: dict[str, str], *args: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "oq_runtime.commands.journal", *map(str, args)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return found.returncode, found.stdout + found.stderr


@pytest.mark.slow
def test_journals_are_shown_and_removed(env: dict[str, str]) -> None:
    number = begin(env)
    kept = results(env, number)
    code, text = journals(env, "show")
    assert code == 0
    assert f"job {number}: {kept} results" in text
    assert f"can go on, {JOB}" in text
    assert journals(env, "verify", number) == (0, f"job {number}: {kept} results are good\n")
    [segment] = journal.segments(journal.directory_of(datadir(env), number))
    os.truncate(segment, segment.stat().st_size - 100)
    code, text = journals(env, "verify", number)
    assert code == 1
    assert "damaged from there on" in text
    assert journals(env, "prune", number)[0] == 0
    assert journals(env, "verify", number)[0] == 2
    assert number not in journal.numbers(datadir(env))
