"""Serve the WebUI until a signal ends it; exit code 2 for a wrong setting.

The site starts each job as a process of its own (the engine's ``spawn``), which outlives the server
and does not hold its port.
"""

from __future__ import annotations

import argparse
import getpass
import ipaddress
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from oq_runtime import processes
from oq_runtime.descriptors import raise_limit
from oq_runtime.errors import ConfigError
from oq_runtime.files import places
from oq_runtime.webui.site import Site

#: what is above the limit of uploads must be received to be told so; from so many times as much on
#: the connection is cut
CUT = 2


def application() -> Any:
    """Return the WSGI application: the engine's site and its static files."""
    from django.conf import settings
    from django.contrib.staticfiles import finders
    from django.core.wsgi import get_wsgi_application
    from openquake.commonlib import logs
    from whitenoise import WhiteNoise

    from oq_runtime.webui import prepare

    prepare.check_database(settings.JOB_DATABASE)
    places.room(Path(logs.get_datadir()), places.OTHER_DATADIR)
    app = WhiteNoise(get_wsgi_application())
    prepare.check_tables()
    try:
        import_module(settings.ROOT_URLCONF)  # where the engine looks for its mail templates
    except AssertionError as exc:
        text = str(exc).split(". ")[0]
        raise ConfigError(f"{text}; copy it from the file *.default.tmpl beside it") from None
    # from where they are installed: a collected copy would be stale after an upgrade
    for finder in finders.get_finders():
        for storage in finder.storages.values():
            app.add_files(storage.location, prefix=settings.STATIC_URL)
    return app


def serve(listen: str, threads: int) -> None:
    """Serve the site; raises ConfigError where it cannot be."""
    from oq_runtime.webui import server

    raise_limit()
    site = Site.read()
    if not _is_loopback(listen) and site.only_here:
        raise ConfigError(
            f"--listen {listen}: set OQ_WEBUI_HOSTS to the names by which browsers call it"
        )
    behind_proxy = {
        "trusted_proxy": site.proxy,
        "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"},
    }
    app = application()
    try:
        bounds = server.Bounds(
            listen=listen,
            threads=threads,
            has_logged_in=has_logged_in,
            max_request_body_size=CUT * site.upload_bytes,
            **(behind_proxy if site.proxy else {}),
        )
        serving = server.make(app, bounds)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--listen {listen}: {exc}; give another address:port") from None
    address = f"{site.origin}{site.prefix}" if site.url else f"http://{listen}"
    print(f"oq-webui: {address}/engine/", flush=True)
    serving.run()


def has_logged_in(cookies: str) -> bool:
    """Whether a request with these cookies is of an account, as far as its session says."""
    from django.conf import settings
    from django.contrib.auth import SESSION_KEY
    from django.db import Error
    from django.http import parse_cookie

    sessions = import_module(settings.SESSION_ENGINE)
    try:
        key = parse_cookie(cookies).get(settings.SESSION_COOKIE_NAME)
        return SESSION_KEY in sessions.SessionStore(key)
    except Error:  # the database is locked; the view will find out by itself
        return False


def _is_loopback(listen: str) -> bool:
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="oq-webui", description="The engine's WebUI with login; see docs/webui.md."
    )
    parser.add_argument(
        "--init",
        action="store_true",
        help="make what it needs, and give an account a password, asked for or read from a pipe",
    )
    parser.add_argument(
        "--account", metavar="NAME", help="of --init, an administrator's; default: your name"
    )
    parser.add_argument("--listen", default="127.0.0.1:8800", help="address:port")
    parser.add_argument("--threads", type=int, default=8, help="requests at a time")
    processes.open_standard()
    args = parser.parse_args()
    os.environ["DJANGO_SETTINGS_MODULE"] = "oq_runtime.webui.settings"
    try:
        processes.check_user()
        if args.init:
            from oq_runtime.webui import prepare

            name = args.account or getpass.getuser()
            print(f"oq-webui: account {name}: {prepare.init(name)}; start it with oq-webui")
        else:
            setproctitle("oq-webui")
            serve(args.listen, args.threads)
    except ConfigError as exc:
        print(f"oq-webui: {exc}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
