"""What a job is made of, and where its files are: read with the engine's own functions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: directories that are emptied, and where the results of all users meet
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))
#: below the export directory, where event based jobs compare themselves with classical ones
COMPARED = "cl"


def survey(readinput: Any, oq: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a job that is not run.

    :param readinput: the engine's module
    :param oq: the engine's parameters of the job
    :param params: as the job file gives them
    :returns: ``mode``, ``sites``, ``sources`` and ``realizations``, None where they come from
        another job or there are none; ``tasks``: of a phase, None: so many for each slot
    """
    of_parent = bool(oq.hazard_calculation_id)
    sites = sources = realizations = None
    if not of_parent:
        found = readinput.get_site_collection(oq)
        sites = None if found is None else len(found)
        if {"source_model_logic_tree", "source_model"} & set(oq.inputs):
            csm = readinput.get_composite_source_model(oq)
            sources, realizations = len(csm.get_sources()), csm.full_lt.get_num_paths()
        elif oq.inputs.get("gsim_logic_tree") or getattr(oq, "gsim", None):
            realizations = readinput.get_gsim_lt(oq).get_num_paths()
    return {
        "mode": oq.calculation_mode,
        "sites": sites,
        "sources": sources,
        "realizations": int(realizations) if realizations else None,
        "tasks": oq.concurrent_tasks if "concurrent_tasks" in params else None,
        "parent": oq.hazard_calculation_id,
    }


def is_temporary(folder: str) -> bool:
    """Whether an export directory is one that is emptied: exports would be lost, or others'."""
    # not tempfile's, which for the engine process of oq-run is the session's
    return Path(folder) in (*TEMPORARY, Path(os.environ.get("TMPDIR") or TEMPORARY[0]))


def exported(folder: Path, job: int, since_s: float) -> list[Path]:
    """Return the files that a job has exported.

    Their names end with its number (``build_fname`` in ``openquake/commonlib/datastore.py``).

    :param since_s: the start of the job, in seconds since 1970
    """
    places = (folder, folder / COMPARED)
    files = [path for place in places for path in place.glob(f"*_{job}.*")]
    return sorted(path for path in files if path.stat().st_mtime >= since_s - 1)
