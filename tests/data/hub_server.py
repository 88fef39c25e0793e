"""A server on loopback that speaks as much of the Hugging Face Hub's protocol as `datasets` asks for.

It serves dictionaries of files, with ranges, and can fail: unknown and gated repositories, errors that pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BROKEN = 0
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(
    r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/[^/]+(?P<under>/.*)?)?$"
)
_RESOLVE = re.compile(r"(?:/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)$")


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    url: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    failures: dict[str, list[int]] = field(default_factory=dict)  # path's end: how the next requests for it fail
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        for end, codes in hub.failures.items():
            if path.endswith(end) and self.command == "GET" and codes:
                return self._fail(codes.pop(0))
        api, resolve = _API.match(path), _RESOLVE.match(path)
        match = api or resolve
        if match is None:
            return self._send(404, b"", {})
        repository = match["repo"]
        if repository in hub.gated:
            return self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"{repository} is gated"})
        if repository not in hub.repositories:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        files = hub.repositories[repository]
        if resolve:
            return self._send_file(files, resolve["path"])
        return self._send_json(files, match["what"], match["under"] or "", repository, body)

    def _send_json(self, files: dict[str, bytes], what: str | None, under: str, repository: str, body: str) -> None:
        entries = [_entry(name, files[name]) for name in sorted(files)]
        answer: object
        if what == "paths-info":
            paths = json.loads(body)["paths"]
            answer = [entry for entry in entries if entry["path"] in paths]
        elif what == "tree":
            answer = _listing(entries, under.strip("/"), recursive="recursive=true" in self.path.lower())
        else:
            answer = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "tags": []}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = files[path]
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers)

    def _fail(self, code: int) -> None:
        """An answer of this status; BROKEN promises more than it sends and hangs up."""
        if code != BROKEN:
            return self._send(code, b"", {})
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"{")
        self.close_connection = True

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "oid": _oid(content), "size": len(content), "path": path}


def _listing(entries: list[dict[str, object]], under: str, recursive: bool) -> list[dict[str, object]]:
    """What is in a folder: files and, as entries of their own, folders."""
    found: dict[str, dict[str, object]] = {}
    prefix = f"{under}/" if under else ""
    for entry in entries:
        path = str(entry["path"])
        if path.startswith(prefix):
            folder, _, rest = path.removeprefix(prefix).partition("/")
            if rest:
                name = prefix + folder
                found[name] = {"type": "directory", "oid": COMMIT, "size": 0, "path": name}
            if recursive or not rest:
                found[path] = entry
    return list(found.values())


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
