"""The engine's Django application, which starts without touching the jobs that are running."""

from __future__ import annotations

from openquake.baselib import hdf5
from openquake.hazardlib import gsim_lt
from openquake.server import apps
from openquake.server.db import actions

from oq_runtime.engine import jobtable, reading
from oq_runtime.errors import ConfigError
from oq_runtime.webui import uploads


class ServerConfig(apps.ServerConfig):  # type: ignore[misc]
    """The engine's application, whose start leaves running jobs alone."""

    def ready(self) -> None:
        jobtable.install_actions(actions)  # also where the runtime is not active
        try:
            super().ready()
        except NameError as exc:  # as the engine calls a setting that lacks
            raise ConfigError(
                f"{exc}; user and password are taken from the variables EMAIL_USER and "
                "EMAIL_PASS; without EMAIL_BACKEND the site sends no mail"
            ) from None
        from openquake.server import views  # it needs the settings

        reading.install_hdf5(hdf5)
        reading.install_gsim_lt(gsim_lt)
        uploads.install(views)
