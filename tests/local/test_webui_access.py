"""Who may do what on the WebUI: a stranger, two members, an administrator, and all its routes."""

from __future__ import annotations

import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import requests

from tests.conftest import Attacks
from tests.leftovers import wait_for
from tests.local.test_webui import EXAMPLE, JOB_S, PASSWORD, Site
from tests.squatter import AS_ANYBODY

pytestmark = [pytest.mark.timeout(600)]
EXAMPLES = EXAMPLE.parent

#: all routes of the site, as JSON: pattern, rule, and whether it takes the number of a calculation
ROUTES = """
import json, django
django.setup()
from django.urls import ResolverMatch, get_resolver
from oq_runtime.webui import access
def walk(resolver, prefix, apps):
    for entry in resolver.url_patterns:
        pattern = prefix + str(entry.pattern)
        if hasattr(entry, "url_patterns"):
            yield from walk(entry, pattern, apps + [entry.app_name] * bool(entry.app_name))
        else:
            yield pattern, ResolverMatch(entry.callback, (), {}, app_names=apps)
rows = []
for pattern, match in walk(get_resolver(), "", []):
    rule = access.rule_of(match)
    rows.append([pattern, access.name_of(match.func), rule and rule.name])
print(json.dumps(rows))
"""
ACCOUNTS = f"""
import django
django.setup()
from django.contrib.auth.models import User
for name in ("alice", "bob"):
    if not User.objects.filter(username=name).exists():
        User.objects.create_user(name, password={PASSWORD!r})
"""
#: what stands in a route for the number of a calculation, and for what follows
PLACES = [(r"(\d+)", "{job}"), ("<int:calc_id>", "{job}"), (r"(\d*):(\d*)", "0:10"),
          ("<str:tag_name>", "tag"), (r"([-/_\.\w]+)", "oqparam"), (r"([-/_\.\(\)\w]+)", "x.png"),
          ("^", ""), ("$", ""), ("?", "")]  # fmt: skip


class Sites(Site):
    def login_as(self, name: str) -> requests.Session:
        session = requests.Session()
        form = {"username": name, "password": PASSWORD}
        assert session.post(f"{self.url}/accounts/ajax_login/", form).text == "Successful login"
        return session

    def job_of(
        self,
        owner: str,
        status: str = "complete",
        *,
        pid: int = 0,
        description: str = "d",
        line: str = "a secret line",
    ) -> int:
        job = self.insert_job(pid)
        with sqlite3.connect(self.database) as db:
            db.execute(
                "UPDATE job SET user_name=?, status=?, is_running=?, description=? WHERE id=?",
                (owner, status, bool(pid), description, job),
            )
            db.executemany(
                "INSERT INTO log (job_id, timestamp, level, process, message)"
                " VALUES (?, '2028-01-01 00:00:00', 'CRITICAL', 'p', ?)",
                [(job, line), (job, "the last line")],
            )
        return job

    def forget(self, job: int) -> None:
        with sqlite3.connect(self.database) as db:
            db.execute("DELETE FROM job WHERE id=?", (job,))

    def jobs(self) -> int:
        with sqlite3.connect(self.database) as db:
            return int(db.execute("SELECT count(*) FROM job").fetchone()[0])


