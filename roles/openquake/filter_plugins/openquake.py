"""A filter for the check of names: ``name | openquake_nearest(known)``."""

import difflib
from collections.abc import Callable, Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like ``name``; an empty text where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


class FilterModule:
    def filters(self) -> dict[str, Callable[..., str]]:
        return {"openquake_nearest": nearest}
