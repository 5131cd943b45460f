"""Several Starmaps of one process: alive at once, taken in turns, dropped half way."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_starmap import run

pytestmark = [pytest.mark.timeout(180), pytest.mark.light]

SQUARES = sum(i * i for i in range(4))
TWO = """
a, b = parallel.Starmap(tasks.square), parallel.Starmap(tasks.square)
for i in range(4): a.submit((i,))
for i in range(4): b.submit((10 * i,))
"""


def test_two_are_alive_at_once(env: dict[str, str], tmpdir: Path) -> None:
    body = TWO + "say(b=b.reduce(acc=AccumDict(accum=0))['sum'])\n"
    body += "say(a=a.reduce(acc=AccumDict(accum=0))['sum'])\nparallel.Starmap.shutdown()"
    code, rows, err = run(env, tmpdir, body)
    assert (code, rows) == (0, [{"b": 100 * SQUARES}, {"a": SQUARES}]), err


def test_two_are_taken_in_turns(env: dict[str, str], tmpdir: Path) -> None:
    body = TWO + "say(pairs=sorted(x['sum'] + 0 * y['sum'] for x, y in zip(a, b)))\n"
    body += "parallel.Starmap.shutdown()"
    code, rows, err = run(env, tmpdir, body)
    assert (code, rows) == (0, [{"pairs": [0, 1, 4, 9]}]), err


def test_one_that_is_dropped_half_way_holds_nothing_back(env: dict[str, str], tmpdir: Path) -> None:
    """Its results fill the window of 1 MiB, and its last tasks would never end."""
    cfg = tmpdir / "openquake.cfg"
    cfg.write_text(Path(env["OQ_CONFIG_FILE"]).read_text() + "window_mb = 1\n")
    body = """
dropped = iter(parallel.Starmap(tasks.array, [(i, 100_000) for i in range(8)]))
next(dropped)
del dropped
dropped = iter(parallel.Starmap(tasks.hang, [(i,) for i in range(4)]))
next(dropped)
del dropped
say(value=sum(r['array'].sum() for r in parallel.Starmap(
    tasks.array, [(i, 100_000) for i in range(6)])))
parallel.Starmap.shutdown()
"""
    code, rows, err = run(env | {"OQ_CONFIG_FILE": str(cfg)}, tmpdir, body)
    assert (code, rows) == (0, [{"value": 15 * 100_000.0}]), err
