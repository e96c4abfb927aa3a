"""A Hub on 127.0.0.1: the part of its protocol that reading and publishing models takes.

Reading: model info and tree (GET /api/models/{repo}[/revision/{at}], .../tree/{at}), and
HEAD and GET of /{repo}/resolve/{at}/{file} with ETag, commit and ranges. Large files are LFS's: the
listing has their `lfs` with SHA-256 and size, and the ETag is the SHA-256; of others it is git's.

Writing: POST /api/repos/create, /api/validate-yaml, and of a model branch/{name}, preupload/{at},
commit/{at} (also with create_pr); /{repo}.git/info/lfs/objects/batch with the transfer `basic`, its
PUT and its verification. A commit changes all of its files or none; objects of LFS stay for the
next one. There is no Xet: clients have HF_HUB_DISABLE_XET=1.

It misbehaves when told to: refusals, answers that break off, wrong bytes, uploads that end, and a
share of requests that fail at random. Source: the requests of huggingface_hub 2.4, and the routes
of the Hub's API; of metadata the rules in its page on model cards.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REPO = "meta/tiny-llama4"
COMMIT = "5f0a3c1d2e4b69788796a5b4c3d2e1f001234567"
TOKEN = "hf_" + "s3cretT0ken" * 3
OWNER = "me"  # whose token it is

Answer = tuple[Mapping[str, Any], HTTPStatus]


@dataclass(frozen=True)
class Refusal(Exception):  # noqa: N818 - an answer, no fault of the server's
    """An answer in place of a file or a listing, as the Hub gives it."""

    status: int
    code: str  # X-Error-Code
    message: str  # X-Error-Message


GATED = Refusal(403, "GatedRepo", "Access to this model is restricted.")
UNKNOWN_REPO = Refusal(404, "RepoNotFound", "Repository not found")
HIDDEN_REPO = Refusal(401, "RepoNotFound", "Invalid username or password.")
BAD_TOKEN = Refusal(401, "", "Invalid credentials in Authorization header")
NOT_YOURS = Refusal(403, "", "You don't have the rights to write under this namespace")
UNKNOWN_REVISION = Refusal(404, "RevisionNotFound", "Invalid rev id: nowhere")
UNKNOWN_ENTRY = Refusal(404, "EntryNotFound", "Entry not found")
EXPIRED = Refusal(403, "", "Request has expired")  # as the storage says of an old address
STALE = Refusal(412, "", "A commit has happened since. Please refresh and try again.")
BUSY = Refusal(503, "", "Service Unavailable")
TOO_MANY = Refusal(429, "", "Too Many Requests")
# Retry-After and RateLimit as the client reads them: no request is left, more in 0 seconds
WAIT = {"Retry-After": "0", "RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"api";q=500;w=300'}


@dataclass
class Repository:
    """Branches and pull requests, and the files of each commit."""

    private: bool = False
    heads: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/1 -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def add(self, branch: str, files: Mapping[str, bytes], commit: str | None = None) -> str:
        """A commit of these files; returns its name."""
        said = f"{branch} {len(self.commits)} {sorted(files)}"
        name = commit or hashlib.sha1(said.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.heads[branch] = name
        return name

    def commit(self, revision: str) -> str:
        """The commit of a branch, or of its own name. Raises Refusal for another one."""
        if revision in self.heads:
            return self.heads[revision]
        if revision not in self.commits:
            raise UNKNOWN_REVISION
        return revision

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.commit(revision)]


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: Mapping[str, bytes]  # of REPO
    refuse_all: Refusal | None = None
    refuse_files: Refusal | None = None  # the listing is public, as of a gated repository
    refuse_commits: Refusal | None = None
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> where answers break off
    wrong: dict[str, int] = field(default_factory=dict)  # file -> how often it comes damaged
    wrong_ranges: set[str] = field(default_factory=set)  # files that come so when a part is asked
    sizes: Mapping[str, int] = field(default_factory=dict)  # file -> what the listing says of it
    failing: float = 0.0  # the share of requests that are answered 429, 503, or broken off
    seed: int = 0  # of which ones
    most_uploads: int | None = None  # objects that are taken; further ones are refused
    lfs_from: int = 2**14  # bytes from which on a file is LFS's
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # what befell requests, at random
    uploads: list[str] = field(default_factory=list)  # SHA-256 of objects that arrived, in order
    address: str = ""

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.repositories = {REPO: Repository()}
        self.repositories[REPO].add("main", self.files, COMMIT)

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
        return [name for method, name, _ in self.requests if method == "GET" and name[0] != "/"]

    def failure(self) -> str | None:
        """What befalls the next request: "429", "503" or "cut"; None for most."""
        with self.lock:
            if self._chance.random() >= self.failing:
                return None
            self.failures.append(self._chance.choice(("429", "503", "cut")))
            return self.failures[-1]

    def is_wrong(self, name: str) -> bool:
        """Whether this answer has a wrong byte; counts it."""
        with self.lock:
            left = self.wrong.get(name, 0)
            self.wrong[name] = max(0, left - 1)
            return left > 0

    # --- what is read ---

    def is_lfs(self, content: bytes) -> bool:
        return len(content) >= self.lfs_from

    def etag(self, content: bytes) -> str:
        return sha256(content) if self.is_lfs(content) else git_hash(content)

    def repository(self, repo: str) -> Repository:
        if repo not in self.repositories:
            raise UNKNOWN_REPO
        return self.repositories[repo]

    def info(self, repo: str, revision: str) -> dict[str, Any]:
        found = self.repository(repo)
        siblings = [{"rfilename": name} for name in found.files(revision)]
        sha = found.commit(revision)
        return {
            "id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "private": found.private
        }  # fmt: skip

    def tree(self, repo: str, revision: str) -> list[dict[str, Any]]:
        """Files, and the folders that they are in."""
        files = self.repository(repo).files(revision)
        folders = sorted({name.rpartition("/")[0] for name in files} - {""})
        found: list[dict[str, Any]] = [
            {"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders
        ]
        for name, content in files.items():
            size = self.sizes.get(name, len(content))
            entry = {"type": "file", "path": name, "size": size, "oid": git_hash(content)}
            if self.is_lfs(content):
                pointer = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                entry["lfs"] = pointer
            found.append(entry)
        return found

    # --- what is written ---

    def create(self, asked: Mapping[str, Any]) -> Answer:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            raise NOT_YOURS
        url = {"url": f"{self.address}/{repo}", "id": repo}
        if repo in self.repositories:
            return {**url, "error": "You already created this model repo"}, HTTPStatus.CONFLICT
        self.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        self.repositories[repo].add("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return url, HTTPStatus.OK

    def branch(self, repo: str, name: str) -> Answer:
        found = self.repository(repo)
        if name in found.heads:
            return {"error": "Reference already exists"}, HTTPStatus.CONFLICT
        found.heads[name] = found.heads["main"]
        return {}, HTTPStatus.OK

    def preupload(self, repo: str, revision: str, asked: Mapping[str, Any]) -> Answer:
        """Which files are LFS's, and what is there under their names already."""
        there = self.repository(repo).files(revision)
        files = []
        for file in asked["files"]:
            mode = "lfs" if file["size"] >= self.lfs_from else "regular"
            known = {"oid": self.etag(there[file["path"]])} if file["path"] in there else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": files}, HTTPStatus.OK

    def batch(self, repo: str, asked: Mapping[str, Any]) -> Answer:
        """Where to send each object; nowhere those that are here."""
        self.repository(repo)
        found = []
        for item in asked["objects"]:
            if item["oid"] not in self.objects:
                upload = {"href": f"{self.address}/lfs-objects/{item['oid']}"}
                verify = {"href": f"{self.address}/{repo}.git/info/lfs/objects/verify"}
                item = {**item, "actions": {"upload": upload, "verify": verify}}
            found.append(item)
        return {"transfer": "basic", "objects": found}, HTTPStatus.OK

    def take(self, oid: str, content: bytes) -> None:
        """One object of LFS. Raises Refusal when it is another one, or no more are taken."""
        with self.lock:
            if self.most_uploads is not None and len(self.uploads) >= self.most_uploads:
                raise EXPIRED
            if sha256(content) != oid:
                raise Refusal(400, "", "The provided checksum does not match")
            self.objects[oid] = content
            self.uploads.append(oid)

    def verify(self, asked: Mapping[str, Any]) -> Answer:
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "", "Object not found")
        return {}, HTTPStatus.OK

    def commit(
        self, repo: str, revision: str, lines: list[Mapping[str, Any]], pull_request: bool
    ) -> Answer:
        """All of the changes, or none."""
        found = self.repository(repo)
        if self.refuse_commits is not None:
            raise self.refuse_commits
        files = dict(found.files(revision))
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    if value.get("parentCommit", found.commit(revision)) != found.commit(revision):
                        raise STALE
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        raise Refusal(400, "", f"{value['path']}: its object was not uploaded")
                    files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise Refusal(400, "", f"unknown operation {other}")
        number = 1 + sum(head.startswith("refs/pr/") for head in found.heads)
        name = found.add(f"refs/pr/{number}" if pull_request else revision, files)
        answer = {"success": True, "commitOid": name}
        answer["commitUrl"] = f"{self.address}/{repo}/commit/{name}"
        if pull_request:
            answer["pullRequestUrl"] = f"{self.address}/{repo}/discussions/{number}"
        return answer, HTTPStatus.OK