@pytest.fixture(scope="module")
def site(engine_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    home = tmp_path_factory.mktemp("w")
    site = Sites(engine_home | {"TMPDIR": str(home), "OQ_WEBUI_UPLOAD_MB": "1"}, home)
    site.prepare()
    site.python("-c", ACCOUNTS)
    site.start()
    yield site
    site.stop()


@pytest.fixture(scope="module")
def routes(site: Sites) -> list[tuple[str, str, str | None]]:
    found: list[tuple[str, str, str | None]] = json.loads(
        site.python("-c", ROUTES).splitlines()[-1]
    )
    return found


def test_every_route_has_a_rule(routes: list[tuple[str, str, str | None]]) -> None:
    assert len(routes) > 50
    assert not [row for row in routes if row[2] is None]


@pytest.mark.attack
def test_a_calculation_is_its_owners(
    site: Sites, routes: list[tuple[str, str, str | None]], attacks: Attacks
) -> None:
    """Every route with the number of a calculation, for somebody else and without a login."""
    job = site.job_of("alice")
    bob, stranger = site.login_as("bob"), requests.Session()
    tried = 0
    for pattern, _, rule in routes:
        if rule not in ("READER", "OWNER"):
            continue
        path = pattern
        for place, value in PLACES:
            path = path.replace(place, value)
        url = f"{site.url}/{path.format(job=job)}"
        for session in (bob, stranger):
            for method in ("GET", "POST"):
                answer = session.request(method, url, allow_redirects=False)
                gone = answer.status_code == 302 and "login" in answer.headers["Location"]
                refused = answer.status_code == 403 or gone
                attacks.tried(successes=int(not refused or "secret" in answer.text))
                tried += 1
    assert tried > 60
    assert site.status(job) == "complete"
    owner, admin = site.login_as("alice"), site.login()
    for session in (owner, admin):
        log = session.get(f"{site.url}/v1/calc/{job}/log/0:10")
        assert (log.status_code, "a secret line" in log.text) == (200, True)
        assert session.get(f"{site.url}/v1/calc/{job}/traceback").ok
    assert bob.get(f"{site.url}/v1/calc/999999/log/0:10").status_code == 404
    assert bob.get(f"{site.url}/v1/calc/{10**30}/log/0:10").status_code == 404


def test_a_shared_calculation_is_read_by_all_and_changed_by_none(site: Sites) -> None:
    job = site.job_of("alice", "shared")
    bob = site.login_as("bob")
    assert bob.get(f"{site.url}/v1/calc/{job}/log/0:10").ok
    for change in ("abort", "remove", "unshare"):
        assert bob.post(f"{site.url}/v1/calc/{job}/{change}").status_code == 403


@pytest.mark.attack
def test_a_pid_that_is_another_process_by_now_gets_no_signal(site: Sites, attacks: Attacks) -> None:
    alice = site.login_as("alice")
    other = subprocess.Popen(["sleep", "99"])
    try:
        job = site.job_of("alice", "executing", pid=other.pid)
        answer = alice.post(f"{site.url}/v1/calc/{job}/remove")
        said = f"calculation {job} is executing; abort it first"
        assert (answer.status_code, answer.json()) == (403, {"error": said})
        assert alice.get(f"{site.url}/v1/calc/{job}/abort").status_code == 405
        answer = alice.post(f"{site.url}/v1/calc/{job}/abort")
        said = f"Unable to find a process for job {job}, setting it as failed"
        assert (answer.status_code, answer.json()) == (200, {"error": said})
        attacks.tried(successes=int(other.poll() is not None))
        assert site.status(job) == "failed"
    finally:
        other.kill()
        other.wait()
    program = [sys.executable, "-c", "import time; time.sleep(99)"]
    with subprocess.Popen(program) as own:
        job = site.job_of("alice", "executing", pid=own.pid)
        answer = alice.post(f"{site.url}/v1/calc/{job}/abort")
        assert answer.json() == {"success": f"Job {job} aborted"}
        assert own.wait(5) and site.status(job) == "aborted"
    assert alice.post(f"{site.url}/v1/calc/{job}/remove").ok


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_calculation_whose_results_stay_is_not_removed(
    site: Sites, tmp_path: Path, mode: int
) -> None:
    job, results = site.job_of("alice"), tmp_path / "calc.hdf5"
    results.touch()
    tmp_path.chmod(mode)
    for path in (tmp_path, results):
        os.chown(path, 65534, 65534)
    with sqlite3.connect(site.database) as db:
        db.execute("UPDATE job SET ds_calc_dir=? WHERE id=?", (str(results.with_suffix("")), job))
    code = (
        "import django; django.setup(); from oq_runtime.webui import access; "
        f"access.check_removal({job})"
    )
    command = [*AS_ANYBODY, sys.executable, "-c", code]
    done = subprocess.run(command, env=site.env, capture_output=True, text=True)
    whom = f"nobody, who owns {results}," if mode == 0o755 else f"the owner of {results}"
    said = f"ask {whom} to delete them with oq engine --dc {job}"
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.attack
def test_no_path_on_the_server_is_read(site: Sites, attacks: Attacks, tmp_path: Path) -> None:
    secret = tmp_path / "authkey"
    secret.write_text("the secret of the cluster")
    bob, before = site.login_as("bob"), site.jobs()
    v1 = f"{site.url}/v1"
    members = {"job.ini": job_text(f"sites_csv = {secret}"), "tree.xml": ""}
    exposure = job_text("exposure_file = e.xml").replace("classical", "classical_risk")
    in_xml = {"job.ini": exposure, "e.xml": EXPOSURE.format(assets=f"../../../../../..{secret}")}
    for answer in [
        bob.post(f"{v1}/calc/run_ini", {"job_ini": str(secret)}),
        bob.get(f"{v1}/calc/jobs_from_inis", params={"ini": str(secret)}),
        bob.post(f"{v1}/calc/validate_ini", files={"job_ini": ("job.ini", b"[general]")}),
        bob.post(f"{v1}/calc/run_scenario_calc_from_ses_rupture/1", {"mapping": str(secret)}),
        upload(bob, f"{v1}/calc/run", members),
        upload(bob, f"{v1}/calc/validate_zip", members),
        bob.post(f"{v1}/calc/run", files={"archive": ("job.ini", members["job.ini"])}),
        upload(bob, f"{v1}/calc/run", in_xml),
        upload(bob, f"{v1}/calc/validate_zip", in_xml),
    ]:
        wrong = answer.status_code not in (400, 403) and not answer.json().get("error_msg")
        attacks.tried(successes=int(wrong or "the secret" in answer.text))
        assert "Traceback" not in answer.text and len(answer.text.splitlines()) == 1, answer.text
    same = bob.post(f"{v1}/on_same_fs", {"filename": str(secret), "checksum": "1"})
    assert same.json() == {"success": False}
    # only that whose paths are in XML came so far that there is a row of it
    assert site.jobs() - before == 1
    assert not list(Path(site.env["TMPDIR"]).glob("oq-webui-*"))


@pytest.mark.attack
def test_nobody_runs_for_somebody_else(site: Sites, attacks: Attacks) -> None:
    bob, before = site.login_as("bob"), site.jobs()
    members = {"job.ini": job_text(), "tree.xml": ""}
    foreign = str(site.job_of("alice"))
    for form in [{"job_owner": "alice"}, {"hazard_job_id": foreign, "job_ini": ".ini"},
                 {"hazard_job_id": "/x.hdf5", "job_ini": ".ini"}, {"user": "alice"}]:  # fmt: skip
        answer = upload(bob, f"{site.url}/v1/calc/run", members, form)
        attacks.tried(successes=int(answer.status_code not in (400, 403)))
        assert "\n" not in answer.json()["error"]
    members["job.ini"] = job_text(f"hazard_calculation_id = {foreign}")
    for way in ("run", "validate_zip"):
        answer = upload(bob, f"{site.url}/v1/calc/{way}", members)
        attacks.tried(successes=int(answer.status_code != 403))
        assert answer.json() == {"error": f"calculation {foreign} belongs to somebody else"}
    assert site.jobs() - before == 1  # alice's


@pytest.mark.attack
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_results_that_the_site_has_not_written(
    site: Sites, attacks: Attacks, tmp_path: Path
) -> None:
    """Whoever runs jobs at the shell, and has an account, makes his results what he likes."""
    ours, bobs = tmp_path / "secret.hdf5", tmp_path / "bob"
    bobs.mkdir()
    ours.touch()
    (bobs / "calc_1.hdf5").symlink_to(ours)
    (bobs / "calc_2.hdf5").touch()
    (tmp_path / "linked").symlink_to(tmp_path)
    os.lchown(tmp_path / "linked", 65534, 65534)
    os.chown(bobs / "calc_2.hdf5", 65534, 65534)
    bob, v1 = site.login_as("bob"), f"{site.url}/v1/calc"
    for name in ("bob/calc_1", "bob/calc_2", "linked/secret", "secret"):
        job = site.job_of("bob")
        with sqlite3.connect(site.database) as db:
            db.execute("UPDATE job SET ds_calc_dir=? WHERE id=?", (str(tmp_path / name), job))
            row = "INSERT INTO output (oq_job_id, display_name, ds_key) VALUES (?, 'x', 'hcurves')"
            output = db.execute(row, (job,)).lastrowid
        for answer in (
            bob.get(f"{v1}/{job}/extract/oqparam"),
            bob.get(f"{v1}/{job}/datastore"),
            bob.get(f"{site.url}/engine/{job}/report"),
            bob.get(f"{v1}/result/{output}?export_type=csv"),
            upload(bob, f"{v1}/run", {"job.ini": job_text(f"hazard_calculation_id = {job}")}),
            upload(bob, f"{v1}/run", {"job.ini": job_text()},
                   {"hazard_job_id": str(job), "job_ini": ".ini"}),
        ):  # fmt: skip
            refused = f"calculation {job} has not left its results to this site" in answer.text
            attacks.tried(successes=int(not refused and name != "secret"))
            assert not (refused and name == "secret"), answer.text
        assert bob.get(f"{v1}/{job}/log/0:10").ok
        shown = bob.get(f"{site.url}/engine/activity").text
        assert f">{job}<" in shown
        assert (f'"/engine/{job}/report"' in shown) == (name == "secret")


@pytest.mark.attack
def test_conditions_of_the_list_are_no_sql(site: Sites, attacks: Attacks) -> None:
    job, bob = site.job_of("alice"), site.login_as("bob")
    for condition in ["' OR 1=1 --", "2028' OR user_name='alice", "x"]:
        answer = bob.get(f"{site.url}/v1/calc/list", params={"start_time": condition})
        attacks.tried(successes=int(answer.status_code != 400 or f'"id": {job},' in answer.text))
    answer = bob.get(f"{site.url}/v1/calc/list", params={"start_time": "2020-01-01"})
    assert answer.ok and job not in [row["id"] for row in answer.json()]


@pytest.mark.parametrize(
    "members, sentence",
    [
        (None, "job.zip is no zip archive"),
        ({"tree.xml": ""}, "no file whose name ends with .ini"),
        ({"JOB.INI": "x"}, "JOB.INI: write it in small letters"),
        ({"job.ini": "x", "in\\tree.xml": ""}, "has a backslash"),
        ({"job.ini": "[general]\ncalculation_mode = classical\nsites_csv = s.csv"}, "No such file"),
        (
            {
                "job.ini": "[general]\ncalculation_mode = scenario_risk\n"
                "exposure_file = an exposure.xml",
                "an exposure.xml": "",
            },
            "(a blank ends a file name here)",
        ),
    ],
)
def test_a_bad_archive_gets_one_sentence(
    site: Sites, members: dict[str, str] | None, sentence: str
) -> None:
    page = {"calculation_type": "hazard", "database": "openquake2"}  # what the page sends with it
    answer = upload(site.login_as("alice"), f"{site.url}/v1/calc/run", members, page)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert sentence in error and "\n" not in error and "Traceback" not in error
    assert "calc_" not in error and site.env["TMPDIR"] not in error, "a path that nobody gave"


@pytest.mark.slow
def test_a_file_in_another_encoding_is_named(site: Sites) -> None:
    """As a spreadsheet saves it: on the page in one line as well, with what to do."""
    members = {path.name: path.read_bytes() for path in (EXAMPLES / "event_based_risk").iterdir()}
    members["exposure.csv"] = members["exposure.csv"].replace(b"Port_Anselm", b"Puerto_A\xf1o")
    alice = site.login_as("alice")
    job = calculated(site, alice, members)
    assert site.status(job) == "failed"
    [line] = alice.get(f"{site.url}/v1/calc/{job}/traceback").json()
    assert line.startswith("exposure.csv is not UTF-8 at byte ") and "iconv" in line
    site.forget(job)


@pytest.mark.slow
def test_an_archive_of_a_mac_with_two_job_files(site: Sites) -> None:
    """Its resource files are no jobs; which one runs is said, and which does not."""
    folder = {path.name: path.read_bytes() for path in (EXAMPLES / "hazard_classical").iterdir()}
    small = folder["job.ini"].replace(b"spacing = 10\n", b"spacing = 60\n")
    folder |= {"job.ini": small, "other.ini": small}
    members = {f"My job/{name}": data for name, data in folder.items()}
    members |= {f"__MACOSX/My job/._{name}": b"\0\x05\x16\x07" for name in folder}
    alice = site.login_as("alice")
    job = calculated(site, alice, members)
    assert site.status(job) == "complete"
    log = alice.get(f"{site.url}/v1/calc/{job}/log/0:1000").json()
    [said] = [row for row in log if "not run are the other job files" in row[3]]
    assert said[1] == "WARNING"
    assert said[3] == "My job/job.ini runs; not run are the other job files: My job/other.ini"
    site.forget(job)


@pytest.mark.attack
def test_passwords_are_not_tried_for_ever(site: Sites, attacks: Attacks) -> None:
    wrong = [
        requests.post(f"{site.url}/accounts/ajax_login/", {"username": "victim", "password": "x"})
        for _ in range(15)
    ]
    assert [answer.status_code for answer in wrong] == [403] * 10 + [429] * 5
    attacks.tried(15)
    assert wrong[-1].json() == {"error": "too many failed logins; try again in 5 minutes"}
    for page in ("accounts/login/", "admin/login/"):
        for spelled in ("victim", " victim\n", "\uff56ictim"):  # the same name for a form
            client = requests.Session()
            form = {"username": spelled, "password": PASSWORD}
            form["csrfmiddlewaretoken"] = token(client, f"{site.url}/{page}")
            answer = client.post(f"{site.url}/{page}", form, allow_redirects=False)
            # before a login the administration leads to the other page
            elsewhere = "/accounts/login/" in answer.headers.get("Location", "")
            attacks.tried(successes=int(answer.status_code != 429 and not elsewhere))
    assert site.login_as("alice").get(f"{site.url}/engine/").ok, "others may log in"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, prefix",
    [
        ({"OQ_WEBUI_PROXY": "127.0.0.1", "OQ_WEBUI_HOSTS": "hazard.example"}, ""),
        ({"OQ_WEBUI_URL": "https://hazard.example/oq/"}, "/oq"),
    ],
)
def test_login_behind_a_proxy_with_tls(site: Sites, settings: dict[str, str], prefix: str) -> None:
    site.stop()
    before, site.env = site.env, site.env | settings
    site.prefix = prefix
    try:
        site.start()
        client, page = requests.Session(), f"{site.url}{prefix}/accounts/login/"
        headers = {"Host": "hazard.example", "X-Forwarded-Proto": "https",
                   "X-Forwarded-For": "192.0.2.7"}  # fmt: skip
        form = {"username": "alice", "password": PASSWORD}
        form["csrfmiddlewaretoken"] = token(client, page, headers)
        cookie = next(iter(client.cookies))
        assert (cookie.path, cookie.secure) == (f"{prefix}/", True)
        cookies = {"csrftoken": str(cookie.value)}  # it goes by https only
        for origin, code in [("https://hazard.example", 302), ("https://elsewhere.example", 403)]:
            headers |= {"Origin": origin, "Referer": f"{origin}/"}
            answer = requests.post(
                page, form, headers=headers, cookies=cookies, allow_redirects=False
            )
            assert answer.status_code == code, answer.text
            if code == 302:
                assert answer.headers["Location"] == f"{prefix}/engine/"
                session = {"sessionid": str(answer.cookies["sessionid"])}
        home = requests.get(f"{site.url}{prefix}/engine/", headers=headers, cookies=session)
        assert home.ok and f"//hazard.example{prefix}'" in home.text
        assert f'src="{prefix}/static/js/oq_runtime.js"' in home.text
        assert requests.get(f"{site.url}{prefix}/static/js/oq_runtime.js").ok
        assert requests.get(f"{site.url}{prefix}/v1/calc/list").status_code == 403
    finally:
        site.stop()
        site.env, site.prefix = before, ""
        site.start()


