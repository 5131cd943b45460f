"""Private directories: made with a new name, or proven; what is somebody else's is never used."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from oq_runtime.engine import inbox
from oq_runtime.errors import ConfigError
from oq_runtime.files import private, spares


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for the shared memory of the host."""
    path = tmp_path / "shm"
    path.mkdir()
    path.chmod(0o1777)
    monkeypatch.setattr(private, "SHARED_MEMORY", path)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return private.own(tmp_path / "session")


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


def add(directory: Path) -> Path:
    private.add_memory(directory, path := private.memory_name(directory))
    return path


def test_every_directory_is_for_its_owner_alone(tmp_path: Path, memory: Path) -> None:
    mask = os.umask(0)
    try:
        made = [private.make(tmp_path, "a-"), private.own(tmp_path / "b")]
        made.append(add(made[0]))
    finally:
        os.umask(mask)
    assert [mode(path) for path in [*made, made[2] / spares.FOLDER]] == [0o700] * 4
    assert private.own(made[1]) == made[1], "ours may be there already"


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.ENOSPC, "free space or set TMPDIR"),
        (errno.EDQUOT, "free some of your quota or set TMPDIR"),
        (errno.EROFS, "set TMPDIR"),
        (errno.ENOENT, "set TMPDIR"),
    ],
    ids=lambda value: errno.errorcode.get(value, ""),
)
def test_what_to_do_where_none_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(**_: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError) as refused:
        private.make(tmp_path, "oq-")
    assert str(refused.value) == (
        f"{tmp_path}: {os.strerror(number)}; {remedy} to another directory"
    )


def test_names_are_not_alike(tmp_path: Path, memory: Path) -> None:
    directories = [private.make(tmp_path, "a-") for _ in range(10)]
    names = {add(path).name.removeprefix(path.name) for path in directories}
    assert len({path.name for path in directories}) == len(names) == 10


@pytest.mark.parametrize("kind", ["link", "file", "others may enter", "somebody else's"])
def test_what_is_not_ours_alone_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    match kind:
        case "link":
            path.symlink_to(private.own(tmp_path / "ours"))
        case "file":
            path.touch(mode=0o600)
        case "others may enter":
            path.mkdir()
            path.chmod(0o755)
        case "somebody else's":
            if os.geteuid() != 0:
                pytest.skip("only root can give a directory away")
            path.mkdir(mode=0o700)
            os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match=rf"{path}"):
        private.own(path)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory to which everybody finds the way."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_where_others_may_rename_there_is_no_private_directory(public: Path) -> None:
    below = public / "below"
    below.mkdir()
    for where in (below, public):
        where.chmod(0o777)
        with pytest.raises(ConfigError, match=rf"{where}: .*chmod \+t"):
            private.make(below, "a-")
        with pytest.raises(ConfigError, match=rf"{where}: .*chmod \+t"):
            private.own(below / "b")
        where.chmod(0o1777)
    assert not list(below.iterdir())
    private.make(below, "a-")
    below.chmod(0o777)
    public.chmod(0o700)
    private.own(below / "b")  # others may do there what they want, if they could enter


def test_results_of_the_engines_own_pool_come_where_nobody_else_is(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are pickles: whoever could bind the socket in its place would run code."""
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    public.chmod(0o777)
    sockets = inbox.PoolSockets(None)
    with pytest.raises(ConfigError, match=rf"{public}: .*chmod \+t"):
        sockets._directory()
    public.chmod(0o1777)
    made = sockets._directory()
    assert private.is_own(made) and sockets._directory() == made
    del sockets
    assert not made.exists()


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root meets directories of others that it may write"
)
def test_root_makes_none_in_the_directory_of_another_user(public: Path) -> None:
    os.chown(public, 1, 1)
    with pytest.raises(ConfigError, match=rf"{public} is not root's; run this as user 1"):
        private.make(public, "a-")
    with pytest.raises(ConfigError, match="is not root's"):
        private.own(public / "b")
    assert not list(public.iterdir())


def test_shared_memory_of_which_others_may_rename_is_not_used(
    public: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public.chmod(0o777)
    monkeypatch.setattr(private, "SHARED_MEMORY", public)
    with pytest.raises(ConfigError, match=rf"{public}: .*chmod \+t"):
        add(directory)
    assert not list(public.iterdir())


def test_a_name_that_is_taken_is_an_error(memory: Path, directory: Path) -> None:
    (taken := private.memory_name(directory)).mkdir()
    with pytest.raises(ConfigError, match=f"{taken}: File exists"):
        private.add_memory(directory, taken)


def test_without_shared_memory_there_is_only_the_name(memory: Path, directory: Path) -> None:
    memory.rmdir()
    assert add(directory) == private.memory_of(directory) and not memory.exists()
    private.remove(directory)
    assert not directory.exists()


def test_full_shared_memory_leaves_nothing(memory: Path, directory: Path) -> None:
    options = "mode=1777,nr_inodes=2"  # its own and one more
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", memory]).returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        add(directory)
        assert not list(memory.iterdir())
    finally:
        subprocess.run(["umount", memory], check=True)


def test_what_is_left_is_found_by_its_note(memory: Path, directory: Path) -> None:
    left = add(directory)
    assert private.memory_of(directory) == left
    (left / "blob").touch()
    private.remove_memory(directory)
    assert directory.exists() and not left.exists()
    private.remove_memory(directory)  # it is gone, and that is all right


def test_removed_is_only_what_is_ours_and_in_shared_memory(
    tmp_path: Path, memory: Path, directory: Path
) -> None:
    elsewhere, link = private.own(tmp_path / "elsewhere"), memory / "link"
    link.symlink_to(elsewhere)
    for target in (elsewhere, link, memory):
        (directory / private.MEMORY).symlink_to(target)
        private.remove_memory(directory)
        assert target.exists()
        (directory / private.MEMORY).unlink()
    with pytest.raises(ConfigError, match="No such file"):
        private.memory_of(directory)
    link = tmp_path / "link"
    link.symlink_to(directory)
    private.remove(link)
    assert directory.exists()


def test_a_lost_note_does_not_keep_what_its_owner_knows(memory: Path, directory: Path) -> None:
    left = add(directory)
    (directory / private.MEMORY).unlink()  # as a cleaner of old files does
    private.remove(directory, left)
    assert not left.exists() and not directory.exists()
