"""What ``oq-run`` makes of its options, and says at the end."""

from __future__ import annotations

import grp
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import oq_runtime
from oq_runtime.commands.checks import (
    BadInput,
    check_file,
    check_log,
    check_places,
    check_priority,
)
from oq_runtime.commands.lines import (
    NO_NODE,
    NO_SHARE,
    NOT_STARTED,
    describe,
    exports,
    shared_out,
    surveyed,
    waits_for,
)
from oq_runtime.commands.run import again, check_report, parse_params
from oq_runtime.config import Cluster, Config
from oq_runtime.engine import jobtable, messages
from oq_runtime.errors import OqRuntimeError
from oq_runtime.priority import Priority
from oq_runtime.report import words
from oq_runtime.session import launch
from oq_runtime.wire.protocol import Node, NodeState, Status
from tests.nobody import NOBODY, told

#: a group of every Linux
DAEMON = 1


@pytest.mark.parametrize(
    "given, pairs",
    [
        ((), {}),
        (("a=1",), {"a": "1"}),
        (("a=1,b=2", "c=3"), {"a": "1", "b": "2", "c": "3"}),
        (("a=1, b=2",), {"a": "1", "b": "2"}),
        (("region=0 0, 1 0, 1 1",), {"region": "0 0, 1 0, 1 1"}),
        (
            ("intensity_measure_types=PGA, SA(0.3),truncation_level=3",),
            {"intensity_measure_types": "PGA, SA(0.3)", "truncation_level": "3"},
        ),
        (
            ('minimum_intensity={"PGA": 0.1, "SA(0.3)": 0.2}',),
            {"minimum_intensity": '{"PGA": 0.1, "SA(0.3)": 0.2}'},
        ),
        (("poes=",), {"poes": ""}),
        (("a=1,=2",), {"a": "1,=2"}),
    ],
)
def test_params(given: tuple[str, ...], pairs: dict[str, str]) -> None:
    assert parse_params(given) == pairs


@pytest.mark.parametrize("given", ["", "a", "=1", "a,b=1"])
def test_bad_params(given: str) -> None:
    with pytest.raises(BadInput, match="name=value"):
        parse_params((given,))


def test_exports_are_counted_by_directory() -> None:
    files = [f"/x/f{number}_1.csv" for number in range(6)] + ["/x/cl/f_1.csv"]
    assert exports(files) == [
        "exported 6 files to /x: f0_1.csv, f1_1.csv, f2_1.csv, f3_1.csv and 2 more",
        "exported 1 file to /x/cl: f_1.csv",
    ]
    assert exports([]) == []


def test_each_node_has_its_share_of_the_tasks() -> None:
    assert shared_out({"w1": 7}) == []
    assert shared_out({"w1": 7, "w2": 0}) == ["tasks of 2 nodes: w1 7, w2 0"]
    [line] = shared_out({f"w{number}": 100 - number for number in range(100)})
    assert line == (
        "tasks of 100 nodes: w0 100, w1 99, w2 98, w3 97, w4 96, ..., "
        "w95 5, w96 4, w97 3, w98 2, w99 1"
    )


def test_the_description_of_a_job_file_is_clean(tmp_path: Path) -> None:
    (file := tmp_path / "job.ini").write_text("[general]\ndescription = one \x1b[2J two\n")
    assert describe(file) == f"{tmp_path.name}/job.ini (one \\x1b[2J two)"


def test_survey_in_a_line() -> None:
    row = {"file": "j.ini", "mode": "scenario", "sites": 1, "sources": None, "realizations": 2}
    assert surveyed(row | {"tasks": None, "parent": None}, None) == (
        "j.ini: scenario, 1 site, 2 realizations; about 2 tasks a slot in its main phase"
    )
    more = row | {"tasks": None, "parent": 7}
    assert surveyed(more, 3).endswith(
        "2 realizations, the hazard of job 7; about 6 tasks in its main phase"
    )
    assert "its size depends on the job before it" in surveyed({"file": "j.ini"}, 3)


