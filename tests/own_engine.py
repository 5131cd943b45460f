"""An engine of its own for a test, and one job by ``oq-run`` under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

OQ_RUN = (sys.executable, "-m", "oq_runtime.commands.run")
LIMIT_S = 600.0


def private_engine(home: Path) -> dict[str, str]:
    """Return the environment of an engine with its own configuration, database and TMPDIR."""
    for name in ("oqdata", "tmp"):
        (home / name).mkdir(parents=True, exist_ok=True)
    cfg = home / "openquake.cfg"
    cfg.write_text(
        "[dbserver]\nmulti_user = false\nhost = 127.0.0.1\n"
        f"file = {home}/oqdata/db.sqlite3\n[oq_runtime]\ncode = import oq_runtime.activate\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("OQ_")}
    return env | {
        "OQ_CONFIG_FILE": str(cfg),
        "OQ_DATADIR": str(home / "oqdata"),
        "TMPDIR": str(home / "tmp"),
        "CI": "true",
        "PYTHONHASHSEED": "0",
    }


def run(
    env: dict[str, str], job: Path, *options: str, limit_s: float = LIMIT_S
) -> tuple[Path | None, str]:
    """
    Run a job to its end.

    :param env: of ``private_engine``
    :param options: more of ``oq-run``
    :returns: its datastore and what ``oq-run`` has said, or None and the error
    :raises subprocess.TimeoutExpired: ``oq-run`` was killed, its other processes end by themselves
    """
    argv = [*OQ_RUN, str(job), "--json", "--export-dir", env["TMPDIR"], *options]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=limit_s)
    if not done.stdout.startswith("{"):
        return None, done.stderr.strip()
    report = json.loads(done.stdout)
    if done.returncode:
        return None, report["error"]
    return Path(report["jobs"][0]["datastore"]), done.stderr
