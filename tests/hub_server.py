"""A small stand-in for the Hugging Face Hub on loopback, and a client process that talks to it.

It speaks as much of the Hub's HTTP API as the real huggingface_hub uses without Xet: creating
repositories, preupload, large files (LFS), commits, trees, and resolve with redirects to a second
address, ETags and ranges. Faults happen on demand.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parents[1]
TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".onnx")

Tree = dict[str, bytes]


class Answer(NamedTuple):
    """What a request gets: JSON, or a body with headers."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


def json_answer(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def refusal(status: int, code: str = "", message: str = "", **headers: str) -> Answer:
    named = {"X-Error-Code": code, "X-Error-Message": message or code}
    body = json.dumps({"error": message or code or str(status)}).encode()
    return Answer(status, body, {k: v for k, v in named.items() if v} | headers)


NO_REPO = refusal(404, "RepoNotFound", "Repository not found")
NO_REVISION = refusal(404, "RevisionNotFound", "Invalid rev id")


class Request(NamedTuple):
    """A request as it came in; `at` says which of the two addresses it came to."""

    at: Literal["hub", "cdn"]
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass
class Fault:
    """What goes wrong with the next requests whose line, "GET /path", holds a pattern.

    kind: "cut" ends the connection half way through the body, "reset" does so rudely, "corrupt"
    flips a bit, "stall" waits half way through the body until `released`, a number is a status.
    """

    kind: Literal["cut", "reset", "corrupt", "stall"] | int
    pattern: str
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repo:
    """A repository: its commits, and the branches and tags that name them."""

    name: str
    private: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, tree: Tree, ref: str = "main") -> str:
        digest = hashlib.sha1(f"{self.name} {ref} {len(self.commits)}".encode()).hexdigest()
        self.commits[digest] = tree
        self.refs[ref] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class StandIn:
    """The Hub: its repositories, what was asked of it, and what is to go wrong."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self.servers)

    def add(self, repo_id: str, folder: Path | Tree, *, private: bool = False) -> str:
        """Put a folder into a repository, without a client; its commit."""
        files = folder if isinstance(folder, dict) else read_tree(folder)
        repo = self.repos.setdefault(repo_id, Repo(repo_id, private))
        self.objects |= {hashlib.sha256(c).hexdigest(): c for c in files.values()}
        return repo.commit(dict(files))

    def lines(self, pattern: str = "") -> list[str]:
        """The requests so far whose line holds a pattern."""
        return [r.line for r in self.requests if re.search(pattern, r.line)]

    def answer(self, request: Request) -> Answer:
        if request.at == "cdn":
            return self._cdn(request)
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, request.line):
                repo = self.repos.get(match.groupdict().get("repo", ""))
                if request.method == "POST" and request.token != TOKEN:
                    return refusal(401, message="Invalid credentials in Authorization header")
                return getattr(self, method)(request, repo, match)
        return refusal(404)

    def _create(self, request: Request, repo: None, match: re.Match[str]) -> Answer:
        wanted = json.loads(request.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return json_answer(answer, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repos[repo_id] = Repo(repo_id, bool(private))
        self.repos[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return json_answer(answer)

    def _validate_card(self, request: Request, repo: None, match: re.Match[str]) -> Answer:
        return json_answer({"errors": [], "warnings": []})

    def _agents(self, request: Request, repo: None, match: re.Match[str]) -> Answer:
        """Newer clients ask for this once a day."""
        return json_answer({"standardEnvVars": [], "harnesses": {}})

    def _repo(
        self, request: Request, repo: Repo | None, match: re.Match[str]
    ) -> tuple[Repo, str] | Answer:
        """The repository and its commit, or why there is none."""
        if repo is None or (repo.private and request.token != TOKEN):
            return NO_REPO._replace(status=404 if request.token else 401)
        commit = repo.resolve(unquote(match.groupdict().get("revision") or "main"))
        return (repo, commit) if commit else NO_REVISION

    def _info(self, request: Request, repo: Repo | None, match: re.Match[str]) -> Answer:
        found = self._repo(request, repo, match)
        if isinstance(found, Answer):
            return found
        return json_answer({"id": found[0].name, "sha": found[1], "private": found[0].private})

    def _tree(self, request: Request, repo: Repo | None, match: re.Match[str]) -> Answer:
        found = self._repo(request, repo, match)
        if isinstance(found, Answer):
            return found
        return json_answer([tree_entry(k, v) for k, v in found[0].commits[found[1]].items()])

    def _preupload(self, request: Request, repo: Repo | None, match: re.Match[str]) -> Answer:
        found = self._repo(request, repo, match)
        if isinstance(found, Answer):
            return found
        tree = found[0].commits[found[1]]
        return json_answer(
            {
                "files": [
                    {
                        "path": (path := file["path"]),
                        "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": etag(path, tree[path]) if path in tree else None,
                    }
                    for file in json.loads(request.body)["files"]
                ]
            }
        )

    def _lfs_batch(self, request: Request, repo: Repo | None, match: re.Match[str]) -> Answer:
        objects = json.loads(request.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.objects:
                wanted["actions"] = {
                    "upload": {"href": f"{self.cdn}/{match['repo']}/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/{match['repo']}.git/info/lfs/verify"},
                }
        return json_answer({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, request: Request, repo: Repo | None, match: re.Match[str]) -> Answer:
        wanted = json.loads(request.body)
        there = self.objects.get(wanted["oid"])
        return Answer(200 if there is not None and len(there) == wanted["size"] else 404)

    def _commit(self, request: Request, repo: Repo | None, match: re.Match[str]) -> Answer:
        found = self._repo(request, repo, match)
        if isinstance(found, Answer):
            return found
        repo, parent = found
        tree = dict(repo.commits[parent])
        for line in request.body.splitlines():
            operation, value = (item := json.loads(line))["key"], item["value"]
            if operation == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif operation == "lfsFile":
                tree[value["path"]] = self.objects[value["oid"]]
            elif operation == "deletedFile":
                del tree[value["path"]]
        ref, extra = unquote(match["revision"]), {}
        if "create_pr" in request.query:
            repo.pull_requests += 1
            ref = f"refs/pr/{repo.pull_requests}"
            extra["pullRequestUrl"] = f"{self.url}/{repo.name}/discussions/{repo.pull_requests}"
        commit = repo.commit(tree, ref)
        url = f"{self.url}/{repo.name}/commit/{commit}"
        return json_answer({"commitUrl": url, "commitOid": commit, **extra})

    def _resolve(self, request: Request, repo: Repo | None, match: re.Match[str]) -> Answer:
        found = self._repo(request, repo, match)
        if isinstance(found, Answer):
            return found
        tree, path = found[0].commits[found[1]], unquote(match["path"])
        headers = {"X-Repo-Commit": found[1]}
        if path not in tree:
            return refusal(404, "EntryNotFound", "Entry not found", **headers)
        content = tree[path]
        if not path.endswith(LARGE):
            return ranged(request, content, headers | {"ETag": f'"{etag(path, content)}"'})
        large = {
            "X-Linked-ETag": f'"{etag(path, content)}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.cdn}/{found[0].name}/{etag(path, content)}",
        }
        return Answer(302, b"", headers | large)

    def _cdn(self, request: Request) -> Answer:
        oid = request.path.rpartition("/")[2]
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                return Answer(400)
            self.objects[oid] = request.body
            return Answer(200)
        if oid not in self.objects:
            return Answer(404)
        return ranged(request, self.objects[oid], {"ETag": f'"{oid}"'})


_NAME = r"(?P<repo>[^/ ]+/[^/ ]+)"
_REVISION = r"(?P<revision>[^/ ]+)"
_ROUTES = (
    ("POST /api/repos/create", "_create"),
    ("POST /api/validate-yaml", "_validate_card"),
    ("GET /api/agent-harnesses", "_agents"),
    (rf"GET /api/models/{_NAME}(/revision/{_REVISION})?", "_info"),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}/?", "_tree"),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", "_preupload"),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", "_commit"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "_lfs_batch"),
    (rf"POST /{_NAME}\.git/info/lfs/verify", "_lfs_verify"),
    (rf"(HEAD|GET) /{_NAME}/resolve/{_REVISION}/(?P<path>\S+)", "_resolve"),
)


def read_tree(folder: Path) -> Tree:
    """Every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def etag(path: str, content: bytes) -> str:
    """SHA-256 of a large file, the digest of its git blob of another."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": etag(path, content)}
    if path.endswith(LARGE):
        entry["oid"] = hashlib.sha1(content).hexdigest()  # of its pointer file, on the real Hub
        lfs = {"oid": etag(path, content), "size": len(content), "pointerSize": 134}
        entry["lfs"] = lfs
    return entry


def ranged(request: Request, content: bytes, headers: Mapping[str, str]) -> Answer:
    """A file, from where the client wants it."""
    if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "")):
        start, size = int(match[1]), len(content)
        return Answer(
            206, content[start:], {"Content-Range": f"bytes {start}-{size - 1}/{size}", **headers}
        )
    return Answer(200, content, headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: StandIn, at: Literal["hub", "cdn"]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.at = hub, at

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _handle(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        through_proxy = f"http://{parts.netloc}" == hub.cdn
        request = Request(
            "cdn" if through_proxy else self.server.at,
            self.command,
            parts.path,
            parse_qs(parts.query),
            {key.lower(): value for key, value in self.headers.items()},
            self._read_body(),
        )
        with hub.lock:
            hub.requests.append(request)
            fault = next(
                (f for f in hub.faults if f.times and re.search(f.pattern, request.line)), None
            )
            if fault is not None:
                fault.times -= 1
            if fault is not None and isinstance(fault.kind, int):
                answer = refusal(fault.kind, **fault.headers)
            else:
                answer = hub.answer(request)
        self._send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(answer.body) // 2
        if fault is None or isinstance(fault.kind, int):
            self.wfile.write(answer.body)
        elif fault.kind == "corrupt":
            changed = bytes([answer.body[half] ^ 1])
            self.wfile.write(answer.body[:half] + changed + answer.body[half + 1 :])
        else:
            self.wfile.write(answer.body[:half])
            self.close_connection = True
            if fault.kind == "stall":
                fault.stalled.set()
                fault.released.wait(60)
            if fault.kind == "reset":
                time.sleep(0.2)  # else the client may not have read what was sent
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                os.close(self.connection.detach())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""


@contextmanager
def running_hub() -> Iterator[StandIn]:
    """A stand-in that serves for a while."""
    hub = StandIn()
    threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in hub.servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            fault.released.set()
        for server in hub.servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


def client_environment(hub: StandIn, home: Path, **changes: str) -> dict[str, str]:
    """Of a process whose huggingface_hub knows no other Hub and no other cache."""
    mine = {k: v for k, v in os.environ.items() if not re.match(r"(?i)HF_|.*_proxy$", k)}
    return mine | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        **changes,
    }


def start_client(
    code: str, hub: StandIn, home: Path, *arguments: str, **changes: str
) -> subprocess.Popen[str]:
    """Run Python code in a process with the real client; `changes` are to its environment."""
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=home,
        env=client_environment(hub, home, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(code: str, hub: StandIn, home: Path, *arguments: str, **changes: str) -> str:
    """Run Python code in a process with the real client; what it prints."""
    with start_client(code, hub, home, *arguments, **changes) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()
