"""Copy an SQLite database, of which others may be reading: ``python3 - FROM TO HOW``.

TO is whole or as it was before, whatever happens meanwhile. HOW is ``once``: only where there is no
TO; or ``back``: only where TO has no jobs beyond those of FROM, else a line says that it was kept.
Where there is no FROM, nothing is done.
"""

import os
import sqlite3
import sys
from contextlib import closing


def last_job(path: str) -> int:
    """Return the number of the last job; 0 where the database cannot be read."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT coalesce(max(id), 0) FROM job").fetchone()[0])
    except sqlite3.Error:
        return 0


source, target, how = sys.argv[1:]
os.umask(0o077)
if not os.path.exists(source) or (how == "once" and os.path.exists(target)):
    sys.exit()
if how == "back" and last_job(target) > last_job(source):
    print(f"{target} was kept, for it has jobs that are not in {source}")
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
