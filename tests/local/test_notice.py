"""The notice at the end of a job: by a command, a webhook and a mail, and when oq-run is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from oq_runtime.commands import notice
from tests.leftovers import wait_for
from tests.local.test_oq_run import EXAMPLES, corpus, run, start

TINY = "classical/case_02/job.ini"


@pytest.fixture
def told(env: dict[str, str], tmp_path: Path) -> Path:
    """A command that keeps what it is given, and openquake.cfg that names it."""
    command = tmp_path / "tell"
    command.write_text(f"#!/bin/sh\ncat >{tmp_path}/part && mv {tmp_path}/part {tmp_path}/told\n")
    command.chmod(0o755)
    given = Path(env["OQ_CONFIG_FILE"]).read_text()
    (tmp_path / "openquake.cfg").write_text(given + f"notify = {command}\n")
    return tmp_path / "told"


def notified(env: dict[str, str], folder: Path) -> dict[str, str]:
    return env | {"OQ_CONFIG_FILE": str(folder / "openquake.cfg")}


def test_command_at_the_end(env: dict[str, str], told: Path) -> None:
    code, out, err = run(notified(env, told.parent), corpus(TINY), "--json")
    assert code == 0, err
    [job] = json.loads(out)["jobs"]
    said = json.loads(told.read_text())
    assert said["jobs"] == [job["job"]]
    assert (said["state"], said["error"]) == ("complete", "")
    assert said["text"].startswith(f"job {job['job']} complete after ")
    assert "case_02/job.ini" in said["description"]


def test_no_job_no_notice(env: dict[str, str], told: Path) -> None:
    code, _, _ = run(notified(env, told.parent), corpus(TINY), "-p", "truncation_level=x")
    assert code == 2
    assert not told.exists()


def test_oq_run_is_killed(env: dict[str, str], told: Path, tmp_path: Path) -> None:
    many = "ses_per_logic_tree_path=100000"
    job = EXAMPLES / "event_based_risk/job.ini"
    process = start(notified(env, told.parent), job, "-p", many, "--no-progress")
    assert process.stderr is not None
    for line in process.stderr:
        if "Running " in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert wait_for(told.exists, 20)
    said = json.loads(told.read_text())
    assert (said["state"], said["error"]) == ("failed", "oq-run was killed")


def test_notice_that_cannot_be_sent(env: dict[str, str], told: Path) -> None:
    (told.parent / "tell").write_text("#!/bin/sh\nexit 3\n")
    code, _, err = run(notified(env, told.parent), corpus(TINY), "--no-progress")
    assert code == 0
    assert "the notice of [oq_runtime] notify could not be sent: " in err
    assert "tell ended with exit code 3" in err


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted; refuses at /no, and sends elsewhere at /gone."""

    def do_GET(self) -> None:
        self.server.gone_after = self.headers["Authorization"] or "nobody"  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted = json.loads(body)  # type: ignore[attr-defined]
        self.server.login = self.headers["Authorization"]  # type: ignore[attr-defined]
        self.send_response({"/no": 500, "/gone": 302}.get(self.path, 204))
        if self.path == "/gone":
            self.send_header("Location", f"http://localhost:{self.server.server_port}/")  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def sent(target: str, **facts: Any) -> str:
    one = notice.Notice(target)
    one.add(jobs=[7], description="a/job.ini")
    told: list[str] = []
    return one.end(told.append, **({"state": "complete", "error": "", "seconds": 61} | facts))


def test_webhook() -> None:
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert sent(url) == ""
        assert server.posted["text"].startswith("job 7 complete after 1 min 1 s on ")  # type: ignore[attr-defined]
        assert sent(f"{url}/no") == f"127.0.0.1:{server.server_port} answers with status 500"
        assert sent(url.replace("//", "//anna:geheim@")) == ""
        assert server.login == "Basic YW5uYTpnZWhlaW0="  # type: ignore[attr-defined]
        gone = sent(f"{url}/gone".replace("//", "//anna:geheim@", 1))
        assert gone == f"127.0.0.1:{server.server_port} answers with status 302"
        assert not hasattr(server, "gone_after")
        server.shutdown()
    assert "refused" in sent(url)


