"""Files of shared memory that are used again when nothing refers to them any more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oq_runtime.files import spares
from oq_runtime.files.store import Store
from oq_runtime.node.spool import Spool
from oq_runtime.wire import payload


@pytest.fixture
def folder(places: tuple[Path, Path]) -> Path:
    path = places[0] / spares.FOLDER
    path.mkdir()
    return path


def written(kept: Store, name: str, body: bytes) -> Path:
    with open(kept.create(name, len(body)), "wb") as file:
        file.write(body)
    return kept.release(name)[0]


def test_a_file_is_used_again_when_nothing_refers_to_it(
    places: tuple[Path, Path], folder: Path
) -> None:
    kept = Store(*places, memory_bytes=1000)
    path = written(kept, "a", b"first")
    inode = path.stat().st_ino
    view = spares.consume(path)
    piece = view[1:]
    del view
    assert not list(folder.iterdir()) and written(kept, "b", b"other").stat().st_ino != inode
    assert bytes(piece) == b"irst"
    del piece
    spares.give_back()
    assert not path.exists() and len(list(folder.iterdir())) == 1
    again = written(kept, "c", b"abc")
    assert again.stat().st_ino == inode and again.read_bytes() == b"abc"
    (folder / "left").touch()
    spares.clear(places[0])
    assert not list(folder.iterdir())


@pytest.mark.parametrize("nbytes", [2, 10])
def test_a_spool_leaves_nothing_of_a_spare_file(
    places: tuple[Path, Path], folder: Path, nbytes: int
) -> None:
    (folder / "used").write_bytes(b"yesterday's")
    spool = Spool("a", places, inline_bytes=0, memory_bytes=1000)
    spool.add([b"x" * nbytes])
    path = Path(spool.finish()[0])
    assert path.parent == places[0] and not list(folder.iterdir())
    assert path.stat().st_size == spool.nbytes
    [[frame]] = payload.parts(path.read_bytes())
    assert bytes(frame) == b"x" * nbytes


def test_spare_files_are_bounded(
    places: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "MOST_BYTES", 10)
    kept = Store(*places, memory_bytes=1000)
    views = [spares.consume(written(kept, name, b"12345678")) for name in "abc"]
    assert len(list(places[0].iterdir())) == 2, "one on loan, and the folder"
    views.clear()
    del views
    view = spares.consume(written(kept, "d", b"1234"))
    assert bytes(view) == b"1234" and list(folder.iterdir()) == [folder / "a"]
    del view
    spares.give_back()
    assert list(folder.iterdir()) == [folder / "a"] and list(places[0].iterdir()) == [folder]


def test_what_a_child_may_have_mapped_is_not_used_again(
    places: tuple[Path, Path], folder: Path
) -> None:
    view = spares.consume(written(Store(*places, memory_bytes=1000), "a", b"first"))
    if not (child := os.fork()):
        os._exit(0 if bytes(view) == b"first" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del view
    spares.give_back()
    assert not list(folder.iterdir()) and list(places[0].iterdir()) == [folder]


def test_on_the_disk_a_consumed_file_is_gone_at_once(places: tuple[Path, Path]) -> None:
    view = spares.consume(written(Store(*places, memory_bytes=0), "a", b"first"))
    assert not list(places[1].iterdir()) and bytes(view) == b"first"


def test_a_new_file_is_never_one_that_is_there(places: tuple[Path, Path], tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"foreign")
    for number, make in enumerate((Path.symlink_to, Path.hardlink_to)):
        make(path := places[0] / str(number), foreign)
        with pytest.raises(FileExistsError):
            spares.open_file(path)
    (places[0] / spares.FOLDER).mkdir()
    (places[0] / spares.FOLDER / "spare").symlink_to(foreign)
    with pytest.raises(OSError):
        spares.open_file(places[0] / "a")
    assert not (places[0] / "a").is_symlink() and foreign.read_bytes() == b"foreign"
