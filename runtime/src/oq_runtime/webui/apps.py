"""The engine's Django application, which starts without touching the jobs that are running."""

from __future__ import annotations

from openquake.server import apps
from openquake.server.db import actions

from oq_runtime.engine import jobtable
from oq_runtime.webui import uploads


class ServerConfig(apps.ServerConfig):  # type: ignore[misc]
    """The engine's application, whose start leaves running jobs alone."""

    def ready(self) -> None:
        jobtable.install_actions(actions)  # also where the runtime is not active
        super().ready()
        from openquake.server import views  # it needs the settings

        uploads.install(views)
