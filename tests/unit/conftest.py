"""Hypothesis profile of the unit tests: no deadline, no example database in the work tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("unit", deadline=None, database=None, print_blob=True)
settings.load_profile("unit")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Directories for files: in memory, on the disk."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    return memory, disk
