"""The WebUI in a browser, through nginx with https and a path, as docs/webui.md says.

Left out where chromium, chromedriver or nginx are not installed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import sqlite3
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import wait_for
from tests.local.test_oq_run import corpus
from tests.local.test_webui import PASSWORD
from tests.local.test_webui_access import Sites
from tests.reports import SEEN
from tests.system.browser import Browser

PROGRAMS = ("chromium", "chromedriver", "nginx", "openssl")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
PAGE = Path(__file__).parents[2] / "docs" / "webui.md"
#: what would run in a page if it were taken for markup there
MARKUP = "<img src=x onerror=\"document.title='taken over'\">"
SENTENCE = "#errorDialog .modal-body-pre p"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def nginx(folder: Path, port: int, site: Sites) -> subprocess.Popen[bytes]:
    """Start nginx with the configuration that the page shows, for other names and a lower limit."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=localhost"
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "crt")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    found = re.search(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    server = found[1]
    for there, here in [
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("hazard.example", "localhost"),
        ("/etc/ssl/hazard.crt", f"{folder}/crt"),
        ("/etc/ssl/hazard.key", f"{folder}/key"),
        ("client_max_body_size 4g", "client_max_body_size 3m"),
        ("127.0.0.1:8800", f"127.0.0.1:{site.port}"),
    ]:
        assert there in server
        server = server.replace(there, here)
    configuration = folder / "nginx.conf"
    places = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy")]
    user = "" if os.geteuid() else "user root;"  # the folder is not for others
    configuration.write_text(
        f"{user} pid {folder}/pid; daemon off; events {{}}\n"
        f"http {{ access_log off; {' '.join(places)}\n{server}\n}}\n"
    )
    return subprocess.Popen(["nginx", "-c", str(configuration), "-e", str(folder / "nginx.log")])


@pytest.fixture(scope="module")
def site(engine_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    home, port = tmp_path_factory.mktemp("w"), free_port()
    settings = {"OQ_WEBUI_URL": f"https://localhost:{port}/oq", "OQ_WEBUI_UPLOAD_MB": "2"}
    site = Sites(engine_home | settings | {"TMPDIR": str(home)}, home)
    site.prefix = "/oq"
    site.prepare()
    site.start()
    proxy = nginx(tmp_path_factory.mktemp("nginx"), port, site)
    yield site
    proxy.terminate()
    proxy.wait(timeout=30)
    site.stop()


@pytest.fixture(scope="module")
def browser(site: Sites, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser in which the administrator has logged in."""
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.open(f"{site.env['OQ_WEBUI_URL']}/engine/")
        assert browser.address.endswith("/oq/accounts/login/")
        browser.type("input[name=username]", "admin")
        browser.type("input[name=password]", PASSWORD)
        browser.click("button[type=submit]")
        browser.wait_for("#calculation_table")
        assert browser.address == f"{site.env['OQ_WEBUI_URL']}/engine/"
        yield browser


def archive(folder: Path, members: dict[str, str]) -> str:
    path = folder / f"{secrets.token_hex(4)}.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return str(path)


@pytest.mark.parametrize(
    "members, sentence",
    [
        ({"JOB.INI": "x"}, "(there is JOB.INI: write it in small letters)"),
        ({f"{MARKUP}.INI": "x"}, f"(there is {MARKUP}.INI: write it in small letters)"),
        ({"x": "x" * 2_500_000}, "these files are more than this site takes: 2 MiB"),
        (
            {"x": "x" * 4_000_000},
            "These files are more than this site, or a proxy before it, takes.",
        ),
    ],
    ids=["capitals", "markup", "site", "proxy"],
)
def test_what_is_refused_gets_a_sentence_on_the_page(
    site: Sites, browser: Browser, tmp_path: Path, members: dict[str, str], sentence: str
) -> None:
    browser.open(f"{site.env['OQ_WEBUI_URL']}/engine/")
    browser.wait_for("#calculation_table")
    browser.type("#hazard_archive", archive(tmp_path, members))
    assert browser.text(SENTENCE).endswith(sentence)
    assert browser.title != "taken over"


def test_what_a_job_says_of_itself_is_no_markup(site: Sites, browser: Browser) -> None:
    """Not in the list, nor where the page takes it from there, nor in a traceback."""
    description = f'{MARKUP}" onmouseover="document.title=\'taken over\'" &lt;{MARKUP[1:]}'
    job = site.job_of("mallory", "failed", description=description)
    with sqlite3.connect(site.database) as db:
        db.execute("UPDATE log SET level='ERROR', message=? WHERE job_id=?", (MARKUP, job))
    try:
        browser.open(f"{site.env['OQ_WEBUI_URL']}/engine/")
        browser.wait_for(f"#calculation_table [data-calc-id='{job}'].btn-remove")
        assert "onerror" in browser.text("#calculation_table")
        browser.click(f"[data-calc-id='{job}'].btn-remove")
        assert "onerror" in browser.text("#confirmModal .modal-body")
        browser.click("#confirmModal .btn-cancel")
        browser.click(f"[data-calc-id='{job}'].btn-traceback")
        assert MARKUP in browser.text("#errorDialog .modal-body-pre")
        assert browser.title != "taken over"
    finally:
        site.forget(job)


def test_activity_renews_itself(site: Sites, browser: Browser) -> None:
    job = site.job_of(
        "alice", "executing", pid=os.getpid(), line="classical  34% [9 submitted, 0 q]"
    )
    try:
        browser.open(f"{site.env['OQ_WEBUI_URL']}/engine/")
        browser.click(".activity a")
        assert browser.address.endswith("/oq/engine/activity")
        assert "classical: 34 %" in browser.text("#jobs")
        browser.picture("activity")
        with sqlite3.connect(site.database) as db:
            db.execute(
                "UPDATE log SET message=replace(message, '34%', '56%') WHERE job_id=?", (job,)
            )
        assert wait_for(lambda: "classical: 56 %" in browser.text("#jobs"), 30)
    finally:
        site.forget(job)


def test_a_report_is_opened_from_activity(site: Sites, browser: Browser, tmp_path: Path) -> None:
    """Of a calculation that was uploaded; its pictures are drawn under the rules of the site."""
    job_file = corpus("classical/case_02/job.ini")
    job = shutil.make_archive(str(tmp_path / "job"), "zip", job_file.parent)
    browser.open(f"{site.env['OQ_WEBUI_URL']}/engine/")
    browser.wait_for("#calculation_table")
    browser.type("#hazard_archive", job)

    def complete() -> int:
        """Its number, when it is."""
        with sqlite3.connect(site.database) as db:
            query = "SELECT max(id) FROM job WHERE user_name='admin' AND status='complete'"
            return int(db.execute(query).fetchone()[0] or 0)

    browser.until(complete, 120)
    browser.open(f"{site.env['OQ_WEBUI_URL']}/engine/activity")
    browser.complaints()
    browser.click(f"#ended a[href='/oq/engine/{complete()}/report']")
    browser.wait_for("figure img")
    assert browser.title.startswith(f"Job {complete()}: ")
    seen = browser.run(SEEN)
    assert seen["pictures"] == seen["drawn"] > 0, seen
    assert not browser.complaints()
    browser.picture("report")
