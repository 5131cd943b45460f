"""What a node must have in common with the master, and how a difference is told."""

from __future__ import annotations

import importlib.metadata
import os
import sys

from oq_runtime.core.limits import DEFAULTS, Limits
from oq_runtime.text import clean
from oq_runtime.wire.protocol import Facts

#: characters of a value that are shown
MOST_CHARACTERS = 200
#: what the fields of Facts are called in a message
NAMES = {
    "engine": "OpenQuake engine",
    "python": "Python",
    "numpy": "numpy",
    "dbserver": "[dbserver] host",
    "shared_dir": "[directory] shared_dir",
    "beat_s": "[oq_runtime] beat_s",
    "suspect_s": "[oq_runtime] suspect_s",
    "lost_s": "[oq_runtime] lost_s",
    "urgent_group": "[oq_runtime] urgent_group",
}


def own(
    dbserver: str = "",
    shared_dir: str = "",
    limits: Limits = DEFAULTS,
    urgent_group: str = "",
) -> Facts:
    """Return the facts of this host: what decides compatibility (pickles, paths, patience), and who
    may be urgent.

    A shared_dir that this process cannot read counts as none. Of the limits those are compared by
    which master and node judge each other's silence.
    """
    try:
        engine = importlib.metadata.version("openquake.engine")
    except importlib.metadata.PackageNotFoundError:
        engine = "not installed"
    readable = shared_dir and os.access(shared_dir, os.R_OK | os.X_OK)
    return Facts(
        engine=engine,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        numpy=importlib.metadata.version("numpy").split(".")[0],
        dbserver=dbserver,
        shared_dir=shared_dir if readable else f"{shared_dir} (not readable)" if shared_dir else "",
        beat_s=f"{limits.beat_s:g}",
        suspect_s=f"{limits.suspect_s:g}",
        lost_s=f"{limits.lost_s:g}",
        urgent_group=urgent_group,
    )


def difference(master: Facts, node: Facts) -> str:
    """Return what differs, with both values, or an empty string."""
    return "; ".join(
        f"{title} is {clean(getattr(node, field), MOST_CHARACTERS) or 'not set'} on the node and "
        f"{clean(getattr(master, field), MOST_CHARACTERS) or 'not set'} on the master"
        for field, title in NAMES.items()
        if getattr(node, field) != getattr(master, field)
    )
