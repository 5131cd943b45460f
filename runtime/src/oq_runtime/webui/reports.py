"""The page ``engine/<number>/report``: what ``oq-report`` says of a calculation.

A process of its own makes it each time it is asked for: it reads files that may be damaged. Nothing
of it is kept. How many are made at a time, and how long each may take, is bounded.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

from django.http import HttpResponse
from django.views.decorators.http import require_GET
from openquake.commonlib import logs

from oq_runtime import processes
from oq_runtime.engine import jobtable
from oq_runtime.errors import InputError
from oq_runtime.text import clean
from oq_runtime.webui.access import Refused

#: seconds for a page; the engine's import may be most of it
LIMIT_S = 120.0
#: pages that are made at a time; of these one for each account
MOST = 2
#: the page says the same of itself; from here it is no page of the site either
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"

lock = threading.Lock()
under_way: set[str] = set()


@require_GET  # type: ignore[untyped-decorator]
def report(request: Any, calc_id: int) -> Any:
    """The page about a calculation that has ended."""
    job = jobtable.JobTable(logs.dbcmd).job(calc_id)
    if job is None or job.status in jobtable.UNFINISHED:
        state = "deleted" if job is None else f"{job.status}; wait for its end"
        raise InputError(f"calculation {calc_id} is {state}")
    jobtable.check_datastore(Path(job.path), f"calculation {calc_id}")
    account = request.user.get_username()
    with lock:
        if account in under_way or len(under_way) >= MOST:
            raise Refused(503, "another report is being made; try again in a minute")
        under_way.add(account)
    try:
        page = made(job.path)
    finally:
        under_way.discard(account)
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "private, no-store"}
    return HttpResponse(page, headers=headers)


def made(datastore: str) -> bytes:
    """Return the page of a datastore.

    :raises InputError: where it cannot be made
    :raises Refused: after LIMIT_S
    """
    command = processes.python("oq_runtime.commands.report", datastore, "-")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        what = f"the report was not made within {LIMIT_S:.0f} s"
        raise Refused(503, f"{what}; oq-report on the command line has no limit") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        what = said.removeprefix("oq-report: ") or f"it {processes.ending(done.returncode)}"
        raise InputError(f"the report could not be made: {clean(what)}")
    return done.stdout
