"""The first import of the engine: one process at a time, until it is done."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oq_runtime.files import compiling
from tests.leftovers import wait_for

IMPORT = """
import sys
from oq_runtime.files import compiling
with compiling.once():
    print("importing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Importer:
    """A process that imports until it is told that it is done."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", IMPORT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def wait_begun(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"importing\n"

    def is_waiting(self) -> bool:
        """Whether it has opened the file, and has not begun."""
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if "imported-" in str(link.readlink()):
                    return True
        return False

    def end(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


def test_the_second_waits_for_the_first_and_no_other_ever() -> None:
    first = Importer()
    first.wait_begun()
    second = Importer()
    assert wait_for(second.is_waiting)
    first.end()
    second.wait_begun()
    third = Importer()  # the second has not ended, and need not
    third.wait_begun()
    second.end()
    third.end()
    assert compiling.done()


def test_a_first_that_dies_lets_the_second_begin() -> None:
    first = Importer()
    first.wait_begun()
    second = Importer()
    assert wait_for(second.is_waiting)
    first.process.kill()
    first.process.communicate()
    second.wait_begun()
    third = Importer()
    assert wait_for(third.is_waiting), "it has not been imported yet"
    second.end()
    third.wait_begun()
    third.end()


def test_nobody_is_waited_for_without_an_own_cache(cache: Path) -> None:
    cache.mkdir()
    (cache / "oq-runtime").symlink_to("/")
    with compiling.once():
        pass
    assert (cache / "oq-runtime").is_symlink()
    (cache / "oq-runtime").unlink()
    cache.rmdir()
    cache.touch()
    with compiling.once():
        pass


def test_nothing_follows_a_link_in_the_cache(cache: Path, tmp_path: Path) -> None:
    place = compiling.place()
    target = tmp_path / "target"
    (place / f"imported-{compiling.installation()}").symlink_to(target)
    with compiling.once():
        pass
    assert not target.exists()


def test_an_import_that_fails_was_none(cache: Path) -> None:
    with pytest.raises(ImportError), compiling.once():
        raise ImportError
    [path] = (cache / "oq-runtime").iterdir()
    assert path.stat().st_size == 0 and not compiling.done()


# ---- what was compiled at the installation

COMPILES = """
import numba, sys
from oq_runtime.files import compiling
sys.prefix = sys.argv[1]
compiling.take()

@numba.njit("f8(f8)", cache=True)
def twice(x):
    return 2 * x

assert twice(1.5) == 3.0
"""


def compiles(script: Path, caches: Path) -> str:
    """Run it for a user with these caches; return what numba says of its cache."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(caches), "NUMBA_DEBUG_CACHE": "1"}
    command = (sys.executable, str(script), str(script.parent / "environment"))
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_a_user_takes_what_was_compiled_at_the_installation(tmp_path: Path) -> None:
    script = tmp_path / "compiles.py"
    script.write_text(COMPILES)
    compiled = tmp_path / "environment" / compiling.COMPILED
    assert "data saved" in compiles(script, compiled)
    before = {path: path.stat().st_mtime_ns for path in compiled.rglob("*")}
    for _ in range(2):
        said = compiles(script, tmp_path / "caches")
        assert "data loaded" in said and "saved" not in said, said
    assert {path: path.stat().st_mtime_ns for path in compiled.rglob("*")} == before
    [directory] = (tmp_path / "caches").iterdir()
    assert {path.name for path in directory.iterdir()} == {
        path.name for path in before if path.is_file()
    }


@pytest.mark.parametrize("there", [False, True])
def test_a_cache_that_is_there_stays(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Nothing of it is mixed: its index may be of another processor. Without any, all is well."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    own = cache / "numba/sources_1"
    own.mkdir(parents=True)
    (own / "f.nbi").write_text("own")
    if there:
        for name in "sources_1/f.nbi", "sources_1/f.1.nbc", "sources_2/g.nbi":
            path = tmp_path / compiling.COMPILED / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("taken")
    compiling.take()
    assert [path.read_text() for path in own.iterdir()] == ["own"]
    assert sorted(path.name for path in (cache / "numba").iterdir()) == (
        ["sources_1", "sources_2"] if there else ["sources_1"]
    )


def test_a_cache_that_cannot_be_is_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    (tmp_path / compiling.COMPILED / "sources").mkdir(parents=True)
    cache.touch()
    compiling.take()
    assert cache.read_bytes() == b""
