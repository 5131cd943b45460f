"""``oq-webui --init``: what the site needs before it starts, and whether it is there.

A secret key, the job database with the tables of accounts and sessions, and an administrator's
account. The key and the database are for their owner alone: who reads a session in it is that
session's user.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import sqlite3
import stat
import sys
from pathlib import Path

from oq_runtime.engine import jobtable
from oq_runtime.errors import ConfigError
from oq_runtime.webui import account
from oq_runtime.webui.site import KEY_NAME, Site

REMEDY = "run oq-webui --init"


def init(name: str) -> str:
    """Make what is not there, and give an account a password; return what was done with it.

    :param name: of the account, an administrator's
    :raises ConfigError: for what cannot be made, and for a password that is refused
    """
    os.umask(0o077)
    from openquake.baselib import config

    database = Path(os.path.expanduser(config.dbserver.file))
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        jobtable.make(database)
        for path in (database, *(Path(f"{database}{suffix}") for suffix in ("-wal", "-shm"))):
            with contextlib.suppress(FileNotFoundError):
                path.chmod(0o600)
        make_key(Site.read().key or database.with_name(KEY_NAME))
    except sqlite3.Error as exc:
        raise ConfigError(f"the job database {database}: {jobtable.explain(exc)}") from None
    except OSError as exc:
        raise ConfigError(f"{exc.filename}: {exc.strerror}") from None
    import django

    django.setup()
    from django.contrib.auth.models import User
    from django.core.management import call_command
    from openquake.commonlib import dbapi
    from openquake.server.db import actions

    actions.upgrade_db(dbapi.db)
    call_command("migrate", verbosity=0)
    user = account.find(name)
    password = ask(name)
    refuse_weak(password, user or User(username=name))
    if user is None:
        account.make(name, password)
        return "made"
    user.set_password(password)
    user.save()
    return "given the new password"


def make_key(path: Path) -> None:
    """Make a secret key where there is none, whole or not at all."""
    if path.exists():
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
        with contextlib.suppress(FileExistsError):  # another one was faster
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)


def ask(name: str) -> str:
    """Return the new password: typed twice at a terminal, else the first line of stdin."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    first = getpass.getpass(f"New password of {name}: ")
    if getpass.getpass("Again: ") != first:
        raise ConfigError(f"the two passwords differ; {REMEDY} again")
    return first


def refuse_weak(password: str, user: object) -> None:
    """Raise ConfigError for a password that the site would not take under /admin either."""
    from django.contrib.auth.password_validation import validate_password
    from django.core.exceptions import ValidationError

    try:
        validate_password(password, user)
    except ValidationError as exc:
        raise ConfigError(" ".join(exc.messages)) from None


def check_database(database: Path) -> None:
    """Raise ConfigError where there is no job database, or others may read it."""
    try:
        if not jobtable.made(database):
            raise ConfigError(f"{database}: there is no job database; {REMEDY}")
        open_to_others = database.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
        entered = database.parent.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH)
    except sqlite3.Error as exc:
        raise ConfigError(f"the job database {database}: {jobtable.explain(exc)}") from None
    except OSError as exc:
        raise ConfigError(f"the job database {database}: {exc}") from None
    if open_to_others and entered:
        raise ConfigError(f"{database}: others may read it, with the sessions of users; {REMEDY}")


def check_tables() -> None:
    """Raise ConfigError where there are no tables of accounts, or older ones, or no account."""
    from django.contrib.auth.models import User
    from django.db import connection
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection)
    if executor.migration_plan(executor.loader.graph.leaf_nodes()):
        raise ConfigError(f"the tables of accounts are not there, or of an older engine; {REMEDY}")
    if not User.objects.exists():
        raise ConfigError(f"there is no account to log in with; {REMEDY}")
