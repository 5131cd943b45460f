"""What keeps a detached job where systemd ends all that a user has left when he logs out.

With ``KillUserProcesses=yes`` in logind.conf(5) the processes of a log-in end with it, in whatever
session(7) they are; after the last one the user's own service manager ends as well, and what he has
in shared memory is removed. Of a user who "lingers" (loginctl(1)) the manager stays, and what runs
under it.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

#: a file for each user who lingers
LINGERING = Path("/var/lib/systemd/linger")
LOGIND = (
    "org.freedesktop.login1",
    "/org/freedesktop/login1",
    "org.freedesktop.login1.Manager",
)
#: seconds for an answer of logind
ANSWER_SECS = 5.0


def outlive() -> tuple[list[str], str]:
    """Return the command under which a job outlives its user's log-in, and why that cannot be done.

    None, and no words, where a job does so by itself.
    """
    if os.geteuid() == 0 or not _kills():
        return [], ""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    if (LINGERING / user).exists():
        return ["systemd-run", "--user", "--scope", "--quiet", "--collect", "--"], ""
    return [], (
        "systemd ends this job when you log out (KillUserProcesses=yes in logind.conf); "
        f"to keep later ones: loginctl enable-linger {user}, once, by root"
    )


def _kills() -> bool:
    """Whether this machine ends what users leave; not where nobody says so."""
    command = ("busctl", "get-property", *LOGIND, "KillUserProcesses")
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.stdout.strip() == "b true"