def test_what_a_command_leaves_or_says_is_not_waited_for(tmp_path: Path) -> None:
    assert sent("sh -c 'sleep 60 & echo done'") == ""
    assert sent("sh -c 'exit 4' --token geheim") == "sh ended with exit code 4"
    assert sent("no-such-command --token geheim") == "no-such-command: No such file or directory"
    assert sent("sh -c 'unclosed") == "the command: No closing quotation"


def test_silent_host_is_not_waited_for_without_a_word() -> None:
    """Its own limit counts, and ``oq-run`` says that it waits."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = notice.Notice(f"http://127.0.0.1:{silent.getsockname()[1]}")
        one.add(jobs=[7])
        told: list[str] = []
        asked = threading.Thread(target=one.end, args=(told.append,), kwargs={"state": "complete"})
        asked.start()
        assert wait_for(lambda: told == ["sending the notice of the end"], 10)
        one.process.kill()
        asked.join(10)
        assert not asked.is_alive()


def mailed(settings: str) -> subprocess.CompletedProcess[str]:
    """Have a notice sent by mail.

    :param settings: statements before that
    """
    code = f"from oq_runtime.commands import notice; {settings}; notice.main()"
    lines = [
        {"target": "anna@example.org"},
        {"jobs": [7, 8], "state": "failed", "error": "no\nroom"},
    ]
    return subprocess.run(
        [sys.executable, "-c", code],
        input="".join(f"{json.dumps(line)}\n" for line in lines),
        capture_output=True,
        text=True,
        env=os.environ,
    )


def check_mail(mail: str) -> None:
    assert "To: anna@example.org" in mail
    assert "Subject: jobs 7, 8 failed on " in mail and ": no room" in mail


def test_mail(tmp_path: Path) -> None:
    """By the program that sends mails, here one that keeps it."""
    program = tmp_path / "sendmail"
    program.write_text(f'#!/bin/sh\n[ "$*" = "-t -i" ] && cat >{tmp_path}/mail\n')
    program.chmod(0o755)
    done = mailed(f"notice.SENDMAIL = {str(program)!r}")
    assert done.returncode == 0, done.stderr
    check_mail((tmp_path / "mail").read_text())


class MailServer(socketserver.StreamRequestHandler):
    """Takes mails (RFC 5321), or refuses them."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            verb, answer = line[:4].upper(), b"250 yes"
            if verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                mail = b"".join(iter(self.rfile.readline, b".\r\n")).decode()
                self.server.mails.append(mail)  # type: ignore[attr-defined]
            elif verb == b"RCPT" and self.server.refuses:  # type: ignore[attr-defined]
                answer = b"550 nobody has that name"
            elif verb == b"QUIT":
                answer = b"221 bye"
            self.wfile.write(answer + b"\r\n")


def test_mail_without_a_program_that_sends_mails() -> None:
    """By the host's own server, which may refuse, or not be there."""
    with socketserver.TCPServer(("127.0.0.1", 0), MailServer) as server:
        server.mails, server.refuses = [], False  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        settings = f"notice.SENDMAIL = '/none'; notice.smtplib.SMTP.default_port = {port}"
        done = mailed(settings)
        assert done.returncode == 0, done.stderr
        [mail] = server.mails  # type: ignore[attr-defined]
        check_mail(mail)
        server.refuses = True  # type: ignore[attr-defined]
        said = mailed(settings).stderr
        assert said.startswith("there is no /none, and the mail server of localhost says: "), said
        assert "nobody has that name" in said
        server.shutdown()
    said = mailed(settings).stderr
    assert "refused" in said and said.count("\n") == 1, said