def git_hash(content: bytes) -> str:
    """Git's name of a file's content, which is the ETag of what is not LFS's."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- metadata of a card ---

LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama4", "cc-by-4.0", "other")
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def validate_yaml(asked: Mapping[str, Any]) -> Answer:
    """What the Hub finds wrong in a card's metadata."""
    block = re.match(r"---\n(.*?)\n---", asked["content"], re.DOTALL)
    try:
        found = yaml.safe_load(block[1]) if block else {}
        errors = list(_faults(found))
    except (yaml.YAMLError, AttributeError):
        errors = ["YAML is invalid"]
    warnings = [] if block else ["empty or missing yaml metadata in repo card"]
    status = HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK
    kinds = {"errors": errors, "warnings": warnings}
    return {kind: [{"message": one} for one in said] for kind, said in kinds.items()}, status


def _faults(found: Mapping[str, Any]) -> list[str]:
    def one_or_more(key: str) -> list[Any]:
        value = found.get(key, [])
        return value if isinstance(value, list) else [value]

    model = re.compile(r"[\w.-]+/[\w.-]+")
    name, link = found.get("license_name"), found.get("license_link")
    wrong = {
        "license": found.get("license", "other") not in LICENCES,
        "license_name": (found.get("license") == "other") != (name is not None)
        or not re.fullmatch(r"[a-z0-9.-]+", name or "none"),
        "license_link": link not in (None, "LICENSE", "LICENSE.md")
        and not str(link).startswith("https://"),
        "base_model": not all(model.fullmatch(str(one)) for one in one_or_more("base_model")),
        "base_model_relation": found.get("base_model_relation", "quantized") not in RELATIONS,
        "tags": not all(isinstance(tag, str) for tag in one_or_more("tags")),
        "language": not all(
            re.fullmatch("[a-z]{2,3}", str(one)) for one in one_or_more("language")
        ),
        "library_name": not isinstance(found.get("library_name", ""), str),
    }
    return [f'"{key}" is not valid' for key, is_wrong in wrong.items() if is_wrong]


