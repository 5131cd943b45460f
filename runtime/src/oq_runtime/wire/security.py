"""Who may talk to whom: CURVE keys derived from the cluster's one secret, and a gate that is shut.

Every control socket on TCP is encrypted and authenticated by ZMTP's CURVE mechanism (RFC
26/ZMTP-CURVE). Who opens a data connection shows a ticket that it was told over such a one (PLAIN,
RFC 24/ZMTP-PLAIN), which keeps out who has none; what then comes has to be sealed (``seal``).
All members derive the same two key pairs from ``[dbserver] authkey``: one for whoever binds, one
for whoever connects. Without the secret no handshake completes, and nothing is decoded before that.
One more pair may be admitted, that of administrators. The nodes know its public half alone, and by
that who calls. Not covered: what an admitted member may do; the right to submit is the right to run
code.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from oq_runtime.errors import ConfigError, SecurityError
from oq_runtime.wire.monitor import Change, Monitor

#: characters of the shortest secret that is accepted
MIN_CHARACTERS = 16
#: cost of scrypt (RFC 7914): 16 MiB and about 50 ms
SCRYPT: dict[str, Any] = {"n": 2**14, "r": 8, "p": 1, "dklen": 32}
SALT = b"oq-runtime cluster secret 1"
DOMAIN, DATA_DOMAIN = b"oq-runtime", b"oq-runtime data"
#: sets what a socket needs to be secured
Secure = Callable[["zmq.Socket[Any]"], None]
#: milliseconds after which a connection that says nothing is closed
HANDSHAKE_MS = 10_000
#: milliseconds for each try of the self-test
TRY_MS = 1000
REMEDY = (
    "set [dbserver] authkey in openquake.cfg, the same on all nodes, to a random text, e.g. of "
    "python3 -c 'import secrets; print(secrets.token_urlsafe(32))', or to file:/path of a file "
    "with one"
)


def read_secret(authkey: str) -> bytes:
    """Return the secret of ``authkey``: the text itself, or ``file:/path``.

    Raises ConfigError, without showing the secret, when it is weak or its file cannot be used: it
    must belong to root or to who reads it, and nobody else may change it.
    """
    where = "[dbserver] authkey"
    if authkey.startswith("file:"):
        path = Path(authkey.removeprefix("file:"))
        where += f" ({path})"
        try:
            if path.is_fifo():
                raise OSError(errno.EINVAL, "is not a file, but a pipe")
            with path.open() as file:
                status = os.fstat(file.fileno())
                authkey = file.readline().strip()
        except PermissionError:
            raise ConfigError(
                f"{where}: only those who may read it may use this cluster; ask its administrator "
                f"to put you into the group {_group(path)}, and log in again"
            ) from None
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or "not a text file"
            raise ConfigError(f"{where}: {reason}") from None
        if status.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{where}: belongs to uid {status.st_uid}; chown it to root")
        if status.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise ConfigError(f"{where}: others may read it or change it; chmod g-w,o-rwx it")
    authkey = authkey.strip()
    if authkey == "changeme" or len(authkey) < MIN_CHARACTERS:
        what = (
            "the default" if authkey == "changeme" else f"shorter than {MIN_CHARACTERS} characters"
        )
        raise ConfigError(f"{where} is {what}; {REMEDY}")
    return authkey.encode()


def _group(path: Path) -> str:
    """Return the name of a file's group, or what to call it."""
    try:
        return path.group()
    except (KeyError, OSError):
        return "of the file"


@dataclass(frozen=True, slots=True)
class Keys:
    """The key pairs of the side that binds and of the side that connects, in Z85."""

    server_public: bytes
    server_secret: bytes = field(repr=False)
    client_public: bytes
    client_secret: bytes = field(repr=False)

    @classmethod
    def derive(cls, secret: bytes) -> Keys:
        """Return the same keys for the same secret: scrypt (RFC 7914), then BLAKE2b per label.

        Raises SecurityError where the platform refuses these, as hosts in FIPS mode do.
        """
        try:
            root = hashlib.scrypt(secret, salt=SALT, **SCRYPT)
            return cls(*_pair(root, b"server"), *_pair(root, b"client"))
        except (AttributeError, ValueError) as exc:
            raise SecurityError(
                "this host refuses scrypt or BLAKE2b, of which the keys of a cluster are made "
                f"(FIPS mode? {exc}); it can run jobs on its own, with oq_distribute = processpool "
                "or oq-run --cores, but be in no cluster"
            ) from exc


def _pair(root: bytes, label: bytes) -> tuple[bytes, bytes]:
    seed = bytearray(hashlib.blake2b(label, key=root, digest_size=32).digest())
    seed[0] &= 248  # clamped as RFC 7748, section 5, demands of an X25519 scalar
    seed[31] = seed[31] & 127 | 64
    secret = z85.encode(bytes(seed))
    return zmq.curve_public(secret), secret


def new_pair() -> tuple[str, str]:
    """Return the public and the secret half of a new key for administrators, as hexadecimals."""
    public, secret = (z85.decode(half).hex() for half in zmq.curve_keypair())
    return public, secret


def calling_with(keys: Keys, file: Path, public: str) -> Keys:
    """Return the keys for calls as an administrator, of whose pair the secret half is in a file.

    :param public: the other half, in hexadecimal digits
    :raises ConfigError: when this process may not read the file, or it belongs to another key
    """
    try:
        secret = bytes.fromhex(file.read_text())
        pair = zmq.curve_public(z85.encode(secret)), z85.encode(secret)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or "not a key"
        raise ConfigError(f"[oq_runtime] urgent_key_file {file}: {reason}") from None
    if z85.decode(pair[0]).hex() != public:
        raise ConfigError(f"[oq_runtime] urgent_key_file {file}: it is not the half of urgent_key")
    return replace(keys, client_public=pair[0], client_secret=pair[1])


