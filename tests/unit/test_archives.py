"""Job archives: what is unpacked, what is refused, what a dead session has left."""

from __future__ import annotations

import re
import shutil
import socket
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from oq_runtime.engine import archives
from oq_runtime.errors import InputError


def packed(path: Path, *names: str, text: str = "[general]\n") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_job_files_in_the_order_of_the_engine(tmp_path: Path, folder: Path) -> None:
    beside = ("__MACOSX/b/._job.ini", "b/._job.ini", "b/Desktop.ini")  # by a Mac, by Windows
    names = ("b/job.ini", "b/job_2.ini", "b/model.xml", *beside)
    found = archives.unpack(packed(tmp_path / "a.zip", *names), folder)
    assert [path.relative_to(folder / archives.FILES) for path in found] == [
        Path("b/job.ini"),
        Path("b/job_2.ini"),
    ]
    assert (folder / archives.FILES / "b" / "model.xml").stat().st_mode & 0o777 == 0o644


def test_nothing_is_written_above(tmp_path: Path, folder: Path) -> None:
    names = ("job.ini", "../../outside.txt", "/outside.txt", f"{archives.OWNER}/x")
    (folder / archives.OWNER).symlink_to(tmp_path)
    archives.unpack(packed(tmp_path / "a.zip", *names), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "folder"]


@pytest.mark.parametrize(
    "names, words",
    [
        ((), "holds no job file"),
        (("model.xml",), "holds no job file"),
        (("._job.ini", "desktop.ini"), "holds no job file"),
        (("job.ini", "x", "x/y"), r"cannot be unpacked in .*: x/y: Not a directory"),
        (("job.ini", "x" * 300), r"cannot be unpacked in .*: x{250,}.*: File name too long"),
        (("JOB.INI",), r"holds no job file \(\.ini\); rename JOB.INI to JOB.ini"),
        (("job.ini", "in\\model.xml"), r"backslashes \(in\\model.xml\)"),
    ],
)
def test_refused(tmp_path: Path, folder: Path, names: tuple[str, ...], words: str) -> None:
    path = packed(tmp_path / "a.zip", *names)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} .*{words}"):
        archives.unpack(path, folder)


def test_no_archive(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="is not a zip archive"):
        archives.unpack(path, folder)


def test_damaged(tmp_path: Path, folder: Path) -> None:
    path = packed(tmp_path / "a.zip", "job.ini", text="[general]\n" * 100)
    data = bytearray(path.read_bytes())
    data[40:50] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged|cannot be unpacked"):
        archives.unpack(path, folder)


def test_more_than_there_is_room_for(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.zip", "job.ini", text="[general]\n" * 1_000_000)
    with zipfile.ZipFile(path) as archive, pytest.raises(InputError, match="takes 10 MB unpacked"):
        archives.check(path, archive, free_bytes=archives.SPARE_BYTES + 9_000_000)
    with zipfile.ZipFile(path) as archive:
        archives.check(path, archive, free_bytes=archives.SPARE_BYTES + 10_000_000)


def test_what_dead_sessions_left_is_removed(tmp_path: Path) -> None:
    shared, living, dead = (tmp_path / name for name in ("shared", "living", "dead"))
    for path in (shared, living, dead):
        path.mkdir()
    kept, left = archives.place(living, shared), archives.place(dead, shared)
    elsewhere = shared / f"{archives.PREFIX}not{socket.gethostname()}-x"
    elsewhere.mkdir()
    shutil.rmtree(dead)
    new = archives.place(living, shared)
    assert (
        sorted(shared.iterdir()) == sorted([kept, new, elsewhere]) and left not in shared.iterdir()
    )
    assert archives.place(living, None).parent == living


@pytest.fixture
def engine() -> SimpleNamespace:
    """The engine's own functions, with what we put before them."""
    from openquake.commonlib import readinput

    names = ("unzip_rename", "extract_from_zip")
    engine = SimpleNamespace(**{name: getattr(readinput, name) for name in names})
    archives.install_readinput(engine)
    return engine


def test_the_engine_takes_the_same_job_files(
    tmp_path: Path, folder: Path, engine: SimpleNamespace
) -> None:
    path = packed(tmp_path / "a.zip", "._job.ini", "desktop.ini", "job.ini")
    found = engine.extract_from_zip(str(path), targetdir=str(folder))
    assert found == [str(folder / "job.ini")]


@pytest.mark.parametrize("above", ["../victim", "{folder}/victim"])
def test_archives_that_a_job_names_move_nothing_away(
    tmp_path: Path, engine: SimpleNamespace, above: str
) -> None:
    """The engine's own function would rename it to ``victim.bak``."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "job").mkdir()
    inner = packed(tmp_path / "job/e.zip", above.format(folder=tmp_path))
    with pytest.raises(InputError, match="would lie outside of its folder"):
        engine.unzip_rename(str(inner), "exposure.xml")
    assert victim.read_text() == "mine"
    packed(inner, "exposure.xml")
    assert engine.unzip_rename(str(inner), "exposure.xml") == str(tmp_path / "job/e.xml")
