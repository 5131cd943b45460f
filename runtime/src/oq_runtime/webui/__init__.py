"""The engine's WebUI as a service: ``python -m oq_runtime.webui``.

The engine's own command is Django's development server: no login, debug pages, a secret key that
everybody knows. Here is the same site behind waitress, with login (the engine's mode
``RESTRICTED``) and static files from whitenoise. Starting or stopping it leaves running jobs alone.

Set by the environment: ``OQ_WEBUI_SECRET_KEY_FILE`` (a file with at least 32 characters that others
may not read), ``OQ_WEBUI_HOSTS`` (names by which the site may be called, with commas between) and
``OQ_WEBUI_PROXY`` (the address of a proxy with TLS in front of it, which is believed about where a
request came from and how).
"""
