"""Check one place of a live cluster: ``verify.py PLACE SETTINGS`` prints a JSON list of checks.

PLACE is ``master``, ``worker`` or ``stranger``; SETTINGS is a JSON object, see the role's
``vars/main.yml``. A check is ``{"check": name, "ok": true or false, "detail": text}``. Runs as root
(``stranger`` as anybody) with Python's own library, and leaves nothing behind.
"""

import json
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CONNECT_SECS = 3.0
#: of two hosts, for the answers of which the ways to them count
CLOCK_SECS = 60
LEAST_FREE_MB = 256
COMMAND_SECS = 300.0
SETTINGS: dict[str, Any] = json.loads(sys.argv[2])
OPENQUAKE = ("runuser", "--user=openquake", "--", "env", "CI=true", "LC_ALL=C.UTF-8")
OPENQUAKE += ("NUMBA_CACHE_DIR=/var/cache/openquake/numba",)
PREFIX, HOME = Path(SETTINGS["prefix"]), Path(SETTINGS["home"])
CONFIG, SHARED = Path(SETTINGS["config_dir"]), Path(SETTINGS["shared_dir"])


class Wrong(Exception):
    """What is not as it should be, and what to do about it."""

    def __init__(self, what: str, remedy: str = "run site.yml") -> None:
        super().__init__(f"{what}; {remedy}")


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
    return run(*OPENQUAKE, *command)


def ask(*command: str) -> dict[str, Any]:
    """Return what a command with ``--json`` answers, also where it ends with an error."""
    command = (str(PREFIX / "venv" / "bin" / command[0]), *command[1:], "--json")
    try:
        done = subprocess.run(
            [*OPENQUAKE, *command], capture_output=True, text=True, timeout=COMMAND_SECS
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Wrong(f"{' '.join(command)}: {exc}") from exc
    except ValueError:
        raise Wrong(f"{' '.join(command)}: {reason(done)}") from None
    if error := answer.get("error"):
        raise Wrong(f"{' '.join(command)}: {error}")
    return answer


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECS).close()
    except OSError:
        return False
    return True


def service(name: str) -> str:
    for question in ("is-active", "is-enabled"):
        done = subprocess.run(["systemctl", question, name], capture_output=True, text=True)
        if done.returncode:
            state = done.stdout.strip() or "not there"
            raise Wrong(f"{name} is {state}", f"see journalctl -u {name}, and run site.yml")
    return "active and enabled"


class Mount(NamedTuple):
    """A line of mountinfo, see proc(5)."""

    kind: str
    source: str
    options: set[str]


def mounted(path: Path, table: str) -> Mount | None:
    """Return what is mounted at a path, the uppermost; what waits for its use is no mount.

    :param table: the text of ``/proc/self/mountinfo``
    """
    found = None
    for row in table.splitlines():
        mount, _, system = row.partition(" - ")
        place, options = mount.split()[4:6]
        kind, source, more = system.split(" ", 2)
        if place == str(path) and kind != "autofs":
            found = Mount(kind, source, {*options.split(","), *more.split(",")})
    return found


# ---- all nodes


def firewall() -> str:
    service("openquake-firewall.service")
    if (CONFIG / "firewall.nft").exists():
        listed = ["nft", "list", "table", "inet", "openquake"]
        if subprocess.run(listed, capture_output=True).returncode:
            raise Wrong("the table of the firewall is not loaded")
        return "the table is loaded"
    return "another firewall is in charge"


def account() -> str:
    found = pwd.getpwnam("openquake")
    wanted = (SETTINGS["uid"], SETTINGS["gid"])
    if (found.pw_uid, found.pw_gid) != wanted:
        text = f"openquake is {found.pw_uid}:{found.pw_gid}, not {wanted[0]}:{wanted[1]}"
        raise Wrong(text, "correct openquake_uid, or the account")
    return f"openquake is {found.pw_uid}:{found.pw_gid}"


def clock() -> str:
    off_s = SETTINGS["clock_s"]
    if abs(off_s) > CLOCK_SECS:
        remedy = "see its time service (timedatectl), and run site.yml"
        raise Wrong(f"the clock is {off_s} s off the master's", remedy)
    return f"within {CLOCK_SECS} s of the master's"


def disk() -> str:
    """Where the services write."""
    for path in (HOME, Path("/tmp"), Path("/var/cache/openquake")):
        free_mb = shutil.disk_usage(path).free >> 20
        if free_mb < LEAST_FREE_MB:
            raise Wrong(f"{path} is on a disk with {free_mb} MiB left", "make space")
    return f"more than {LEAST_FREE_MB} MiB left"


