"""A headless Chromium that tests drive over its debugging pipe: no driver, no port, no package.

Messages are JSON with a NUL behind each; the browser reads them from its descriptor 3 and writes to 4.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run "
    "--disable-background-networking --disable-extensions --disable-sync --remote-debugging-pipe"
)
ANSWER_S = 40.0


def found_browser() -> str | None:
    """The path of a Chromium; None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class BrowserPage:
    """One page of the browser."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._bytes = read, write, b""
        self._number, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)
        raise AssertionError(f"{method}: no answer")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._bytes:
            read = os.read(self._read, 1 << 20)
            assert read, "the browser has gone"
            self._bytes += read
        text, self._bytes = self._bytes.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        return message

    def show(self, width: int, height: int, scheme: str) -> None:
        """Gives the page a screen, and the reader's choice of light or dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def value(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20.0) -> Any:
        """The first value of an expression that is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := self.value(script):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; the page says: {self.value('document.body.innerText')}")

    def screenshot(self, path: Path) -> None:
        """Writes the whole page as it is now."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=True, fromSurface=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def problems(self) -> list[str]:
        """Errors of the page, and addresses that it asked for beyond its own server."""
        self.value("1")
        found = []
        for event in self.events:
            its = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(its["exceptionDetails"]))
            if event.get("method") == "Log.entryAdded" and its["entry"]["level"] == "error":
                found.append(str(its["entry"]["text"]))
            if event.get("method") == "Network.requestWillBeSent":
                url = its["request"]["url"]
                if not url.startswith(("http://127.0.0.1:", "data:", "about:")):
                    found.append(f"asked for {url}")
        return found


@contextmanager
def open_browser(program: str, profile: Path, options: Sequence[str] = ()) -> Iterator[BrowserPage]:
    """A browser with a profile of its own, ended with the scope."""
    to_browser, from_browser = os.pipe(), os.pipe()
    words = [program, *OPTIONS.split(), f"--user-data-dir={profile}", *options, "about:blank"]
    command = ["bash", "-c", f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}', "browser", *words]
    process = subprocess.Popen(
        command, pass_fds=(to_browser[0], from_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield BrowserPage(from_browser[0], to_browser[1])
    finally:
        os.close(to_browser[1])  # the browser ends with its pipe
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(from_browser[0])
