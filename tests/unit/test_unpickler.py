"""What the DbServer reads of a pickle, and what it refuses; bytes in, data or Refused out."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from oq_runtime.engine.dbserver import read_command
from oq_runtime.engine.unpickler import MAX_LEVELS, MAX_UNFOLDED_BYTES, Refused, check_size
from tests import pickles

#: by which this process may grow through all of them
GROWTH_BYTES = 200 << 20


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "command",
    [
        ("getpid",),
        ("get_job", -1, None),
        ("log", 1, datetime.now(UTC), "INFO", "MainProcess/1", "straße ≥ 1\n\0\ud800"),
        ("update_job", 1, {"start_time": datetime(2028, 1, 1), "status": "executing", 1: 2.5}),
        ("SELECT * FROM job WHERE id IN (?X)", [1, -(2**70), True, 0.1, 1e300]),
        ("create_outputs", 1, [("hcurves", 12.5), ("hmaps", None)], 10**15),
        ("import_job", 1, "x" * 3_000_000, [timedelta(1), timedelta(2, 3, 4)]),
    ],
    ids=lambda command: command[0],
)
def test_what_clients_send_is_read(command: tuple[Any, ...], protocol: int) -> None:
    assert read_command([pickle.dumps(command, protocol)]) == command


def test_settings_of_engine_3_23_are_read() -> None:
    name = pickles.text("openquake.baselib") + pickles.text("DotDict") + b"\x93"
    item = pickles.text("ctrl_port") + pickles.text("1909")
    data = b"\x80\x04" + pickles.text("workers_start") + name + b")\x81" + item + b"s\x86."
    assert read_command([data]) == ("workers_start", {"ctrl_port": "1909"})


def test_nothing_else_is_read(tmp_path: Path) -> None:
    mark = tmp_path / "done"
    before = psutil.Process().memory_info().rss
    tried = dict(pickles.attacks(str(mark)))
    assert len(tried) > 400
    wrong = []
    for name, data in tried.items():
        try:
            wrong.append((name, read_command([data])))
        except Refused as exc:
            assert len(str(exc)) < 200 and str(exc).isprintable(), name
    assert not wrong
    assert not mark.exists()
    assert psutil.Process().memory_info().rss - before < GROWTH_BYTES


def test_parts_and_bytes_are_bounded() -> None:
    data = pickle.dumps(("get_job", 1))
    with pytest.raises(Refused, match="2 parts"):
        read_command([data, data])
    with pytest.raises(Refused, match="0 parts"):
        read_command([])
    with pytest.raises(Refused, match="bytes"):
        read_command([pickle.dumps(("log", "x" * (4 << 20)))])


def test_size_is_that_of_what_would_be_written_out() -> None:
    check_size(nested(MAX_LEVELS))
    with pytest.raises(Refused, match="levels"):
        check_size(nested(MAX_LEVELS + 1))
    shared = nested(MAX_LEVELS - 1)
    check_size([shared, shared])
    with pytest.raises(Refused, match="levels"):
        check_size([shared, [[shared]]])
    text = "x" * (MAX_UNFOLDED_BYTES // 4)
    check_size([text] * 3)
    with pytest.raises(Refused, match="unfolds"):
        check_size([text] * 5)
    with pytest.raises(Refused, match="unfolds"):
        check_size({"a": text, "b": {text: [text, text], 5: [text]}})
