"""Check one place of a live cluster: ``verify.py PLACE SETTINGS`` prints a JSON list of checks.

PLACE is ``master``, ``worker`` or ``stranger``; SETTINGS is a JSON object, see the role's
``vars/main.yml``. A check is ``{"check": name, "ok": true or false, "detail": text}``. Runs as root
(``stranger`` as anybody) with Python's own library, and leaves nothing behind.
"""

import errno
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONNECT_SECS = 3.0
COMMAND_SECS = 300.0
SETTINGS: dict[str, Any] = json.loads(sys.argv[2])
PREFIX, HOME = Path(SETTINGS["prefix"]), Path(SETTINGS["home"])
CONFIG, SHARED = Path(SETTINGS["config_dir"]), Path(SETTINGS["shared_dir"])


class Wrong(Exception):
    """What is not as it should be, and what to look at."""


def run(*command: str) -> str:
    """Return the standard output of a command; raises Wrong with what it says went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECS)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Wrong(f"{' '.join(command)}: {exc}") from exc
    if done.returncode:
        raise Wrong(f"{' '.join(command)}: exit code {done.returncode}: {reason(done)}")
    return done.stdout


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The error that a command with ``--json`` tells, or the last line of its errors."""
    try:
        return str(json.loads(done.stdout)["error"])
    except (ValueError, LookupError, TypeError):
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        return lines[-1]


def as_openquake(*command: str) -> str:
    cache = "NUMBA_CACHE_DIR=/var/cache/openquake/numba"
    return run("runuser", "--user=openquake", "--", "env", cache, "CI=true", *command)


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECS).close()
    except OSError:
        return False
    return True


def service(name: str) -> str:
    for question in ("is-active", "is-enabled"):
        run("systemctl", question, name)
    return "active and enabled"


# ---- all nodes


def firewall() -> str:
    service("openquake-firewall.service")
    if (CONFIG / "firewall.nft").exists():
        run("nft", "list", "table", "inet", "openquake")
        return "the table is loaded"
    return "another firewall is in charge"


def account() -> str:
    found = pwd.getpwnam("openquake")
    wanted = (SETTINGS["uid"], SETTINGS["gid"])
    if (found.pw_uid, found.pw_gid) != wanted:
        raise Wrong(f"openquake is {found.pw_uid}:{found.pw_gid}, not {wanted[0]}:{wanted[1]}")
    return f"openquake is {found.pw_uid}:{found.pw_gid}"


def secret() -> str:
    path = CONFIG / "authkey"
    status = path.stat()
    found = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
    if found != (0o640, 0, SETTINGS["gid"]):
        raise Wrong(f"{path} has mode {found[0]:o}, owner {found[1]}:{found[2]}")
    return "only root and the group openquake can read it"


# ---- the master


def dbserver() -> str:
    service("openquake-dbserver.service")
    if not reaches(SETTINGS["master"], SETTINGS["dbserver_port"]):
        raise Wrong(f"no answer on {SETTINGS['master']}:{SETTINGS['dbserver_port']}")
    return f"answers on {SETTINGS['master']}:{SETTINGS['dbserver_port']}"


def database() -> str:
    path = HOME / "oqdata" / "db.sqlite3"
    status = path.stat()
    if status.st_uid != SETTINGS["uid"] or status.st_mode & stat.S_IRWXO:
        raise Wrong(f"{path}: owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}")
    return f"{path}, {status.st_size} bytes"


def settings() -> str:
    path = PREFIX / "venv" / "openquake.cfg"
    text = path.read_text()
    if (CONFIG / "authkey").read_text().strip() in text:
        raise Wrong(f"{path} contains the secret; run site.yml")
    return f"{path} has no secret in it"


def engine() -> str:
    code = "import importlib.metadata as m; print(m.version('openquake.engine'))"
    found = run(str(PREFIX / "venv" / "bin" / "python"), "-c", code).strip()
    if found != SETTINGS["engine"]:
        raise Wrong(f"engine {found}, and the inventory says {SETTINGS['engine']}")
    return f"engine {found}"


def exports() -> str:
    """What the kernel was told: options are written out there, with all defaults."""
    rows = Path("/var/lib/nfs/etab").read_text().splitlines()
    clients = {str(PREFIX): set(), str(SHARED): set()}  # type: dict[str, set[str]]
    for row in rows:
        path, _, rest = row.partition("\t")
        client, _, options = rest.partition("(")
        if path in clients:
            if not {"ro", "root_squash"} <= set(options.rstrip(")").split(",")):
                raise Wrong(f"{path} is exported to {client} with {options}")
            clients[path].add(client)
    wanted = set(SETTINGS["workers"]) - {SETTINGS["master"]}
    for path, found in clients.items():
        if found != wanted:
            raise Wrong(f"{path} is exported to {sorted(found)}, not to {sorted(wanted)}")
    return "read-only, to the workers alone"


def gate() -> str:
    for worker in SETTINGS["workers"]:
        answer = as_openquake("ssh", f"openquake@{worker}", "ping").strip()
        if answer != "pong":
            raise Wrong(f"ssh openquake@{worker} ping: {answer!r}")
    return "all workers answer to ssh"


