"""The WebUI as a service: who may enter, and what its start and stop do to jobs.

A real server on a port of loopback, with the job database of a private engine.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import socket
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.leftovers import wait_for
from tests.reports import Page

EXAMPLE = Path(__file__).parents[2] / "examples" / "hazard_classical"
PASSWORD = "a long enough password"
pytestmark = pytest.mark.timeout(600)
START_S, JOB_S = 120.0, 300.0


class Site:
    """A WebUI with the account ``admin``; its job database is ``database``."""

    def __init__(self, env: dict[str, str], home: Path) -> None:
        self.database = home / "db.sqlite3"
        datadir = home / "oqdata"  # its own, as the jobs of a new database begin with number 1
        datadir.mkdir(exist_ok=True)
        config = home / "openquake.cfg"
        config.write_text(
            "[oq_runtime]\ncode = import oq_runtime.activate\n"
            "[distribution]\noq_distribute = zmq\n"
            f"[dbserver]\nhost = 127.0.0.1\nfile = {self.database}\n"
        )
        self.env = env | {
            "OQ_CONFIG_FILE": str(config),
            "OQ_DATADIR": str(datadir),
            "DJANGO_SETTINGS_MODULE": "oq_runtime.webui.settings",
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.prefix = ""
        self.log = home / "webui.log"
        self.process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Make the database and the account."""
        self.python("-m", "oq_runtime.webui", "--init", "--account", "admin", stdin=PASSWORD)

    def python(self, *args: str, stdin: str = "") -> str:
        done = subprocess.run(
            [sys.executable, *args], env=self.env, input=stdin, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "oq_runtime.webui", "--listen", f"127.0.0.1:{self.port}"],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        process = self.process
        assert wait_for(lambda: self.answers() or process.poll() is not None, START_S)
        assert self.answers(), self.log.read_text()

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}{self.prefix}/accounts/login/", timeout=5).ok
        except requests.ConnectionError:
            return False

    def stop(self) -> None:
        """As systemd does with KillMode=process."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=10)
            self.process = None

    def login(self) -> requests.Session:
        session = requests.Session()
        form = {"username": "admin", "password": PASSWORD}
        assert session.post(f"{self.url}/accounts/ajax_login/", form).text == "Successful login"
        return session

    def run(self, session: requests.Session) -> int:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for path in EXAMPLE.glob("*.xml"):
                file.write(path, path.name)
            text = (EXAMPLE / "job.ini").read_text()
            file.writestr("job.ini", text.replace("spacing = 10\n", "spacing = 60\n"))  # few sites
        files = {"archive": ("job.zip", archive.getvalue())}
        answer = session.post(f"{self.url}/v1/calc/run", files=files)
        assert answer.ok, answer.text
        return int(answer.json()["job_id"])

    def insert_job(self, pid: int) -> int:
        with sqlite3.connect(self.database) as db:
            row = db.execute(
                "INSERT INTO job (description, user_name, calculation_mode, ds_calc_dir, status,"
                " is_running, pid, host) VALUES ('d', 'u', 'classical', '/', 'executing', 1, ?, ?)",
                (pid, socket.gethostname()),
            )
        return int(row.lastrowid or 0)

    def status(self, job: int) -> str:
        with sqlite3.connect(self.database) as db:
            return str(db.execute("SELECT status FROM job WHERE id = ?", (job,)).fetchone()[0])

    def pid(self, job: int) -> int:
        with sqlite3.connect(self.database) as db:
            return int(db.execute("SELECT pid FROM job WHERE id = ?", (job,)).fetchone()[0] or 0)

    def ended(self, job: int) -> bool:
        return self.status(job) not in ("created", "submitted", "executing")


@pytest.fixture(scope="module")
def home(engine_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("w")
    Site(engine_home, home).prepare()
    return home


@pytest.fixture
def site(env: dict[str, str], home: Path) -> Iterator[Site]:
    site = Site(env, home)
    site.start()
    yield site
    site.stop()


@pytest.mark.parametrize(
    "typed, sentence",
    [
        (["12345678"], "This password is too common. This password is entirely numeric."),
        ([PASSWORD, "another one"], "the two passwords differ; run oq-webui --init again"),
    ],
    ids=["weak, from a pipe", "twice, at a terminal"],
)
def test_init_refuses_a_password_in_a_line(
    env: dict[str, str], home: Path, typed: list[str], sentence: str
) -> None:
    command = [sys.executable, "-m", "oq_runtime.webui", "--init", "--account", "other"]
    env = Site(env, home).env
    if len(typed) == 1:
        done = subprocess.run(command, env=env, input=typed[0], capture_output=True, text=True)
        code, text = done.returncode, done.stderr
    else:
        code, text = at_terminal(command, env, list(typed))
    assert (code, text.splitlines()[-1]) == (2, f"oq-webui: {sentence}"), text
    assert "Traceback" not in text
    assert typed[0] not in text


def at_terminal(command: list[str], env: dict[str, str], lines: list[str]) -> tuple[int, str]:
    """Run a command that asks for lines; return its exit code and what is on the screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, env)
    text = ""
    with contextlib.suppress(OSError):  # it has ended
        while piece := os.read(terminal, 1000).decode():
            text += piece
            if piece.endswith(": ") and lines:
                os.write(terminal, f"{lines.pop(0)}\n".encode())
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


