"""Metrics: what is told, how it is asked for; rules and dashboard ask for what there is."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser

from oq_runtime import metrics
from oq_runtime.metrics import MOST_CLIENTS, Exporter, of_agent, of_session
from oq_runtime.priority import Priority
from oq_runtime.wire import protocol
from oq_runtime.wire.protocol import AgentState, AgentStatus, LeaseStatus, Node, NodeState, Phase
from tests.leftovers import wait_for

RULES = Path(__file__).parents[2] / "monitoring"
#: what Prometheus adds by itself
ITS_OWN = {"up"}
SECRET = "calculation 42 of alice"
AGENT = AgentStatus(
    host="w1", pid=1, slots=8, busy=3, jobs=[SECRET], memory=0.25, engine="3.26.2",
    state=AgentState.DRAINING, ready=2, beat_age_s=1.5, stuck=1,
    leases=[LeaseStatus(name=SECRET, user="alice", title=SECRET, age_s=1.0, slots=8,
                        priority=Priority.NORMAL, busy=3, done=1, total=9, left_s=None)],
)  # fmt: skip
SESSION = protocol.Status(
    job="j",
    phases=[
        Phase(name="classical", job=SECRET, total=10, done=4, running=2, retries=1,
              received_bytes=500),
        Phase(name="post", job=SECRET, total=3, preempted=2, received_bytes=50),
    ],
    nodes=[
        Node(host="w1", slots=4, busy=2, state=NodeState.LEASED),
        Node(host="w2", slots=0, busy=0, state=NodeState.CALLING, reason=SECRET),
    ],
)  # fmt: skip
#: a text of OpenMetrics as its families
families: Callable[[str], Iterable[Any]] = parser.text_string_to_metric_families
OVER: Counter[type[protocol.Message]] = Counter({protocol.Ended: 5, protocol.Died: 2})


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    found = Exporter("127.0.0.1", [0])
    found.take([*of_agent(AGENT, OVER, 1234), *of_session(SESSION)])
    yield found
    found.close()


def asked(exporter: Exporter, accept: str = "application/openmetrics-text") -> tuple[str, str]:
    """The type and the text of an answer."""
    url = f"http://127.0.0.1:{exporter.server.server_port}/metrics"
    request = urllib.request.Request(url, headers={"Accept": accept})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families(text)
        for sample in family.samples
    }


def test_figures(exporter: Exporter) -> None:
    kind, text = asked(exporter)
    assert kind.startswith("application/openmetrics-text")
    found = samples(text)
    assert {name: value for (name, labels), value in found.items()
          if name.startswith("oq_") and not labels} == {
        "oq_agent_slots": 8, "oq_agent_busy_slots": 3, "oq_agent_stuck_slots": 1,
        "oq_agent_ready_workers": 2,
        "oq_agent_sessions": 1, "oq_agent_memory_used_ratio": 0.25,
        "oq_agent_beat_age_seconds": 1.5, "oq_agent_results_bytes_total": 1234,
        "oq_session_slots": 4, "oq_session_busy_slots": 2, "oq_session_running_tasks": 2,
        "oq_session_open_tasks": 9, "oq_session_waiting": 0,
        "oq_session_tasks_submitted_total": 13, "oq_session_tasks_completed_total": 4,
        "oq_session_retries_total": 1, "oq_session_preemptions_total": 2,
        "oq_session_received_bytes_total": 550,
    }  # fmt: skip
    assert found["oq_agent_state", ("draining",)] == 1 and found["oq_agent_state", ("up",)] == 0
    assert found["oq_agent_attempts_total", ("died",)] == 2
    assert found["oq_session_nodes", ("leased",)] == found["oq_session_nodes", ("calling",)] == 1
    assert found["process_resident_memory_bytes", ()] > 0


def test_nothing_names_a_job_or_a_user(exporter: Exporter) -> None:
    text = asked(exporter)[1]
    assert "alice" not in text and "42 of" not in text
    labels = {label for family in families(text)
              for sample in family.samples for label in sample.labels}  # fmt: skip
    assert labels == {"engine", "version", "state", "outcome"}


def test_what_is_told_last_is_answered(exporter: Exporter) -> None:
    exporter.take(of_agent(AGENT, OVER, 2 * 1234))
    assert samples(asked(exporter)[1])["oq_agent_results_bytes_total", ()] == 2 * 1234


def test_clients_that_say_nothing(exporter: Exporter) -> None:
    """No more than so many are waited for, and not for long."""
    address = ("127.0.0.1", exporter.server.server_port)
    silent = [socket.create_connection(address) for _ in range(MOST_CLIENTS + 3)]
    try:
        for one in silent:
            one.settimeout(20)
        refused = [one for one in silent[MOST_CLIENTS:] if one.recv(1) == b""]
        assert len(refused) == 3
        silent[0].close()
        assert wait_for(lambda: answers(exporter), 20)
    finally:
        for one in silent:
            one.close()


def test_clients_that_never_come_to_an_end(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then is soon enough for each read."""
    monkeypatch.setattr(metrics, "ANSWER_SECS", 1.0)
    address = ("127.0.0.1", exporter.server.server_port)
    slow = [socket.create_connection(address) for _ in range(MOST_CLIENTS)]

    def served() -> bool:
        for one in slow:
            with contextlib.suppress(OSError):
                one.sendall(b"G")
        return answers(exporter)

    try:
        assert wait_for(served, 20)
    finally:
        for one in slow:
            one.close()


