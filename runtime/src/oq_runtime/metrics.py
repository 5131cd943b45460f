"""Figures for a Prometheus server: OpenMetrics over HTTP, where ``metrics_port`` is set.

The loop of an agent or of a broker hands over what it has at each beat, and a thread answers with
that: whoever asks costs the loop nothing, and sees nothing half changed. No label names a job or a
user, so that there are as many series as there are nodes. Whatever is wrong with the metrics, no
task waits for it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from oq_runtime.wire import protocol
from oq_runtime.wire.protocol import AgentState, AgentStatus, NodeState, Status

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

log = logging.getLogger(__name__)

#: ports above ``metrics_port`` for the sessions of a master, as many as there are receiver_ports
SESSION_PORTS = 9
#: who may ask at a time, seconds for which one is waited for, and that a whole question may take
MOST_CLIENTS, PATIENCE_SECS, ANSWER_SECS = 8, 5.0, 10.0
#: what an agent tells a broker of an attempt that is over -> how that is called here
OVER: dict[type[protocol.Message], str] = {
    protocol.Ended: "ended",
    protocol.Died: "died",
    protocol.Preempted: "preempted",
}


@dataclass(frozen=True, slots=True)
class Value:
    """A figure.

    ``total``: it only grows.
    """

    name: str
    meaning: str
    value: float
    total: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


def of_agent(status: AgentStatus, over: Counter[type[Any]], sent_bytes: int) -> list[Value]:
    """Return the figures of a node.

    :param over: how many attempts were over, by the kind of message that has told it
    :param sent_bytes: of the results of those that ended
    """
    about = {"version": importlib.metadata.version("oq-runtime"), "engine": status.engine}
    found = [
        Value("oq_agent_info", "Versions of runtime and engine.", 1, labels=about),
        Value("oq_agent_slots", "Tasks that the node runs at a time.", status.slots),
        Value("oq_agent_busy_slots", "Tasks that run.", status.busy),
        Value(
            "oq_agent_stuck_slots", "Slots whose workers were killed and do not end.", status.stuck
        ),
        Value("oq_agent_ready_workers", "Workers that wait for a task.", status.ready),
        Value("oq_agent_sessions", "Jobs that have a share of the slots.", len(status.leases)),
        Value("oq_agent_memory_used_ratio", "Part of the memory in use.", status.memory),
        Value(
            "oq_agent_beat_age_seconds",
            "Age of the oldest of the brokers' last beats; 0 without a job.",
            status.beat_age_s or 0.0,
        ),
        Value("oq_agent_results_bytes", "Results of attempts that ended.", sent_bytes, True),
    ]
    for state in AgentState:
        found.append(
            Value("oq_agent_state", "1 for the state that the node is in.",
                  float(state is status.state), labels={"state": state.value})
        )  # fmt: skip
    for kind, name in OVER.items():
        found.append(
            Value("oq_agent_attempts", "Attempts at tasks that are over.", over[kind], True,
                  {"outcome": name})
        )  # fmt: skip
    return found


def of_session(status: Status) -> list[Value]:
    """Return the figures of a session."""

    def count(name: str) -> int:
        return sum(getattr(phase, name) for phase in status.phases)

    open_tasks = count("total") - count("done")
    found = [
        Value("oq_session_slots", "Slots of the job.", sum(n.slots for n in status.nodes)),
        Value("oq_session_busy_slots", "Slots with a task.", sum(n.busy for n in status.nodes)),
        Value("oq_session_running_tasks", "Tasks that run.", count("running")),
        Value("oq_session_open_tasks", "Tasks without a result.", open_tasks),
        Value("oq_session_waiting", "1 while it waits for a port.", float(bool(status.note))),
        Value("oq_session_tasks_submitted", "Tasks of the engine.", count("total"), True),
        Value("oq_session_tasks_completed", "Tasks with a result.", count("done"), True),
        Value("oq_session_retries", "Attempts that had to be repeated.", count("retries"), True),
        Value("oq_session_preemptions", "Attempts interrupted for others.", count("preempted"),
              True),
        Value("oq_session_received_bytes", "Results received.", count("received_bytes"), True),
    ]  # fmt: skip
    states = Counter(node.state for node in status.nodes)
    for state in NodeState:
        found.append(
            Value("oq_session_nodes", "Nodes by what the session knows of them.", states[state],
                  labels={"state": state.value})
        )  # fmt: skip
    return found


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_SECS

    def setup(self) -> None:
        super().setup()
        # whoever sends a byte now and then would stay for ever
        self.end = threading.Timer(ANSWER_SECS, self._cut_off)
        self.end.daemon = True
        self.end.start()

    def finish(self) -> None:
        self.end.cancel()
        super().finish()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):  # it has gone away
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Note nothing of who asks."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers so many at a time, and looks up no names."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self.room = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note nothing of one who went away."""


class Exporter:
    """Shows the last figures to whoever asks over HTTP.

    :param address: of this host in the cluster
    :param ports: of which the first free one is taken
    :raises ImportError: without the library
    :raises OSError: when no port is free
    """

    def __init__(self, address: str, ports: Sequence[int]) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

        self.found: list[Value] = []
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        error = OSError("no port is given")
        for port in ports:
            try:
                self.server = _Server((address, port))
                break
            except OSError as exc:
                error = exc
        else:
            raise error
        self.server.set_app(make_wsgi_app(registry))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, found: list[Value]) -> None:
        """Answer with this from now on."""
        self.found = found

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for one in self.found:
            if one.name not in families:
                made = CounterMetricFamily if one.total else GaugeMetricFamily
                families[one.name] = made(one.name, one.meaning, labels=list(one.labels))
            families[one.name].add_metric(list(one.labels.values()), one.value)
        return families.values()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def start(address: str, ports: Sequence[int]) -> Exporter | None:
    """Return what answers on the first free port; None, and the log says why, where none can.

    :param ports: none where there are to be no metrics
    """
    if not ports:
        return None
    try:
        exporter = Exporter(address, ports)
    except ImportError:
        log.warning(
            "no metrics: metrics_port is set and prometheus_client is not installed; install "
            "oq-runtime[metrics]"
        )
        return None
    except (OSError, OverflowError) as exc:
        log.warning(f"no metrics on {address}, port {ports[0]} to {ports[-1]}: {exc}")
        return None
    log.info(f"metrics on http://{address}:{exporter.server.server_port}/metrics")
    return exporter


def agent_ports(metrics_port: int) -> list[int]:
    """Return the port of an agent, if it has one."""
    return [metrics_port] if metrics_port else []


def session_ports(metrics_port: int) -> list[int]:
    """Return the ports of which each session on the master takes one."""
    return [metrics_port + 1 + n for n in range(SESSION_PORTS)] if metrics_port else []
