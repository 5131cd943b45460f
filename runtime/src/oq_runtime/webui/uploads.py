"""What comes with a calculation: an archive or single files, of which a job uses nothing else.

The engine takes any path in a job file and in the files that it names, and reads it with the rights
of the service; what it finds there it tells in the message of the error. Checked are the archive,
the paths in job files before the engine reads them, and then all files that the job would read.
"""

from __future__ import annotations

import configparser
import contextlib
import re
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from oq_runtime.engine import archives, messages
from oq_runtime.errors import InputError
from oq_runtime.text import clean

#: bytes that an archive may have when it is unpacked
MAX_UNPACKED_BYTES = 64 << 30
#: bytes of a job file
MAX_JOB_FILE_BYTES = 4 << 20
#: keys of a job file whose values are paths; so are all values that end with .hdf5
PATHS = re.compile(r".*_(file|csv|hdf5)|shakemap_.*")
#: of a calculation
NUMBER = re.compile("[0-9]{1,18}")
#: what stands between the paths of a value: a list, or a dictionary as Python writes it
BETWEEN = re.compile(r"[\s,'\"{}\[\]()]+")


class Upload(threading.local):
    """What the request of this thread has brought.

    ``jobs`` are its job files, the one that runs first; ``parents`` the calculations that they
    start from; ``root`` is where it lies unpacked.
    """

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.parents: list[int] = []
        self.root: Path | None = None
        self.copy: tempfile.TemporaryDirectory[str] | None = None

    def unpack_here(self, place: str | None) -> str:
        """Return a new directory for it, which is removed with the request."""
        self.copy = tempfile.TemporaryDirectory(prefix="oq-webui-", dir=place)
        self.root = Path(self.copy.name)
        return self.copy.name

    def forget(self) -> None:
        if self.copy is not None:
            self.copy.cleanup()
        self.__init__()  # type: ignore[misc]


upload = Upload()


def check(files: Sequence[Any], ending: str) -> None:
    """Look at what a request brings and note it in ``upload``; raises InputError.

    :param files: Django's uploaded files
    :param ending: of the name of the job file
    """
    packed = [file for file in files if file.name.endswith(".zip")]
    if packed:  # the engine takes the last one
        with _archive(packed[-1]) as archive:
            upload.jobs = _check_archive(archive, packed[-1].name, ending)
        return
    names = [file.name for file in files]
    jobs = [file for file in files if file.name.endswith(ending)]
    if not jobs:
        raise InputError(_no_job_file("the upload", names, ending))
    for file in jobs:
        check_job_file(file.name, _text(file.name, file.read(MAX_JOB_FILE_BYTES + 1)))
        file.seek(0)
    upload.jobs = [file.name for file in jobs]


@contextlib.contextmanager
def _archive(file: Any) -> Iterator[zipfile.ZipFile]:
    name = clean(file.name, 100)
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except zipfile.BadZipFile as exc:
        raise InputError(f"{name} is no zip archive, or damaged: {exc}; pack it again") from None
    except (NotImplementedError, RuntimeError) as exc:  # a method of packing, or a password
        raise InputError(f"{name} cannot be unpacked: {exc}; pack it as a plain zip") from None
    finally:
        file.seek(0)


def _check_archive(archive: zipfile.ZipFile, name: str, ending: str) -> list[str]:
    members = [info for info in archive.infolist() if not info.is_dir()]
    names = [info.filename for info in members]
    for member in names:
        if "\\" in member:
            raise InputError(
                f"{name}: the name {clean(member, 100)} has a backslash, which is no separator of "
                "folders here; pack the folder again with a program that writes /"
            )
        if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts:
            raise InputError(f"{name}: {clean(member, 100)} would lie outside of its folder")
    if sum(info.file_size for info in members) > MAX_UNPACKED_BYTES:
        raise InputError(f"{name}: it unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB")
    jobs = sorted(
        member
        for member, path in zip(names, map(PurePosixPath, names), strict=True)
        if path.name.endswith(ending) and archives.is_job_file(path)
    )
    if not jobs:
        raise InputError(_no_job_file(name, names, ending))
    for member in jobs:
        with archive.open(member) as file:
            check_job_file(member, _text(member, file.read(MAX_JOB_FILE_BYTES + 1)))
    return jobs


def _no_job_file(where: str, names: Sequence[str], ending: str) -> str:
    near = [name for name in names if name.lower().endswith(ending.lower())]
    seen = f" (there is {clean(near[0], 100)}: write it in small letters)" if near else ""
    return f"{where} has no file whose name ends with {clean(ending, 100)}{seen}"


