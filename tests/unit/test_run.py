"""What ``oq-run`` makes of its options, and says at the end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from oq_runtime.commands.checks import BadInput
from oq_runtime.commands.lines import exports, surveyed
from oq_runtime.commands.run import parse_params, stop_session


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


def test_survey_in_a_line() -> None:
    row = {"file": "j.ini", "mode": "scenario", "sites": 1, "sources": None, "realizations": 2}
    assert surveyed(row | {"tasks": None, "parent": None}) == (
        "j.ini: scenario, 1 site, 2 realizations; about 2 tasks a slot in its main phase"
    )
    assert "its size depends on the job before it" in surveyed({"file": "j.ini"})


def test_only_the_processes_of_a_session_are_ended(tmp_path: Path) -> None:
    """Their numbers may be those of others by the time that they are told to end."""
    (directory := tmp_path / "oq-run-x").mkdir(mode=0o700)
    waits = "trap '' TERM; read word"
    own, other = (
        subprocess.Popen(["/bin/sh", "-c", waits, *words], stdin=subprocess.PIPE)
        for words in ((str(directory),), ())
    )
    try:
        (directory / "pids").write_text(json.dumps([own.pid, other.pid]))
        stop_session(directory)
        assert own.wait(timeout=5) == -9 and other.poll() is None
        assert not directory.exists()
    finally:
        for process in (own, other):
            process.kill()
            process.communicate()
