"""The script that makes an environment: one build at a time, which ends with its playbook."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.leftovers import wait_for
from tests.provisioning.roles import ROOT

pytestmark = pytest.mark.timeout(60)

SCRIPT = ROOT / "roles/openquake_engine/files/build_venv.sh"
#: in place of Python: makes an environment whose packages take a moment, and notes what it does
PYTHON = """\
#!/bin/sh
case "$*" in
"-m venv .") mkdir -p bin lib && cp "$0" bin/python ;;
*import*openquake*) mkdir -p "$NUMBA_CACHE_DIR" && echo "$HOME" >"$NUMBA_CACHE_DIR/x" ;;
*install*engine*) echo begin >>packages/log; sleep 1; echo end >>packages/log ;;
esac
"""
#: in place of sync: notes whether it comes before the mark
SYNC = """#!/bin/sh
[ ! -e .complete ] || exit 1
echo synced >>packages/log
"""


def test_two_builds_of_one_environment(tmp_path: Path) -> None:
    """It is marked as complete when all of it is on the disk, and all can use it."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/engine-3.26.txt").touch()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    sync = tmp_path / "programs/sync"
    sync.parent.mkdir()
    sync.write_text(SYNC)
    sync.chmod(0o755)
    env = os.environ | {"PATH": f"{sync.parent}:{os.environ['PATH']}"}
    command = ["sh", str(SCRIPT), str(python), str(tmp_path)]
    builds = [subprocess.Popen(command, env=env, umask=0o077) for _ in range(3)]
    assert [build.wait() for build in builds] == [0, 0, 0]
    assert (tmp_path / "packages/log").read_text() == "begin\nend\nsynced\n"
    assert (tmp_path / ".complete").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "bin").stat().st_mode & 0o777 == 0o755
    # what numba compiles is there for all, and nothing of a home of root's
    assert (tmp_path / "compiled/x").stat().st_mode & 0o777 == 0o644
    home = Path((tmp_path / "compiled/x").read_text().strip())
    assert home == tmp_path / "packages/home" and not home.exists()


@pytest.mark.parametrize("terminal", [False, True])
def test_build_ends_with_the_connection_of_its_playbook(tmp_path: Path, terminal: bool) -> None:
    """Half of it is not complete, and does not hold up the next one."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/engine-3.26.txt").touch()
    for name, text in (
        ("python", PYTHON.replace("sleep 1;", f"sleep 50; touch {tmp_path}/packages/late;")),
        ("quick", PYTHON),
        ("sshd-session", '#!/bin/sh\n"$@"\nexit\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "packages/log"
    command = ["sh", str(SCRIPT), str(tmp_path / "python"), str(tmp_path)]
    server = subprocess.Popen([str(tmp_path / "sshd-session"), *command], start_new_session=True)
    assert wait_for(log.exists, 20)
    if terminal:
        os.killpg(server.pid, signal.SIGHUP)
    else:
        server.kill()
    server.wait()
    lock = ["flock", "--nonblock", str(tmp_path / "packages/lock"), "true"]
    assert wait_for(lambda: subprocess.run(lock).returncode == 0, 20)
    assert not (tmp_path / ".complete").exists()
    subprocess.run(["sh", str(SCRIPT), str(tmp_path / "quick"), str(tmp_path)], check=True)
    assert log.read_text() == "begin\nbegin\nend\n"
    assert (tmp_path / ".complete").exists()
