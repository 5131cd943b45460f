"""What ``oq-run`` refuses before anything is started: files, directories, users, limits.

Each check raises BadInput (or ConfigError) with one line: what is wrong, where, and what to do.
"""

from __future__ import annotations

import codecs
import getpass
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import click

from oq_runtime import processes
from oq_runtime.config import Config
from oq_runtime.engine import jobtable, messages
from oq_runtime.errors import ConfigError
from oq_runtime.files import places
from oq_runtime.priority import Priority
from oq_runtime.text import clean

EXIT_INPUT = 2
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
#: free space of a file system in which a calculation cannot go on
ALMOST_FULL_BYTES = 1 << 20
#: of a job file, which has some thousand
MOST_BYTES = 64 << 20
#: that a file must be able to have: results on their way, and the datastore of a small job
LEAST_FILE_BYTES = 128 << 20
#: bytes that no text has
CONTROL = frozenset(range(32)) - frozenset(b"\t\n\f\r")


class BadInput(click.ClickException):
    """What the user gave cannot be used; ends the command with exit code 2 and one line."""

    exit_code = EXIT_INPUT

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"oq-run: {clean(self.format_message(), messages.MOST_CHARACTERS)}", err=True)


def check_priority(priority: Priority, settings: Config) -> None:
    """Refuse a priority that would change nothing, or that this user may not give."""
    if priority is Priority.NORMAL:
        return
    if settings.cluster is None:
        raise BadInput(
            f"--priority {priority} is for a cluster, where several jobs share the slots; leave it "
            "out on one machine"
        )
    if priority is Priority.URGENT:
        try:
            settings.check_urgent()
        except ConfigError as exc:
            raise BadInput(f"--priority {priority}: {exc}") from exc


def expanded(name: str) -> Path:
    """Return a path with ``~`` and ``~user`` put in."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise BadInput(f"{name}: there is no such user; write ./{name} for a file") from None


def absolute(name: str) -> Path:
    """Return the absolute path of what may not be there yet."""
    return Path(os.path.realpath(expanded(name)))  # also of a link to itself


def check_log(name: str) -> str:
    """Return the absolute path of a log file, which need not be there."""
    path = absolute(name)
    try:
        if path.is_fifo():  # the engine would wait for its reader, and all jobs for the engine
            raise BadInput(f"--log-file {name} is a pipe; give a file")
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as exc:
        raise BadInput(f"--log-file {name}: {exc.strerror}; give another one") from exc
    return str(path)


def check_file(name: str) -> str:
    """Return the absolute path of a job file."""
    path = expanded(name)
    try:
        if path.is_dir():
            raise BadInput(f"{name} is a directory; give the job file in it")
        if path.exists() and not path.is_file():  # whose reader may wait for ever
            raise BadInput(f"{name} is a pipe or a device; give a job file (.ini)")
        packed = path.suffix.lower() == ".zip"
        if not packed and (nbytes := path.stat().st_size) > MOST_BYTES:
            raise BadInput(f"{name} has {nbytes / 1e6:.0f} MB; give a job file (.ini)")
        data = path.open("rb").read(1) if packed else path.read_bytes()
    except OSError as exc:
        raise BadInput(f"{name}: {exc.strerror}; check the path of the job file") from exc
    if packed:
        return str(path.resolve())
    if not data.strip():
        raise BadInput(f"{name} is empty; a job file has sections such as [general]")
    wrong = messages.not_utf8(path, data)
    if not data.startswith(UTF16) and CONTROL & set(data):
        wrong = f"{name} is not a text file; give a job file (.ini)"
    if wrong:
        raise BadInput(wrong)
    return str(path.resolve())


def check_user() -> None:
    """Refuse a user without a home, and give one without an entry in passwd a name: the number."""
    try:
        processes.check_user()
    except ConfigError as exc:
        raise BadInput(str(exc)) from None


def check_file_size() -> None:
    """Refuse a limit of the size of files at which a job would end in the midst."""
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if resource.RLIM_INFINITY != most < LEAST_FILE_BYTES:
        raise BadInput(
            f"a file may have {most >> 10} KiB at most here, and a job needs more than "
            f"{LEAST_FILE_BYTES >> 20} MiB; raise this limit (ulimit -f)"
        )


def check_here() -> None:
    """Raise ConfigError where there is no working directory."""
    try:
        os.getcwd()
    except OSError as exc:
        raise ConfigError(
            f"the working directory is not there any more ({exc.strerror}); cd to another one"
        ) from None


def check_places(proc: Path = Path("/proc")) -> None:
    """Refuse to start where a working directory, one for sockets, or most of /proc is lacking."""
    try:
        check_here()
    except ConfigError as exc:
        raise BadInput(str(exc)) from None
    temporary = os.environ.get("TMPDIR", "")
    try:
        temporary.encode()
    except UnicodeEncodeError:  # libzmq's names of sockets are UTF-8
        raise BadInput(
            f"TMPDIR {temporary} is not UTF-8, or not in this locale; set another TMPDIR, or "
            "LC_ALL=C.UTF-8"
        ) from None
    if not os.access(proc / "meminfo", os.R_OK):
        raise BadInput(
            f"{proc}/meminfo cannot be read, and the engine needs it; mount {proc} whole "
            "(hidepid may be set, subset=pid may not)"
        )


def check_directories(sections: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ConfigError where nothing can be written: the results, the job database."""
    places.room(data_directory(sections), places.OTHER_DATADIR)
    dbserver = sections.get("dbserver", {})
    host = os.environ.get("OQ_DATABASE") or dbserver.get("host")
    if not jobtable.served(host):
        file = expanded(dbserver.get("file", ""))
        places.room(file.parent, "set file in [dbserver] of openquake.cfg to another place")


def is_full(directory: Path) -> bool:
    """Whether a directory has less room than ALMOST_FULL_BYTES; not where nobody can say."""
    try:
        stat = os.statvfs(directory)
    except OSError:
        return False
    return stat.f_bavail * stat.f_frsize < ALMOST_FULL_BYTES


def data_directory(sections: Mapping[str, Mapping[str, str]]) -> Path:
    """Return where the engine puts its results.

    Source: ``get_datadir`` in ``openquake/commonlib/logs.py`` of engine 3.26.
    """
    if given := os.environ.get("OQ_DATADIR"):
        check_here()
        return Path(given).absolute()
    shared = sections.get("directory", {}).get("shared_dir", "")
    if not shared:
        return Path.home() / "oqdata"
    folder = str(Path(shared, getpass.getuser(), "oqdata"))
    return Path(folder.replace("openquake/openquake", "openquake"))
