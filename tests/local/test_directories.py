"""Directories of a session: nobody else has made them, looks into them or exchanges them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import Attacks
from tests.leftovers import SHM
from tests.squatter import Squatter

from .test_starmap import run

pytestmark = [pytest.mark.timeout(180), pytest.mark.light, pytest.mark.attack]

#: sessions, one after the other, with a big argument and a big result in shared memory
SESSIONS = 4
BODY = f"""
from oq_runtime.session.client import Session
from oq_runtime.config import Config, read
from oq_runtime.session import launch
for n in range({SESSIONS}):
    directory = launch.start(Config.from_sections(read()), os.getpid())
    Session._current = Session(directory)
    say(value=go(tasks.grow, [(i, b'x' * 1_000_000, 1_000_000) for i in (1, 2)])['in'])
    launch.stop(directory)
"""


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """A directory for everybody, as /tmp is one, on a way that everybody may go."""
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without rights")
    path = Path("/tmp", f"oq-t{os.getpid()}")
    path.mkdir()
    path.chmod(0o1777)
    return path


def test_a_watcher_takes_no_directory(
    env: dict[str, str], tmpdir: Path, temporary: Path, attacks: Attacks
) -> None:
    try:
        with Squatter(temporary, SHM) as squatter:
            code, rows, err = run(env, tmpdir, BODY, squatter.victim, TMPDIR=str(temporary))
        assert code == 0 and len(rows) == SESSIONS, err
        attacks.tried(squatter.tried, len(squatter.found))
        assert not squatter.found
        assert squatter.tried >= 2 * SESSIONS, "it has seen no directory"
    finally:
        shutil.rmtree(temporary)
