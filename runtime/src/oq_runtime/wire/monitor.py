"""What becomes of the connections of a socket, as libzmq tells it.

Not covered: who is admitted (``security``).
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

WRONG_KEY = "wrong authkey, or no encryption, on one of the two sides"
NO_TICKET = "without the ticket of a lease, or with one that was used before"


class Change(Enum):
    """Of one connection; ADMITTED when both sides have shown their keys, or one its ticket."""

    OPENED = "opened"
    ADMITTED = "admitted"
    REFUSED = "refused"
    CLOSED = "closed"
    STOPPED = "not told any more"


class Event(NamedTuple):
    """What became of a connection of a socket.

    :param url: that was bound or connected, as it was given
    :param descriptor: of the connection, where libzmq tells it: OPENED and CLOSED
    :param reason: in words, of REFUSED
    """

    change: Change
    url: str
    descriptor: int
    reason: str = ""


CHANGES = {
    zmq.EVENT_ACCEPTED: Change.OPENED,
    zmq.EVENT_CONNECTED: Change.OPENED,
    zmq.EVENT_HANDSHAKE_SUCCEEDED: Change.ADMITTED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Change.REFUSED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Change.REFUSED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Change.REFUSED,
    zmq.EVENT_DISCONNECTED: Change.CLOSED,
    zmq.EVENT_CLOSED: Change.CLOSED,  # it could not be opened
    zmq.EVENT_MONITOR_STOPPED: Change.STOPPED,
}


class Monitor:
    """Tells what becomes of the connections of a socket; to be made before bind or connect."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self.watched = socket
        self.server = bool(socket.curve_server or socket.plain_server)
        self.refused = NO_TICKET if socket.mechanism == zmq.PLAIN else WRONG_KEY
        self.socket = socket.get_monitor_socket(sum(CHANGES))
        # with a limit, unread events would block libzmq's I/O thread, and so all sockets
        self.socket.setsockopt(zmq.RCVHWM, 0)

    def events(self) -> list[Event]:
        """Return what has happened, never waiting."""
        found = []
        while int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # a poller would be made anew
            told = recv_monitor_message(self.socket)
            url = told["endpoint"].decode(errors="replace")
            change = CHANGES[zmq.Event(told["event"])]
            reason = ""
            if change is Change.REFUSED:
                # a client sees no more of a server that refuses its key
                left = told["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self.server
                reason = f"{'it ended during the handshake' if left else self.refused} ({url})"
            found.append(Event(change, url, told["value"], reason))
        return found

    def stop(self) -> None:
        """Have no more told: the last event is STOPPED. To be called by the socket's thread."""
        self.watched.disable_monitor()

    def close(self) -> None:
        self.stop()
        self.socket.close(linger=0)
