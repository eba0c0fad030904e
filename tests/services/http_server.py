"""A real web server on loopback that answers as it is told: files, errors, resets in mid-body, trickles, and what it was asked."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_BLOCK = 4096


@dataclass(frozen=True)
class Answer:
    """One response."""

    body: bytes = b""
    """All of the file; a request for a range gets that range of it."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    """Over the defaults: Content-Type video/mp4, a fixed Last-Modified. An empty value leaves a header out."""
    reset_after: int | None = None
    """Bytes of the body after which the connection is reset."""
    bytes_per_second: float | None = None
    """Slower than the line."""


@dataclass(frozen=True)
class Request:
    """One request that came in."""

    path: str
    headers: dict[str, str]


class WebServer:
    """Answers by path; `requests` lists what came, in order."""

    def __init__(self, port: int):
        self.port = port
        self.requests: list[Request] = []
        self._answers: dict[str, list[Answer]] = {}
        self._lock = threading.Lock()

    def serve(self, path: str, *answers: Answer) -> str:
        """Give these answers to the next requests for a path, the last of them from then on; the URL of the path."""
        with self._lock:
            self._answers[path.partition("?")[0]] = list(answers)
        return f"http://127.0.0.1:{self.port}{path}"

    def asked(self, path: str) -> list[Request]:
        """The requests for a path."""
        return [request for request in self.requests if request.path.partition("?")[0] == path]

    def answer(self, request: Request) -> Answer:
        """Take note of a request and say what to answer."""
        with self._lock:
            self.requests.append(request)
            answers = self._answers.get(request.path.partition("?")[0], [Answer(status=404)])
            return answers.pop(0) if len(answers) > 1 else answers[0]


@contextlib.contextmanager
def web_server() -> Iterator[WebServer]:
    """A server in threads of this process, on a free port of loopback."""

    class Handler(_Handler):
        web: WebServer

    with _Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False  # a client that was killed may leave a trickle behind
        Handler.web = WebServer(server.server_address[1])
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield Handler.web
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up whenever they like; the server would print the stack into the output that a test looks at."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer

    def do_GET(self) -> None:
        answer = self.web.answer(Request(self.path, dict(self.headers)))
        body, status, headers = answer.body, answer.status, {"Content-Type": "video/mp4", "Last-Modified": "Wed, 01 Jan 2020 00:00:00 GMT"}
        if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(wanted[1])
            status, body = (206, body[start:]) if start < len(body) else (416, b"")
            headers["Content-Range"] = f"bytes {start}-{len(answer.body) - 1}/{len(answer.body)}"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))} | answer.headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # clients hang up
            self._send(body, answer)

    do_HEAD = do_GET

    def _send(self, body: bytes, answer: Answer) -> None:
        if self.command == "HEAD":
            return
        for start in range(0, len(body[: answer.reset_after]), _BLOCK):
            self.wfile.write(body[start : min(start + _BLOCK, answer.reset_after or len(body))])
            if answer.bytes_per_second is not None:
                time.sleep(_BLOCK / answer.bytes_per_second)
        if answer.reset_after is not None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
