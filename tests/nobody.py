"""What another account is told: a call in a process of its own, without the rights of root."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence

from click import ClickException

from oq_runtime.errors import OqRuntimeError

NOBODY = 65534


def told(call: Callable[[], object], groups: Sequence[int] = (NOBODY,)) -> str:
    """Return the line of the error that a call ends with; nothing where it has none.

    :param groups: those of the account; none: the call is root's own
    """
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            if groups:
                os.setgroups(groups)
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            call()
        except ClickException as exc:
            os.write(write, exc.format_message().encode())
        except OqRuntimeError as exc:
            os.write(write, str(exc).encode())
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text
