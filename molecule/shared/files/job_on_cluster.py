"""Run a job and watch the workers meanwhile: ``python3 - JOB.ini`` prints one JSON object.

``run`` is the result of ``oq-run --json``; ``busiest`` the most tasks that each worker has had
under way at a time, by ``oq-workers status --json``, which each worker's agent answers for itself.
"""

import json
import subprocess
import sys
import tempfile

busiest: dict[str, int] = {}
with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    run = subprocess.Popen(["oq-run", "--json", *sys.argv[1:]], stdout=out, stderr=err)
    while run.poll() is None:
        status = subprocess.run(["oq-workers", "status", "--json"], capture_output=True, text=True)
        for host, row in json.loads(status.stdout or "{}").items():
            busiest[host] = max(busiest.get(host, 0), row.get("busy", 0))
    out.seek(0)
    err.seek(0)
    result = json.loads(out.read() or "null")
    print(json.dumps({"run": result, "busiest": busiest, "stderr": err.read()[-2000:]}))
