"""The notice at the end of the jobs of an ``oq-run``: a command, a mail, or a webhook.

A process of its own sends it, so that it comes also when ``oq-run`` is killed: that ends the pipe
from which it reads what is known of the jobs, a JSON object per line.
"""

from __future__ import annotations

import getpass
import json
import re
import shlex
import smtplib
import socket
import subprocess
import sys
import urllib.request
from email.message import EmailMessage
from typing import Any

from oq_runtime.text import clean, duration

#: seconds that a notice may take
LIMIT_SECS = 30
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
            [sys.executable, "-m", "oq_runtime.commands.notice"],
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

    def end(self, **facts: Any) -> str:
        """Say what became of them; return why the notice could not be sent, else nothing."""
        self.add(**facts)
        try:
            _, said = self.process.communicate(timeout=LIMIT_SECS + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"no answer within {LIMIT_SECS} s"
        return clean(said.strip().rpartition("\n")[2])


def words(facts: dict[str, Any]) -> str:
    """Say in a line what became of the jobs."""
    jobs = ", ".join(map(str, facts["jobs"]))
    after = f" after {duration(facts['seconds'])}" if "seconds" in facts else ""
    why = f": {facts['error']}" if facts.get("error") else ""
    plural = "s" if len(facts["jobs"]) > 1 else ""
    return clean(f"job{plural} {jobs} {facts['state']}{after} on {facts['host']}{why}")


def send(target: str, facts: dict[str, Any]) -> None:
    """Send a notice; raises OSError, or subprocess.SubprocessError, when that is not possible."""
    body = json.dumps(facts)
    if WEBHOOK.match(target):
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(target, body.encode(), head)
        urllib.request.urlopen(request, timeout=LIMIT_SECS).close()
    elif MAIL.fullmatch(target):
        mail = EmailMessage()
        mail["To"], mail["Subject"] = target, facts["text"]
        mail["From"] = f"{facts['user']}@{facts['host']}"
        mail.set_content(f"{facts['text']}\n\n{facts.get('description', '')}\n")
        try:
            command = [SENDMAIL, "-t", "-i"]
            subprocess.run(command, input=bytes(mail), check=True, timeout=LIMIT_SECS)
        except FileNotFoundError:
            with smtplib.SMTP("localhost", timeout=LIMIT_SECS) as server:
                server.send_message(mail)
    else:
        command = shlex.split(target)
        subprocess.run(command, input=body.encode(), check=True, timeout=LIMIT_SECS)


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
    try:
        send(target, facts)
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        # an HTTPError is an OSError; the target stays out of it, as it may have a password in it
        sys.exit(str(exc).replace(target, "the target"))


if __name__ == "__main__":
    main()
