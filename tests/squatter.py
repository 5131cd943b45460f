"""A user of the host without any rights, who takes the directories of others before they make them.

    squatter.py DIRECTORY DIRECTORY [NAME ...]

Makes the names in both directories, and whatever appears in one of them from then on in the other
one as well, for everybody to write to, until its stdin ends. Prints how many it tried to make, and
what others have put into them: each such file could be exchanged for another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType

#: inotify(7): a name appears in a directory; watch, mask, cookie, bytes of the name behind it
IN_CREATE, EVENT = 0x100, struct.Struct("iIII")
#: runs the rest of the command line as user nobody
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
#: as a user who has no power over the files of others, though he is called root
CAPABILITIES = "-dac_override,-dac_read_search,-fowner"
AS_ANYBODY = ("setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}")
#: with a /dev/shm of its own, as any host has one
MOUNT = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm && echo mounted && read end"


class Squatter:
    """Runs as long as the context lasts, in a mount namespace of its own; needs root.

    :param places: two directories
    :param names: to be taken beforehand

    ``victim`` is what runs a command line where it can be attacked. Afterwards ``tried`` and
    ``found`` are what the squatter has printed.
    """

    tried: int
    found: list[str]

    def __init__(self, *places: Path, names: tuple[str, ...] = ()) -> None:
        self.host = _start("unshare", "--mount", "sh", "-c", MOUNT)
        _await(self.host, "mounted")
        enter = ("nsenter", "--mount", f"--target={self.host.pid}")
        self.victim = (*enter, *AS_ANYBODY)
        python, script = os.path.realpath(sys.executable), Path(__file__).read_text()
        attack = (python, "-I", "-c", script, *map(str, places), *names)
        self.process = _start(*enter, *AS_NOBODY, *attack)
        _await(self.process, "ready")

    def run(self, *command: str) -> str:
        """Return what a command prints where the victim is."""
        return subprocess.check_output([*self.victim, *command], text=True)

    def __enter__(self) -> Squatter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        out, _ = self.process.communicate(timeout=10)
        self.host.communicate(timeout=10)
        assert self.process.returncode == 0
        self.tried, self.found = json.loads(out)


def _start(*command: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def _await(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n", f"{process.args!r} has ended"


def main() -> None:
    places, names = sys.argv[1:3], sys.argv[3:]
    os.umask(0)
    tried = 0
    taken: set[str] = set()
    found: set[str] = set()

    def take(path: str) -> None:
        nonlocal tried
        tried += 1
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o777)
            taken.add(path)

    for place in places:
        for name in names:
            take(f"{place}/{name}")
    libc = ctypes.CDLL(None)
    events = libc.inotify_init()
    watches = [libc.inotify_add_watch(events, place.encode(), IN_CREATE) for place in places]
    other = dict(zip(watches, places[::-1], strict=True))
    print("ready", flush=True)
    while sys.stdin not in (ready := select.select([sys.stdin, events], [], [], 0.01)[0]):
        data = os.read(events, 1 << 16) if ready else b""
        while data:
            watch, _, _, size = EVENT.unpack_from(data)
            name = data[EVENT.size : EVENT.size + size].rstrip(b"\0").decode()
            data = data[EVENT.size + size :]
            take(f"{other[watch]}/{name}")
        for path in taken:
            # it has been removed, and perhaps made anew by its owner
            with contextlib.suppress(FileNotFoundError, PermissionError):
                found |= {f"{path}/{name}" for name in os.listdir(path)}
    for path in taken:
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(path)
    print(json.dumps([tried, sorted(found)]))


if __name__ == "__main__":
    main()
