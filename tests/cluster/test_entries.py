"""The entry points of the engine besides ``oq-run``: each uses every node of the cluster."""

from __future__ import annotations

import html.parser
import json
import sys
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from tests.cluster.cluster import USER, WEBUI_PORT, Cluster
from tests.cluster.jobs import JOB_LIMIT_S, SHORT_BEATS, job_file, number, status
from tests.cluster.netns import MASTER
from tests.conformance.compare import compare

pytestmark = [pytest.mark.timeout(400), pytest.mark.settings(**SHORT_BEATS)]

#: what differs with the way in, and not with the results
DIFFERING = (
    "oqparam.inputs",
    "oqparam.export_dir",
    "oqparam.exports",
    "oqparam.base_path",
    "full_lt/gsim_lt@filename",
    "full_lt/source_model_lt@filename",
    "source_model_read_times.fname",
)
POST = """
import json, sys, requests
url, fields, names = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
files = [("archive", open(name, "rb")) for name in names]
with requests.Session() as session:
    session.trust_env = False
    answer = session.post(url, data=fields, files=files, timeout=60)
print(answer.text)
sys.exit(answer.status_code != 200)
"""


def tasks_of(datastore: Path) -> Counter[bytes]:
    """How many tasks of each function the datastore knows of."""
    with h5py.File(datastore) as file:
        return Counter(file["task_info"]["taskname"].tolist())


def check_everywhere(cluster: Cluster, ended: Callable[[], object]) -> None:
    """Until the job ends, each node is seen with tasks of it."""
    seen: set[str] = set()

    def all_seen() -> bool:
        seen.update(node for node, row in status(cluster).items() if row.get("busy"))
        return len(seen) == len(cluster.slots)

    cluster.wait_for(lambda: all_seen() or ended(), JOB_LIMIT_S)
    assert seen == set(cluster.slots)
    assert cluster.wait_for(ended, JOB_LIMIT_S)


def check_equal(undisturbed: Path, datastore: Path) -> None:
    assert tasks_of(datastore) == tasks_of(undisturbed)
    differences = compare(undisturbed, datastore)
    assert not [line for line in differences if not line.startswith(DIFFERING)]


def test_oq_engine_run(cluster: Cluster, undisturbed: Path) -> None:
    args = ["-m", "openquake.commands", "engine", "--run", str(job_file(cluster))]
    run = cluster.run(args, {"LOGNAME": USER})
    check_everywhere(cluster, lambda: run.poll() is not None)
    out, _ = run.communicate()
    assert run.returncode == 0, (out, run.log.read_text())
    check_equal(undisturbed, cluster.datadir / f"calc_{number(run)}.hdf5")


# ---- the WebUI


def post(cluster: Cluster, path: str, fields: dict[str, str], *files: Path) -> int:
    """Send files from a node's browser or program; returns the number of the calculation."""
    url = urllib.parse.urljoin(f"http://{cluster.net.address[MASTER]}:{WEBUI_PORT}", path)
    argv: list[str | Path] = [sys.executable, "-c", POST, url, json.dumps(fields), *files]
    done = cluster.net.run("node1", argv, limit_s=120)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return int(json.loads(done.stdout)["job_id"])


def follow(cluster: Cluster, job: int, undisturbed: Path) -> None:
    """The calculation uses every node, completes, and has the same results."""

    def state() -> str:
        answer = cluster.get(f"/v1/calc/{job}", "node2")
        return json.loads(answer)["status"] if answer else ""

    check_everywhere(cluster, lambda: state() in ("complete", "failed", "aborted"))
    assert state() == "complete", cluster.get(f"/v1/calc/{job}/log/0:")
    check_equal(undisturbed, cluster.datadir / f"calc_{job}.hdf5")


def inputs(cluster: Cluster) -> list[Path]:
    return sorted(p for p in job_file(cluster).parent.iterdir() if p.suffix != ".md")


@pytest.mark.slow
def test_api(webui: Cluster, cluster: Cluster, undisturbed: Path) -> None:
    job = post(cluster, "/v1/calc/run", {"job_ini": "job.ini"}, *inputs(cluster))
    follow(cluster, job, undisturbed)


class Forms(html.parser.HTMLParser):
    """The forms of a page: method, action, and the names of their inputs for files."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self.found.append((given.get("method") or "", given.get("action") or "", []))
        elif tag == "input" and given.get("type") == "file" and self.found:
            self.found[-1][2].append(given.get("name") or "")


@pytest.mark.slow
def test_upload_in_the_browser(
    webui: Cluster, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    page = cluster.get("/engine", "node1")
    assert page
    forms = Forms()
    forms.feed(page)
    # the first form is the one for a new calculation; the script of the page sends it as it is
    method, action, names = forms.found[0]
    assert (method.lower(), names) == ("post", ["archive"]), forms.found
    archive = tmp_path / "job.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in inputs(cluster):
            file.write(path, path.name)
    follow(cluster, post(cluster, action, {}, archive), undisturbed)
