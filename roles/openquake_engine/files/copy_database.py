"""Copy an SQLite database, of which others may be reading: ``python3 - FROM TO HOW``.

TO is whole or as it was before, whatever happens meanwhile. HOW is ``once``: only where there is no
TO, else a line says where both are; or ``back``: only where its jobs and the accounts of the WebUI
are those of FROM, or cannot be read; else a line says that it was kept. Where there is no FROM,
nothing is done.
"""

import os
import sqlite3
import sys
from contextlib import closing

#: what people put there; a login changes a row of auth_user as well, and is no reason to keep it
QUERIES = {
    "jobs": "SELECT id FROM job",
    "accounts": "SELECT username, password, is_active, is_staff, is_superuser FROM auth_user",
}


def content(path: str) -> dict[str, set[tuple[object, ...]]]:
    """Return what people have put into a database; nothing where it cannot be read."""
    found = {}
    for name, query in QUERIES.items():
        found[name] = set()
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                found[name].update(database.execute(query))
        except sqlite3.Error:
            pass  # a database that no WebUI has used has no accounts
    return found


source, target, how = sys.argv[1:]
os.umask(0o077)
if not os.path.exists(source):
    sys.exit()
if how == "once" and os.path.exists(target):
    print(f"{target} stays as it is; {source} is not used")
    sys.exit()
if how == "back":
    before, now = content(source), content(target)
    other = [name for name in QUERIES if now[name] and now[name] != before[name]]
    if other:
        print(f"{target} was kept, for its {' and '.join(other)} are not those of {source}")
        sys.exit()
half = target + ".half"
if os.path.exists(half):
    os.unlink(half)
with sqlite3.connect(f"file:{source}?mode=ro", uri=True) as old, sqlite3.connect(half) as new:
    old.backup(new)
old.close()
new.close()
for suffix in "-journal", "-wal", "-shm":  # of what is replaced
    if os.path.exists(target + suffix):
        os.unlink(target + suffix)
os.replace(half, target)