def names() -> str:
    """The engine tells the other nodes to reach it at the address of its own name."""
    own = socket.gethostname()
    for row in Path("/etc/hosts").read_text().splitlines():
        address, *found = row.partition("#")[0].split() or [""]
        if address.startswith(("127.", "::1")) and own in found:
            raise Wrong(f"/etc/hosts has {own} at {address}")
    return "its own name is on no loopback address"


def secret() -> str:
    path = CONFIG / "authkey"
    status = path.stat()
    found = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
    if found != (0o640, 0, SETTINGS["gid"]):
        raise Wrong(f"{path} has mode {found[0]:o}, owner {found[1]}:{found[2]}")
    if not SETTINGS["same_secret"]:
        raise Wrong(f"the secret in {path} is not the master's")
    return "the master's; only root and the group openquake can read it"


# ---- the master


def dbserver() -> str:
    service("openquake-dbserver.service")
    if not reaches(SETTINGS["master"], SETTINGS["dbserver_port"]):
        where = f"{SETTINGS['master']}:{SETTINGS['dbserver_port']}"
        raise Wrong(f"no answer on {where}", "see journalctl -u openquake-dbserver")
    return f"answers on {SETTINGS['master']}:{SETTINGS['dbserver_port']}"


def database() -> str:
    path = HOME / "oqdata" / "db.sqlite3"
    owner, mode, size = as_openquake("stat", "--format=%u %a %s", str(path)).split()
    if int(owner) != SETTINGS["uid"] or int(mode, 8) & stat.S_IRWXO:
        raise Wrong(f"{path}: owner {owner}, mode {mode}")
    return f"{path}, {size} bytes"


def settings() -> str:
    path = PREFIX / "venv" / "openquake.cfg"
    text = path.read_text()
    if (CONFIG / "authkey").read_text().strip() in text:
        raise Wrong(f"{path} contains the secret")
    return f"{path} has no secret in it"


def engine() -> str:
    code = "import importlib.metadata as m; print(m.version('openquake.engine'))"
    found = run(str(PREFIX / "venv" / "bin" / "python"), "-c", code).strip()
    if found != SETTINGS["engine"]:
        text = f"engine {found}, and the inventory says {SETTINGS['engine']}"
        raise Wrong(text, "run playbooks/upgrade.yml")
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


def results() -> str:
    """Can the workers read them, and nobody but their owner write?"""
    if not SETTINGS["homes"]:
        status = SHARED.stat()
        mode, found = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
        if mode != 0o3770 or found != (SETTINGS["uid"], SETTINGS["gid"]):
            raise Wrong(f"{SHARED} has mode {mode:o}, owner {found[0]}:{found[1]}")
    if SETTINGS["closed_results"]:
        raise Wrong(f"not open to the group openquake: {'; '.join(SETTINGS['closed_results'])}")
    return "readable for the workers"


def gate() -> str:
    found = []
    for worker in SETTINGS["workers"]:
        command = [*OPENQUAKE, "ssh", f"openquake@{worker}", "ping"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECS)
        except subprocess.TimeoutExpired:
            found.append(f"{worker}: no answer within {COMMAND_SECS:g} s")
            continue
        if done.stdout.strip() != "pong":
            found.append(f"{worker}: {reason(done)}")
    if found:
        remedy = "ssh openquake@WORKER ping as openquake on the master shows more; run site.yml"
        raise Wrong(f"ssh does not reach {'; '.join(found)}", remedy)
    return "all workers answer to ssh"


def workers() -> str:
    rows = ask("oq-workers", "status")
    if missing := set(SETTINGS["workers"]) - set(rows):
        raise Wrong(f"not in openquake.cfg: {', '.join(sorted(missing))}")
    down = [f"{host}: {row['state']}" for host, row in rows.items() if row["state"] != "up"]
    if down:
        remedy = "see journalctl -u openquake-worker there, and run site.yml"
        raise Wrong("; ".join(down), remedy)
    return f"{len(rows)} workers with {sum(row['slots'] for row in rows.values())} slots"


def tasks() -> str:
    """Tasks on every worker: Python, engine and mounts are there and fit."""
    rows = ask("oq-workers", "debug")["hosts"]
    if idle := [host for host, row in rows.items() if not row["answered"]]:
        remedy = "see journalctl -u openquake-worker there"
        raise Wrong(f"no task was run by {', '.join(idle)}", remedy)
    return ", ".join(f"{host}: {row['answered']} slots" for host, row in sorted(rows.items()))