def key_of(frame: zmq.Frame) -> str:
    """Return the key in hexadecimal digits with which the sender of a frame was admitted."""
    return z85.decode(str(frame.get("User-Id")).encode()).hex()


def secure_server(socket: zmq.Socket[Any], keys: Keys) -> None:
    """Make a socket that will bind admit nobody but holders of the keys."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.server_public, keys.server_secret
    _guard(socket, DOMAIN)


def secure_client(socket: zmq.Socket[Any], keys: Keys) -> None:
    """Make a socket that will connect talk to nobody but a holder of the keys."""
    socket.curve_serverkey = keys.server_public
    socket.curve_publickey, socket.curve_secretkey = keys.client_public, keys.client_secret


def ask_for_tickets(socket: zmq.Socket[Any]) -> None:
    """Make a socket that will bind admit nobody but holders of tickets that its gate knows."""
    socket.plain_server = True
    _guard(socket, DATA_DOMAIN)


def show_ticket(socket: zmq.Socket[Any], ticket: bytes) -> None:
    """Make a socket that will connect show a ticket; who sees it on the way finds it used up."""
    socket.plain_username = socket.plain_password = ticket.hex().encode()


def ticket_of(frame: zmq.Frame) -> bytes:
    """Return the ticket with which the sender of a frame was admitted."""
    return bytes.fromhex(str(frame.get("User-Id")))


def _guard(socket: zmq.Socket[Any], domain: bytes) -> None:
    socket.setsockopt(zmq.ZAP_DOMAIN, domain)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no gate, no entry
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


class Tickets:
    """Those that are still good, each for one connection, as ``zmq.auth`` asks for passwords."""

    def __init__(self) -> None:
        self.good: set[str] = set()

    def add(self, ticket: bytes) -> None:
        self.good.add(ticket.hex())

    def discard(self, ticket: bytes) -> None:
        self.good.discard(ticket.hex())

    def __contains__(self, user: str) -> bool:
        return user in self.good

    def __getitem__(self, user: str) -> str:
        self.good.discard(user)
        return user  # which is the password as well: it must not be empty


class Gate:
    """Admits the derived client key, and nobody else, to the sockets of a context (ZAP, RFC 27).

    :param also: a public key (hexadecimal) that is admitted as well

    To those that ask for tickets it admits whose are in ``tickets``. To be opened before the first
    bind: CURVE alone admits any client that knows the server's key. Tried at once; raises
    SecurityError when it does not shut.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys, also: str = "") -> None:
        if not zmq.has("curve"):
            raise SecurityError("this libzmq was built without CURVE; install pyzmq from its wheel")
        self.admitted = {keys.client_public, *([z85.encode(bytes.fromhex(also))] if also else [])}
        # not above: asyncio comes with it, for which oq-run would wait before its first line
        from zmq.auth.thread import ThreadAuthenticator

        self.authenticator = ThreadAuthenticator(context)
        self.authenticator.start()
        self.authenticator.configure_curve_callback(DOMAIN.decode(), credentials_provider=self)
        self.tickets = Tickets()
        passwords: Any = self.tickets
        self.authenticator.configure_plain(DATA_DOMAIN.decode(), passwords)
        try:
            self_test(context, keys, self.tickets)
        except BaseException:
            self.stop()
            raise

    def callback(self, domain: str, key: bytes) -> bool:
        """Say whether a client key (Z85) may enter; called by the authenticator."""
        return key in self.admitted

    def stop(self) -> None:
        self.authenticator.stop()


def self_test(context: zmq.Context[Any], keys: Keys, tickets: Tickets) -> None:
    """Try the gate of ``context``: who is known must pass, who is made up must not.

    Raises SecurityError otherwise; takes a few milliseconds.
    """
    public, secret = zmq.curve_keypair()
    stranger = Keys(keys.server_public, b"", public, secret)
    ticket, other = secrets.token_bytes(16), secrets.token_bytes(16)
    tickets.add(ticket)
    curve = functools.partial(secure_server, keys=keys)
    for server, client, what, passes in (
        (curve, functools.partial(secure_client, keys=keys), "a known key", True),
        (curve, functools.partial(secure_client, keys=stranger), "a random key", False),
        (ask_for_tickets, functools.partial(show_ticket, ticket=ticket), "a known ticket", True),
        (ask_for_tickets, functools.partial(show_ticket, ticket=other), "a random ticket", False),
    ):
        outcome = _try(context, server, client)
        if outcome is not (Change.ADMITTED if passes else Change.REFUSED):
            raise SecurityError(
                f"the self-test of the encryption failed: {what} was "
                f"{outcome.value if outcome else 'not answered'}"
            )


def _try(context: zmq.Context[Any], secure_server: Secure, secure_client: Secure) -> Change | None:
    """Return what becomes of a connection between two sockets made so."""
    server: zmq.Socket[Any] = context.socket(zmq.ROUTER)
    client: zmq.Socket[Any] = context.socket(zmq.DEALER)
    server.linger = client.linger = 0
    secure_server(server)
    secure_client(client)
    monitor = Monitor(client)
    try:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client.connect(f"tcp://127.0.0.1:{port}")
        found: list[Change] = []
        while not found and monitor.socket.poll(TRY_MS):
            found = [e.change for e in monitor.events() if e.change is not Change.OPENED]
    finally:
        monitor.close()
        client.close()
        server.close()
    return found[0] if found else None