def test_bad_input_gets_a_line(site: Sites, routes: list[tuple[str, str, str | None]]) -> None:
    """Every route with values that it does not know, of a calculation without a datastore."""
    job, alice = site.job_of("alice"), site.login_as("alice")
    names = ("limit", "offset", "start_time", "id", "export_type", "ini", "is_running", "tag")
    asked = 0
    for pattern, name, rule in routes:
        if rule in (None, "LOGIN") or name in ("LogoutView", "ajax_logout", "calc_remove"):
            continue
        path = pattern
        for place, value in PLACES:
            path = path.replace(place, value)
        for method, value in [("GET", "nonsense"), ("POST", "99999999999999999999")]:
            given = dict.fromkeys(names, value)
            params, data = (given, None) if method == "GET" else (None, given)
            answer = alice.request(
                method,
                f"{site.url}/{path.format(job=job)}",
                params=params,
                data=data,
                allow_redirects=False,
            )
            asked += 1
            where = f"{method} {path}: {answer.status_code} {answer.text[:500]}"
            if answer.status_code >= 500:  # what the engine has not foreseen
                assert answer.json()["error"].startswith("the engine could not answer this: "), (
                    where
                )
            assert "Traceback (most" not in answer.text and '", line ' not in answer.text, where
            if answer.headers["Content-Type"] == "application/json" and not answer.ok:
                assert len(answer.text.splitlines()) <= 1, where
    assert asked > 60
    for condition in ("limit=x", "limit=-1", "is_running=perhaps", f"offset={10**30}"):
        answer = alice.get(f"{site.url}/v1/calc/list?{condition}")
        assert answer.status_code == 400 and "takes" in answer.json()["error"]
    assert site.status(job) == "complete"


