"""A Hub of one repository on 127.0.0.1: the part of the protocol that snapshot_download speaks.

Source: the requests of huggingface_hub 2.4, and the routes of the Hub's API: model info and tree
at a revision, HEAD and GET of /owner/name/resolve/revision/file with ETag, commit and ranges.
"""

from __future__ import annotations

import hashlib
import json
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


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: Mapping[str, bytes]
    refuse_all: Refusal | None = None
    refuse_files: Refusal | None = None  # the listing is public, as of a gated repository
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> where answers break off
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    address: str = ""

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
        found = [
            {"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders
        ]
        for name, content in self.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
            found.append(entry)
        return found


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


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
            if found is None:
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
            start = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range", "bytes=0-")))
            headers = {"ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes"}
            status = HTTPStatus.OK
            if start:
                status = HTTPStatus.PARTIAL_CONTENT
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cuts = hub.cuts.get(name, [])
            stop = cuts.pop(0) if cuts and self.command == "GET" else len(content)
            self._send(content[start:], status, headers, max(0, stop - start))

        def _refuse(self, refusal: Refusal) -> None:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            body = json.dumps({"error": refusal.message}).encode()
            self._send(body, HTTPStatus(refusal.status), headers)

        def _send(
            self,
            body: bytes,
            status: HTTPStatus = HTTPStatus.OK,
            headers: Mapping[str, str] | None = None,
            stop: int | None = None,
        ) -> None:
            """`body` with its true length; only the first `stop` bytes where that is less."""
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
            self.close_connection = self.close_connection or stop not in (None, len(body))

    return Handler
