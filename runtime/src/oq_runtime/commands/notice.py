"""The notice at the end of the jobs of an ``oq-run``: a command, a mail, or a webhook.

A process of its own sends it, so that it comes also when ``oq-run`` is killed: that ends the pipe
from which it reads what is known of the jobs, a JSON object per line.
"""

from __future__ import annotations

import base64
import getpass
import http.client
import json
import re
import shlex
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from oq_runtime import processes
from oq_runtime.text import clean, duration

#: seconds that a notice may take, and after which that is worth a line
LIMIT_SECS, TELL_SECS = 30, 2
MAIL, WEBHOOK = re.compile(r"[^@\s/]+@[^@\s/]+"), re.compile(r"https?://")
KILLED = {"state": "failed", "error": "oq-run was killed"}
#: what sends mails, where there is one; else the host's own server has to
SENDMAIL = "/usr/sbin/sendmail"


class Notice:
    """The end of ``oq-run``: says what is known, and hears whether the notice could be sent.

    :param target: a command, to which a JSON object is given on stdin; a mail address; or the URL
        to which the object is posted
    """

    def __init__(self, target: str) -> None:
        self.process = subprocess.Popen(
            processes.python("oq_runtime.commands.notice"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # neither a terminal's end nor Ctrl-C is meant for it
            text=True,
        )
        self.add(target=target)  # which may have a password in it: no argument of a process

    def add(self, **facts: Any) -> None:
        """Say something of the jobs."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(facts) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has ended, ``end`` says why
            pass

    def end(self, tell: Callable[[str], None], **facts: Any) -> str:
        """Say what became of them; return why the notice could not be sent, else nothing.

        :param tell: is given a line where that takes long
        """
        self.add(**facts)
        try:
            try:
                _, said = self.process.communicate(timeout=TELL_SECS)
            except subprocess.TimeoutExpired:
                tell("sending the notice of the end")
                _, said = self.process.communicate(timeout=LIMIT_SECS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            said = ""
        if self.process.wait() == 0:
            return ""
        return clean(said.strip().rpartition("\n")[2]) or f"no answer within {LIMIT_SECS} s"


def words(facts: dict[str, Any]) -> str:
    """Say in a line what became of the jobs."""
    jobs = ", ".join(map(str, facts["jobs"]))
    after = f" after {duration(facts['seconds'])}" if "seconds" in facts else ""
    why = f": {facts['error']}" if facts.get("error") else ""
    plural = "s" if len(facts["jobs"]) > 1 else ""
    return clean(f"job{plural} {jobs} {facts['state']}{after} on {facts['host']}{why}")


def send(target: str, facts: dict[str, Any]) -> None:
    """Send a notice; ends the process with a line, without the target, when that is not possible.

    A target may have a password in it.
    """
    body = json.dumps(facts).encode()
    if WEBHOOK.match(target):
        post(target, body)
    elif MAIL.fullmatch(target):
        mail = EmailMessage()
        mail["To"], mail["Subject"] = target, facts["text"]
        mail["From"] = f"{facts['user']}@{facts['host']}"
        mail.set_content(f"{facts['text']}\n\n{facts.get('description', '')}\n")
        if Path(SENDMAIL).exists():
            run([SENDMAIL, "-t", "-i"], bytes(mail))
            return
        try:
            with smtplib.SMTP("localhost", timeout=LIMIT_SECS) as server:
                server.send_message(mail)
        except (OSError, smtplib.SMTPException) as exc:
            sys.exit(f"there is no {SENDMAIL}, and the mail server of localhost says: {exc}")
    else:
        try:
            run(shlex.split(target), body)
        except ValueError as exc:
            sys.exit(f"the command: {exc}")


def run(command: list[str], given: bytes) -> None:
    """Give a command its stdin. What it says is kept apart: oq-run may be gone, or wait for it."""
    with tempfile.TemporaryFile() as said:
        try:
            done = subprocess.run(command, input=given, stdout=said, stderr=said)
        except OSError as exc:
            sys.exit(f"{command[0]}: {exc.strerror}")
    if done.returncode:
        sys.exit(f"{command[0]} {processes.ending(done.returncode)}")


class Straight(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: the login would go with it, and what is to be posted would not."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(url: str, body: bytes) -> None:
    """Post a JSON object; a login in the URL becomes a header."""
    parts = urllib.parse.urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    head = {"Content-Type": "application/json"}
    if login:
        word = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        head["Authorization"] = f"Basic {word}"
    try:
        request = urllib.request.Request(parts._replace(netloc=host).geturl(), body, head)
        urllib.request.build_opener(Straight).open(request, timeout=LIMIT_SECS).close()
    except urllib.error.HTTPError as exc:
        sys.exit(f"{host} answers with status {exc.code}")
    except urllib.error.URLError as exc:
        sys.exit(f"{host}: {exc.reason}")
    except (OSError, ValueError, http.client.HTTPException) as exc:
        sys.exit(f"{host}: {type(exc).__name__}")


def main() -> None:
    facts: dict[str, Any] = {}
    for line in sys.stdin:
        facts |= json.loads(line)
    target = facts.pop("target")
    if not facts.get("jobs"):  # refused before there was one, which oq-run has said
        return
    if "state" not in facts:
        facts |= KILLED
    facts |= {"host": socket.gethostname(), "user": getpass.getuser()}
    facts["text"] = words(facts)
    signal.alarm(LIMIT_SECS)  # whatever it waits for, and whoever has asked for it
    send(target, facts)


if __name__ == "__main__":
    main()
