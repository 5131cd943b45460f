"""What counts as looking at a parameter, with the engine's own classes.

Not covered: what is made of it (``unit/test_resume``, ``local/test_resume``).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)

#: an OqParam, and what was looked at since the last question
BEGIN = """
import copy, pickle
import oq_runtime.activate
from openquake.baselib import hdf5
from openquake.commonlib import readinput
from openquake.hazardlib.contexts import ContextMaker
from oq_runtime.engine import reads
from oq_runtime.engine.canonical import digest

def read(**other):
    return readinput.get_oqparam(dict(
        calculation_mode="classical", description="a job", sites="0 0", inputs={},
        intensity_measure_types_and_levels='{"PGA": [0.1, 0.2]}', investigation_time="50",
        maximum_distance="100", truncation_level="3", reference_vs30_value="760",
        reference_vs30_type="measured", reference_depth_to_2pt5km_per_sec="5",
        reference_depth_to_1pt0km_per_sec="100", rupture_mesh_spacing="2",
        width_of_mfd_bin="1", area_source_discretization="10",
        gsim="SadighEtAl1997") | other)

job = reads.begin()

def looked():
    found = job.names & {"*"} or set(job.names)
    job.names.clear()
    return found

oq = read(poes="0.1")
"""
LOOKS = {
    "checking them all": ("read(poes='0.2')", set()),
    "one": ("oq.poes", {"poes"}),
    "whether there is one": ("hasattr(oq, 'poes')", {"poes"}),
    "in the dictionary": ("vars(oq)['poes']", {"poes"}),
    "whether it is in it": ("'poes' in vars(oq)", {"poes"}),
    "as part of a text": ("'%(poes)s' % vars(oq)", {"poes"}),
    "all": ("sorted(vars(oq).items())", {"*"}),
    "all, as arguments": ("dict(**vars(oq))", {"*"}),
    "writing all down": ("hdf5.dumps(vars(oq))", set()),
    "pickling": ("pickle.loads(pickle.dumps(oq))", set()),
    "pickling what was looked into": ("vars(oq); pickle.loads(pickle.dumps(oq))", set()),
    "copies": ("copy.copy(oq), copy.deepcopy(oq)", set()),
    "a copy": ("copy.copy(oq).poes", {"poes"}),
    "a loaded one": ("pickle.loads(pickle.dumps(oq)).poes", {"poes"}),
    "digest": ("assert digest([oq]) == digest([read(poes='0.2')])", set()),
}


def check(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_looks() -> None:
    lines = [
        f"{code}\nassert (found := looked()) == {names or 'set()'}, ({what!r}, found)\n"
        for what, (code, names) in LOOKS.items()
    ]
    check("".join(lines))


def test_what_others_carry() -> None:
    """A ContextMaker has a copy of some: they count when it is asked, and not in its digest."""
    check("""
from openquake.hazardlib import valid
gsim = valid.gsim("SadighEtAl1997")
other = read(poes="0.2")
makers = [ContextMaker("*", [gsim], one) for one in (oq, other)]
assert "poes" not in (found := looked()), found
assert "truncation_level" in found, found
assert [maker.poes for maker in makers] == [[0.1], [0.2]]
assert looked() == {"poes"}
assert digest(makers[0]) == digest(makers[1])
third = ContextMaker("*", [gsim], read(poes="0.1", truncation_level="2"))
assert digest(makers[0]) != digest(third)
assert pickle.loads(pickle.dumps(makers[0])).poes == [0.1]
assert "poes" not in vars(ContextMaker("*", [gsim], dict(imtls={"PGA": [1.0]})))
""")


def test_where_results_are_is_no_input() -> None:
    """Another job has its own, with the same in it: or the history before would differ."""
    check("""
from openquake.calculators.getters import MapGetter

def getter(number, rlzs):
    found = object.__new__(MapGetter)
    found.filenames, found.trt_rlzs = [f"/data/calc_{number}.hdf5"], rlzs
    return found

assert digest([getter(7, [0, 1])]) == digest([getter(8, [0, 1])])
assert digest([getter(7, [0, 1])]) != digest([getter(7, [0, 2])])
""")


def test_a_tree_is_its_points() -> None:
    """Its nodes hold addresses of this process, and follow from the points."""
    check("""
import numpy
from scipy.spatial import KDTree

points = numpy.random.default_rng(1).random((500, 3))
first, same = KDTree(points), KDTree(points.copy())
assert digest([first]) == digest([same]) == digest([pickle.loads(pickle.dumps(first))])
others = points.copy()
others[7] += 1e-9
assert digest([first]) != digest([KDTree(others)])
assert digest([first]) != digest([KDTree(first.data, leafsize=5)])
assert digest([first]) != digest([KDTree(first.data, boxsize=9)])
""")


def test_a_string_is_its_characters() -> None:
    """Which of them are one object depends on what the process has had before."""
    check("""
name = "a name"
other = "".join(["a", " name"])
assert name is not other
assert digest([name, name]) == digest([name, other])
assert digest([{name: 1}, {name: 2}]) == digest([{name: 1}, {other: 2}])
assert digest([name, "a name!"]) != digest([name, name])
assert digest([name, b"a name"]) != digest([name, name])
""")


def test_a_model_is_the_same_wherever_its_files_lay() -> None:
    """A datastore's data files lie in a directory of their own while its models are read."""
    check("""
import shutil
from openquake.hazardlib.gsim.gmpe_table import GMPETable
from openquake.qa_tests_data.scenario import case_35
from oq_runtime.engine import reading

def model(name):
    place = reading.make()
    try:
        path = shutil.copy(case_35.__path__[0] + "/Wcrust_med_rhypo.hdf5", f"{place}/{name}")
        return GMPETable(gmpe_table=path)
    finally:
        reading.remove(place)

first, same = model("table.hdf5"), model("table.hdf5")
assert first.gmpe_table != same.gmpe_table
assert digest([first]) == digest([same])
assert digest([first]) != digest([model("another.hdf5")])
same.m_w[0] += 1
assert digest([first]) != digest([same])
""")


def test_tasks(tmp_path: Path) -> None:
    """A request begins where it is loaded, for all tasks of a job; in its own process it is one."""
    requests = tmp_path / "requests"
    check(f"""
oq.sites
other = reads.Collector("of another job")
first, second = (pickle.dumps([reads.Request(one), oq]) for one in (job, other))
open({str(requests)!r}, "wb").write(pickle.dumps([first, second]))
pickle.loads(first)
oq.poes
assert looked() == {{"sites", "poes"}}
""")
    check(f"""
first, second = pickle.load(open({str(requests)!r}, "rb"))
for request, name, names in (
    (first, "poes", ("poes",)), (first, "sites", ("poes", "sites")), (second, "sites", ("sites",))
):
    collector, oq = pickle.loads(request)
    getattr(oq, name)
    assert pickle.loads(pickle.dumps(collector)) == names, collector.names
""")
