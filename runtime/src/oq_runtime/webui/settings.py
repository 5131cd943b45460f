"""Django settings: the engine's own, with login and without what is for development only.

``local_settings.py``, the engine's way to change its settings, still works.
"""

# ruff: noqa: F403
import os
import stat
from pathlib import Path

# read by the engine's settings: "RESTRICTED" is its mode with login, and a mode with login must
# name a mail backend; there is none here, so an administrator sets passwords under /admin
os.environ.setdefault("OQ_APPLICATION_MODE", "RESTRICTED")
os.environ.setdefault("EMAIL_BACKEND", "django.core.mail.backends.dummy.EmailBackend")

from openquake.server.settings import *
from openquake.server.settings import INSTALLED_APPS as ENGINE_APPS
from openquake.server.settings import MIDDLEWARE as ENGINE_MIDDLEWARE

from oq_runtime.errors import ConfigError

#: characters of the shortest secret key that is accepted; below 50 Django itself warns
MIN_CHARACTERS = 32


def read_secret_key(name: str) -> str:
    """Return the key in the file that the variable ``name`` gives; raises ConfigError."""
    if not os.environ.get(name):
        raise ConfigError(f"{name} is not set; name a file with a secret key")
    path = Path(os.environ[name])
    try:
        mode, key = path.stat().st_mode, path.read_text().strip()
    except OSError as exc:
        raise ConfigError(f"{name}={path}: {exc.strerror}; name a file with a secret key") from None
    if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{name}={path}: others may read it; chmod 0600 it")
    if len(key) < MIN_CHARACTERS:
        raise ConfigError(f"{name}={path}: give at least {MIN_CHARACTERS} characters")
    return key


if (mode := os.environ["OQ_APPLICATION_MODE"]) != "RESTRICTED":
    # the others have no login, or views that this site has no rules for
    raise ConfigError(f"OQ_APPLICATION_MODE={mode}: give RESTRICTED, the mode with login")

DEBUG = False
SECRET_KEY = read_secret_key("OQ_WEBUI_SECRET_KEY_FILE")
ALLOWED_HOSTS = [host for host in os.environ.get("OQ_WEBUI_HOSTS", "").split(",") if host]
# ours does not set running jobs to failed when it starts
INSTALLED_APPS = tuple(
    "oq_runtime.webui.apps.ServerConfig" if app == "openquake.server" else app
    for app in ENGINE_APPS
)
MIDDLEWARE = (*ENGINE_MIDDLEWARE, "oq_runtime.webui.access.Access")
# behind a proxy with TLS cookies go by no other way
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = bool(os.environ.get("OQ_WEBUI_PROXY"))
