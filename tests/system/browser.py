"""Chromium without a screen, by the W3C's WebDriver protocol: plain JSON over HTTP.

https://www.w3.org/TR/webdriver2/
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.leftovers import wait_for

PACKAGES = ("chromium", "chromium-driver")
LIMIT_S = 60.0
#: the name of an element's number in an answer, fixed by the standard
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class BrowserError(Exception):
    """What the driver says went wrong."""


class Browser:
    """
    A context manager: one window with nothing of earlier ones.

    :param directory: gets screenshots, and ``downloads``
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.downloads = directory / "downloads"
        self.downloads.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._driver = subprocess.Popen(
            ("chromedriver", f"--port={port}"), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        self._url = f"http://127.0.0.1:{port}"
        assert wait_for(self._ready, LIMIT_S, 0.2), "chromedriver does not answer"
        options = {
            # root may have no sandbox
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--no-proxy-server",
                "--window-size=1280,1024",
            ],
            "prefs": {"download.default_directory": str(self.downloads)},
        }
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
            "acceptInsecureCerts": True,  # tests make their own
        }
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{made['sessionId']}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                self.picture("failed")
            self._ask("DELETE", "", None)
        finally:
            self._driver.terminate()
            self._driver.wait(LIMIT_S)

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    @property
    def address(self) -> str:
        """Of the page that is shown."""
        return str(self._ask("GET", "/url", None))

    @property
    def title(self) -> str:
        """Of the page that is shown."""
        return str(self._ask("GET", "/title", None))

    def find(self, selector: str) -> str:
        """The first element of a CSS selector.

        :raises BrowserError: if there is none
        """
        query = {"using": "css selector", "value": selector}
        return str(self._ask("POST", "/element", query)[ELEMENT])

    def wait_for(self, selector: str, limit_s: float = LIMIT_S) -> str:
        """The first element of a CSS selector, as soon as it is there."""
        found: list[str] = []

        def look() -> bool:
            try:
                found.append(self.find(selector))
            except BrowserError:
                return False
            return True

        if not wait_for(look, limit_s, 0.5):
            raise BrowserError(f"no {selector} after {limit_s:.0f} s at {self.address}")
        return found[0]

    def type(self, selector: str, text: str) -> None:
        """Type into a field; into one for files, their path."""
        self._ask("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self.wait_for(selector)}/click", {})

    def text(self, selector: str) -> str:
        """What is to be read in the first element of a selector."""
        return str(self._ask("GET", f"/element/{self.wait_for(selector)}/text", None))

    def until(self, condition: Callable[[], object], limit_s: float) -> None:
        """Wait for a condition; the page of the end is in a picture if it does not come."""
        if not wait_for(condition, limit_s, 1.0):
            raise BrowserError(f"not after {limit_s:.0f} s: {self.text('body')[-2000:]}")

    def run(self, script: str) -> Any:
        """Return what a script of the page returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def resize(self, width: int, height: int) -> None:
        """Give the window another size, in pixels."""
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def complaints(self) -> list[str]:
        """What the browser has found wrong since the last time: scripts, addresses, policies."""
        rows = self._ask("POST", "/se/log", {"type": "browser"})
        return [row["message"] for row in rows]

    def picture(self, name: str) -> None:
        """Keep a screenshot."""
        image = base64.b64decode(self._ask("GET", "/screenshot", None))
        (self.directory / f"{name}.png").write_bytes(image)

    def _ready(self) -> bool:
        try:
            return bool(self._ask("GET", "/status", None)["ready"])
        except OSError:
            return False

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=LIMIT_S) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise BrowserError(json.load(error)["value"]["message"].splitlines()[0]) from error
