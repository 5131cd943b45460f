"""Job archives (.zip): unpacked where the workers see the files, and gone with the job.

The engine unpacks them into a directory that nobody removes, takes the first of several job files
without a word, and names that directory in its errors.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from oq_runtime.engine import messages
from oq_runtime.errors import InputError
from oq_runtime.files import private
from oq_runtime.text import clean

PREFIX, NEW = ".oq-run-", ".oq-new-"
#: of an unpacked archive: a link to the directory of the session that unpacked it
OWNER = "session"
#: where the files of the archive are in it
FILES = "files"
#: of a folder that a Mac adds to archives, and of a file that Windows keeps in folders
MACOSX, FOLDER_SETTINGS = "__MACOSX", "desktop.ini"
#: bytes that stay free
SPARE_BYTES = 16 << 20


def place(session: Path, shared: Path | None) -> Path:
    """Make the directory into which this session unpacks.

    :param session: the session's own directory, with which it goes
    :param shared: where the workers of other hosts read, None where there are none; what dead
        sessions of this host have left there is removed
    :raises OSError: when it cannot be made
    """
    if shared is None:
        return Path(tempfile.mkdtemp(prefix="archive-", dir=session))
    prefix = f"{PREFIX}{socket.gethostname()}-"
    for left in shared.glob(f"{prefix}*"):
        if not (left / OWNER).exists():
            shutil.rmtree(left, ignore_errors=True)
    for left in shared.glob(f"{NEW}*"):
        private.remove_stale(left)
    # under another name until it has its owner, or the next session would remove it
    new = Path(tempfile.mkdtemp(prefix=NEW, dir=shared))
    (new / OWNER).symlink_to(session)
    new.chmod(0o755)
    return new.rename(shared / f"{prefix}{new.name.removeprefix(NEW)}")


def unpack(archive: Path, place: Path) -> list[Path]:
    """Unpack an archive and return its job files, in the order in which the engine takes them.

    :param place: a new directory for it
    :raises InputError: for what is no archive, does not fit on the device, or has no job file
    """
    folder = place / FILES
    name = ""  # of the member that is being unpacked
    try:
        folder.mkdir()
        with zipfile.ZipFile(archive) as packed:
            check(archive, packed, shutil.disk_usage(folder).free)
            for member in packed.infolist():
                name = f": {member.filename}"
                path = Path(packed.extract(member, folder))  # never above the folder
                path.chmod(0o755 if path.is_dir() else 0o644)
    except zipfile.BadZipFile as exc:
        raise InputError(f"{archive} is not a zip archive, or damaged: {exc}") from exc
    except (zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
        raise InputError(f"{archive} cannot be unpacked: {exc}; pack it again") from exc
    except OSError as exc:
        what = f"{archive} cannot be unpacked in {folder}{name}: {exc.strerror}"
        raise InputError(clean(what, messages.MOST_CHARACTERS)) from exc
    for directory, _, _ in os.walk(folder):
        os.chmod(directory, 0o755)
    found = sorted(path for path in folder.rglob("*.ini") if is_job_file(path))
    if not found:
        near = [path.name for path in folder.rglob("*.[iI][nN][iI]") if is_job_file(path)]
        hint = f"; rename {near[0]} to {Path(near[0]).stem}.ini" if near else ""
        raise InputError(clean(f"{archive} holds no job file (.ini){hint}"))
    return found


def is_job_file(path: PurePath) -> bool:
    """Whether a file with the ending of a job file may be one: not what a Mac or Windows adds."""
    name = path.name
    return not (name.startswith(".") or name.lower() == FOLDER_SETTINGS or MACOSX in path.parts)


def install_readinput(readinput: Any) -> None:
    """Mend what the engine does with archives, for all ways into it.

    It takes what a Mac or Windows adds for a job file. Where a job file names an archive, it moves
    away what is there already under the names in the archive, wherever these lead.
    """
    theirs, extract = readinput.unzip_rename, readinput.extract_from_zip

    def unzip_rename(zpath: str, name: str) -> str:
        path = Path(zpath)
        if os.path.isfile(path) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                check(path, packed, shutil.disk_usage(path.parent).free)
                for member in map(PurePosixPath, packed.namelist()):
                    if member.is_absolute() or ".." in member.parts:
                        raise InputError(clean(f"{path}: {member} would lie outside of its folder"))
        unpacked: str = theirs(zpath, name)
        return unpacked

    def extract_from_zip(*args: Any, **kwargs: Any) -> list[str]:
        return [name for name in extract(*args, **kwargs) if is_job_file(Path(name))]

    readinput.unzip_rename, readinput.extract_from_zip = unzip_rename, extract_from_zip


def check(archive: Path, packed: zipfile.ZipFile, free_bytes: int) -> None:
    """Raise InputError for an archive that is not to be unpacked."""
    for member in packed.infolist():
        if "\\" in member.filename:
            raise InputError(
                clean(
                    f"{archive} names its files with backslashes ({member.filename}), so that its "
                    "folders are lost here; pack it again with a program that writes slashes"
                )
            )
        if member.flag_bits & 1:
            raise InputError(f"{archive} is encrypted; pack it without a password")
    nbytes = sum(member.file_size for member in packed.infolist())
    if nbytes > free_bytes - SPARE_BYTES:
        raise InputError(
            f"{archive} takes {nbytes / 1e6:.0f} MB unpacked, and {free_bytes / 1e6:.0f} MB are "
            "free; set TMPDIR to a directory with more room, or unpack it yourself"
        )
