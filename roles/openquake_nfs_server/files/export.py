"""Export what the files say, and print "changed" if that was not so before: ``- FILE PATH...``.

FILE has the exports of the cluster, the other arguments name what it may export. Where exportfs
complains, and yet these are exported as FILE says and to nobody else, it complains of others.
"""

import re
import subprocess
import sys
from pathlib import Path


def rows(text: str) -> dict[tuple[str, str], set[str]]:
    """Path and client of each export, and its options."""
    found = {}
    for line in text.splitlines():
        path = line.partition(" ")[0]
        for name, options in re.findall(r"([^\s(]+)\(([^)]*)\)", line):
            found[path, name] = set(options.split(","))
    return found


def exported() -> str:
    return subprocess.run(["exportfs", "-s"], stdout=subprocess.PIPE, text=True).stdout


file = Path(sys.argv[1])
before = exported()
failed = subprocess.run(["exportfs", "-ra"]).returncode
after = exported()
if sorted(before.splitlines()) != sorted(after.splitlines()):
    print("changed")
if failed:
    wanted = rows(file.read_text()) if file.exists() else {}
    found = {row: options for row, options in rows(after).items() if row[0] in sys.argv[2:]}
    same = found.keys() == wanted.keys()
    sys.exit(not (same and all(wanted[row] <= found[row] for row in wanted)))
