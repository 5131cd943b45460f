"""What the user sees while a job runs: one bar per phase on a terminal, else plain lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from oq_runtime.wire import protocol, transport


class StatusReader:
    """Asks the broker of a session for its counters, without ever waiting for it."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = transport.dealer(self.context, f"ipc://{directory}/engine")
        self.asked = False

    def poll(self) -> protocol.Status | None:
        """Return the newest answer, if one has come, and ask again."""
        status = None
        while frames := transport.receive(self.socket):
            message = protocol.decode(frames[0])
            if isinstance(message, protocol.Status):
                status, self.asked = message, False
        if not self.asked:
            transport.send(self.socket, protocol.StatusQuery())
            self.asked = True
        return status

    def close(self) -> None:
        self.context.destroy(linger=0)


class Display:
    """Bars on a terminal; otherwise a line whenever a phase has gained a tenth of its tasks.

    :param console: where to draw, or None to show nothing
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.bars: list[TaskID] = []  # of the phases, which stay in their order
        self.tenths: dict[int, tuple[int, int]] = {}
        self.progress: Progress | None = None
        if console is not None and console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.progress.start()

    def show(self, status: protocol.Status) -> None:
        """Draw the counters of the broker."""
        busy = sum(node.busy for node in status.nodes)
        slots = sum(node.slots for node in status.nodes)
        for number, phase in enumerate(status.phases):
            note = f"busy {busy}/{slots}, {phase.received_bytes / 1e6:.1f} MB"
            if phase.retries:
                note += f", {phase.retries} retried"
            if self.progress is not None:
                if number == len(self.bars):
                    bar = self.progress.add_task(phase.name, total=phase.total, note=note)
                    self.bars.append(bar)
                bar = self.bars[number]
                rate = self.progress.tasks[number].speed
                rated = f"{rate:.1f}/s, {note}" if rate else note
                self.progress.update(bar, completed=phase.done, total=phase.total, note=rated)
            elif self.console is not None:
                step = (phase.done * 10 // max(phase.total, 1), phase.retries)
                if self.tenths.get(number) != step:
                    self.tenths[number] = step
                    line = f"{phase.name}: {phase.done}/{phase.total} tasks, {note}"
                    self.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
