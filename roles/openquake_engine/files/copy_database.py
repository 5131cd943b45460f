"""Copy an SQLite database, of which others may be reading: ``python3 - FROM TO``.

TO is whole or as it was before, whatever happens meanwhile.
"""

import os
import sqlite3
import sys

source, target = sys.argv[1:]
os.umask(0o077)
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
