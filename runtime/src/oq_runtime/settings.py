"""The keys of ``[oq_runtime]`` in openquake.cfg, each declared once: default, limits, meaning.

``Settings`` is what is read, what an error says is allowed, and what docs/configuration.md and the
roles' variables are held against. The unit of a key is in its name. Not covered: the sections of
the engine (``config``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from configparser import ConfigParser
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from oq_runtime import logs
from oq_runtime.core.limits import Limits
from oq_runtime.errors import ConfigError

SECTION = "oq_runtime"
#: what the unit at the end of a name is called
UNITS = {"s": " of seconds", "mb": " of MiB", "gb": " of GB", "percent": " of per cent"}
#: keys of which the second must have the greater value
ORDERED = (
    ("beat_s", "suspect_s"),
    ("suspect_s", "lost_s"),
    ("memory_soft_percent", "memory_hard_percent"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Limits):
    """The section ``[oq_runtime]``: the limits, and what concerns one host."""

    code: Annotated[
        str, Meta(description="`import oq_runtime.activate` switches the runtime on in the engine")
    ] = ""
    cores: Annotated[
        int,
        Meta(ge=-1, description="tasks at a time where no cluster is configured; -1 for all cores"),
    ] = -1
    window_mb: Annotated[
        int,
        Meta(
            ge=1, le=1_000_000, description="MiB of results that a job has in its broker at a time"
        ),
    ] = 1024
    journal_gb: Annotated[
        float,
        Meta(
            ge=0,
            le=1_000_000,
            description="GB of results of a job that are kept until it is complete, at most half "
            "of what is free, so that it can go on after a crash; 0: none",
        ),
    ] = 20.0
    preload: Annotated[
        tuple[str, ...], Meta(description="modules that a node imports once for all its workers")
    ] = ("openquake.calculators.base",)
    log_level: Annotated[
        logs.Level, Meta(description="the least that the logs of agents and brokers tell")
    ] = "info"

    urgent_group: Annotated[
        str,
        Meta(
            description="the group of the master whose members may run urgent jobs, the same on "
            "all hosts; without it, root alone"
        ),
    ] = ""
    urgent_key: Annotated[
        str,
        Meta(
            pattern=r"\A(|[0-9a-f]{64})\Z",
            title="64 hexadecimal digits",
            description="the public key that the nodes want to see of an urgent job; then it is "
            "for those who may read `urgent_key_file`",
        ),
    ] = ""
    urgent_key_file: Annotated[
        str, Meta(description="the file on the master with the secret half of `urgent_key`")
    ] = ""
    notify: Annotated[
        str,
        Meta(
            description="what tells of the end of the jobs of an `oq-run`: a command, which is "
            "given a JSON object on stdin, a mail address, or a URL to which the object is posted"
        ),
    ] = ""

    metrics_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65526,
            description="the port of each agent for its metrics, on its own address; the sessions "
            "on the master take one of the nine ports above it; 0: none",
        ),
    ] = 0

    @property
    def limits(self) -> Limits:
        """The limits alone."""
        return msgspec.convert(self, Limits, from_attributes=True)

    @classmethod
    def from_section(cls, section: Mapping[str, str]) -> Settings:
        """Return the settings of a section; no text stands for the default, or for no names.

        Raises ConfigError that names the key, and what is allowed or what was probably meant.
        """
        given = [(_known(name), text) for name, text in section.items()]
        found = cls(**{key.name: key.value(text) for key, text in given if text or key.several})
        for low, high in ORDERED:
            least, value = getattr(found, low), getattr(found, high)
            if value <= least:
                raise ConfigError(f"[{SECTION}] {high}={value:g}: give more than {low}, {least:g}")
        return found


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the section.

    :param kind: type of its value
    :param meta: its constraints, and in ``description`` its meaning
    :param default: value without it
    """

    name: str
    kind: Any
    meta: Meta
    default: Any

    @property
    def several(self) -> bool:
        """Whether its value is a list, which may be empty."""
        return get_origin(self.kind) is tuple

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        if self.kind is bool:
            return "on or off"
        if self.several:
            return "names, separated by commas"
        if get_origin(self.kind) is Literal:
            return f"one of {', '.join(get_args(self.kind))}"
        if self.kind is str:
            return self.meta.title or "a text"
        number = "a whole number" if self.kind is int else "a number"
        unit = UNITS.get(self.name.rpartition("_")[2], "")
        least, above, most = self.meta.ge, self.meta.gt, self.meta.le
        lower = f"from {least:g} up" if above is None else f"above {above:g} up"
        return f"{number}{unit} {lower}" + (f" to {most:.0f}" if most is not None else "")

    def value(self, text: str) -> Any:
        """Return the value of a text; raises ConfigError that says what is allowed."""
        given: Any = text
        if self.kind is bool:
            given = ConfigParser.BOOLEAN_STATES.get(text.lower(), text)
        elif self.several:
            given = [name for name in map(str.strip, text.split(",")) if name]
        try:
            return msgspec.convert(given, Annotated[self.kind, self.meta], strict=False)
        except msgspec.ValidationError:
            raise ConfigError(f"[{SECTION}] {self.name}={text}: give {self.allowed}") from None


def _keys() -> dict[str, Key]:
    hints = get_type_hints(Settings, include_extras=True)
    found = {}
    for field in fields(Settings):
        kind, meta = get_args(hints[field.name])
        found[field.name] = Key(field.name, kind, meta, field.default)
    return found


#: the keys by name, in the order in which they are declared
KEYS = _keys()


def _known(name: str) -> Key:
    if name in KEYS:
        return KEYS[name]
    meant = difflib.get_close_matches(name, KEYS, 1)
    hint = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(KEYS)}"
    raise ConfigError(f"[{SECTION}] {name} is not a setting; {hint}")
