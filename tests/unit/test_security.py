"""Keys and the gate: who gets in, who does not, and what both sides are told, on real sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from oq_runtime.errors import ConfigError, SecurityError
from oq_runtime.files import private
from oq_runtime.wire import security
from oq_runtime.wire.monitor import Change, Event, Monitor
from oq_runtime.wire.security import Gate, Keys, read_secret
from tests.leftovers import wait_for

SECRET = "correct-horse-battery"
KEYS = Keys.derive(SECRET.encode())
LIMIT_S = 3.0


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def gate(context: zmq.Context[Any]) -> Iterator[Gate]:
    gate = Gate(context, KEYS)
    yield gate
    gate.stop()


def outcome(monitor: Monitor) -> Change | None:
    """What became of the first connection; None when nothing happens in time."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for event in monitor.events():
            if event.change is not Change.OPENED:
                return event.change
        monitor.socket.poll(100)
    return None


def meet(
    context: zmq.Context[Any], client_keys: Keys | None
) -> tuple[Change | None, Change | None, bool]:
    """Connect a client to a server of KEYS: what each sees of it, and whether a message comes."""
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    server.linger = client.linger = 0
    security.secure_server(server, KEYS)
    if client_keys:
        security.secure_client(client, client_keys)
    monitors = Monitor(server), Monitor(client)
    try:
        client.connect(f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}")
        with contextlib.suppress(zmq.Again):  # it was refused already
            client.send(b"hello", zmq.DONTWAIT)
        found = outcome(monitors[0]), outcome(monitors[1])
        arrived = bool(server.poll(500 if found[0] is not Change.ADMITTED else LIMIT_S * 1000))
        return *found, arrived
    finally:
        for monitor in monitors:
            monitor.close()
        server.close()
        client.close()


def stranger() -> Keys:
    """Knows the server's public key, and has a key of its own."""
    public, secret = zmq.curve_keypair()
    return dataclasses.replace(KEYS, client_public=public, client_secret=secret)


@pytest.mark.usefixtures("gate")
def test_the_right_key_gets_in(context: zmq.Context[Any]) -> None:
    assert meet(context, KEYS) == (Change.ADMITTED, Change.ADMITTED, True)


@pytest.mark.usefixtures("gate")
@pytest.mark.parametrize(
    "keys",
    [Keys.derive(b"another secret of 16"), stranger(), None],
    ids=["wrong secret", "stranger", "no encryption"],
)
def test_nobody_else_gets_in_and_both_sides_know(
    context: zmq.Context[Any], keys: Keys | None
) -> None:
    server, client, arrived = meet(context, keys)
    assert (server, client, arrived) == (Change.REFUSED, Change.REFUSED, False)


def test_without_a_gate_nobody_gets_in(context: zmq.Context[Any]) -> None:
    server, _, arrived = meet(context, KEYS)
    assert server is not Change.ADMITTED and not arrived


class OpenGate(Gate):
    def callback(self, domain: str, key: bytes) -> bool:
        return True


class ShutGate(Gate):
    def callback(self, domain: str, key: bytes) -> bool:
        return False


@pytest.mark.parametrize(("kind", "who"), [(OpenGate, "random"), (ShutGate, "known")])
def test_a_gate_that_does_not_work_is_found_out(
    context: zmq.Context[Any], kind: type[Gate], who: str
) -> None:
    with pytest.raises(SecurityError, match=f"a {who} key was"):
        kind(context, KEYS)


