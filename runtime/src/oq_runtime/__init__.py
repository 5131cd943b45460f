"""ZeroMQ master/worker execution for the OpenQuake engine."""

import contextlib
import os
import sys

__version__ = "0.1.0"


def leave_working_directory_out() -> None:
    """Import nothing from the working directory for an empty entry of PYTHONPATH.

    There is one where somebody has put a path before or behind a variable that was not set. The
    working directory may be the folder of a job, in which others put files; so to be called before
    anything else is imported.
    """
    given = os.environ.get("PYTHONPATH", "")
    meant = [entry for entry in given.split(os.pathsep) if entry]
    if not given or given == os.pathsep.join(meant):
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(meant)  # of what is started
    with contextlib.suppress(OSError):  # it is not there any more
        here = os.getcwd()
        if here not in map(os.path.abspath, meant):
            sys.path[:] = [path for path in sys.path if path != here]
