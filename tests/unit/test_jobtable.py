"""Whether a process is the one of a job, as far as its row, ``/proc`` and the clock tell."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from oq_runtime.engine import queue
from oq_runtime.engine.jobtable import SLACK_SECS, DatabaseError, Job, Outside, is_of, seconds
from oq_runtime.processes import Process

BOOT_S, STARTED_S = 1_000_000.0, 2_000_000.0
JOB = Job(7, "alice", "executing", 4711, "here", STARTED_S)
BEFORE_S, AFTER_S = STARTED_S - 5, STARTED_S + SLACK_SECS + 1
PYTHON = "/opt/venv/bin/python3 /opt/venv/bin/oq engine --run job.ini"


@pytest.mark.parametrize(
    "process, verdict",
    [
        (Process("oq-job-7", "oq-job-7", BEFORE_S), True),
        (Process("oq-job-7", "oq-job-7", AFTER_S), True),  # the clock was put right
        (Process("oq-job-7", "", BEFORE_S), False),  # a zombie
        (Process("oq-job-6", "oq-job-6", BEFORE_S), True),  # the job file before
        (Process("oq-job-6", "oq-job-6", AFTER_S), False),
        (Process("python3", PYTHON, BEFORE_S), True),  # has no title yet
        (Process("python3", PYTHON, AFTER_S), False),
        (Process("sleep", "sleep 1000", BEFORE_S), False),
        (Process("sshd", "sshd: alice", BEFORE_S), False),
        (None, True),  # hidden
    ],
)
def test_evidence(process: Process | None, verdict: bool) -> None:
    assert is_of(JOB, process, BOOT_S) is verdict


def test_no_job_outlives_a_boot() -> None:
    assert not is_of(JOB, None, STARTED_S + SLACK_SECS + 1)
    assert not is_of(JOB, Process("python3", PYTHON, BEFORE_S), STARTED_S + SLACK_SECS + 1)
    assert is_of(JOB, None, 0.0)  # hidden as well


@pytest.mark.parametrize(
    "moment",
    [
        "2026-11-28 04:23:27",
        "2026-11-28 04:23:27.000000",
        "2026-11-28 04:23:27+00:00",
        datetime(2026, 11, 28, 4, 23, 27),
        datetime(2026, 11, 28, 4, 23, 27, tzinfo=UTC),
    ],
)
def test_times_of_the_table(moment: object) -> None:
    assert seconds(moment) == datetime(2026, 11, 28, 4, 23, 27, tzinfo=UTC).timestamp()


def test_a_user_in_the_table_is_cleaned_before_a_person_sees_it() -> None:
    forged = Job(7, "al\x1b[2Jice", "executing", 4711, "here", 0.0)
    assert queue.waiting([forged]).startswith("waiting for job 7 of al\\x1b[2Jice (executing)")


@pytest.mark.parametrize("moment", [None, "", "yesterday"])
def test_no_time(moment: object) -> None:
    assert seconds(moment) == 0.0


@pytest.mark.parametrize("place", ["tcp://127.0.0.1:many", "tcp://a b/@::1908"])
def test_a_place_where_no_dbserver_can_be(place: str) -> None:
    with pytest.raises(DatabaseError, match=r"^the DbServer tcp://.* \[dbserver\]$"):
        Outside(place, answer_s=0).find(1)