def workers() -> str:
    rows = json.loads(as_openquake(str(PREFIX / "venv/bin/oq-workers"), "status", "--json"))
    if missing := set(SETTINGS["workers"]) - set(rows):
        raise Wrong(f"not in openquake.cfg: {', '.join(sorted(missing))}; run site.yml")
    down = [f"{host}: {row['state']}" for host, row in rows.items() if row["state"] != "up"]
    if down:
        raise Wrong("; ".join(down))
    return f"{len(rows)} workers with {sum(row['slots'] for row in rows.values())} slots"


def tasks() -> str:
    """Tasks on every worker: Python, engine and mounts are there and fit."""
    answer = json.loads(as_openquake(str(PREFIX / "venv/bin/oq-workers"), "debug", "--json"))
    rows = answer["hosts"]
    if idle := [host for host, row in rows.items() if not row["answered"]]:
        raise Wrong(f"no task was run by {', '.join(idle)}; see journalctl -u openquake-worker")
    return ", ".join(f"{host}: {row['answered']} slots" for host, row in sorted(rows.items()))


def job() -> str:
    file = str(PREFIX / "verify/job.ini")
    answer = as_openquake(str(PREFIX / "venv/bin/oq-run"), "--json", file)
    [row] = json.loads(answer)["jobs"]
    command = [str(PREFIX / "venv/bin/oq"), "engine", "--delete-calculation", str(row["job"])]
    as_openquake(*command, "--yes")
    if row["state"] != "complete":
        raise Wrong(f"job {row['job']} is {row['state']}")
    return f"complete after {row['seconds']} s and {row['tasks']} tasks"


def webui() -> str:
    if not SETTINGS["webui_port"]:
        return "off"
    service("openquake-webui.service")
    url = f"http://127.0.0.1:{SETTINGS['webui_port']}/engine/"
    with urllib.request.urlopen(url, timeout=30) as answer:
        if not answer.url.endswith("/accounts/login/"):
            raise Wrong(f"{url} asks for no login")
    return "asks for a login"


# ---- a worker


def agent() -> str:
    return service("openquake-worker.service")


def mounts() -> str:
    if SETTINGS["is_master"]:
        return "its own directories"
    for path in (PREFIX, SHARED):
        try:
            os.close(os.open(path / ".openquake-verify", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError as exc:
            if exc.errno != errno.EROFS:
                raise Wrong(f"{path} is not mounted read-only: {exc.strerror}") from exc
        else:
            (path / ".openquake-verify").unlink()
            raise Wrong(f"{path} can be written to; it must be a read-only mount of the master's")
    return "read-only"


def owner() -> str:
    """The engine takes the owner of its files for whether it serves several users."""
    [path] = PREFIX.glob("venv/lib/python3*/site-packages/openquake/baselib/__init__.py")
    name = pwd.getpwuid(path.stat().st_uid).pw_name
    if name != "root":
        raise Wrong(f"{path} belongs to {name}, not to root; see the id mapping of NFS")
    return "the engine belongs to root"


def master() -> str:
    if not reaches(SETTINGS["master"], SETTINGS["dbserver_port"]):
        raise Wrong(f"cannot reach the DbServer on {SETTINGS['master']}")
    return "reaches the DbServer"


def swap() -> str:
    active = [row.split()[0] for row in Path("/proc/swaps").read_text().splitlines()[1:]]
    if active and SETTINGS["swap_off"]:
        raise Wrong(f"swap is on: {', '.join(active)}; run site.yml")
    return f"on: {', '.join(active)}" if active else "off"


# ---- a stranger


def closed() -> str:
    """The ports of the cluster, from the machine that Ansible runs on."""
    addresses = {SETTINGS["master"], *SETTINGS["workers"]}
    for address in addresses:
        with socket.socket() as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return "not tried: this machine belongs to the cluster"
    first, last = (int(port) for port in SETTINGS["receiver_ports"].split("-"))
    ports = {SETTINGS["master"]: {SETTINGS["dbserver_port"], *range(first, last + 1)}}
    for worker in SETTINGS["workers"]:
        ports.setdefault(worker, set()).add(SETTINGS["ctrl_port"])
    pairs = [(host, port) for host, found in ports.items() for port in sorted(found)]
    if found := [f"{host}:{port}" for host, port in pairs if reaches(host, port)]:
        raise Wrong(f"open to this machine: {', '.join(found)}")
    return f"{len(pairs)} ports are closed to this machine"


NODE = [firewall, account, secret]
MASTER = [dbserver, database, settings, engine, exports, gate, workers, tasks, job, webui]
CHECKS: dict[str, list[Callable[[], str]]] = {
    "master": [*NODE, *MASTER],
    "worker": [*NODE, agent, mounts, owner, master, swap],
    "stranger": [closed],
}


def check(function: Callable[[], str]) -> dict[str, object]:
    try:
        detail, ok = function(), True
    except Exception as exc:  # whatever it is, the other checks are to be made
        detail, ok = str(exc) if isinstance(exc, Wrong) else f"{type(exc).__name__}: {exc}", False
    return {"check": function.__name__, "ok": ok, "detail": detail}


if __name__ == "__main__":
    print(json.dumps([check(function) for function in CHECKS[sys.argv[1]]]))