def test_only_the_processes_of_a_session_are_ended(tmp_path: Path) -> None:
    """Their numbers may be those of others by the time that they are told to end."""
    (directory := tmp_path / "oq-run-x").mkdir(mode=0o700)
    waits = "trap '' TERM; echo; read word"
    own, other = (
        subprocess.Popen(
            ["/bin/sh", "-c", waits, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for words in ((str(directory),), ())
    )
    try:
        for process in (own, other):
            assert process.stdout is not None
            process.stdout.readline()  # from now on it does not mind
        (directory / "pids").write_text(json.dumps([own.pid, other.pid]))
        launch.stop(directory)
        assert own.wait(timeout=5) == -9 and other.poll() is None
        assert not directory.exists()
    finally:
        for process in (own, other):
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("given", "left", "imports"),
    [
        (None, None, True), ("", "", True), ("/a", "/a", True), (".", ".", True),
        (":", "", False), (":/a", "/a", False), ("/a:", "/a", False), (":.", ".", True),
    ],
)  # fmt: skip
def test_an_empty_entry_of_pythonpath(
    monkeypatch: pytest.MonkeyPatch, given: str | None, left: str | None, imports: bool
) -> None:
    monkeypatch.setattr(sys, "path", ["/x", here := os.getcwd(), "/y"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given)
    oq_runtime.leave_working_directory_out()
    assert os.environ.get("PYTHONPATH") == left
    assert (here in sys.path) == imports and {"/x", "/y"} <= set(sys.path)


def test_a_start_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hanging := tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(launch, "ANSWER_SECS", 0.2)
    with pytest.raises(
        OqRuntimeError, match=r"not be started in 0.2 s: .* the file server of .* is away"
    ):
        launch.start(Config(cores=1), os.getpid())


def answer(priority: Priority, group: str, *groups: int, cluster: bool = True) -> str:
    """What a process of another account with these groups is told of a priority; root's for none.

    :param group: that of urgent_group
    """
    hosts = Cluster({"192.0.2.2": 1}, 1909, "", "", range(1), "", "") if cluster else None
    settings = Config(cores=1, urgent_group=group, cluster=hosts)
    return told(lambda: check_priority(priority, settings), groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have the groups of others")
def test_who_may_be_urgent_is_known_by_the_groups_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = grp.getgrgid(DAEMON).gr_name
    assert answer(Priority.URGENT, daemon, NOBODY, DAEMON) == ""
    assert answer(Priority.URGENT, "") == "", "root"
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "root")
    refused = answer(Priority.URGENT, daemon, NOBODY)
    whom = f"members of the group {daemon} (urgent_group in [oq_runtime] of openquake.cfg)"
    assert refused.startswith(f"--priority urgent: an urgent job is for {whom}; normal and low")
    assert "an urgent job is for root" in answer(Priority.URGENT, "", NOBODY, DAEMON)
    assert answer(Priority.URGENT, "no-such-group", NOBODY, DAEMON) != ""
    for priority in (Priority.LOW, Priority.NORMAL):
        assert answer(priority, daemon, NOBODY) == ""


def test_a_priority_is_for_a_cluster() -> None:
    assert answer(Priority.NORMAL, "", cluster=False) == ""
    refused = answer(Priority.LOW, "", cluster=False)
    assert refused.startswith("--priority low is for a cluster") and "leave it out" in refused


def test_the_engine_needs_more_of_proc_than_processes(tmp_path: Path) -> None:
    check_places()
    with pytest.raises(BadInput, match=f"{tmp_path}/meminfo cannot be read.*subset=pid may not"):
        check_places(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "call, line",
    [
        (lambda path: check_log(str(path)), "--log-file {path}: Permission denied; give another"),
        (
            lambda path: check_file(str(path)),
            "{path}: Permission denied; check the path of the job",
        ),
        (
            lambda path: check_report(f"{path}.html", None, ["job.ini"], False),
            "--report: {folder}: Permission denied; give a file in a directory where you may write",
        ),
        (
            lambda path: words.find(path.parent, 5),
            "job 5: {folder}/calc_5.hdf5: Permission denied; ",
        ),
        (
            lambda path: jobtable.check_datastore(path, "job 5"),
            "job 5: its datastore {path}: Permission denied; its owner must let you read it",
        ),
        (lambda path: messages.no_file([str(path)]), ""),
        (lambda path: messages.encoding(UnicodeError("codec can't decode"), [f"{path}.csv"]), ""),
    ],
)
def test_a_folder_that_others_may_not_look_into(
    tmp_path: Path, call: Callable[[Path], object], line: str
) -> None:
    (path := tmp_path / "sealed" / "job.ini").parent.mkdir(0o700)
    path.touch(0o666)
    said = told(lambda: call(path))
    assert said.startswith(line.format(path=path, folder=path.parent)) and bool(line) == bool(said)
    assert said.count("\n") == 0, "a traceback"


def test_a_log_that_is_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("log")
    with pytest.raises(BadInput, match="log: Too many levels of symbolic links; give another one"):
        check_log(str(tmp_path / "log"))


def test_what_a_job_waits_for() -> None:
    def status(*nodes: tuple[int, NodeState], note: str = "") -> Status:
        found = [Node(host="n", slots=slots, busy=0, state=state) for slots, state in nodes]
        return Status(phases=[], nodes=found, note=note)

    def waits(*nodes: tuple[int, NodeState], note: str = "") -> tuple[str, str]:
        return waits_for(status(*nodes, note=note), cluster=True)

    leased, calling = NodeState.LEASED, NodeState.CALLING
    assert waits((0, leased), (2, leased)) == ("", "")
    assert waits((0, leased), (0, calling)) == ("slots", NO_SHARE)
    assert waits((0, calling)) == ("nodes", NO_NODE)
    nodes = [Node(host=f"n{n}", slots=1, busy=1, state=leased, unstarted=True) for n in range(2)]
    nodes.append(Node(host="idle", slots=1, busy=0, state=leased))
    hangs = Status(phases=[], nodes=nodes)
    assert waits_for(hangs, cluster=True) == ("workers", NOT_STARTED)
    nodes[1].unstarted = False
    assert waits_for(hangs, cluster=True) == ("", "")
    assert waits((0, calling), note="all in use") == ("a port", "all in use")
    assert waits_for(status((0, calling)), cluster=False) == ("", "")


def test_a_job_goes_on_with_the_options_that_it_had() -> None:
    assert again(None, "low", "info", None, None) == ["--priority=low", "--log-level=info"]
    assert again("2", "low", "info", "/l", Path("/r"))[-2:] == ["--log-file=/l", "--report=/r"]
