"""What a job is made of beside its parameters: files of results, and of inputs; once per series."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openquake import qa_tests_data
from openquake.baselib import hdf5
from openquake.commonlib import readinput
from openquake.commonlib.oqvalidation import OqParam

from oq_runtime.engine import resume
from oq_runtime.errors import JournalError
from tests.conformance.corpus import list_jobs

#: a new virtual environment compiles the engine for minutes
pytestmark = pytest.mark.timeout(900)


def results(path: Path, *, of: int | str | None = None) -> None:
    """Write results as the engine does of a job that begins with those of another one."""
    oq = object.__new__(OqParam)
    vars(oq).update(hazard_calculation_id=of, inputs={}, base_path="")
    with hdf5.File(path, "w") as file:
        file["oqparam"] = oq


def test_parents_of_parents(tmp_path: Path) -> None:
    """The engine takes from them what the nearer ones have not."""
    for number, of in ((1, None), (2, 1), (3, 2), (4, 5), (5, 4)):
        results(tmp_path / f"{number}.hdf5", of=of)
    table: Any = SimpleNamespace(job=lambda n: SimpleNamespace(path=tmp_path / f"{n}.hdf5"))
    before = resume.of_parent(table, 3, "")
    assert list(before) == [f"the results of job {number}" for number in (3, 2, 1)]
    assert list(resume.of_parent(table, "3.hdf5", str(tmp_path)))[1:] == list(before)[1:]
    assert len(resume.of_parent(table, 4, "")) == 2, "a circle has an end"
    results(tmp_path / "1.hdf5")
    assert resume.differences(before, resume.of_parent(table, 3, "")) == ["the results of job 1"]
    results(tmp_path / "2.hdf5", of=str(tmp_path / "1.hdf5"))  # as for --hc with a path
    assert len(resume.of_parent(table, 3, "")) == 3
    (tmp_path / "1.hdf5").unlink()
    results(tmp_path / "2.hdf5", of=1)
    with pytest.raises(JournalError, match=r"the results of job 1, .*: No such file"):
        resume.of_parent(table, 3, "")


@pytest.mark.filterwarnings("ignore")  # the engine's, of models that are experimental
def test_a_check_leaves_no_trace_in_the_engine() -> None:
    """Of a copy of what is in a job file; then the engine reads the same of it when it runs it."""
    read = changed = 0
    for job in list_jobs():
        try:
            params = readinput.get_params(str(job.path))
            given = copy.deepcopy(params)
            checked = resume.values(readinput.get_oqparam(given))
            again = resume.values(readinput.get_oqparam(params))
        except (Exception, SystemExit):  # no job that can be run
            continue
        read += 1
        changed += given["inputs"] != readinput.get_params(str(job.path))["inputs"]
        assert resume.differences(checked, again) == [], job.name
    assert read > 100
    assert changed > 10, "then no copy is needed"


def test_files_that_others_name() -> None:
    """Of a logic tree, its source models; of an exposure, its tables."""
    [corpus] = qa_tests_data.__path__
    params = readinput.get_params(f"{corpus}/classical/case_02/job.ini")
    found = {path.name for path in resume.inputs(params, readinput.get_oqparam(params))}
    assert found >= {"job.ini", "source_model_logic_tree.xml", "source_model.xml"}
    assert found - {path.name for path in resume.inputs(params, None)}
