"""The engine's Django application, which starts without touching the jobs that are running."""

from __future__ import annotations

from typing import Any

from openquake.server import apps
from openquake.server.db import actions

from oq_runtime.engine.jobtable import JobTable
from oq_runtime.webui import uploads


def fail_lost_jobs(db: Any) -> None:
    """Set to ``failed`` the jobs of this host whose engine process is gone, and no others.

    :param db: ``openquake.commonlib.dbapi.Db``; the DbServer need not be there yet
    """
    JobTable(lambda action, *arguments: getattr(actions, action)(db, *arguments)).mend()


class ServerConfig(apps.ServerConfig):  # type: ignore[misc]
    """The engine's application, whose start leaves running jobs alone."""

    def ready(self) -> None:
        # The engine's sets every executing job to failed, also when only `manage.py` is run.
        reset = actions.reset_is_running
        actions.reset_is_running = fail_lost_jobs
        try:
            super().ready()
        finally:
            actions.reset_is_running = reset
        from openquake.server import views  # it needs the settings

        uploads.install(views)
