"""Results of others are data: whoever reads them reads, and writes, no other file for them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy
import pytest
from click.testing import CliRunner

from oq_runtime.commands import report
from oq_runtime.engine import reading

#: the first one imports the engine, which numba may have to compile
pytestmark = pytest.mark.timeout(600)

SECRET = "the secret of the cluster"


def external(file: h5py.File, secret: Path) -> None:
    file.create_dataset("got", (len(SECRET),), "S1", external=[(str(secret), 0, len(SECRET))])


def linked(file: h5py.File, secret: Path) -> None:
    file["got"] = h5py.ExternalLink(str(secret.with_suffix(".hdf5")), "/secret")


def through_a_group(file: h5py.File, secret: Path) -> None:
    file["a"] = h5py.ExternalLink(str(secret.with_suffix(".hdf5")), "/")
    file["got"] = h5py.SoftLink("/a/secret")


def virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".hdf5")), "/secret", (3,), "f8")
    file.create_virtual_dataset("got", layout)


@pytest.mark.parametrize("make", [external, linked, through_a_group, virtual])
def test_what_lies_in_another_file(
    tmp_path: Path, make: Callable[[h5py.File, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__getitem__", "get"):
        monkeypatch.setattr(h5py.Group, name, getattr(h5py.Group, name))
    secret, path = tmp_path / "secret", tmp_path / "calc_1.hdf5"
    secret.write_text(SECRET)
    with h5py.File(secret.with_suffix(".hdf5"), "w") as file:
        file["secret"] = [1.0, 2.0, 3.0]
    with h5py.File(path, "w") as file:
        make(file, secret)
        file["own/x"] = [1, 2]
        file["alias"], file["soft"] = file["own/x"], h5py.SoftLink("/own/x")
    reading.install_hdf5()
    reading.install_hdf5()  # and once counts
    with h5py.File(path) as file:
        assert [list(file[name]) for name in ("own/x", "alias", "soft")] == [[1, 2]] * 3
        for get in (lambda: file["got"], lambda: file.get("got"), lambda: list(file.values())):
            with pytest.raises(OSError, match=r"^(got|a) of .*calc_1.hdf5 lies in another file"):
                get()


def logic_tree(path: Path, names: dict[str, bytes], gsim: str) -> None:
    """Write what a job leaves of its logic tree, with these data files."""
    kinds = [(name, h5py.string_dtype()) for name in ("trt", "branch", "uncertainty")]
    with h5py.File(path, "w") as file:
        file["oqparam"] = json.dumps({"calculation_mode": "classical", "description": "d"})
        file["oqparam"].attrs["__pyclass__"] = "openquake.commonlib.oqvalidation.OqParam"
        rows = numpy.array([("A", "b", gsim, 1.0)], [*kinds, ("weight", float)])
        tree = file.create_dataset("full_lt/gsim_lt", data=rows)
        tree.attrs["__pyclass__"] = "openquake.hazardlib.gsim_lt.GsimLogicTree"
        tree.attrs.update({"bsetdict": "{}", "filename": "tree.xml"})
        for name, data in names.items():
            tree.attrs[f"gmpe_table:{name}"] = numpy.void(data)
        file["full_lt"].attrs["__pyclass__"] = "openquake.hazardlib.logictree.FullLogicTree"


@pytest.mark.attack
def test_a_report_writes_nothing_for_a_datastore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine puts data files of a logic tree where their names lead, up to a start file."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    ours, path = tmp_path / ".bashrc", tmp_path / "calc_1.hdf5"
    ours.write_text("ours")
    ways = [str(ours), *("../" * depth + ".bashrc" for depth in range(1, 25))]
    for name in ways:
        logic_tree(path, {name: b"theirs"}, "[SadighEtAl1997]")
        CliRunner().invoke(report.main, [str(path), str(tmp_path / "x.html")])
        assert ours.read_text() == "ours", name
        assert not [top for top in (tmp_path / "tmp").iterdir() if top.name == ".bashrc"], name


def test_data_files_above_a_logic_tree_are_read(tmp_path: Path) -> None:
    """One directory of tables for many models: names that lead upwards are honest ones, too."""
    from openquake.baselib import hdf5
    from openquake.hazardlib import gsim_lt

    reading.install_gsim_lt(gsim_lt)
    table = tmp_path / "t.hdf5"
    found: list[Path] = []

    def take(text: str, folder: str) -> object:
        found.append(Path(folder, text).resolve())
        assert found[-1].read_bytes() == b"data"
        raise LookupError  # what stands for a GSIM is not needed any more

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsim_lt.valid, "gsim", take)
        for name in ("t.hdf5", "tables/t.hdf5", "../tables/t.hdf5", str(table)):
            table.write_bytes(b"data")
            logic_tree(tmp_path / "calc_1.hdf5", {name: b"data"}, name)
            with hdf5.File(tmp_path / "calc_1.hdf5") as file, contextlib.suppress(LookupError):
                file["full_lt/gsim_lt"]
    assert len(found) == 4 and os.path.exists(table)


def test_pickles_are_for_jobs(tmp_path: Path) -> None:
    """3.23 opens one wherever a datastore says that there is a group of sources."""
    path = tmp_path / "calc_1.hdf5"
    with h5py.File(path, "w") as file:
        file["oqparam"] = numpy.zeros(3)
        name = "openquake.hazardlib.sourceconverter.SourceGroup"
        file["oqparam"].attrs["__pyclass__"] = name
    done = CliRunner().invoke(report.main, [str(path), str(tmp_path / "x.html")])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_pipe_among_the_inputs_is_not_waited_for(tmp_path: Path) -> None:
    path, pipe = tmp_path / "calc_1.hdf5", tmp_path / "tree.xml"
    os.mkfifo(pipe)
    with h5py.File(path, "w") as file:
        inputs = {"job_ini": "/nowhere", "source_model_logic_tree": str(pipe)}
        file["oqparam"] = json.dumps({"calculation_mode": "classical", "inputs": inputs})
        file["oqparam"].attrs["__pyclass__"] = "openquake.commonlib.oqvalidation.OqParam"
    done = CliRunner().invoke(report.main, [str(path), str(tmp_path / "x.html")])
    assert done.exit_code == 0, done.output
    assert "is no file" in (tmp_path / "x.html").read_text()
