"""Private mappings that serve the next task, but never with what the last one wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oq_runtime.node import mappings
from oq_runtime.node.mappings import Mappings, written

PAGE = mappings.PAGE_BYTES


@pytest.fixture(params=["/dev/shm", ""])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of some pages and a bit, in shared memory or on a disk."""
    path = tmp_path / "file"
    if request.param:
        path = Path(request.param) / f"oq-test-{tmp_path.name}"
        request.addfinalizer(path.unlink)
    path.write_bytes(bytes(range(1, 251)) * (10 * PAGE // 250) + b"end")
    return path


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def test_the_next_task_gets_the_mapping_that_was_only_read(file: Path) -> None:
    kept = Mappings()
    [view] = kept.views([str(file)])
    content, first = bytes(view), address(view)
    assert content == file.read_bytes()
    del view
    file.rename(file.with_name("elsewhere"))  # so it cannot be mapped anew
    try:
        [view] = kept.views([str(file)])
    finally:
        file.with_name("elsewhere").rename(file)
    assert address(view) == first and bytes(view) == content


@pytest.mark.parametrize("at", [0, 3 * PAGE + 7, 9 * PAGE, -1])
def test_what_was_written_is_seen_by_nobody(file: Path, at: int) -> None:
    kept, content = Mappings(), file.read_bytes()
    [view] = kept.views([str(file)])
    view[at] = 255
    del view
    assert bytes(kept.views([str(file)])[0]) == content
    assert file.read_bytes() == content


def test_what_somebody_still_refers_to_is_not_given_to_another(file: Path) -> None:
    kept, content = Mappings(), file.read_bytes()
    [view] = kept.views([str(file)])
    left = np.frombuffer(view[PAGE:], np.uint8)
    del view
    [view] = kept.views([str(file)])
    left[0] = 255
    assert bytes(view) == content
    view[0] = 254
    assert bytes(left[:1]) == b"\xff" and kept.views([str(file)])[0][0] == content[0]


def test_a_task_that_does_not_need_it_lets_it_go(file: Path) -> None:
    kept = Mappings()
    del kept.views([str(file)])[:]
    assert kept.views([]) == [] and not kept.kept


def test_no_more_is_kept_than_a_worker_may_hold(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "KEPT_BYTES", file.stat().st_size)
    other = file.with_name("other")
    other.write_bytes(b"more")
    kept = Mappings()
    try:
        assert [bytes(v)[-3:] for v in kept.views([str(file), str(other)])] == [b"end", b"ore"]
        assert list(kept.kept) == [str(file)]
    finally:
        other.unlink()


def test_where_the_kernel_does_not_tell_a_mapping_counts_as_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Mappings()
    del kept.views([str(file)])[:]
    mapping, _ = kept.kept[str(file)]
    assert not written(mapping)
    monkeypatch.setattr("oq_runtime.node.mappings.os.pread", lambda *_: b"")
    assert written(mapping)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Mappings().views([str(tmp_path / "none")])
