"""Which versions of the engine fit: those that have what the runtime takes hold of.

What is taken hold of decides, not the number: a version that was never tested gets one warning.
"""

from __future__ import annotations

import functools
import logging

from oq_runtime.errors import UnsupportedEngine

#: versions with which every test is run
TESTED = ("3.23.5", "3.25.1", "3.26.2")


def installed() -> str:
    """Return the version of the installed engine."""
    from openquake import baselib

    return str(baselib.__version__)


def misfit(what: str) -> UnsupportedEngine:
    """Return the error for an engine that lacks something.

    :param what: what it lacks
    """
    return UnsupportedEngine(
        f"OpenQuake engine {installed()} does not fit the runtime ({what}); "
        f"install one of {', '.join(TESTED)}"
    )


@functools.cache
def warn() -> None:
    """Say once per process that the installed version was not tested, if that is so."""
    if installed() not in TESTED:
        logging.warning(
            "OpenQuake engine %s has all that the runtime needs, but only %s are tested: compare "
            "a result with that of the engine alone",
            installed(),
            ", ".join(TESTED),
        )
