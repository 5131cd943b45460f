"""Where the engine puts results, which the roles export and open to the workers."""

from __future__ import annotations

from pathlib import Path

import pytest

#: a new virtual environment compiles the engine for minutes
pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("shared_dir", "own", "expected"),
    [
        ("", "", "{home}/oqdata"),
        ("", "/elsewhere", "/elsewhere"),
        ("/home", "", "/home/alice/oqdata"),
        ("/oq_shared", "", "/oq_shared/alice/oqdata"),
    ],
)
def test_results_are_where_shared_dir_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_dir: str, own: str, expected: str
) -> None:
    from openquake.commonlib import logs

    monkeypatch.setitem(logs.config.directory, "shared_dir", shared_dir)
    for name, value in ("LOGNAME", "alice"), ("HOME", str(tmp_path)), ("OQ_DATADIR", own):
        monkeypatch.setenv(name, value)
    assert logs.get_datadir() == expected.format(home=tmp_path)
