"""What a node must have in common with the master, and how a difference is told."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from oq_runtime import facts
from oq_runtime.core.limits import Limits
from oq_runtime.wire.protocol import Facts

MASTER = Facts(
    engine="3.26.2", python="3.11", numpy="2", dbserver="192.0.2.1", shared_dir="/oq_shared",
    beat_s="2", suspect_s="10", lost_s="30", urgent_group="hazard",
)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("engine", "3.25.1", "OpenQuake engine is 3.25.1 on the node and 3.26.2 on the master"),
        ("python", "3.12", "Python is 3.12 on the node and 3.11 on the master"),
        ("numpy", "1", "numpy is 1 on the node and 2 on the master"),
        (
            "dbserver",
            "10.0.0.1",
            "[dbserver] host is 10.0.0.1 on the node and 192.0.2.1 on the master",
        ),
        (
            "shared_dir",
            "",
            "[directory] shared_dir is not set on the node and /oq_shared on the master",
        ),
        ("beat_s", "60", "[oq_runtime] beat_s is 60 on the node and 2 on the master"),
        ("suspect_s", "9", "[oq_runtime] suspect_s is 9 on the node and 10 on the master"),
        ("lost_s", "99", "[oq_runtime] lost_s is 99 on the node and 30 on the master"),
        (
            "urgent_group",
            "",
            "[oq_runtime] urgent_group is not set on the node and hazard on the master",
        ),
    ],
)
def test_a_difference_names_both_values(field: str, value: str, text: str) -> None:
    node = msgspec.structs.replace(MASTER, **{field: value})
    assert facts.difference(MASTER, node) == text


def test_equal_hosts_do_not_differ() -> None:
    assert facts.difference(MASTER, MASTER) == ""


def test_all_differences_are_told_in_one_line() -> None:
    text = facts.difference(MASTER, Facts())
    assert text.count("not set on the node") == len(facts.NAMES) and "\n" not in text


def test_own_facts(tmp_path: Path) -> None:
    own = facts.own("192.0.2.1", str(tmp_path), urgent_group="hazard")
    assert (own.dbserver, own.shared_dir) == ("192.0.2.1", str(tmp_path))
    assert own.urgent_group == "hazard"
    assert own.engine.startswith("3.") and own.python.startswith("3.") and own.numpy in ("1", "2")


def test_limits_of_silence_are_facts() -> None:
    own, other = facts.own(), facts.own(limits=Limits(beat_s=1.5, max_attempts=9))
    assert (
        facts.difference(own, other) == "[oq_runtime] beat_s is 1.5 on the node and 2 on the master"
    )


def test_shared_dir_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    text = facts.difference(
        msgspec.structs.replace(MASTER, shared_dir=missing),
        msgspec.structs.replace(MASTER, shared_dir=facts.own("", missing).shared_dir),
    )
    assert f"{missing} (not readable) on the node and {missing} on the master" in text