@pytest.mark.slow
def test_what_init_makes_is_for_nobody_else(site: Site, home: Path) -> None:
    made = [site.database, home / "webui-secret-key"]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o600, 0o600]
    again = site.python("-m", "oq_runtime.webui.account", "admin", stdin="does not matter")
    assert again == "there\n"
    site.stop()
    home.chmod(0o755)
    site.database.chmod(0o644)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "oq_runtime.webui"], env=site.env, capture_output=True, text=True
        )
    finally:
        home.chmod(0o700)
        site.database.chmod(0o600)
    sentence = f"{site.database}: others may read it, with the sessions of users; run oq-webui"
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_nobody_enters_without_login(site: Site) -> None:
    page = requests.get(f"{site.url}/engine/", allow_redirects=False)
    assert (page.status_code, page.headers["Location"]) == (302, "/accounts/login/")
    assert requests.get(f"{site.url}/v1/calc/list").status_code == 403
    assert requests.post(f"{site.url}/v1/calc/run").status_code == 403
    form = {"username": "admin", "password": "wrong"}
    assert requests.post(f"{site.url}/accounts/ajax_login/", form).status_code == 403
    session = site.login()
    assert session.get(f"{site.url}/engine/").ok
    assert session.get(f"{site.url}/v1/calc/list").json() == []


def test_is_not_for_development(site: Site) -> None:
    assert requests.get(f"{site.url}/static/js/engine.js").ok
    assert requests.get(f"{site.url}/static/admin/css/base.css").ok  # of another application
    missing = site.login().get(f"{site.url}/no-such-page")
    assert missing.status_code == 404
    assert "DEBUG" not in missing.text
    other_name = {"Host": "elsewhere.example"}
    assert requests.get(f"{site.url}/accounts/login/", headers=other_name).status_code == 400


