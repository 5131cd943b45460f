"""What became of the attempts of a job, kept in its datastore: the group ``oq_runtime``.

Written once, at the end of the job, whether it is complete or has failed. The format is described
in docs/explain.md. Not covered: how it is noted (``core.ledger``), and read (``core.explain``).
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy

from oq_runtime.core import explain
from oq_runtime.core.ledger import FIELDS, Outcome
from oq_runtime.engine.history import History
from oq_runtime.engine.jobtable import Status
from oq_runtime.session.client import Session
from oq_runtime.wire.protocol import Attempts

GROUP, FORMAT = "oq_runtime", 1
DTYPE = numpy.dtype([(name, f"<{kind}") for name, (kind, _) in FIELDS.items()])
SHARES = numpy.dtype([("at_s", "<f8"), ("node", "<u2"), ("slots", "<u4"), ("reason", "<u2")])
TEXT = h5py.string_dtype()


def install_kept(engine: Any) -> None:
    """Have the engine's ``run_calc`` keep what became of the attempts.

    :param engine: the module ``openquake.engine.engine``
    """
    engine_run_calc = engine.run_calc

    @functools.wraps(engine_run_calc)  # the engine has other processes find it by its name
    def run_calc(log: Any, *args: Any, **kwargs: Any) -> Any:
        began, began_s, state = time.time(), time.monotonic(), Status.FAILED
        try:
            calc = engine_run_calc(log, *args, **kwargs)
            state = Status.COMPLETE
            return calc
        except (KeyboardInterrupt, SystemExit):  # by a signal, as the engine takes it
            state = Status.ABORTED
            raise
        finally:
            facts = {"began": began, "began_s": began_s, "state": state}
            try:
                keep(log.calc_id, facts)
            except Exception as exc:  # whatever it is, the job has ended as it has
                logging.warning("what became of its tasks is not kept: %s", exc)

    engine.run_calc = run_calc


def keep(number: int, facts: dict[str, Any]) -> None:
    """Write the group of a calculation of this process; nothing where no task left it.

    :param facts: ``state``, and when it began, in seconds since 1970 and on the monotonic clock
    """
    from openquake.commonlib import logs

    session = Session.existing()
    path = Path(logs.get_datadir()) / f"calc_{number}.hdf5"
    if session is None or not path.exists():
        return
    found = session.attempts(f"calculation {number}")
    seconds = time.monotonic() - facts["began_s"]
    history = History.current()
    attributes = {
        "format": FORMAT,
        "version": importlib.metadata.version("oq-runtime"),
        "state": facts["state"].value,
        "began": facts["began"],
        "seconds": seconds,
        "replayed": history.replayed if history else 0,
    }
    with h5py.File(path, "r+") as file:
        write(file, found, facts["began_s"], attributes)


def write(
    file: h5py.File, found: Sequence[Attempts], began_s: float, attributes: dict[str, Any]
) -> None:
    """Write the group.

    :param found: what the broker has told
    :param began_s: when the job began, on its clock
    :param attributes: of the group
    """
    rows = numpy.frombuffer(b"".join(one.rows for one in found), DTYPE).copy()
    for name in FIELDS:
        if name in explain.TIMES:
            rows[name] -= began_s
    shares = numpy.array([msgspec.structs.astuple(share) for share in found[-1].shares], SHARES)
    shares["at_s"] -= began_s
    if GROUP in file:  # of an earlier run under this number
        del file[GROUP]
    group = file.create_group(GROUP)
    group.attrs.update(attributes)
    packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if len(rows) else {}
    group.create_dataset("attempts", data=rows, **packed)
    group.create_dataset("shares", data=shares)
    for name in ("functions", "nodes", "reasons"):
        words = [str(word) for word in getattr(found[-1], name)]
        group.create_dataset(name, data=numpy.array(words, object), dtype=TEXT)


def tasks_of_nodes(file: h5py.File) -> dict[str, int]:
    """Return how many tasks each node has done, most first; nothing where nothing is kept."""
    if GROUP not in file:
        return {}
    names = file[GROUP]["nodes"].asstr()[:].tolist()
    rows = file[GROUP]["attempts"][:]
    committed = rows["node"][rows["outcome"] == Outcome.COMMITTED]
    done = numpy.bincount(committed, minlength=len(names)).tolist()
    return dict(sorted(zip(names, done, strict=True), key=lambda of: (-of[1], of[0])))


def read(file: h5py.File) -> explain.Job | None:
    """Return what is kept in a datastore; None where there is nothing, or a later format."""
    group = file.get(GROUP)
    if group is None or group.attrs["format"] != FORMAT:
        return None
    functions, nodes, reasons = (
        group[name].asstr()[:].tolist() for name in ("functions", "nodes", "reasons")
    )
    attempts = []
    for row in group["attempts"][:].tolist():
        fields = dict(zip(FIELDS, row, strict=True))
        fields["func"] = functions[fields["func"]]
        fields["node"] = nodes[fields["node"]]
        fields["reason"] = reasons[fields["reason"]]
        fields["outcome"] = Outcome(fields["outcome"])
        attempts.append(explain.Attempt(**fields))
    shares = [
        explain.Share(at_s, nodes[node], slots, reasons[reason])
        for at_s, node, slots, reason in group["shares"][:].tolist()
    ]
    return explain.Job(float(group.attrs["seconds"]), attempts, shares)
