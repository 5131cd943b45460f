"""ZeroMQ sockets as this project uses them: bounded, never lingering, never silently dropping.

Not covered: what the messages mean (``protocol``) and who may connect (``security``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Any

import zmq

from oq_runtime import protocol

#: messages queued per peer of a router or dealer; the byte window bounds what they hold
HWM = 1000
LINGER_MS = 0


def router(context: zmq.Context[Any], url: str) -> zmq.Socket[Any]:
    """Return a ROUTER bound to ``url`` that raises instead of dropping what it cannot route."""
    socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, HWM)
    socket.bind(url)
    return socket


def dealer(context: zmq.Context[Any], url: str, *, send_hwm: int = HWM) -> zmq.Socket[Any]:
    """Return a DEALER connected to ``url``."""
    socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, send_hwm)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(url)
    return socket


def send(socket: zmq.Socket[Any], message: protocol.Message, *frames: Any) -> None:
    """Send a message to the peer of a DEALER."""
    socket.send_multipart([protocol.encode(message), *frames], copy=False)


def send_to(socket: zmq.Socket[Any], peer: bytes, message: protocol.Message, *frames: Any) -> bool:
    """Send a message to one peer of a ROUTER; False when that peer is gone."""
    try:
        socket.send_multipart([peer, protocol.encode(message), *frames], copy=False)
    except zmq.ZMQError as exc:
        if exc.errno == zmq.EHOSTUNREACH:
            return False
        raise
    return True


def receive(socket: zmq.Socket[Any]) -> list[zmq.Frame] | None:
    """Return the frames of one waiting message, or None when nothing waits."""
    try:
        frames: list[zmq.Frame] = socket.recv_multipart(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return None
    return frames


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent thread ends (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends; None when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        return os.pidfd_open(pid)
    return None
