"""What a calculation may bring, and what it is told otherwise; without a server."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from oq_runtime.errors import InputError
from oq_runtime.webui import uploads

JOB = "[general]\ncalculation_mode = classical\nsource_model_logic_tree_file = in/tree.xml\n"


class File(io.BytesIO):
    """A file with a name, as Django gives what was uploaded."""

    def __init__(self, name: str, data: bytes) -> None:
        super().__init__(data)
        self.name = name


def archive(members: Mapping[str, str | bytes], name: str = "job.zip") -> File:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for member, text in members.items():
            file.writestr(member, text)
    return File(name, data.getvalue())


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    uploads.upload.forget()


@pytest.mark.parametrize(
    "members, jobs",
    [
        ({"job.ini": JOB, "in/tree.xml": ""}, ["job.ini"]),
        ({"Il mio job/job.ini": JOB, "__MACOSX/Il mio job/._job.ini": b"\0\5"}, None),
        ({"job.ini": JOB, "._job.ini": b"\0\5", "desktop.ini": b"\xff\xfe["}, ["job.ini"]),
        ({"b.ini": JOB, "a.ini": JOB}, ["a.ini", "b.ini"]),
        ({"job.ini": "\ufeff" + JOB}, ["job.ini"]),
        ({"hazard/job.ini": JOB.replace("in/", "../in/")}, ["hazard/job.ini"]),
        ({"job.ini": JOB + "export_dir = /tmp\ndescription = of /etc/../x.hdf5"}, ["job.ini"]),
        ({"job.ini": JOB + "shakemap_uri = {'kind': 'usgs_id', 'id': 'x'}"}, ["job.ini"]),
    ],
)
def test_accepted(members: Mapping[str, str], jobs: list[str] | None) -> None:
    file = archive(members)
    uploads.check([file], ".ini")
    assert uploads.upload.jobs == (jobs or ["Il mio job/job.ini"])
    assert file.tell() == 0, "the engine reads it from its beginning"


def test_single_files() -> None:
    uploads.check([File("tree.xml", b""), File("job.ini", JOB.encode())], ".ini")
    assert uploads.upload.jobs == ["job.ini"]


@pytest.mark.parametrize(
    "file, sentence",
    [
        (File("job.zip", b"no zip"), "job.zip is no zip archive, or damaged: File is not a zip"),
        (archive({"tree.xml": ""}), "job.zip has no file whose name ends with .ini"),
        (archive({"JOB.INI": JOB}), r"\(there is JOB.INI: write it in small letters\)"),
        (archive({"job.ini": JOB, "in\\tree.xml": ""}), r"in\\tree.xml has a backslash"),
        (archive({"job.ini": JOB, "../x": ""}), r"\.\./x would lie outside"),
        (archive({"job.ini": JOB, "/x": ""}), "/x would lie outside"),
        (archive({"job.ini": JOB.encode() + b"\xe9"}), "job.ini is not UTF-8, at byte [0-9]+"),
        (archive({"job.ini": "no section"}), "File contains no section headers"),
        (File("job.ini", b"x"), "File contains no section headers"),
        (File("job.txt", b"x"), "the upload has no file whose name ends with .ini"),
        (File("job.ini", b"#" * (5 << 20)), "a job file of more than 4 MiB"),
    ],
)
def test_refused(file: File, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        uploads.check([file], ".ini")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "exposure_file = /etc/openquake/authkey",
        "exposure_file = ../authkey",
        "exposure_file = a.xml ../../b.xml",
        "site_model_file = in/../../x.csv",
        "consequence_file = {'taxonomy': '../x.csv'}",
        "consequence_file = {'taxonomy': ['a.csv', '/etc/x.csv']}",
        "reqv_hdf5 = {'active': '~/x.hdf5'}",
        "gsim_logic_tree_file = ${mosaic}/../x.xml",
        "shakemap_uri = {'kind': 'usgs_xml', 'grid_url': 'file:///etc/passwd'}",
        "shakemap_uri = {'kind': 'file_npy', 'fname': '/etc/passwd'}",
        "sites_csv = \n  ../x.csv",
        "[other]\nsites_csv = ../x.csv",
    ],
)
def test_paths_outside_are_refused(line: str) -> None:
    with pytest.raises(InputError, match="is outside of the upload"):
        uploads.check([archive({"job.ini": f"{JOB}{line}\n"})], ".ini")


@pytest.mark.parametrize("value", ["/x/calc_1.hdf5", "own.hdf5", "../x.ini", "other.ini", "-1"])
def test_a_job_starts_from_a_calculation_alone(value: str) -> None:
    """Not from a file: results that are uploaded would be a program."""
    with pytest.raises(InputError, match="give the number of a calculation"):
        uploads.check([archive({"job.ini": f"{JOB}hazard_calculation_id = {value}\n"})], ".ini")
    uploads.check([archive({"job.ini": f"{JOB}hazard_calculation_id = 7\n"})], ".ini")
    assert uploads.upload.parents == [7]


def test_number_of_a_job_is_refused() -> None:
    """The engine would overwrite the job that has it."""
    with pytest.raises(InputError, match="job_id is no parameter"):
        uploads.check_job_file("job.ini", "[general]\njob_id = 7\n")


def test_what_the_engine_reads_lies_in_the_upload(tmp_path: Path) -> None:
    root = tmp_path / "calc_1"
    (root / "in").mkdir(parents=True)
    (tmp_path / "secret").touch()
    (root / "link").symlink_to(tmp_path / "secret")
    uploads.check_files(str(root / "in"), ["<in-memory>", "a.xml", "../b.csv", str(root)], root)
    for name in ("../../secret", str(tmp_path / "secret"), "../link", "/etc/passwd"):
        with pytest.raises(InputError, match="is outside of the upload"):
            uploads.check_files(str(root / "in"), [name], root)


def test_a_copy_goes_with_the_request(tmp_path: Path) -> None:
    path = Path(uploads.upload.unpack_here(str(tmp_path)))
    assert path.is_dir() and uploads.upload.root == path
    uploads.upload.forget()
    assert not path.exists() and uploads.upload.root is None