def test_an_upload_that_is_too_large_gets_a_sentence(site: Sites) -> None:
    members = {"job.ini": job_text(), "site_model.csv": "x" * (3 << 19)}
    answer = upload(site.login_as("alice"), f"{site.url}/v1/calc/run", members)
    sentence = "these files are more than this site takes: 1 MiB"
    assert (answer.status_code, answer.json()) == (413, {"error": sentence})


def test_a_large_upload_is_kept_of_an_account_alone(site: Sites) -> None:
    alice = f"sessionid={site.login_as('alice').cookies['sessionid']}"
    ask = "import django, sys; django.setup(); from oq_runtime.webui.__main__ import has_logged_in"
    ask += "; print([has_logged_in(cookies) for cookies in sys.argv[1:]])"
    said = site.python("-c", ask, alice, f"{alice}x", "sessionid=", "", "junk")
    assert said.splitlines()[-1] == "[True, False, False, False, False]"
    answer = requests.post(f"{site.url}/v1/calc/run", bytes(3 << 19))
    assert (answer.status_code, answer.json()) == (403, {"error": "log in first"})


def test_activity_is_shown_to_whom_the_calculations_are(site: Sites) -> None:
    line = "classical  34% [9 submitted, 0 queued]"
    job = site.job_of(
        "alice", "executing", pid=os.getpid(), description="<b>of alice</b>", line=line
    )
    try:
        pages = {
            name: site.login_as(name).get(f"{site.url}/engine/activity").text
            for name in ("alice", "bob", "admin")
        }
    finally:
        site.forget(job)
    for name in ("alice", "admin"):
        assert "&lt;b&gt;of alice&lt;/b&gt;" in pages[name]
        assert "classical: 34 %" in pages[name]
    assert "of alice" not in pages["bob"] and "34 %" not in pages["bob"]
    assert all(f"<td>{socket.gethostname()}</td>" in page for page in pages.values())


