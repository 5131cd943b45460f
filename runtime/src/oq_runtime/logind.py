"""What systemd ends and removes of a user who logs out: processes, and files in shared memory.

With ``KillUserProcesses=yes`` in logind.conf(5) the processes of a log-in end with it, in whatever
session(7) they are. With ``RemoveIPC=yes``, the default, the last log-in of an ordinary user takes
with it what he has in shared memory, also that of processes which belong to no log-in, as of a
service or of cron. A log-in lasts as long as a process that belongs to it. Of a user who "lingers"
(loginctl(1)) everything stays, and what runs under his service manager.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from pathlib import Path

#: a file for each user who lingers
LINGERING = Path("/var/lib/systemd/linger")
LOGIND = (
    "org.freedesktop.login1",
    "/org/freedesktop/login1",
    "org.freedesktop.login1.Manager",
)
#: the greatest number of an account of the system, whose shared memory stays (login.defs(5))
SYSTEM_UID = 999
#: seconds for an answer of logind
ANSWER_SECS = 5.0


def outlive() -> tuple[list[str], str]:
    """Return the command under which a job outlives its user's log-in, and why that cannot be done.

    None, and no words, where a job does so by itself.
    """
    if os.geteuid() == 0 or not _has("KillUserProcesses"):
        return [], ""
    user = _user()
    if (LINGERING / user).exists():
        return ["systemd-run", "--user", "--scope", "--quiet", "--collect", "--"], ""
    return [], (
        "systemd ends this job when you log out (KillUserProcesses=yes in logind.conf); "
        f"to keep later ones: loginctl enable-linger {user}, once, by root"
    )


def removes_memory(cgroups: Path = Path("/proc/self/cgroup")) -> bool:
    """Whether what this process has in shared memory may be removed when its user logs out.

    :param cgroups: those of the process
    """
    uid = os.geteuid()
    if uid <= SYSTEM_UID or (LINGERING / _user()).exists():
        return False
    try:
        ours = re.search(rf"/user-{uid}\.slice/", cgroups.read_text())
    except OSError:
        ours = None
    return not ours and _has("RemoveIPC")


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _has(setting: str) -> bool:
    """Whether logind of this machine has a setting; not where nobody says so."""
    command = ("busctl", "get-property", *LOGIND, setting)
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.stdout.strip() == "b true"
