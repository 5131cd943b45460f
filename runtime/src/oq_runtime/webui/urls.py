"""The addresses of the engine's site, and beside them those of our pages.

The engine starts its mode with login only where somebody has written the texts of its mails into
its package. With the PAM backend it takes its examples instead, as no mail is sent then: as here.
"""

from __future__ import annotations

import importlib

from django.conf import settings
from django.urls import path

from oq_runtime.webui import activity, reports

PAM = "django_pam.auth.backends.PAMBackend"

backends = settings.AUTHENTICATION_BACKENDS
if settings.EMAIL_BACKEND == settings.NO_MAIL:
    settings.AUTHENTICATION_BACKENDS = (*backends, PAM)
try:
    engine = importlib.import_module("openquake.server.urls")
finally:
    settings.AUTHENTICATION_BACKENDS = backends

OURS = f"{settings.SITE.prefix}/engine".lstrip("/")
urlpatterns = [
    path(f"{OURS}/activity", activity.activity, name="activity"),
    path(f"{OURS}/<int:calc_id>/report", reports.report, name="report"),
    *engine.urlpatterns,
]