# --- HTTP ---


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(self._read)

        def do_GET(self) -> None:
            self._answer(self._read)

        def do_POST(self) -> None:
            self._answer(self._write)

        def do_PUT(self) -> None:
            self._answer(self._put)

        def _answer(self, answer: Callable[[str], None]) -> None:
            path = unquote(urlsplit(self.path).path)
            file = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
            hub.requests.append(
                (self.command, file[1] if file else path, self.headers.get("Range"))
            )
            self.commit = COMMIT
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.failure = hub.failure()
            try:
                if self.failure in ("429", "503"):
                    raise TOO_MANY if self.failure == "429" else BUSY
                if hub.refuse_all is not None:
                    raise hub.refuse_all
                answer(path)
            except Refusal as refusal:
                self._refuse(refusal)

        # --- reading ---

        def _read(self, path: str) -> None:
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repository = hub.repository(found[1])
                self.commit = repository.commit(found[2])
                self._send_file(found[3], repository.files(found[2]))
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._send_json(hub.info(found[1], found[2] or "main"))
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                self._send_json(hub.tree(found[1], found[2]))
            else:
                raise UNKNOWN_REPO

        def _send_file(self, name: str, files: Mapping[str, bytes]) -> None:
            if name not in files:
                raise UNKNOWN_ENTRY
            if hub.refuse_files is not None:
                raise hub.refuse_files
            content = files[name]
            headers = {"ETag": f'"{hub.etag(content)}"', "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            start, end = _ends(asked, len(content))  # of what is sent, the end not included
            if asked and not 0 <= start < end:
                headers["Content-Range"] = f"bytes */{len(content)}"
                return self._send(b"", HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
            status = HTTPStatus.OK
            if asked:
                status = HTTPStatus.PARTIAL_CONTENT
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            body = content[start:end]
            wrong = (
                name in hub.wrong_ranges if asked else self.command == "GET" and hub.is_wrong(name)
            )
            if body and wrong:
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            cuts = hub.cuts.get(name, [])
            stop = cuts.pop(0) if cuts and self.command == "GET" else end
            self._send(body, status, headers, max(0, stop - start))

        # --- writing ---

        def _write(self, path: str) -> None:
            if path == "/api/validate-yaml":  # for anybody
                found, status = validate_yaml(json.loads(self.body))
                if self.headers.get("Accept") == "text/plain":
                    said = "\n".join(one["message"] for one in found["errors"])
                    return self._send(said.encode(), status)
                return self._send_json(found, status)
            self._check_token(path)
            lines = [json.loads(line) for line in self.body.splitlines()]
            model = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path)
            lfs = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path)
            if path == "/api/repos/create":
                answer = hub.create(lines[0])
            elif model and model[2] == "branch":
                answer = hub.branch(model[1], model[3])
            elif model and model[2] == "preupload":
                answer = hub.preupload(model[1], model[3], lines[0])
            elif model and model[2] == "commit":
                wanted = "create_pr" in parse_qs(urlsplit(self.path).query)
                with hub.lock:
                    answer = hub.commit(model[1], model[3], lines, wanted)
            elif lfs:
                answer = hub.batch(lfs[1], lines[0]) if lfs[2] == "batch" else hub.verify(lines[0])
            else:
                raise Refusal(404, "", "Not found")
            self._send_json(*answer)

        def _put(self, path: str) -> None:
            hub.take(path.removeprefix("/lfs-objects/"), self.body)
            self._send(b"")

        def _check_token(self, path: str) -> None:
            given = self.headers.get("Authorization")
            if given is None:
                raise HIDDEN_REPO
            if given != f"Bearer {TOKEN}":
                raise BAD_TOKEN

        # --- answers ---

        def _refuse(self, refusal: Refusal) -> None:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            wait = WAIT if refusal.status in (429, 503) else {}
            body = json.dumps({"error": refusal.message}).encode()
            self._send(body, HTTPStatus(refusal.status), {**headers, **wait})

        def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
            self._send(json.dumps(value).encode(), status)

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
                if self.command == "HEAD" or not body:  # there is no body to break off
                    self.close_connection = True
                    return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", self.commit)
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