def _text(name: str, data: bytes) -> str:
    if len(data) > MAX_JOB_FILE_BYTES:
        raise InputError(f"{name}: a job file of more than {MAX_JOB_FILE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")  # as the engine reads it
    except UnicodeDecodeError as exc:
        raise InputError(f"{name} is not UTF-8, at byte {exc.start}; save it as UTF-8") from None


def check_job_file(name: str, text: str) -> None:
    """Raise InputError when a job file names a path outside of the upload; note its parents.

    :param name: of the job file, in the upload
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text, name)
    except configparser.Error as exc:
        raise InputError(clean(str(exc), 300)) from None
    for section in parser.sections():
        for key, value in parser.items(section):
            if key == "job_id":  # the engine would overwrite that job
                raise InputError(f"{name}: job_id is no parameter of a job file; leave it out")
            if key == "hazard_calculation_id" and value:  # results that were uploaded are a program
                if not NUMBER.fullmatch(value):
                    raise InputError(
                        f"{name}: {key} = {clean(value, 100)}: give the number of a calculation"
                    )
                upload.parents.append(int(value))
            if PATHS.fullmatch(key) or (value.endswith(".hdf5") and key != "description"):
                for path in filter(None, BETWEEN.split(value)):
                    if not _inside(PurePosixPath(name).parent, path):
                        raise InputError(
                            f"{name}: {key} = {clean(path, 100)} is outside of the upload; give "
                            "the files of the job with it"
                        )


def _inside(folder: PurePosixPath, path: str) -> bool:
    """Whether a path of a job file stays in the upload.

    :param folder: of the job file, in the upload
    """
    if path.startswith(("/", "~", "$", "file:")):
        return False
    level = len(folder.parts)
    for part in PurePosixPath(path).parts:
        level += -1 if part == ".." else 1
        if level < 0:
            return False
    return True


def check_files(base: str, names: Iterable[str], root: Path) -> None:
    """Raise InputError when a job would read a file outside of the upload.

    :param base: directory to which names without one refer
    :param names: of the files that the engine says it reads
    :param root: directory of the upload
    """
    for name in names:
        if name != "<in-memory>" and not Path(base, name).resolve().is_relative_to(root.resolve()):
            raise InputError(f"{clean(name, 200)} is outside of the upload")


def install(views: Any) -> None:
    """Put the checks where the engine reads what was uploaded, in this process.

    :param views: the engine's module of that name
    """
    readinput, config, logs = views.readinput, views.config, views.logs
    engine_read, engine_store, engine_submit = readinput.get_oqparam, views.store, views.submit_job

    def store(files: Any, ending: str, number: int) -> Any:
        path = engine_store(files, ending, number)
        upload.root = next(dir for dir in Path(path).parents if dir.name == f"calc_{number}")
        return path

    def get_oqparam(job_ini: Any, pkg: Any = None, kw: Any = {}, validate: bool = True) -> Any:  # noqa: B006
        place = config.directory.custom_tmp or tempfile.gettempdir()
        if isinstance(job_ini, str) and job_ini.endswith(".zip"):  # the engine leaves a copy
            job_ini = readinput.extract_from_zip(job_ini, ".ini", upload.unpack_here(place))[0]
        # results are written when they are asked for: nothing goes where a job file says
        job = engine_read(job_ini, pkg, {"export_dir": place, **kw}, validate)
        if upload.root is not None:
            check_files(job.base_path, readinput.get_input_files(job), upload.root)
        return job

    def submit_job(*args: Any, **kwargs: Any) -> Any:
        try:
            number = engine_submit(*args, **kwargs)
        except Exception as exc:
            refused = InputError(_in_terms_of_the_upload(exc))
            refused.job_id = getattr(exc, "job_id", None)  # type: ignore[attr-defined]
            raise refused from None
        if len(upload.jobs) > 1:
            first, *others = upload.jobs
            text = f"{first} runs; not run are the other job files: {', '.join(others)}"
            now = datetime.now(UTC)
            logs.dbcmd("log", number, now, "WARNING", "webui", clean(text, 1000))
        return number

    readinput.get_oqparam, views.store, views.submit_job = get_oqparam, store, submit_job


def _in_terms_of_the_upload(exc: Exception) -> str:
    """Return an error of the engine on one line, without directories that the user has not made."""
    text = messages.reworded(str(exc)) or type(exc).__name__
    if upload.root is not None:
        text = text.replace(f"{upload.root}/", "")
    return clean(text, 1000)
