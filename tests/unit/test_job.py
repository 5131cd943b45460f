"""The engine process of ``oq-run``: what it removes at its end, which is not the interpreter's."""

from __future__ import annotations

from pathlib import Path

from oq_runtime.engine import job


def test_temporary_files_of_the_engine(tmp_path: Path) -> None:
    from openquake.baselib import general

    path = Path(general.gettemp("text", dir=str(tmp_path)))
    assert path.read_text() == "text"
    job.remove_temporary()
    assert not path.exists()
