"""A faulty cable: carries frames between two taps, each way with its own drop, loss and delay.

    NEAR (the host's side) --out--> FAR (the network's side)
    NEAR                   <--in--- FAR

Run by ``netns`` as a script inside the namespace of the switch. It makes the taps and says
``made``; each line on stdin, ``{"in": {...}, "out": {...}}`` with the fields of ``Fault``, sets the
faults and is answered by ``set``. It ends, and the taps with it, at the end of its stdin.
In user space: taps are everywhere, netem is missing in many kernels and nft on many machines.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass

#: <linux/if_tun.h>
TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
FRAME_BYTES = 65536
ETHERTYPE_ARP = b"\x08\x06"


@dataclass(frozen=True)
class Fault:
    """What happens to frames in one direction.

    :param drop: nothing but ARP passes, as behind a firewall that drops silently
    :param loss_percent: share of the frames (ARP too) that is lost, at random
    :param delay_ms: time that each frame takes
    :param most_bytes: longer frames are lost, as on a way with a smaller MTU that tells nobody
    """

    drop: bool = False
    loss_percent: float = 0.0
    delay_ms: float = 0.0
    most_bytes: int = FRAME_BYTES


class Lane:
    """One direction: frames leave in the order in which they came."""

    def __init__(self, source: int, target: int, rng: random.Random) -> None:
        self.source = source
        self.target = target
        self.rng = rng
        self.fault = Fault()
        self.frames: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        frame = os.read(self.source, FRAME_BYTES)
        if self.fault.drop and frame[12:14] != ETHERTYPE_ARP:
            return
        if len(frame) > self.fault.most_bytes:
            return
        if self.rng.random() * 100 >= self.fault.loss_percent:
            self.frames.append((time.monotonic() + self.fault.delay_ms / 1000, frame))

    def deliver(self) -> float | None:
        """Send what is due; return the seconds until the next frame is."""
        while self.frames:
            wait_s = self.frames[0][0] - time.monotonic()
            if wait_s > 0:
                return wait_s
            os.write(self.target, self.frames.popleft()[1])
        return None


def make_tap(name: str) -> int:
    """Return the descriptor of a new tap, which exists as long as the descriptor is open."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


def main() -> None:
    near, far = (make_tap(name) for name in sys.argv[1:3])
    rng = random.Random(0)
    lanes = {"in": Lane(far, near, rng), "out": Lane(near, far, rng)}
    print("made", flush=True)
    # only now: a tap that is not up cannot be read
    while line := sys.stdin.readline():
        for name, fields in json.loads(line).items():
            lanes[name].fault = Fault(**fields)
        print("set", flush=True)
        carry(list(lanes.values()))


def carry(lanes: list[Lane]) -> None:
    """Carry frames until there is something on stdin."""
    control = sys.stdin.fileno()
    while True:
        waits = [wait for lane in lanes if (wait := lane.deliver()) is not None]
        sources = [lane.source for lane in lanes]
        ready, _, _ = select.select([control, *sources], [], [], min(waits, default=None))
        for lane in lanes:
            if lane.source in ready:
                lane.take()
        if control in ready:
            return


if __name__ == "__main__":
    main()
