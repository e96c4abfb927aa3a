"""A Hub on 127.0.0.1: the part of its protocol that reading a repository takes.

Endpoints: model info and tree (GET /api/models/{repo}[/revision/{at}], .../tree/{at}), and
HEAD and GET of /{repo}/resolve/{at}/{file} with ETag, commit and ranges. Large files are LFS's: the
listing has their `lfs` with SHA-256 and size, and the ETag is the SHA-256; of others it is git's.

It misbehaves when told to: refusals, answers that break off, wrong bytes, and a share of requests
that fail at random. Source: the requests of huggingface_hub 2.4, and the routes of the Hub's API.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "meta/tiny-llama4"
COMMIT = "5f0a3c1d2e4b69788796a5b4c3d2e1f001234567"


@dataclass(frozen=True)
class Refusal:
    """An answer in place of a file or a listing, as the Hub gives it."""

    status: int
    code: str  # X-Error-Code
    message: str  # X-Error-Message


GATED = Refusal(403, "GatedRepo", "Access to this model is restricted.")
UNKNOWN_REPO = Refusal(404, "RepoNotFound", "Repository not found")
HIDDEN_REPO = Refusal(401, "RepoNotFound", "Invalid username or password.")
BAD_TOKEN = Refusal(401, "", "Invalid credentials in Authorization header")
UNKNOWN_REVISION = Refusal(404, "RevisionNotFound", "Invalid rev id: nowhere")
UNKNOWN_ENTRY = Refusal(404, "EntryNotFound", "Entry not found")
BUSY = Refusal(503, "", "Service Unavailable")
TOO_MANY = Refusal(429, "", "Too Many Requests")
# Retry-After and RateLimit as the client reads them: no request is left, more in 0 seconds
WAIT = {"Retry-After": "0", "RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"api";q=500;w=300'}


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: Mapping[str, bytes]
    refuse_all: Refusal | None = None
    refuse_files: Refusal | None = None  # the listing is public, as of a gated repository
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> where answers break off
    wrong: dict[str, int] = field(default_factory=dict)  # file -> how often a byte of it is another
    failing: float = 0.0  # the share of requests that are answered 429, 503, or broken off
    seed: int = 0  # of which ones
    lfs_from: int = 2**14  # bytes from which on a file is LFS's
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The files that were asked for with GET, in order."""
        return [path for method, path, _ in self.requests if method == "GET" and path in self.files]

    def listing(self) -> list[dict[str, Any]]:
        """The repository's tree, folders included."""
        folders = sorted({name.rpartition("/")[0] for name in self.files} - {""})
        found: list[dict[str, Any]] = [
            {"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders
        ]
        for name, content in self.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if self.is_lfs(content):
                pointer = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                entry["lfs"] = pointer
            found.append(entry)
        return found

    def is_lfs(self, content: bytes) -> bool:
        return len(content) >= self.lfs_from

    def etag(self, content: bytes) -> str:
        return sha256(content) if self.is_lfs(content) else git_hash(content)

    def failure(self) -> str | None:
        """What befalls the next request: "429", "503" or "cut"; None for most."""
        with self._lock:
            if self._chance.random() >= self.failing:
                return None
            return self._chance.choice(("429", "503", "cut"))

    def is_wrong(self, name: str) -> bool:
        """Whether this answer has a wrong byte; counts it."""
        with self._lock:
            left = self.wrong.get(name, 0)
            self.wrong[name] = max(0, left - 1)
            return left > 0


def git_hash(content: bytes) -> str:
    """Git's name of a file's content, which is the ETag of what is not LFS's."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            info = re.fullmatch(rf"/api/models/{REPO}(/revision/(?P<at>.+))?", path)
            tree = re.fullmatch(rf"/api/models/{REPO}/tree/(?P<at>[^/]+)", path)
            file = re.fullmatch(rf"/{REPO}/resolve/(?P<at>[^/]+)/(?P<name>.+)", path)
            found = info or tree or file
            name = file["name"] if file else path
            hub.requests.append((self.command, name, self.headers.get("Range")))
            self.failure = hub.failure()
            if self.failure in ("429", "503"):
                self._refuse(TOO_MANY if self.failure == "429" else BUSY, WAIT)
            elif found is None:
                self._refuse(UNKNOWN_REPO)
            elif hub.refuse_all is not None:
                self._refuse(hub.refuse_all)
            elif found["at"] not in (None, "main", COMMIT):
                self._refuse(UNKNOWN_REVISION)
            elif file is None:
                siblings = [{"rfilename": name} for name in hub.files]
                model = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}
                self._send(json.dumps(hub.listing() if tree else model).encode())
            elif name not in hub.files:
                self._refuse(UNKNOWN_ENTRY)
            elif hub.refuse_files is not None:
                self._refuse(hub.refuse_files)
            else:
                self._send_file(name)

        def _send_file(self, name: str) -> None:
            content = hub.files[name]
            headers = {"ETag": f'"{hub.etag(content)}"', "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            start, end = _ends(asked, len(content))  # of what is sent, the end not included
            if not 0 <= start < end and asked:
                headers["Content-Range"] = f"bytes */{len(content)}"
                return self._send(b"", HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
            status = HTTPStatus.OK
            if asked:
                status = HTTPStatus.PARTIAL_CONTENT
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            body = content[start:end]
            if self.command == "GET" and body and hub.is_wrong(name):
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            cuts = hub.cuts.get(name, [])
            stop = cuts.pop(0) if cuts and self.command == "GET" else end
            self._send(body, status, headers, max(0, stop - start))

        def _refuse(self, refusal: Refusal, more: Mapping[str, str] | None = None) -> None:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            body = json.dumps({"error": refusal.message}).encode()
            self._send(body, HTTPStatus(refusal.status), {**headers, **(more or {})})

        def _send(
            self,
            body: bytes,
            status: HTTPStatus = HTTPStatus.OK,
            headers: Mapping[str, str] | None = None,
            stop: int | None = None,
        ) -> None:
            """`body` with its true length; only the first `stop` bytes where that is less."""
            if self.failure == "cut":
                stop = len(body) // 2
                if self.command == "HEAD":  # there is no body to break off
                    self.close_connection = True
                    return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Request-Id", "Root=1-test")
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[:stop])
            self.close_connection = self.close_connection or (stop is not None and stop < len(body))

    return Handler


def _ends(asked: str | None, length: int) -> tuple[int, int]:
    """Start and end of a Range header: bytes=a-, bytes=a-b with both in it, bytes=-last."""
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "bytes=0-").groups()  # type: ignore[union-attr]
    if not first:
        return max(0, length - int(last)), length
    return int(first), min(int(last) + 1, length) if last else length
