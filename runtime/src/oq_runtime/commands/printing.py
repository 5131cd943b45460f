"""Commands that end in one line where what they print cannot be written, as on a full disk."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

EXIT_FAILED = 1


class Command(click.Command):
    """A command of click's that says so."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            try:
                return super().main(*args, **options)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except OSError as exc:
            if exc.filename is not None:  # of another file
                raise
            # what is left in its buffer is not tried again at the interpreter's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"{self.name}: stdout: {exc.strerror}", err=True)
            sys.exit(EXIT_FAILED)


class Group(Command, click.Group):
    """The same of a command with others below it."""
