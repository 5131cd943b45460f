"""The engine's own command ``oq``: what the runtime refuses is one line, and leaves no job behind.

The engine makes the row of a job long before the session of the job is started, and shows whatever
is raised as a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oq_runtime.config import SESSION_VARIABLE, Config
from oq_runtime.engine import messages
from oq_runtime.engine.jobtable import JobTable
from oq_runtime.errors import ConfigError, OqRuntimeError
from oq_runtime.files import places
from oq_runtime.session import launch
from oq_runtime.text import clean

FAILED, BAD_INPUT = 1, 2


def install_sap(sap: Any) -> None:
    """Have an error of the runtime told in one line.

    :param sap: the module ``openquake.baselib.sap``, by which the engine runs its commands
    """
    engine_run = sap.run

    @functools.wraps(engine_run)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return engine_run(*args, **kwargs)
        except OqRuntimeError as exc:
            print(f"oq: {clean(messages.explain(exc), messages.MOST_CHARACTERS)}", file=sys.stderr)
            sys.exit(BAD_INPUT if isinstance(exc, ConfigError) else FAILED)

    sap.run = run


def install_create_jobs(engine: Any) -> None:
    """Let no job have a row for which no session could be started.

    :param engine: the module ``openquake.engine.engine``
    """
    engine_create_jobs = engine.create_jobs

    @functools.wraps(engine_create_jobs)
    def create_jobs(*args: Any, **kwargs: Any) -> Any:
        check()
        return engine_create_jobs(*args, **kwargs)

    engine.create_jobs = create_jobs


def install_run_calc(engine: Any) -> None:
    """Log a line behind the traceback of a job that failed by what its user can change.

    It is the last thing of its level, which the WebUI shows.

    :param engine: the module ``openquake.engine.engine``
    """
    engine_run_calc = engine.run_calc

    @functools.wraps(engine_run_calc)  # the engine has other processes find it by its name
    def run_calc(log: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return engine_run_calc(log, *args, **kwargs)
        except Exception as exc:
            with contextlib.suppress(Exception):  # the job has failed by another one
                tell(log, exc)
            raise

    engine.run_calc = run_calc


def tell(log: Any, exc: BaseException) -> None:
    """Log what the user can do about the end of a job, if there is something.

    :param log: the engine's context of the job
    """
    from openquake.baselib import config
    from openquake.commonlib import logs

    inputs = messages.files(log.params["inputs"])
    table = JobTable.of_engine()
    text = messages.of_user(exc, inputs, config.directory.shared_dir)
    if not text and messages.unforeseen(said := messages.explain(exc)):
        elsewhere = messages.starting_elsewhere(table, log)
        text = elsewhere and said + elsewhere
    if text:
        unpacked = f"{logs.get_datadir()}/calc_{log.calc_id}/"  # an upload
        level = table.level_of_errors(log.calc_id)
        row = (level, "oq_runtime", text.replace(unpacked, ""))
        logs.dbcmd("log", log.calc_id, datetime.now(UTC), *row)


def install_main(command: Any) -> None:
    """Refuse what ``oq engine`` could not do, before it says or writes anything.

    :param command: the module ``openquake.commands.engine``
    """
    engine_main = command.main

    @functools.wraps(engine_main)
    def main(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("run"):
            check()
        places.make(Path(command.datastore.get_datadir()), places.OTHER_DATADIR)
        engine_main(*args, **kwargs)

    # with its attributes this makes the command line
    main.__signature__ = inspect.signature(engine_main)  # type: ignore[attr-defined]
    command.main = main


def check() -> None:
    """Raise ConfigError where this process may or can start no session for a job."""
    from openquake.baselib import config

    if os.environ.get("OQ_DISTRIBUTE") == "zmq" and SESSION_VARIABLE not in os.environ:
        launch.check(Config.from_sections(config))