def answers(exporter: Exporter) -> bool:
    try:
        return bool(asked(exporter)[1])
    except OSError:
        return False


def test_sessions_share_the_ports() -> None:
    with socket.socket() as taken, socket.socket() as free:
        for one in (taken, free):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1], free.getsockname()[1]]
        free.close()
        second = Exporter("127.0.0.1", ports)
        assert second.server.server_port == ports[1]
        second.close()
    assert metrics.session_ports(9680) == list(range(9681, 9690))


def test_metrics_hold_nobody_back(caplog: pytest.LogCaptureFixture) -> None:
    assert metrics.start("127.0.0.1", metrics.agent_ports(0)) is None
    assert not caplog.messages
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert metrics.start("127.0.0.1", [taken.getsockname()[1]]) is None
    [told] = caplog.messages
    assert told.startswith("no metrics on 127.0.0.1, port ") and "in use" in told


def test_without_the_library() -> None:
    code = "import logging, sys; sys.modules['prometheus_client'] = None\n"
    code += "from oq_runtime import metrics; print(metrics.start('127.0.0.1', [0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "None\n" and "install oq-runtime[metrics]" in done.stderr


# ---- rules and dashboard


def expressions() -> list[str]:
    """What the dashboard asks for."""
    found = json.loads((RULES / "dashboard.json").read_text())
    return [target["expr"] for panel in found["panels"] for target in panel["targets"]]


def test_they_ask_for_what_there_is(exporter: Exporter) -> None:
    there = {name for name, _ in samples(asked(exporter)[1])} | ITS_OWN
    rules = re.findall(r"^ +expr: (.*)$", (RULES / "alerts.yml").read_text(), re.MULTILINE)
    assert len(rules) == 6 and len(expressions()) > 10
    named = {name for text in [*rules, *expressions()] for name in re.findall(r"\boq_\w+", text)}
    assert named and named <= there, named - there


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (prometheus)")
def test_promtool_agrees(exporter: Exporter, tmp_path: Path) -> None:
    """Of the figures, the rules and their tests, the example, and the dashboard's expressions."""
    text = asked(exporter, "text/plain")[1]
    records = [{"record": f"x:{n}", "expr": expr} for n, expr in enumerate(expressions())]
    (tmp_path / "dashboard.yml").write_text(
        json.dumps({"groups": [{"name": "dashboard", "rules": records}]})
    )
    for words, given in [
        (["check", "metrics"], text),
        (["check", "rules", "alerts.yml"], ""),
        (["check", "rules", str(tmp_path / "dashboard.yml")], ""),
        (["check", "config", "--syntax-only", "prometheus.example.yml"], ""),
        (["test", "rules", "alerts_test.yml"], ""),
    ]:
        done = subprocess.run(
            ["promtool", *words], cwd=RULES, input=given, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), (words, done.stderr, done.stdout)
