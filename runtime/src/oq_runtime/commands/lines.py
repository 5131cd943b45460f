"""What ``oq-run`` says of a job in a line: what and where it is, what it waits for and leaves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oq_runtime.config import Config
from oq_runtime.text import MOST_NAMES, clean, counted
from oq_runtime.wire.protocol import NodeState, Status

#: characters of a job's description, and names of exported files, that are shown
DESCRIPTION_CHARACTERS, MOST_FILES = 100, 4
#: of a phase, where the job file does not say (``Starmap.CT`` in ``openquake/baselib/parallel.py``)
TASKS_PER_SLOT = 2
#: nodes that have done most tasks, and that have done least, which are named
MOST_NODES = 5

#: what oq plot draws, by the output that it needs; the first that there is
PLOTS = {"Hazard Maps": "hmaps", "Hazard Curves": "hcurves"}

NO_NODE = (
    "no node has slots for this job; oq-workers status says why, oq-workers start starts those "
    "that are down"
)
NO_SHARE = (
    "no slot is free for this job; it gets its share in turn. oq-workers jobs says who has the "
    "slots; oq-workers status names processes that were killed and do not end"
)
NOT_STARTED = (
    "no node begins with its tasks; oq-workers jobs says whose tasks come first, oq-workers status "
    "where workers do not start; big arguments may still be on their way"
)


def waits_for(status: Status, *, cluster: bool) -> tuple[str, str]:
    """Return what the tasks of a job wait for, and a line on it, or no words."""
    if status.note:
        return "a port", status.note
    busy = [node for node in status.nodes if node.busy]
    if cluster and busy and all(node.unstarted for node in busy):
        return "workers", NOT_STARTED
    if not cluster or any(node.slots for node in status.nodes):
        return "", ""
    leased = any(node.state is NodeState.LEASED for node in status.nodes)
    return ("slots", NO_SHARE) if leased else ("nodes", NO_NODE)


def describe(path: Path) -> str:
    """Return the name of a job file with the description that is in it."""
    name = str(Path(path.parent.name, path.name))
    text = "" if path.suffix.lower() == ".zip" else path.read_text(errors="replace")
    found = re.search(r"^\s*description\s*[=:](.*)$", text, re.MULTILINE)
    words = clean(found[1].strip(), DESCRIPTION_CHARACTERS) if found else ""
    return f"{name} ({words})" if words else name


def place(settings: Config) -> str:
    """Say where the tasks are run, and on how many slots."""
    if settings.cluster is None:
        return f"this machine, {counted(settings.cores, 'slot')}"
    hosts = {host: slots for host, slots in settings.cluster.hosts.items() if slots}
    nodes = f"{counted(len(hosts), 'node')} ({', '.join(list(hosts)[:MOST_NAMES])}"
    nodes += ", ...)" if len(hosts) > MOST_NAMES else ")"
    known = slots(settings)
    return f"{nodes}, {counted(known, 'slot')}" if known else f"{nodes}, on all their cores"


def slots(settings: Config) -> int | None:
    """Return how many tasks are run at a time, None where the nodes alone know it."""
    if settings.cluster is None:
        return settings.cores
    each = settings.cluster.hosts.values()
    return None if -1 in each else sum(each)


def surveyed(row: dict[str, Any], slots: int | None) -> str:
    """Say how large a job is, in a line."""
    if "mode" not in row:
        return f"{row['file']}: its size depends on the job before it"
    nouns = ("sites", "sources", "realizations")
    found = [counted(row[noun], noun[:-1]) for noun in nouns if row[noun] is not None]
    if row["parent"]:
        found.append(f"the hazard of job {row['parent']}")
    number = row["tasks"] or (slots and TASKS_PER_SLOT * slots)
    tasks = counted(number, "task") if number else f"{TASKS_PER_SLOT} tasks a slot"
    return f"{row['file']}: {row['mode']}, {', '.join(found)}; about {tasks} in its main phase"


def shared_out(nodes: dict[str, int]) -> list[str]:
    """Say how many tasks of a job each node has done, where there is more than one.

    :param nodes: tasks of each, most first
    """
    if len(nodes) < 2:
        return []
    found = [f"{node} {tasks}" for node, tasks in nodes.items()]
    if len(found) > 2 * MOST_NODES:  # who has done least tells as much as who has done most
        found = [*found[:MOST_NODES], "...", *found[-MOST_NODES:]]
    return [f"tasks of {counted(len(nodes), 'node')}: {', '.join(found)}"]


def exports(files: Sequence[str]) -> list[str]:
    """Say what was exported, and where, a line for each directory."""
    names: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        names.setdefault(folder, []).append(name)
    lines = []
    for folder, found in names.items():
        more = f" and {len(found) - MOST_FILES} more" if len(found) > MOST_FILES else ""
        shown = ", ".join(found[:MOST_FILES])
        lines.append(f"exported {counted(len(found), 'file')} to {folder}: {shown}{more}")
    return lines


def next_steps(row: dict[str, Any]) -> list[str]:
    """Return the commands that show the results of a job, or export them."""
    job, steps = row["job"], []
    if not row["exported"]:
        steps.append(f"export: oq engine --eos {job} DIR --exports csv")
    named = {output["name"] for output in row["outputs"]}
    for name, what in PLOTS.items():
        if row["imts"] and name in named:
            picture = f"{what}_{job}.png"
            steps.append(
                f'plot: oq plot "{what}?kind=mean&imt={row["imts"][0]}" {job} -s {picture}'
            )
            break
    if "report" not in row:
        steps.append(f"report: oq-report {job}")
    return [*steps, f"log: oq engine --show-log {job}"]


def reported(row: dict[str, Any]) -> list[str]:
    """Say where the report of a job is, if there is one."""
    return [f"report {row['report']}"] if "report" in row else []
