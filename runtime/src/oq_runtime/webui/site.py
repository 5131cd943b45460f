"""What the environment says of the site: its key, its names, its address, how much it takes.

``OQ_WEBUI_URL``
    address by which browsers call it through a proxy, as ``https://hazard.example/oq``; its path is
    the prefix of all pages
``OQ_WEBUI_PROXY``
    address of the proxy, which is believed about where a request came from and how; 127.0.0.1 where
    only the URL is set. Without a URL: one with TLS, and no prefix
``OQ_WEBUI_HOSTS``
    more names by which the site may be called, with commas between
``OQ_WEBUI_UPLOAD_MB``
    MiB of an upload at most
``OQ_WEBUI_SECRET_KEY_FILE``
    a file with at least 32 characters that others may not read; ``oq-webui --init`` makes it
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from oq_runtime.errors import ConfigError

PREFIX = "OQ_WEBUI_"
KEY_VARIABLE = "OQ_WEBUI_SECRET_KEY_FILE"
VARIABLES = (
    "OQ_WEBUI_URL",
    "OQ_WEBUI_PROXY",
    "OQ_WEBUI_HOSTS",
    "OQ_WEBUI_UPLOAD_MB",
    KEY_VARIABLE,
)
#: name of the key beside the job database
KEY_NAME = "webui-secret-key"
#: characters of the shortest secret key that is accepted; below 50 Django itself warns
MIN_CHARACTERS = 32
#: names of this machine for itself
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
#: MiB of the largest upload; models of a country have some hundred
UPLOAD_MB = 4096
#: what a path may be made of that the engine puts into patterns of its addresses
PATH = re.compile(r"(/[A-Za-z0-9_-]+)*/?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The settings of a site.

    :param key: path of the secret key, None where it lies beside the job database
    :param hosts: names by which the site may be called
    :param url: by which browsers call it through a proxy
    :param proxy: address of what is believed about requests, or nothing
    :param upload_bytes: of the largest upload
    """

    key: Path | None
    hosts: tuple[str, ...]
    url: SplitResult | None
    proxy: str
    upload_bytes: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Site:
        """Return what the variables say; raises ConfigError that names the variable."""
        for other in environment:
            if other.startswith(PREFIX) and other not in VARIABLES:
                near = difflib.get_close_matches(other, VARIABLES, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VARIABLES)}"
                raise ConfigError(f"{other}: no such setting; {hint}")
        url = _url(environment.get("OQ_WEBUI_URL", ""))
        hosts = [name.strip() for name in environment.get("OQ_WEBUI_HOSTS", "").split(",")]
        if url and (name := url.hostname):
            hosts.append(f"[{name}]" if ":" in name else name)
        key = environment.get(KEY_VARIABLE)
        return cls(
            key=Path(key) if key else None,
            hosts=tuple(dict.fromkeys([*filter(None, hosts), *LOOPBACK])),
            url=url,
            proxy=environment.get("OQ_WEBUI_PROXY") or ("127.0.0.1" if url else ""),
            upload_bytes=_megabytes(environment.get("OQ_WEBUI_UPLOAD_MB")) << 20,
        )

    @property
    def prefix(self) -> str:
        """What stands before the path of each page: ``/oq``, or nothing."""
        return self.url.path.rstrip("/") if self.url else ""

    @property
    def origin(self) -> str:
        """What a browser calls the site when it sends a form from one of its pages."""
        return f"{self.url.scheme}://{self.url.netloc}" if self.url else ""

    @property
    def secure(self) -> bool:
        """Whether browsers come by https, and so cookies go by no other way."""
        return self.url.scheme == "https" if self.url else bool(self.proxy)

    @property
    def only_here(self) -> bool:
        """Whether only this machine's own names are known."""
        return set(self.hosts) == set(LOOPBACK)


def read_key(path: Path) -> str:
    """Return the key in a file; raises ConfigError."""
    try:
        found, key = path.stat(), path.read_text().strip()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no secret key; make it with oq-webui --init") from None
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}; name a file with a secret key") from None
    if stat.S_IMODE(found.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path}: others may read it; chmod 0600 it")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path} is somebody else's; remove it and run oq-webui --init")
    if len(key) < MIN_CHARACTERS:
        raise ConfigError(f"{path}: give at least {MIN_CHARACTERS} characters")
    return key


def _url(text: str) -> SplitResult | None:
    if not text:
        return None
    try:
        url = urlsplit(text)
        right = bool(url.scheme in ("http", "https") and url.hostname and PATH.fullmatch(url.path))
        right = right and url.port != 0 and not (url.username or url.query or url.fragment)
    except ValueError:  # a port that is none
        right = False
    if not right:
        raise ConfigError(
            f"OQ_WEBUI_URL={text}: give the address by which browsers call the site, as "
            "https://hazard.example/oq"
        )
    return url


def _megabytes(text: str | None) -> int:
    if not text:
        return UPLOAD_MB
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"OQ_WEBUI_UPLOAD_MB={text}: give a whole number of MiB from 1 up")
    return int(text)
