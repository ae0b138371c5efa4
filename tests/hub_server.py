"""A Hugging Face hub on this machine, for the real client: loopback only, with faults to order.

Large files are stored as on the hub: their address answers with a redirect to another host, and their name in the
client's cache is their SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".pth", ".pt", ".bin", ".safetensors")


@dataclass
class ServedFile:
    """A file of a repository, and what is wrong with its delivery."""

    content: bytes | memoryview  # what the hub announces
    large: bool  # whether its address leads to another host
    cut_at: int = 0  # byte at which the connection breaks
    cuts: int = 0  # how often it still does
    lacking: int = 0  # bytes at the end that are announced, but are not there to be delivered
    delivered: bytes | None = None  # other content, of the same length, that arrives instead

    def __post_init__(self) -> None:
        self.size = len(self.content)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.etag = f'"{self.sha256 if self.large else self.sha256[:40]}"'


class HubServer(ThreadingHTTPServer):
    """Bound when made, so that its address is known; it answers once `start` was called."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self) -> None:
        """Forget every repository and request."""
        self.repos: dict[str, dict[str, ServedFile]] = {}  # files by name, by repository
        self.tokens: dict[str, str] = {}  # what private repositories want
        self.gated: set[str] = set()
        self.failing = 0  # the status that every request is answered with, if not 0
        self.requests: list[tuple[str, str]] = []  # method and path of each
        self.downloads: Counter[str] = Counter()  # requests for the content of each "owner/name/file"

    def add(self, repo: str, name: str, content: bytes | memoryview) -> None:
        """Put a file into a repository, which gets a new commit."""
        self.repos.setdefault(repo, {})[name] = ServedFile(content, large=name.endswith(LARGE))

    def add_folder(self, repo: str, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.add(repo, path.relative_to(folder).as_posix(), path.read_bytes())

    def commit(self, repo: str) -> str:
        state = json.dumps(sorted((name, file.sha256) for name, file in self.repos[repo].items()))
        return hashlib.sha1(f"{repo}{state}".encode()).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


def _repo(parts: list[str]) -> tuple[str, str]:
    """The repository that an address begins with, "owner/name" or "datasets/owner/name", and what follows."""
    count = 3 if parts[0] == "datasets" else 2
    return "/".join(parts[:count]), "/".join(parts[count:])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are written one after the other
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, path))
        parts = path.split("/")
        if self.server.failing:
            self._answer(self.server.failing)
        elif parts[0] == "api":
            self._api(parts[1:])
        elif parts[0] == "storage":
            self._content(*_repo(parts[1:]))
        elif "resolve" in parts[2:4]:
            repo, rest = _repo(parts)
            _, revision, name = rest.split("/", 2)
            self._resolve(repo, revision, name)
        else:
            self._answer(404)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if not self._may_read(repo, revision):
            return
        commit = {"X-Repo-Commit": self.server.commit(repo)}
        file = self.server.repos[repo].get(name)
        if file is None:
            self._answer(404, {**commit, "X-Error-Code": "EntryNotFound"})
        elif file.large:
            linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": file.etag}
            storage = f"http://localhost:{self.server.server_port}/storage/{repo}/{name}"
            self._answer(302, {**commit, **linked, "Location": storage})
        else:
            self._content(repo, name, {**commit, "ETag": file.etag})

    def _content(self, repo: str, name: str, headers: dict[str, str] | None = None) -> None:
        file = self.server.repos[repo][name]
        end = file.size - file.lacking
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.command == "GET":
            self.server.downloads[f"{repo}/{name}"] += 1
        if start and start >= end:
            self._answer(416)
            return
        headers = {**(headers or {}), "Content-Length": str(end - start)}
        headers |= {"Content-Range": f"bytes {start}-{end - 1}/{end}"} if start else {}
        if file.cuts > 0 and self.command == "GET":
            file.cuts -= 1
            end = max(start, file.cut_at)
            self.close_connection = True
        content = file.content if file.delivered is None else file.delivered
        self._send(206 if start else 200, headers, content[start:end])

    def _api(self, parts: list[str]) -> None:
        match parts:
            case ["repos", "create"]:
                wanted = json.loads(self.body)
                repo = f"{wanted['organization']}/{wanted['name']}"
                self.server.repos.setdefault(repo, {})
                self._answer(200, body={"url": f"{self.server.address}/{repo}", "name": repo, "id": "1"})
            case ["validate-yaml"]:
                self._answer(200, body={"errors": [], "warnings": []})
            case ["models", owner, name, *rest]:
                action, revision, *_ = *rest, *("revision", "main")[len(rest) :]
                if self._may_read(f"{owner}/{name}", revision):
                    self._repository(f"{owner}/{name}", action)
            case _:
                self._answer(404)

    def _repository(self, repo: str, action: str) -> None:
        if action == "revision":
            self._answer(200, body={"id": repo, "sha": self.server.commit(repo)})
        elif action == "tree":
            listed = []
            for name, file in self.server.repos[repo].items():
                large = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.large else {}
                listed.append({"type": "file", "path": name, "size": file.size, "oid": file.sha256[:40], **large})
            self._answer(200, body=listed)
        elif action == "preupload":
            asked = [{"path": file["path"]} for file in json.loads(self.body)["files"]]
            self._answer(200, body={"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif action == "commit":
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] == "file":
                    self.server.add(repo, line["value"]["path"], base64.b64decode(line["value"]["content"]))
            commit = self.server.commit(repo)
            url = f"{self.server.address}/{repo}/commit/{commit}"
            self._answer(200, body={"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer(404)

    def _may_read(self, repo: str, revision: str) -> bool:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        wanted = self.server.tokens.get(repo)
        if repo not in self.server.repos or (wanted and not given):
            status = 404 if given else 401  # who is not logged in learns nothing
            self._answer(status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif wanted and given != wanted:
            self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo in self.server.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is gated"})
        elif revision not in ("main", self.server.commit(repo)):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self._send(status, {**(headers or {}), "Content-Length": str(len(content))}, content)

    def _send(self, status: int, headers: dict[str, str], content: bytes | memoryview) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


HUB = HubServer()
