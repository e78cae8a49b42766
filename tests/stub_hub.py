"""A stand-in for the Hugging Face hub on the loopback: serves repositories from memory, and takes uploads."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class StubHub:
    """What a hub holds and was asked for.

    Attributes:
        files: contents by repository and name, {"USER/NAME": {"model.safetensors": b"…"}}.
        writable: whether uploads are taken; else they are answered with 403.
        failing: whether everything is answered with 500.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.writable, self.failing = True, False
        self.asked: list[str] = []
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body."""
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if self.failing:
            return 500, {}, b""
        if method in ("GET", "HEAD") and "/resolve/" in path:
            return self._file(path)
        if method == "POST" and not self.writable:
            return 403, {}, b'{"error": "Forbidden"}'
        if path == "/api/repos/create":
            name = "/".join(filter(None, [json.loads(body).get("organization"), json.loads(body)["name"]]))
            self.files.setdefault(name, {})
            return 200, {}, json.dumps({"url": f"{self.endpoint}/{name}"}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return 200, {}, json.dumps({"files": files}).encode()
        if "/commit/" in path:
            return self._commit(path, body)
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _file(self, path: str) -> tuple[int, dict[str, str], bytes]:
        repository, _, rest = path.strip("/").partition("/resolve/")
        content = self.files.get(repository, {}).get(rest.partition("/")[2])
        if content is None:
            code = "EntryNotFound" if repository in self.files else "RepoNotFound"
            return 404, {"X-Error-Code": code}, b""
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    def _commit(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        repository = path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        told = {"commitUrl": f"{self.endpoint}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        return 200, {}, json.dumps(told).encode()


@contextlib.contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Yields a hub that answers at `hub.endpoint` until the end."""
    hub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = hub.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
