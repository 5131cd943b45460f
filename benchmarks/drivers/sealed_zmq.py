"""No system: what AES-256-GCM over ZeroMQ can do, as the bound of row b.

Another process seals the bytes of the results in messages of 1 MiB, on the loopback, and this one
opens them and lets go of them. Nobody computes, pickles, schedules, checks or keeps anything.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks import work
from benchmarks.drivers import Rows, check, serve

MESSAGE_BYTES = 1 << 20
NONCE_BYTES = 12


def send(address: str, key: bytes, tasks: int) -> None:
    cipher, numbers = AESGCM(key), iter(range(1 << 32))
    socket = zmq.Context().socket(zmq.PUSH)
    socket.connect(address)
    data = memoryview(work.array(1).data).cast("B")
    for _ in range(tasks):
        for start in range(0, len(data), MESSAGE_BYTES):
            nonce = next(numbers).to_bytes(NONCE_BYTES, "big")
            sealed = cipher.encrypt(nonce, data[start : start + MESSAGE_BYTES], None)
            socket.send_multipart((nonce, sealed), copy=False)
    socket.send(b"")


def none(func: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
    raise NotImplementedError("it runs no tasks")


class Sealed(Rows):
    def warm_up(self, slots: int) -> dict[str, Any]:
        return {"seconds": 0.0, "pids": []}

    def result(self, tasks: int) -> dict[str, Any]:
        """From the first message to the last, once the processes are connected."""
        key = os.urandom(32)
        cipher = AESGCM(key)
        with zmq.Context() as context, context.socket(zmq.PULL) as socket:
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            arguments = (f"tcp://127.0.0.1:{port}", key, tasks)
            process = multiprocessing.get_context("spawn").Process(target=send, args=arguments)
            process.start()
            nbytes, start_s, frames = 0, 0.0, socket.recv_multipart(copy=False)
            start_s = time.perf_counter()
            while len(frames) == 2:
                nonce, sealed = frames
                nbytes += len(cipher.decrypt(nonce.bytes, sealed.buffer, None))
                frames = socket.recv_multipart(copy=False)
            seconds = time.perf_counter() - start_s
            process.join()
        check("bytes", nbytes, tasks * work.RESULT_FLOATS * 8)
        return {"seconds": seconds}


if __name__ == "__main__":
    for _ in serve(Sealed(none)):
        pass
