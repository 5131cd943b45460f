"""Filters of the roles: ``name | openquake_nearest(known)`` and ``path | openquake_unit_name``."""

import difflib
from collections.abc import Callable, Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like ``name``; an empty text where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def unit_name(path: str) -> str:
    """Return a path as systemd writes it in the name of a unit: ``systemd-escape --path``.

    :param path: an absolute one of letters, digits and ``._-``, as ``tasks/inventory.yml`` wants it
    """
    name = path.strip("/").replace("-", r"\x2d").replace("/", "-")
    return name if name[0] != "." else r"\x2e" + name[1:]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., str]]:
        return {"openquake_nearest": nearest, "openquake_unit_name": unit_name}
