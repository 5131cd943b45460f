"""The engine process of ``oq-run``: what it removes, at its end and before a job goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oq_runtime.engine import job, resume
from oq_runtime.files import journal
from oq_runtime.files.journal import Writer


def test_temporary_files_of_the_engine(tmp_path: Path) -> None:
    from openquake.baselib import general

    path = Path(general.gettemp("text", dir=str(tmp_path)))
    assert path.read_text() == "text"
    job.remove_temporary()
    assert not path.exists()


@pytest.mark.parametrize(
    "change", ["", "an input has changed", "an input has changed, and back", "the journal is gone"]
)
def test_kept_for_others(tmp_path: Path, change: str) -> None:
    """Only what was made of the inputs that the head says; the job is complete in any case."""
    inputs, told = [tmp_path / "a.csv"], list[str]()
    inputs[0].write_text("1")
    jobs: Any = SimpleNamespace(
        spec={"files": ["job.ini"]}, rest=["job"], facts=[{}], inputs=[inputs], note=told.append,
        table=None, stamps={},
    )  # fmt: skip
    params = {"base_path": ""}
    jobs.facts[0] = job.Jobs.as_now(jobs, 0, None, params)
    directory = tmp_path / "calc_1.journal"
    Writer(directory, {}, budget_bytes=1 << 30).close()
    if "input" in change:
        inputs[0].write_text("2")
        assert resume.digests(inputs) != jobs.facts[0]
        if "and back" in change:
            inputs[0].write_text("1")
            assert resume.digests(inputs) == jobs.facts[0]
    elif change:
        journal.remove(directory)
    job.Jobs.keep_for_others(jobs, directory)
    assert journal.is_complete(directory) == (not change)
    assert directory.exists() == (not change)
    assert len(told) == bool(change) and "\n" not in "".join(told), told


def test_what_a_job_has_left(tmp_path: Path) -> None:
    """Also in its directory, unless that is a link; nothing of other jobs."""
    datadir, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (datadir / "calc_1", datadir / "calc_12", elsewhere):
        folder.mkdir(parents=True)
        (folder / "0.hdf5").touch()
        (folder / "input.csv").touch()
    (datadir / "calc_2").symlink_to(elsewhere)
    mine = ["calc_1.hdf5", "calc_1_tmp.hdf5", "calc_1/0.hdf5"]
    for name in ("calc_1.hdf5", "calc_1_tmp.hdf5", "calc_12.hdf5", "calc_2.hdf5"):
        (datadir / name).touch()
    assert sorted(job.left_by(datadir, 1)) == sorted(datadir / name for name in mine)
    assert list(job.left_by(datadir, 2)) == [datadir / "calc_2.hdf5"]