def test_key_that_others_may_read_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 50)
    key.chmod(0o640)
    done = subprocess.run(
        [sys.executable, "-m", "oq_runtime.webui"],
        env=env | {"OQ_WEBUI_SECRET_KEY_FILE": str(key)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"{key}: others may read it; chmod 0600 it")


def test_start_fails_the_lost_jobs_and_no_others(site: Site) -> None:
    site.stop()
    running = site.insert_job(os.getpid())
    gone = subprocess.Popen(["true"])
    gone.wait()
    lost = site.insert_job(gone.pid)
    with subprocess.Popen(["sleep", "99"]) as other:  # has the pid of a job that died
        reused = site.insert_job(other.pid)
        site.start()
        other.kill()
    assert (site.status(running), site.status(lost)) == ("executing", "failed")
    assert site.status(reused) == "failed"
    with sqlite3.connect(site.database) as db:
        db.execute("DELETE FROM job WHERE id IN (?, ?, ?)", (running, lost, reused))


@pytest.mark.slow
def test_job_outlives_a_restart(site: Site) -> None:
    job = site.run(site.login())
    assert wait_for(lambda: site.status(job) == "executing", JOB_S), site.log.read_text()
    pid = site.pid(job)
    os.kill(pid, signal.SIGSTOP)  # so that it is there all the time
    try:
        site.stop()
        site.start()  # on the same port
    finally:
        os.kill(pid, signal.SIGCONT)
    assert site.status(job) == "executing"
    assert wait_for(lambda: site.ended(job), JOB_S), site.log.read_text()
    assert site.status(job) == "complete", site.log.read_text()
    session = site.login()
    outputs = session.get(f"{site.url}/v1/calc/{job}/results").json()
    assert any(row["type"] == "hcurves" for row in outputs)
    check_report(site, session, job)
    answer = session.get(f"{site.url}/v1/calc/{job}/extract/no_such_key")
    assert 400 <= answer.status_code < 500 and len(answer.text.splitlines()) == 1, answer.text


def check_report(site: Site, session: requests.Session, job: int) -> None:
    """Its page is made when it is asked for, one at a time for an account, and not kept."""
    assert f'href="/engine/{job}/report"' in session.get(f"{site.url}/engine/activity").text

    def ask(_: int) -> requests.Response:
        return session.get(f"{site.url}/engine/{job}/report")

    with ThreadPoolExecutor(2) as both:
        page, refused = sorted(both.map(ask, range(2)), key=lambda answer: answer.status_code)
    assert page.ok, page.text
    assert {"hcurves", "hmaps", "timeline"} < {one.output for one in Page(page.text).figures}
    assert page.headers["Content-Security-Policy"].endswith("; sandbox")
    said = {"error": "another report is being made; try again in a minute"}
    assert (refused.status_code, refused.json()) == (503, said)
    assert not list(site.database.parent.rglob("report_*"))
    html = {"Accept": "text/html"}
    none = session.get(f"{site.url}/engine/99999/report", headers=html)
    assert none.status_code >= 400 and none.headers["Content-Type"].startswith("text/plain")
    assert len(none.text.splitlines()) == 1 and not none.text.startswith("{"), none.text
    code = "import django, sys; django.setup(); from oq_runtime.webui import reports; "
    code += "reports.LIMIT_S = 0.1; reports.made(sys.argv[1])"
    datastore = f"{site.env['OQ_DATADIR']}/calc_{job}.hdf5"
    command = [sys.executable, "-c", code, datastore]
    done = subprocess.run(command, env=site.env, capture_output=True, text=True)
    assert "Refused: the report was not made within 0 s" in done.stderr.splitlines()[-1]


def test_a_data_directory_that_takes_nothing_gets_a_line(site: Site, home: Path) -> None:
    """Before the calculation has a number."""

    def jobs() -> int:
        with sqlite3.connect(site.database) as db:
            return int(db.execute("SELECT count(*) FROM job").fetchone()[0])

    session, before, datadir = site.login(), jobs(), home / "oqdata"
    files = {"archive": ("job.zip", b"PK")}
    kept = datadir.rename(home / "kept")
    try:
        datadir.touch()
        answer = session.post(f"{site.url}/v1/calc/run", files=files)
    finally:
        datadir.unlink()
        kept.rename(datadir)
    remedy = "it is a file: move it away or tell the administrator of this site"
    assert answer.json() == {"error": f"{datadir}: File exists; {remedy}"}
    assert (answer.status_code, jobs()) == (503, before)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"OQ_WEBUI_SECRET_KEY_FILE": ""},
            "there is no secret key; make it with oq-webui --init",
        ),
        ({"OQ_WEBUI_SECRET_KEY_FILE": "/"}, "/: Is a directory; name a file with a secret key"),
        ({"OQ_WEBUI_URL": "hazard.example/oq"}, "give the address by which browsers call"),
        ({"OQ_WEBUI_HOST": "a"}, "OQ_WEBUI_HOST: no such setting; did you mean OQ_WEBUI_HOSTS?"),
        ({"OQ_APPLICATION_MODE": "restricted"}, "give RESTRICTED, the mode with login"),
        ({"OQ_APPLICATION_MODE": "PUBLIC"}, "give RESTRICTED, the mode with login"),
        (
            {"PYTHONPATH": "{0}/syntax"},
            "syntax/local_settings.py, line 1: '(' was never closed; correct this file of settings",
        ),
        (
            {"PYTHONPATH": "{0}/name"},
            "name/local_settings.py, line 2: name 'public' is not defined; correct this file",
        ),
    ],
)
def test_wrong_settings_are_told_in_a_line(
    env: dict[str, str], tmp_path: Path, change: dict[str, str], sentence: str
) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 50)
    key.chmod(0o600)
    for name, text in (("syntax", "LOCKDOWN = ("), ("name", "\nAPPLICATION_MODE = public")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "local_settings.py").write_text(text)
    given = {name: value.format(tmp_path) for name, value in change.items()}
    done = subprocess.run(
        [sys.executable, "-m", "oq_runtime.webui"],
        env=env | {"OQ_WEBUI_SECRET_KEY_FILE": str(key)} | given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_what_a_start_lacks_is_told_in_a_line(env: dict[str, str], tmp_path: Path) -> None:
    """One thing after the other, as somebody does who does not read on."""
    site = Site(env, tmp_path)
    key = tmp_path / "key"
    key.write_text("k" * 50)
    key.chmod(0o600)

    def refused(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "oq_runtime.webui", "--listen", f"127.0.0.1:{site.port}"],
            env=site.env | {"OQ_WEBUI_SECRET_KEY_FILE": str(key)} | more,
            capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr.splitlines()[-1]

    assert f"{site.database}: there is no job database; " in refused()
    site.python("-m", "openquake.commands", "engine", "--upgrade-db")
    site.database.chmod(0o600)
    assert "the tables of accounts are not there" in refused()
    (tmp_path / "file").touch()
    line = refused(OQ_DATADIR=f"{tmp_path}/file")
    assert f"{tmp_path}/file: File exists; it is a file: move it away or set OQ_DATADIR" in line
    key.unlink()
    site.prepare()
    site.env.pop("OQ_WEBUI_SECRET_KEY_FILE", None)
    with sqlite3.connect(site.database) as db:
        db.execute("DELETE FROM auth_user")
    key.write_text("k" * 50)
    key.chmod(0o600)
    line = refused()
    assert "there is no account to log in with; " in line and "oq-webui --init" in line
    site.prepare()
    mail = {"EMAIL_BACKEND": "django.core.mail.backends.smtp.EmailBackend"}
    line = refused(**mail)
    assert "EMAIL_HOST_PASSWORD" in line and "without EMAIL_BACKEND the site sends no mail" in line
    mail |= {f"EMAIL_{name}": "1" for name in ("HOST", "PORT", "USE_TLS", "USER", "PASS")}
    assert "copy it from the file *.default.tmpl beside it" in refused(**mail)