def job() -> str:
    file = str(PREFIX / "verify/job.ini")
    [row] = ask("oq-run", file)["jobs"]
    command = [str(PREFIX / "venv/bin/oq"), "engine", "--delete-calculation", str(row["job"])]
    as_openquake(*command, "--yes")
    if row["state"] != "complete":
        raise Wrong(f"job {row['job']} is {row['state']}", f"see oq engine --show-log {row['job']}")
    return f"complete after {row['seconds']} s and {row['tasks']} tasks"


def webui() -> str:
    if not SETTINGS["webui_port"]:
        return "off"
    service("openquake-webui.service")
    url = f"http://127.0.0.1:{SETTINGS['webui_port']}/engine/"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=30) as answer:
        if not answer.url.endswith("/accounts/login/"):
            raise Wrong(f"{url} asks for no login")
    return "asks for a login"


# ---- a worker


def agent() -> str:
    return service("openquake-worker.service")


def mounts() -> str:
    """What the kernel says of them, for to the master root is nobody here; and openquake tries."""
    if SETTINGS["is_master"]:
        return "its own directories"
    for path in (PREFIX, SHARED):
        as_openquake("stat", "--file-system", f"{path}/.")  # mounts what waits for its use
        check_mount(path, mounted(path, Path("/proc/self/mountinfo").read_text()))
        file = f"{path}/.openquake-verify"
        if not subprocess.run([*OPENQUAKE, "touch", file], capture_output=True).returncode:
            subprocess.run([*OPENQUAKE, "rm", "-f", file], capture_output=True)
            raise Wrong(f"{path} can be written to")
    return "read-only, of the master"


def check_mount(path: Path, mount: Mount | None) -> None:
    """Raise Wrong where this is not what the role mounts there."""
    if mount is None:
        raise Wrong(f"{path} is not mounted", f"see systemctl status {path}, and run site.yml")
    source = f"{SETTINGS['master']}:{path}"
    if SETTINGS["nfs"] and (mount.kind, mount.source) != ("nfs4", source):
        raise Wrong(f"{path} is {mount.kind} of {mount.source}, not {source}")
    if SETTINGS["nfs"] and "vers=4.2" not in mount.options:
        raise Wrong(f"{path} is not mounted with vers=4.2")
    if "ro" not in mount.options:
        raise Wrong(f"{path} is not mounted read-only")


def owner() -> str:
    """The engine takes the owner of its files for whether it serves several users."""
    found = [*PREFIX.glob("venv/lib/python3*/site-packages/openquake/baselib/__init__.py")]
    if not found:
        raise Wrong(f"{PREFIX}/venv has no engine")
    path = found[0]
    name = pwd.getpwuid(path.stat().st_uid).pw_name
    if name != "root":
        raise Wrong(f"{path} belongs to {name}, not to root", "see the id mapping of NFS")
    return "the engine belongs to root"


def master() -> str:
    if not reaches(SETTINGS["master"], SETTINGS["dbserver_port"]):
        remedy = "see the firewalls of both hosts, and openquake-dbserver there"
        raise Wrong(f"cannot reach the DbServer on {SETTINGS['master']}", remedy)
    return "reaches the DbServer"


def swap() -> str:
    active = [row.split()[0] for row in Path("/proc/swaps").read_text().splitlines()[1:]]
    if active and SETTINGS["swap_off"]:
        raise Wrong(f"swap is on: {', '.join(active)}")
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
        raise Wrong(f"open to this machine: {', '.join(found)}", "see the firewalls there")
    return f"{len(pairs)} ports are closed to this machine"


NODE = [firewall, account, secret, clock, disk, names]
MASTER = [dbserver, database, settings, engine, exports, results, gate, workers, tasks, job, webui]
CHECKS: dict[str, list[Callable[[], str]]] = {
    "master": [*NODE, *MASTER],
    "worker": [*NODE, agent, mounts, owner, master, swap],
    "stranger": [closed],
}


def check(function: Callable[[], str]) -> dict[str, object]:
    try:
        detail, ok = function(), True
    except Exception as exc:  # whatever it is, the other checks are to be made
        wrong = exc if isinstance(exc, Wrong) else Wrong(f"{type(exc).__name__}: {exc}")
        detail, ok = str(wrong), False
    return {"check": function.__name__, "ok": ok, "detail": detail}


if __name__ == "__main__":
    print(json.dumps([check(function) for function in CHECKS[sys.argv[1]]]))
