"""Server of the page on one address: the page itself, and what it asks for, as JSON. It reads the folder alone.

GET /                            the page
GET /snapshot.json[?run=R]       state, curves and last report of a run
GET /report.json?run=R&index=I   one report
GET /layer.json?run=R&layer=L    the rows of one layer's experts over time
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.live.folder import RunFolder
from ds_moe_ep.live.lines import finite
from ds_moe_ep.live.snapshot import layer_over_time, report_at, run_of, snapshot

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The page fetches from its own server alone, whatever a run's files hold.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def page() -> bytes:
    """The page: one file, nothing of which is fetched from elsewhere."""
    return resources.files("ds_moe_ep.live").joinpath("page.html").read_bytes()


class LiveServer(ThreadingHTTPServer):
    """Serves one folder. Raises EngineError where the address cannot be had."""

    daemon_threads = True

    def __init__(self, folder: RunFolder, host: str, port: int) -> None:
        self.folder, self.is_local = folder, host in LOOPBACK
        self._lock = threading.Lock()
        self.page = page()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise EngineError(
                f"watch={host}:{port}: cannot be served ({error.strerror}); another --port, or --port 0 for a free one"
            ) from None

    @property
    def url(self) -> str:
        """The address to open."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def answer(self, path: str, query: dict[str, str]) -> Any:
        """The object behind a path; None where there is none. Raises ConfigError for what is not in the folder."""
        asked: dict[str, Callable[[], Any]] = {
            "/snapshot.json": lambda: snapshot(self.folder, query.get("run")),
            "/report.json": lambda: report_at(run_of(self.folder, query.get("run", "")), _whole(query.get("index"))),
            "/layer.json": lambda: layer_over_time(run_of(self.folder, query.get("run", "")), query.get("layer", "")),
        }
        if path not in asked:
            return None
        with self._lock:  # the reader is one for all requests
            self.folder.refresh()
            return asked[path]()


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    server_version = "ds_moe_ep"
    sys_version = ""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if self.server.is_local and not self._names_this_machine():
            return self._send_json({"error": "Host: not this machine; open the address that the command printed"}, 403)
        if parts.path == "/":
            return self._send(self.server.page, "text/html; charset=utf-8", HTTPStatus.OK)
        try:
            found = self.server.answer(parts.path, {key: its[-1] for key, its in parse_qs(parts.query).items()})
        except ConfigError as error:
            return self._send_json({"error": str(error)}, HTTPStatus.NOT_FOUND)
        except OSError as error:
            return self._send_json(
                {"error": f"{error.filename}: cannot be read ({error.strerror})"}, HTTPStatus.INTERNAL_SERVER_ERROR
            )
        if found is None:
            return self._send_json({"error": f"{parts.path}: nothing is here"}, HTTPStatus.NOT_FOUND)
        return self._send_json(found, HTTPStatus.OK)

    do_HEAD = do_GET

    def _names_this_machine(self) -> bool:
        """False for a foreign site's page that calls this server by a name of its own."""
        host = self.headers.get("Host", "")
        return host.rpartition(":")[0].strip("[]") in LOOPBACK or host.strip("[]") in LOOPBACK

    def _send_json(self, value: Any, status: int) -> None:
        text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
        self._send(text.encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: int) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except ConnectionError:  # the reader has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that asks every two seconds would fill the terminal."""


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else -1