def token(client: requests.Session, page: str, headers: dict[str, str] | None = None) -> str:
    text = client.get(page, headers=headers).text
    return text.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]


def job_text(line: str = "") -> str:
    return f"[general]\ndescription = d\ncalculation_mode = classical\n{line}\n"


EXPOSURE = """<?xml version="1.0" encoding="utf-8"?>
<nrml xmlns="http://openquake.org/xmlns/nrml/0.5"><exposureModel id="e" category="buildings">
<description>d</description><conversions><costTypes>
<costType name="structural" type="aggregated" unit="USD"/></costTypes></conversions>
<tagNames></tagNames><assets>{assets}</assets></exposureModel></nrml>
"""


def calculated(site: Sites, session: requests.Session, members: Mapping[str, bytes]) -> int:
    """Run an uploaded job to its end; return its number."""
    answer = upload(session, f"{site.url}/v1/calc/run", members)
    assert answer.ok, answer.text
    job = int(answer.json()["job_id"])
    assert wait_for(lambda: site.ended(job), JOB_S)
    return job


def upload(
    session: requests.Session,
    url: str,
    members: Mapping[str, str | bytes] | None,
    form: dict[str, str] | None = None,
) -> requests.Response:
    data = io.BytesIO()
    if members is None:
        data.write(b"no zip")
    else:
        with zipfile.ZipFile(data, "w") as file:
            for name, text in members.items():
                file.writestr(name, text)
    return session.post(url, form, files={"archive": ("job.zip", data.getvalue())})
