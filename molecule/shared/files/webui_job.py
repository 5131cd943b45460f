"""Use the WebUI as a browser does: ``python3 - URL USER DIRECTORY`` prints one JSON object.

Asks for a page without a login, logs in with $WEBUI_PASSWORD, uploads the job in DIRECTORY as a zip
file and waits until it has ended. Python's own library only.
"""

import http.cookiejar
import io
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

LIMIT_SECS = 240
BOUNDARY = "openquake-molecule"

url, user, directory = sys.argv[1:]
password = os.environ["WEBUI_PASSWORD"]
cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
opener = urllib.request.build_opener(cookies)


def ask(path: str, data: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
    """Return the status, the address after redirects, and the body."""
    request = urllib.request.Request(url + path, data, headers)
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.url, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.url or path, error.read()


def form(**fields: str) -> bytes:
    return urllib.parse.urlencode(fields).encode()


def upload() -> tuple[int, str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path in Path(directory).iterdir():
            file.write(path, path.name)
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="archive"; filename="job.zip"\r\n'
        "Content-Type: application/zip\r\n\r\n"
    )
    body = head.encode() + archive.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()
    content = f"multipart/form-data; boundary={BOUNDARY}"
    return ask("/v1/calc/run", body, **{"Content-Type": content})


def logged_out(answer: tuple[int, str, bytes]) -> bool:
    """Whether the answer is the login page or a refusal."""
    status, address, _ = answer
    return status in (401, 403) or "/accounts/login" in address


seen: dict[str, object] = {
    "page_without_login": logged_out(ask("/engine/")),
    "api_without_login": logged_out(ask("/v1/calc/list")),
    "run_without_login": logged_out(upload()),
    "wrong_password": ask("/accounts/ajax_login/", form(username=user, password="x"))[0],
    "wrong_host": ask("/accounts/login/", Host="elsewhere.example")[0],
    "debug_page": b"DEBUG" in ask("/no-such-page")[2],
    "login": ask("/accounts/ajax_login/", form(username=user, password=password))[0],
    "page": ask("/engine/")[0],
    "static": ask("/static/js/engine.js")[0],
}
status, _, body = upload()
seen["run"] = status
if status == 200:
    job = json.loads(body)["job_id"]
    deadline = time.monotonic() + LIMIT_SECS
    while time.monotonic() < deadline:
        row = json.loads(ask(f"/v1/calc/{job}/status")[2])
        if not row["is_running"] and row["status"] not in ("created", "submitted"):
            break
        time.sleep(1)
    seen["job"] = row["status"]
else:
    seen["error"] = body.decode(errors="replace")[-2000:]
print(json.dumps(seen))
