"""Where a page is written: whole or not at all, and never in place of what is none of ours."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from oq_runtime.errors import InputError

SUFFIX = ".html"
#: how a page of ours is known, within so many bytes of its begin
MARK, MARK_BYTES = b'<meta name="generator" content="oq-report">', 512


def check_place(file: Path) -> None:
    """Raise InputError where a page cannot be written, or something else is there."""
    if os.path.isdir(file):
        raise InputError(f"{file} is a directory; give the name of a file, or leave it out")
    if os.path.exists(file):
        try:
            ours = os.path.isfile(file) and MARK in file.open("rb").read(MARK_BYTES)
        except OSError as exc:
            raise InputError(f"{file} is there and cannot be read: {exc.strerror}") from exc
        if not ours:
            raise InputError(f"{file} is there already, and is no report; give another name")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as exc:
        raise InputError(
            f"{file.parent}: {exc.strerror}; give a file in a directory where you may write"
        ) from exc


def write(file: Path, text: str) -> None:
    """Write a page whole, or not at all.

    :raises InputError: where it cannot be written
    """
    check_place(file)
    try:
        descriptor, name = tempfile.mkstemp(".part", f".{file.name[:100]}.", file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf8") as stream:
                stream.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as exc:
        raise InputError(f"{file}: {exc.strerror}; give another place for the report") from exc


def place(datastore: Path, given: Path | None) -> Path:
    """Return where the page of a datastore goes.

    :param given: a file, or a directory; None: the working directory
    """
    name = f"report_{datastore.stem.removeprefix('calc_')}{SUFFIX}"
    if given is None:
        return Path(name).absolute()
    given = given.absolute()
    return given / name if os.path.isdir(given) else given
