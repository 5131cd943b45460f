"""The first import of the engine by a user: one process does it, the others wait for it.

Numba compiles parts of the engine while they are imported and keeps the outcome in a cache. Until
it is filled that takes minutes of CPU, in each process that does not find it: at once in the engine
process and in the fork server of the same job, and in those of the next job of an impatient user.

Numba reads no cache that it may not write to. So what the installation of a cluster has compiled,
in ``COMPILED``, is copied into the cache of each user. What was compiled for another kind of
processor is never run: the index of each function in the cache has the processor in its keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from oq_runtime.errors import ConfigError
from oq_runtime.files import private

#: seconds to wait for another process, which may have been stopped
WAIT_SECS, LOOK_SECS = 600.0, 0.1
#: under the directory of the environment, as numba has it: a directory for each one of sources
COMPILED = "compiled"
#: how the name of a directory begins into which that is copied for a user
TAKING = "taken-"
#: bytes that numba writes for a small function
PROBE_BYTES = 16 << 10


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Import the engine in the block: alone, until one process of this user has done so.

    A file per installation in the user's cache directory tells that it was done; where there can
    be none, or no lock on it, the block is entered at once.
    """
    with contextlib.ExitStack() as stack:
        descriptor = None
        with contextlib.suppress(OSError, ConfigError, RuntimeError):  # the last: no home
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(place() / f"imported-{installation()}", flags, 0o600)
            stack.callback(os.close, descriptor)
            deadline_s = time.monotonic() + WAIT_SECS
            while not (done := os.fstat(descriptor).st_size) and not _locked(descriptor):
                if time.monotonic() > deadline_s:
                    break
                time.sleep(LOOK_SECS)
            if done:
                descriptor = None
        yield
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(descriptor, b"1", 0)


def find_cache(temporary: Path) -> None:
    """Give numba a place for what it compiles where it would find none, and end the import.

    It takes the one beside the engine's files, or that in the user's cache directory: there is none
    for a user without a home, or where that is full. What it gets is in ``temporary``, under the
    same name each time.
    """
    if "NUMBA_CACHE_DIR" in os.environ or any(map(_takes_files, _caches())):
        return
    with contextlib.suppress(ConfigError):  # numba says what it lacks
        found = private.own(temporary / f"oq-numba-{os.getuid()}")
        os.environ["NUMBA_CACHE_DIR"] = str(found)


def _caches() -> Iterator[Path]:
    """Yield where numba keeps what it has compiled, see ``numba/core/caching.py`` of 0.61."""
    spec = importlib.util.find_spec("openquake")
    for engine in (spec and spec.submodule_search_locations) or ():
        yield Path(engine, "baselib", "__pycache__")
    with contextlib.suppress(RuntimeError):  # no home
        yield caches() / "numba"


def _takes_files(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError:
        return False
    return True


def done() -> bool:
    """Whether this user has imported the engine of this installation before."""
    try:
        return bool((place() / f"imported-{installation()}").lstat().st_size)
    except (OSError, ConfigError, RuntimeError):
        return False


def take() -> None:
    """Give this user what was compiled at the installation; what is in the cache already stays.

    Where there is none, or it cannot be copied, numba compiles.
    """
    with contextlib.suppress(OSError, RuntimeError):  # the latter: no home
        found = list(Path(sys.prefix, COMPILED).iterdir())
        cache = Path(os.environ.get("NUMBA_CACHE_DIR") or caches() / "numba")
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(f"{TAKING}*"):
            private.remove_stale(left)
        with tempfile.TemporaryDirectory(prefix=TAKING, dir=cache) as scratch:
            for directory in found:
                if not (cache / directory.name).exists():
                    copy = Path(scratch, directory.name)
                    shutil.copytree(directory, copy, copy_function=shutil.copyfile)
                    with contextlib.suppress(OSError):  # another process has been quicker
                        copy.rename(cache / directory.name)


def caches() -> Path:
    """Return the user's own directory of caches; RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())


def place() -> Path:
    """Return the directory of the files, in the user's own cache directory, which is made.

    Raises ConfigError where that cannot be, RuntimeError for a user without a home.
    """
    cache = caches()
    if not cache.exists():
        private.own(cache)
    return private.own(cache / "oq-runtime")


def installation() -> str:
    """Return a word for what is imported: which engine and which numba, from where."""
    import importlib.metadata  # not before oq-run has said its first line

    versions = [importlib.metadata.version(name) for name in ("openquake.engine", "numba")]
    where = os.environ.get("NUMBA_CACHE_DIR", "")
    return xxhash.xxh3_64_hexdigest("\n".join([sys.prefix, where, *versions]).encode())


def _locked(descriptor: int) -> bool:
    """Take the lock, which ends with this process, if it is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
