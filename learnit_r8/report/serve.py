"""`r8 serve`: the report in a browser while runs train elsewhere; it reads their folders and writes nothing.

The page is the report's own, drawn once; 0.6 seconds after each answer it asks for what has changed in its data
sources. Only the standard library's server is needed for that. It is bound to this machine; elsewhere a request has to
bring the token.
"""

from __future__ import annotations

import gzip
import hmac
import json
import secrets
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from learnit_r8.errors import ConfigError
from learnit_r8.report.page import page, refreshed
from learnit_r8.report.run_data import RunData, run_of
from learnit_r8.run.table import LogReader
from learnit_r8.run.tail import EVENTS_FILE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_WAITING = (
    "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><meta http-equiv='refresh' content='2'>"
    "<title>learnit::r8</title><p style='font-family:sans-serif'>Waiting for the first reported loss.</p></html>"
)


class LiveRuns:
    """Runs that are read again and again, one a folder."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._logs = [(folder, LogReader(folder / EVENTS_FILE)) for folder in folders]
        self._lock = threading.Lock()
        self._version = 0
        self._newest = b""

    def page(self) -> str:
        """Return the page of the runs as they are now."""
        with self._lock:
            runs = self._read()
            return page(runs, live=True) if runs else _WAITING

    def news(self, known: int) -> bytes:
        """Return what has changed since the version that a page knows, as JSON; nothing where nothing has."""
        with self._lock:
            runs = self._read()
            if not self._newest and runs:
                data = {"version": self._version, **refreshed(runs)}
                self._newest = json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
            return self._newest if known != self._version else b""

    def _read(self) -> list[RunData]:
        found = []
        for folder, log in self._logs:
            table = log.poll()
            if log.changed:
                self._version += 1
                self._newest = b""
            if len(table):
                found.append(run_of(folder, table))
        return found if len(found) == len(self._logs) else []


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(address.query).items()}
        if not self._allowed(asked.get("token", "")):
            self._answer(HTTPStatus.FORBIDDEN, b"the address needs the token that r8 serve has printed", "text/plain")
            return
        try:
            if address.path == "/":
                self._answer(HTTPStatus.OK, self.server.runs.page().encode(), "text/html; charset=utf-8")
            elif address.path == "/news":
                known = asked.get("known", "")
                data = self.server.runs.news(int(known) if known.isdecimal() else -1)
                self._answer(HTTPStatus.OK if data else HTTPStatus.NO_CONTENT, data, "application/json")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"there is only one page", "text/plain")
        except OSError as error:  # the log's folder is away for now: the page asks again
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode(), "text/plain")

    def _allowed(self, token: str) -> bool:
        if self.server.token:
            return hmac.compare_digest(token.encode(), self.server.token.encode())
        # A page of another site whose name leads here must not read a run.
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return name in LOOPBACK

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        if len(body) > 1000 and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 1)
            self.send_header("Content-Encoding", "gzip")
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the address holds the token."""


class Server(ThreadingHTTPServer):
    """Serves runs until `shutdown`.

    Each request has to bring the token; where there is none, it has to come from this machine. Port 0 takes a free one.

    Raises:
        ConfigError: The address cannot be used.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], host: str = "127.0.0.1", port: int = 0, token: str = "") -> None:
        self.runs = LiveRuns(folders)
        self.token = token or ("" if host in LOOPBACK else secrets.token_urlsafe(16))
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError([f"cannot listen on {host}:{port} ({error.strerror}): give another --port"]) from error

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")
