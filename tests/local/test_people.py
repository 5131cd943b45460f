"""People without rights on one host and one job database: whose results they may go on from.

In namespaces of their own, with the interpreter where everybody reaches it, so that what holds is
what the files' modes say. Anna and Boris are of the group of the cluster, Clara is not. A first
start of somebody compiles for minutes; Boris and Clara get what that of Anna has compiled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.leftovers import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users"),
]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/hazard_classical/job.ini"
GROUP = 1600
PEOPLE = {"anna": (1501, GROUP), "boris": (1502, GROUP), "clara": (1503, 1503)}
#: a bigger investigation time changes the rates, not the time that the job takes
LONGER = ("-p", "investigation_time=51")
UNSHARE = ("unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child")
#: $1: where the interpreter is, $2: an empty directory
MAKE = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
ip link set lo up
ip address add 192.0.2.1/32 dev lo
mkdir "$2/python"
mount --bind "$1" "$2/python"
case $1 in /root/*)
    mount -t tmpfs -o mode=755 people /root
    mkdir -p "$1"
    mount --bind "$2/python" "$1"
esac
for place in /srv /tmp /dev/shm; do
    mount -t tmpfs -o mode=1777 people $place
done
echo made
exec sleep infinity
"""
CFG = """\
[dbserver]
multi_user = true
file = /srv/db.sqlite3
listen = 192.0.2.1
host = 192.0.2.1
authkey = {authkey}
[oq_runtime]
code = import oq_runtime.activate
"""


class Host:
    """A host with a DbServer, and people; made in ``folder``, an empty directory."""

    def __init__(self, folder: Path) -> None:
        self.holder = subprocess.Popen(
            [*UNSHARE, "sh", "-c", MAKE, "people", sys.base_prefix, folder],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None and self.holder.stdout.readline() == "made\n"
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        self.inside = children.read_text().strip()
        self.seen = Path(f"/proc/{self.inside}/root")
        for name, (uid, gid) in PEOPLE.items():
            results = self.seen / f"srv/{name}/oqdata"
            results.mkdir(parents=True)
            for place in (results.parent, results):
                os.chown(place, uid, gid)
                place.chmod(0o2750)
        cfg = self.seen / "srv/openquake.cfg"
        cfg.write_text(CFG.format(authkey=os.urandom(24).hex()))
        self.server = subprocess.Popen(
            self._enter("openquake", 0, 0, "oq", "dbserver", "start", "-f"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert wait_for((self.seen / "srv/db.sqlite3").exists, 120)

    def close(self) -> None:
        os.kill(int(self.inside), signal.SIGKILL)
        self.holder.communicate()
        self.server.wait()

    def _enter(self, name: str, uid: int, gid: int, *command: str, umask: str = "027") -> list[str]:
        env = [
            f"HOME=/srv/{name}", f"USER={name}", f"LOGNAME={name}", f"PATH={path()}", "CI=true",
            f"OQ_DATADIR=/srv/{name}/oqdata", "OQ_CONFIG_FILE=/srv/openquake.cfg", "COLUMNS=200",
        ]  # fmt: skip
        become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        inside = ["nsenter", f"--target={self.inside}", "--mount", "--net", "--ipc", "--pid"]
        masked = ["sh", "-c", f'umask {umask}; cd /srv; exec "$@"', "sh"]
        return [*inside, "env", "-i", *env, *become, *masked, *command]

    def start(self, name: str, *command: str, umask: str = "027") -> subprocess.Popen[str]:
        """Start a command as somebody."""
        entered = self._enter(name, *PEOPLE[name], *command, umask=umask)
        pipe = subprocess.PIPE
        return subprocess.Popen(entered, stdout=pipe, stderr=pipe, text=True)

    def run(self, name: str, *command: str, umask: str = "027") -> tuple[int, str, str]:
        """Run a command as somebody; return its exit code, its output and its errors."""
        process = self.start(name, *command, umask=umask)
        out, err = process.communicate(timeout=1200)
        return process.returncode, out, err

    def job(self, name: str, *args: str, umask: str = "027") -> dict[str, Any]:
        """Run the example as somebody; return what it says of the job."""
        command = ("oq-run", "--json", "--cores=1", *args, str(EXAMPLE))
        code, out, err = self.run(name, *command, umask=umask)
        assert code == 0, (out, err)
        [job] = json.loads(out)["jobs"]
        return dict(job)


def path() -> str:
    return f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("people"))
    try:
        yield host
    finally:
        host.close()


@pytest.fixture(scope="module")
def hazard(host: Host) -> dict[str, Any]:
    """A job of Anna, whose results her group may read."""
    done = host.job("anna")
    for name in ("boris", "clara"):
        uid, gid = PEOPLE[name]
        cache = host.seen / "srv" / name / ".cache"
        subprocess.run(["cp", "-a", host.seen / "srv/anna/.cache", cache], check=True)
        subprocess.run(["chown", "-R", f"{uid}:{gid}", cache], check=True)
    return done


def test_a_colleague_goes_on_from_a_job(host: Host, hazard: dict[str, Any]) -> None:
    parent = host.seen / str(hazard["datastore"]).removeprefix("/")
    before = hashlib.sha256(parent.read_bytes()).digest()
    done = host.job("boris", "--hc", str(hazard["job"]))
    assert done["state"] == "complete" and done["job"] != hazard["job"]
    code, out, _ = host.run("boris", "oq", "engine", "--eos", str(hazard["job"]), "/tmp/boris")
    assert code == 0 and "hazard_curve-mean" in out
    assert hashlib.sha256(parent.read_bytes()).digest() == before


@pytest.mark.parametrize("name, umask", [("clara", "027"), ("boris", "077")])
def test_whoever_may_not_read_is_told(
    host: Host, hazard: dict[str, Any], name: str, umask: str
) -> None:
    job = hazard if umask == "027" else host.job("anna", *LONGER, umask=umask)
    code, _, err = host.run(name, "oq-run", "--hc", str(job["job"]), "--no-progress", str(EXAMPLE))
    assert code == 2
    said = f"oq-run: --hc {job['job']}: job {job['job']} of anna: its datastore {job['datastore']}"
    assert f"{said}: Permission denied; its owner must let you read it" in err


def test_others_that_proc_hides_are_alive(host: Host, hazard: dict[str, Any]) -> None:
    mounted = ["nsenter", f"--target={host.inside}", "--mount", "--pid", "mount", "-t", "proc"]
    subprocess.run([*mounted, "-o", "hidepid=2", "proc", "/proc"], check=True)
    anna = host.start("anna", "oq-run", "--cores=1", "--no-progress", *LONGER, str(EXAMPLE))
    assert anna.stderr is not None
    begun = (re.search(r" #(\d+) WARNING\] anna@", line) for line in anna.stderr)
    number = next(found[1] for found in begun if found)
    boris = host.start("boris", "oq-run", "--cores=1", "--no-progress", str(EXAMPLE))
    assert boris.stderr is not None
    assert any(f"waiting for job {number} of anna" in line for line in boris.stderr)
    code, out, err = host.run("anna", "oq", "abort", number)
    assert code == 0 and "aborted" in out, (out, err)
    anna.communicate(timeout=120)
    assert anna.returncode == 130
    boris.communicate(timeout=600)
    assert boris.returncode == 0, "a job behind one that has ended begins"
