"""A cluster as a site has it: hosts, an inventory, people, and jobs of theirs.

    master    2 GiB   alice and bob may run calculations, mallory may not
    worker1   2 GiB
    worker2   1 GiB
    worker3   1 GiB   off, and not in the inventory, until a step adds it

Each host has one core of this machine. The inventory is that of ``inventory.example.ini`` without
any setting but the users; steps may set more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tests.leftovers import wait_for
from tests.system import host, image, network, playbooks
from tests.system.host import Host
from tests.system.playbooks import ROOT, Played

MASTER, WORKERS, NEWCOMER = "master", ("worker1", "worker2"), "worker3"
MEMORY_MB = {MASTER: 2048, "worker1": 2048, "worker2": 1024, NEWCOMER: 1024}
NUMBER = {MASTER: 10, "worker1": 11, "worker2": 12, NEWCOMER: 13}
USERS, OUTSIDER = ("alice", "bob"), "mallory"
EXAMPLES = {"hazard": "hazard_classical", "risk": "event_based_risk"}
#: whose results are compared: a datastore has the paths of its inputs, so they are the same ones
OWNER = dict(zip(EXAMPLES, USERS, strict=True))
JOB_LIMIT_S = 1200.0
#: seconds without an answer to ssh after which a host is taken for dead
SILENT_LIMIT_S = 60.0
VENV = "/opt/openquake/venv"
DATABASE = "/var/lib/openquake/oqdata/db.sqlite3"


class Cluster:
    """
    A context manager: hosts and network are there inside it, and nothing of them after it.

    :param directory: of the run, for disks, logs and the inventory; disks that are there are used
    :param suite: release of Debian
    """

    def __init__(self, directory: Path, suite: str) -> None:
        self.directory = directory
        self.settings: dict[str, object] = {"openquake_users": list(USERS)}
        self.workers = list(WORKERS)
        self.hosts = {
            name: Host(name, f"{network.NETWORK}.{NUMBER[name]}", MEMORY_MB[name], directory, suite)
            for name in NUMBER
        }
        self.master = self.hosts[MASTER]
        self.inventory = directory / "inventory.ini"
        self._made = directory / "provisioned"
        if self.tasks:
            self.read_inventory()

    def __enter__(self) -> Cluster:
        host.remove_dead()
        network.make(list(self.hosts))
        self.directory.mkdir(parents=True, exist_ok=True)
        key = self.directory / "observer_key"
        if not key.exists():
            command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "harness", "-f", key)
            subprocess.run(command, check=True)
        for name in ("ssh_config", "known_hosts"):
            (self.directory / name).unlink(missing_ok=True)
        for one in self.hosts.values():
            one.install()
        return self

    def __exit__(self, *error: object) -> None:
        for one in self.hosts.values():
            if one.process is not None:
                one.cut()
        host.remove_dead()
        network.remove()

    # ---- hosts

    @property
    def running(self) -> list[Host]:
        return [one for one in self.hosts.values() if one.process is not None]

    @property
    def shared(self) -> str:
        """The directory whose files the workers see."""
        return str(self.settings.get("openquake_shared_dir", "/home"))

    @property
    def members(self) -> list[Host]:
        """The hosts of the inventory."""
        return [self.master, *(self.hosts[name] for name in self.workers)]

    def start(self, names: Iterable[str] = (MASTER, *WORKERS)) -> None:
        """Switch hosts on, and wait until they are up."""
        started = [self.hosts[name] for name in names if self.hosts[name].process is None]
        for one in started:
            one.start()
        for one in started:
            one.wait_up()

    def cut_silent(self) -> None:
        """Cut the power of hosts that do not answer any more: a row before has failed with them."""
        for one in self.running:
            if not wait_for(partial(one.reaches, 22), SILENT_LIMIT_S, 1.0):
                one.cut()

    def make_people(self) -> None:
        """Accounts on the master, reached by the key of the harness; private homes."""
        for name in (*USERS, OUTSIDER):
            self.master.run(
                f"id {name} 2>/dev/null || {{ useradd --create-home --shell /bin/bash {name} && "
                f"chmod 700 /home/{name} && install -d -o {name} -g {name} -m 700 "
                f"/home/{name}/.ssh && install -o {name} -g {name} -m 600 "
                f"/root/.ssh/authorized_keys /home/{name}/.ssh/; }}"
            )

    # ---- playbooks

    @property
    def tasks(self) -> int:
        """Of ``site.yml``, when it made the cluster on these disks; 0 until then."""
        return int(self._made.read_text()) if self._made.exists() else 0

    @tasks.setter
    def tasks(self, number: int) -> None:
        self._made.write_text(str(number))

    def read_inventory(self) -> None:
        """Take the workers and the settings of the run that made what is on the disks."""
        lines = self.inventory.read_text().splitlines()
        workers, variables = lines.index("[workers]"), lines.index("[all:vars]")
        self.workers = [line.split()[0] for line in lines[workers + 1 : variables] if line]
        pairs = [line.split("=", 1) for line in lines[variables + 1 :] if line]
        self.settings = {name: json.loads(value) for name, value in pairs}

    def write_inventory(self) -> None:
        """The inventory of the workers and settings of now."""

        def line(name: str) -> str:
            return f"{name} ansible_host={self.hosts[name].address}"

        settings = {"ansible_user": image.ADMIN, **self.settings}
        lines = ["[master]", line(MASTER), "", "[workers]", *map(line, self.workers), ""]
        lines += ["[all:vars]", *(f"{name}={json.dumps(it)}" for name, it in settings.items())]
        self.inventory.write_text("\n".join(lines) + "\n")

    def play(self, playbook: str, *args: str, **options: Any) -> Played:
        """Run a playbook, see ``playbooks.play``; the output is in ``playbooks.log``."""
        self.write_inventory()
        config = self.directory / "ssh_config"
        return playbooks.play(
            playbook,
            *args,
            inventory=self.inventory,
            log=self.directory / "playbooks.log",
            env={
                "ANSIBLE_SSH_COMMON_ARGS": f"-F {config}",
                "ANSIBLE_NOCOLOR": "1",
                "COLUMNS": "160",
                "PWD": str(self.directory),  # where verify.yml writes its report
            },
            **{"answers": {"BECOME password": image.PASSWORD}, **options},
        )

    # ---- jobs

    def give_example(self, user: str, example: str) -> str:
        """Copy an example to where the workers see it; returns the path of its job file there."""
        name = EXAMPLES[example]
        archive = subprocess.run(
            ("tar", "-C", str(ROOT / "examples"), "-cf", "-", name), check=True, capture_output=True
        ).stdout
        place = f"{self.shared}/{user}"
        subprocess.run(self.master.ssh(f"tar -C {place} -xf -", user), input=archive, check=True)
        return f"{place}/{name}/job.ini"

    def submit(self, user: str, job: str, *args: str) -> Job:
        """Start ``oq-run`` as a user who has logged in."""
        return Job(self, user, job, args)

    def fetch(self, user: str, datastore: str, target: Path) -> Path:
        """Copy a datastore of a user from the master."""
        with target.open("wb") as file:
            command = self.master.ssh(f"cat {datastore}", user)
            subprocess.run(command, stdout=file, check=True, timeout=120)
        return target

    def status(self) -> dict[str, dict[str, Any]]:
        """What ``oq-workers status`` says, by the name of the worker."""
        done = self.master.run("oq-workers status --json", USERS[0], check=False)
        rows = json.loads(done.stdout or "{}")
        names = {one.address: name for name, one in self.hosts.items()}
        return {names.get(address, address): row for address, row in rows.items()}

    def all_up(self) -> bool:
        """Do all workers of the inventory say that they are up?"""
        rows = self.status()
        return set(rows) == set(self.workers) and all(row["state"] == "up" for row in rows.values())

    def wait_all_up(self, limit_s: float = 180.0) -> None:
        """Wait until all workers serve."""
        assert wait_for(self.all_up, limit_s, 1.0), f"not all workers are up: {self.status()}"

    def jobs(self) -> dict[int, str]:
        """The jobs of the database with their states, read on the master."""
        code = (
            "import sqlite3, json; "
            f"db = sqlite3.connect('file:{DATABASE}?mode=ro', uri=True); "
            "print(json.dumps(dict(db.execute('SELECT id, status FROM job'))))"
        )
        rows = json.loads(self.master.out(f'python3 -c "{code}"'))
        return {int(number): state for number, state in rows.items()}


class Job:
    """
    ``oq-run --json`` of a user on the master, from this machine.

    :param job: path of the job file on the master
    :param args: more of the command line
    """

    def __init__(self, cluster: Cluster, user: str, job: str, args: Iterable[str] = ()) -> None:
        self.cluster = cluster
        self.started_s = time.monotonic()
        self.seconds = 0.0
        words = " ".join(("oq-run", "--json", *args, job))
        self.user = user
        self._log = cluster.directory / f"job-{user}-{time.strftime('%H%M%S')}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                cluster.master.ssh(words, user), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, limit_s: float = JOB_LIMIT_S) -> dict[str, Any]:
        """What it has printed at its end, with its log.

        :raises subprocess.TimeoutExpired: if it does not end
        """
        out, _ = self._process.communicate(timeout=limit_s)
        self.seconds = time.monotonic() - self.started_s
        log = self._log.read_text(errors="replace")[-4000:]
        try:
            return {**json.loads(out), "log": log, "code": self._process.returncode}
        except ValueError:
            return {"exit": self._process.returncode, "error": out, "jobs": [], "log": log}

    def complete(self, limit_s: float = JOB_LIMIT_S) -> str:
        """Wait for it; it must be complete. Returns the path of its datastore on the master."""
        found = self.wait(limit_s)
        assert found["exit"] == 0, found
        [row] = found["jobs"]
        assert row["state"] == "complete", found
        return str(row["datastore"])

    def fetch(self, datastore: str, target: Path) -> Path:
        """Copy a datastore of the user from the master."""
        return self.cluster.fetch(self.user, datastore, target)

    def under_way(self, *workers: str, limit_s: float = JOB_LIMIT_S) -> None:
        """Wait until each of the workers has a task."""
        seen: dict[str, Any] = {}

        def reached() -> bool:
            seen.update(self.cluster.status())
            return all(seen.get(name, {}).get("busy", 0) for name in workers)

        found = wait_for(lambda: not self.running() or reached(), limit_s, 0.5)
        assert found and self.running(), (seen, None if self.running() else self.wait())


#: in a /home that only this command sees, as it is but for what is copied there.
#: $1: an empty directory, $2: what is copied, $3: where to, $4...: the command
AT_HOME = """
mount -t tmpfs home "$1"
mkdir "$1/changed" "$1/work"
mount -t overlay -o "lowerdir=/home,upperdir=$1/changed,workdir=$1/work" home /home
mkdir -p "$(dirname "$3")"
cp -r "$2" "$3"
shift 3
exec "$@"
"""


def embedded(example: str, directory: Path) -> Path:
    """Run an example of its owner on this machine alone; returns its datastore."""
    kept = directory / "embedded" / f"{example}.hdf5"
    kept.parent.mkdir(exist_ok=True)
    name = EXAMPLES[example]
    home = f"/home/{OWNER[example]}/{name}"
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as datadir:
        done = subprocess.run(
            ("unshare", "--mount", "sh", "-ec", AT_HOME, "embedded",
             scratch, ROOT / "examples" / name, home,
             Path(sys.prefix) / "bin/oq-run", "--json", "--cores=2", f"{home}/job.ini"),
            env=os.environ | {"OQ_DATADIR": datadir, "CI": "true"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return Path(shutil.copy(json.loads(done.stdout)["jobs"][-1]["datastore"], kept))


def sampled(question: Callable[[], dict[str, int]], job: Job) -> dict[str, int]:
    """Ask while a job runs; per key the greatest number that was answered."""
    most: dict[str, int] = {}
    while job.running():
        asked_s = time.monotonic()
        for key, number in question().items():
            most[key] = max(most.get(key, 0), number)
        time.sleep(max(0.5, time.monotonic() - asked_s))  # the master has one core, for the job too
    return most