def test_libzmq_without_curve(context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oq_runtime.wire.security.zmq.has", lambda _: False)
    with pytest.raises(SecurityError, match="CURVE"):
        Gate(context, KEYS)


def test_keys_are_the_same_everywhere_and_all_different() -> None:
    assert Keys.derive(SECRET.encode()) == KEYS
    values = dataclasses.astuple(KEYS) + dataclasses.astuple(Keys.derive(SECRET.encode() + b"x"))
    assert len(set(values)) == 8
    assert all(len(value) == 40 for value in values), "Z85 of 32 bytes"


#: for OpenSSL: nothing but approved methods, of which no provider is there
FIPS = """\
openssl_conf = init
[init]
alg_section = methods
[methods]
default_properties = fips=yes
"""
CLUSTER = """\
[distribution]
oq_distribute = zmq
[dbserver]
host = 192.0.2.1
authkey = {secret}
[zworkers]
host_cores = 192.0.2.2 1
"""


@pytest.mark.parametrize(
    ("module", "args", "code"),
    [
        ("commands.run", ["{0}/job.ini"], 3),
        ("commands.workers", ["status"], 2),
        ("node.daemon", ["--address", "192.0.2.2"], 1),
        ("session.broker", ["--directory", "{0}/s", "--owner", "1", "--window-bytes", "1"], 1),
    ],
)
def test_a_host_that_refuses_the_methods_is_in_no_cluster(
    tmp_path: Path, module: str, args: list[str], code: int
) -> None:
    (tmp_path / "openssl.cnf").write_text(FIPS)
    (tmp_path / "openquake.cfg").write_text(CLUSTER.format(secret=SECRET))
    (tmp_path / "job.ini").write_text("[general]")
    (tmp_path / "s").mkdir(0o700)
    private.add_memory(tmp_path / "s", tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-m", f"oq_runtime.{module}", *(arg.format(tmp_path) for arg in args)],
        env=os.environ
        | {
            "OPENSSL_CONF": str(tmp_path / "openssl.cnf"),
            "OQ_CONFIG_FILE": str(tmp_path / "openquake.cfg"),
            "OQ_DISTRIBUTE": "zmq",  # the engine, once imported, has set another
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done
    *_, line = done.stderr.splitlines()  # oq-run says before what it runs
    assert "Traceback" not in done.stderr
    assert "this host refuses scrypt or BLAKE2b" in line and "oq-run --cores" in line
    assert SECRET not in line


def test_an_engine_that_does_not_load_on_such_a_host_is_told_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "openssl.cnf").write_text(FIPS)
    done = subprocess.run(
        [sys.executable, "-c", "from oq_runtime.engine import job; job.run(print)"],
        input=json.dumps({"session": str(tmp_path)}),
        env=os.environ | {"OPENSSL_CONF": str(tmp_path / "openssl.cnf")},
        capture_output=True,
        text=True,
    )
    said = (
        r"the engine cannot be loaded: .+ unsupported \(\w+ in numba/core/\w+\.py: .*hashlib\.sha1"
    )
    assert re.search(said, done.stdout), done


def test_secrets_are_not_shown() -> None:
    for secret in (KEYS.server_secret, KEYS.client_secret):
        assert secret.decode() not in repr(KEYS)


@pytest.mark.parametrize("authkey", ["changeme", "", "fifteen-letters"])
def test_weak_keys_are_refused_with_the_remedy(authkey: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_secret(authkey)
    assert "authkey" in str(caught.value) and "token_urlsafe" in str(caught.value)
    if authkey == "fifteen-letters":  # may be a part of the one that was meant
        assert authkey not in str(caught.value)


def test_file_form(tmp_path: Path) -> None:
    path = tmp_path / "authkey"
    path.write_text(f" {SECRET} \nignored\n")
    path.chmod(0o640)
    assert read_secret(f"file:{path}") == SECRET.encode()


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o660, 0o602])
def test_file_that_others_may_read_or_change(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "authkey"
    path.write_text(SECRET)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod") as caught:
        read_secret(f"file:{path}")
    assert SECRET not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "authkey"
    path.write_text(SECRET)
    path.chmod(0o640)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to uid 12345") as caught:
        read_secret(f"file:{path}")
    assert SECRET not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_file_that_one_may_not_read_says_whom_to_ask(tmp_path: Path) -> None:
    path = tmp_path / "authkey"
    path.write_text(SECRET)
    path.chmod(0o600)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    os.seteuid(12345)
    try:
        with pytest.raises(ConfigError, match="put you into the group root, and"):
            read_secret(f"file:{path}")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("content", [None, b"", b"short", b"\xff\xfe" * 20])
def test_file_that_cannot_be_used(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "authkey"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        read_secret(f"file:{path}")
    assert str(path) in str(caught.value)


def test_pipe_in_place_of_the_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "authkey", 0o600)
    with pytest.raises(ConfigError, match="is not a file, but a pipe"):
        read_secret(f"file:{tmp_path}/authkey")


@pytest.mark.usefixtures("gate")
def test_a_peer_that_hangs_up_has_no_wrong_key(context: zmq.Context[Any]) -> None:
    server = context.socket(zmq.ROUTER)
    security.secure_server(server, KEYS)
    monitor = Monitor(server)
    try:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        socket.create_connection(("127.0.0.1", port)).close()
        found: list[Event] = []
        assert wait_for(lambda: (found.extend(monitor.events()), len(found) == 3)[1], LIMIT_S)
    finally:
        monitor.close()
        server.close(linger=0)
    assert [event.change for event in found] == [Change.OPENED, Change.REFUSED, Change.CLOSED]
    assert "ended during the handshake" in found[1].reason
    assert found[0].descriptor == found[2].descriptor > 0
