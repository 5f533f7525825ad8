"""A server of files on this machine that can break off, send a wrong file, redirect, be slow, or ignore Range."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class LocalServer:
    """A server on a free port of this machine, while it is open; `handler` answers, `root` is its address."""

    def __enter__(self):
        class Handler(self.handler()):
            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """The class that answers requests."""
        raise NotImplementedError


class FileServer(LocalServer):
    """Serves `files` (path -> bytes or a file) while it is open; what it was asked for is in `requests`."""

    def __init__(self, **files: bytes | Path) -> None:
        self.files: dict[str, bytes | Path] = dict(files)  # by path without the first slash
        self.breaks: dict[str, int] = {}  # path -> after how many bytes the connection breaks, once
        self.wrong: dict[str, list[bytes]] = {}  # path -> what is sent instead, as often as the list is long
        self.redirects: dict[str, str] = {}  # path -> where the client is sent
        self.statuses: dict[str, list[int]] = {}  # path -> an error status, as often as the list is long
        self.ranges = True  # whether it understands Range
        self.pause_s = 0.0  # before it answers
        self.requests: list[tuple[str, str | None]] = []  # (path, Range header or None), in order

    def handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

        return Handler

    @property
    def url(self) -> str:
        return f"{self.root}/"

    def asked_for(self, path: str) -> list[str | None]:
        """The Range headers of the requests for `path`."""
        return [byte_range for asked, byte_range in self.requests if asked == path]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, byte_range = handler.path.lstrip("/"), handler.headers["Range"]
        self.requests.append((path, byte_range))
        time.sleep(self.pause_s)
        if path in self.redirects:
            handler.send_response(302)
            handler.send_header("Location", self.redirects[path])
            handler.end_headers()
            return
        if self.statuses.get(path) or path not in self.files:
            handler.send_error(self.statuses[path].pop(0) if path in self.statuses else 404)
            return
        wrong = bool(self.wrong.get(path))
        data = self.wrong[path].pop(0) if wrong else self.files[path]
        data = data.read_bytes() if isinstance(data, Path) else data
        start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1]) if byte_range and self.ranges else 0
        if start >= len(data):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(data)}")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that was killed
            handler.wfile.write(data[start : None if wrong else self.breaks.pop(path, None)])
