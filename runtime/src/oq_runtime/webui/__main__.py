"""Serve the WebUI until a signal ends it; exit code 2 for a wrong setting.

The site starts each job as a process of its own (the engine's ``spawn``), which outlives the server
and does not hold its port.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import Any

from setproctitle import setproctitle

from oq_runtime.errors import ConfigError

#: bytes of the largest upload; models of a country have some hundred MB
MAX_UPLOAD_BYTES = 4 << 30


def application() -> Any:
    """Return the WSGI application: the engine's site and its static files."""
    from django.conf import settings
    from django.contrib.staticfiles import finders
    from django.core.wsgi import get_wsgi_application
    from whitenoise import WhiteNoise

    app = WhiteNoise(get_wsgi_application())
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="oq_runtime.webui", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:8800", help="address:port")
    parser.add_argument("--threads", type=int, default=8, help="requests at a time")
    args = parser.parse_args()
    os.environ["DJANGO_SETTINGS_MODULE"] = "oq_runtime.webui.settings"
    setproctitle("oq-webui")
    import waitress

    try:
        app = application()
    except ConfigError as exc:
        print(f"oq_runtime.webui: {exc}", file=sys.stderr)
        sys.exit(2)
    behind_proxy = {
        "trusted_proxy": os.environ.get("OQ_WEBUI_PROXY"),
        "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"},
    }
    waitress.serve(
        app,
        listen=args.listen,
        threads=args.threads,
        max_request_body_size=MAX_UPLOAD_BYTES,
        ident=None,
        clear_untrusted_proxy_headers=True,
        **(behind_proxy if behind_proxy["trusted_proxy"] else {}),
    )


if __name__ == "__main__":
    main()
