"""Django settings: the engine's own, with login and without what is for development only.

``local_settings.py``, the engine's way to change its settings, still works.
"""

# ruff: noqa: E402, F403
import os
import traceback
from pathlib import Path

from oq_runtime.errors import ConfigError
from oq_runtime.webui.site import KEY_NAME, Site, read_key

SITE = Site.read()
# read by the engine's settings: "RESTRICTED" is its mode with login, and a mode with login must
# name a mail backend; there is none here, so an administrator sets passwords under /admin
NO_MAIL = "django.core.mail.backends.dummy.EmailBackend"
os.environ.setdefault("OQ_APPLICATION_MODE", "RESTRICTED")
os.environ.setdefault("EMAIL_BACKEND", NO_MAIL)
os.environ["WEBUI_PATHPREFIX"] = SITE.prefix
if (mode := os.environ["OQ_APPLICATION_MODE"]) != "RESTRICTED":
    # the others have no login, or views that this site has no rules for
    raise ConfigError(f"OQ_APPLICATION_MODE={mode}: give RESTRICTED, the mode with login")

try:
    from openquake.server.settings import *
except Exception as exc:
    *_, last = traceback.extract_tb(exc.__traceback__)
    file, line, text = last.filename, last.lineno, str(exc)
    if isinstance(exc, SyntaxError):
        file, line, text = exc.filename or file, exc.lineno, exc.msg
    if Path(file).name != "local_settings.py":  # which these read
        raise
    raise ConfigError(f"{file}, line {line}: {text}; correct this file of settings") from None
from openquake.server.settings import DATABASES
from openquake.server.settings import INSTALLED_APPS as ENGINE_APPS
from openquake.server.settings import LOGIN_EXEMPT_URLS as ENGINE_EXEMPT
from openquake.server.settings import MIDDLEWARE as ENGINE_MIDDLEWARE
from openquake.server.settings import STATICFILES_DIRS as ENGINE_STATIC
from openquake.server.settings import TEMPLATES as ENGINE_TEMPLATES

HERE = Path(__file__).parent
DEBUG = False
JOB_DATABASE = Path(DATABASES["default"]["NAME"])
SECRET_KEY = read_key(SITE.key or JOB_DATABASE.with_name(KEY_NAME))
ALLOWED_HOSTS = SITE.hosts
ROOT_URLCONF = "oq_runtime.webui.urls"
# ours does not set running jobs to failed when it starts
INSTALLED_APPS = tuple(
    "oq_runtime.webui.apps.ServerConfig" if app == "openquake.server" else app
    for app in ENGINE_APPS
)
# before the engine's: our base.html puts something into the engine's of the same name
TEMPLATES = [ENGINE_TEMPLATES[0] | {"DIRS": [HERE / "templates"]}]
STATICFILES_DIRS = [*ENGINE_STATIC, HERE / "static"]
LOGIN = ENGINE_MIDDLEWARE.index("openquake.server.middleware.LoginRequiredMiddleware")
MIDDLEWARE = (
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    *ENGINE_MIDDLEWARE[:LOGIN],
    "oq_runtime.webui.access.LoginOfPrograms",
    *ENGINE_MIDDLEWARE[LOGIN:],
    "oq_runtime.webui.access.Access",
)
# patterns of paths without a slash at the beginning; the engine forgets the prefix of some
LOGIN_EXEMPT_URLS = [*ENGINE_EXEMPT, *(f"{SITE.prefix}/{path}" for path in ENGINE_EXEMPT)]
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SITE.secure
SESSION_COOKIE_PATH = CSRF_COOKIE_PATH = f"{SITE.prefix}/"
CSRF_TRUSTED_ORIGINS = [SITE.origin] if SITE.origin else []
