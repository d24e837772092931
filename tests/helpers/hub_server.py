"""A Hugging Face hub on loopback, over folders of files, that fails on purpose when told.

It answers what `trimix pull` and huggingface_hub ask: a repository's files with sizes and hashes,
HEAD and GET of a file, Range. Large files (LFS) are handed over by a second server on a port of
its own, as the hub's are by another host, so that what must not go there can be seen not to.
"""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 14


@dataclass
class Fault:
    """What goes wrong with one answer: a status in its place, or its body spoilt."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body; then the connection is closed
    stall_after: int | None = None  # bytes; then silence until the client gives up
    flip: int | None = None  # the byte of the file that comes out wrong
    body: bytes | None = None  # what is sent, as 200, in place of the answer
    sized: bool = True  # that body has a Content-Length
    whole: bool = False  # Range is passed over
    forever: bool = False  # stays, for every later answer


@dataclass
class File:
    path: Path
    n_bytes: int
    sha256: str
    oid: str  # git's SHA-1 of the blob
    lfs: bool


@dataclass
class Repo:
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    licence: str | None = None
    token: str | None = None  # gated: only who sends it gets files
    n_weights: dict[str, int] = field(default_factory=dict)  # of a checkpoint, by dtype
    declared: dict[str, int] = field(default_factory=dict)  # sizes that are not the files' own


@dataclass
class Asked:
    method: str
    path: str
    range: str | None
    authorized: bool
    n_sent: int = 0  # bytes of the file's own that went out


class Hub:
    """The two servers; `faults` maps a piece of a path to what goes wrong there, in turn."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.asked: list[Asked] = []
        self.seconds_per_chunk = 0.0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.hub = _Server(self)
        self.cdn = _Server(self)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    def environment(self) -> dict[str, str]:
        """What points huggingface_hub here, with waits that suit a test."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, repo: str, folder: Path, *, branch: str = "main", **facts: object) -> str:
        """Publish the files of a folder as the newest commit of a branch; return the commit."""
        known = self.repos.setdefault(repo, Repo())
        for name, value in facts.items():
            setattr(known, name, value)
        files = {
            path.relative_to(folder).as_posix(): describe(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        listing = "".join(f"{name} {file.sha256}\n" for name, file in files.items())
        commit = hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()
        known.commits[commit] = files
        known.branches[branch] = commit
        return commit

    def n_sent(self, piece: str) -> int:
        """Bytes of files whose path holds `piece` that went out so far."""
        return sum(asked.n_sent for asked in self.asked if piece in asked.path)

    def close(self) -> None:
        self.closing.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


def describe(path: Path) -> File:
    data = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = path.suffix in (".gguf", ".safetensors", ".bin")
    return File(path, len(data), hashlib.sha256(data).hexdigest(), oid, lfs)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, owner: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        """A client that goes away, or is killed, is what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server.owner, unquote(urlsplit(self.path).path)
        authorized = self.headers.get("Authorization")
        asked = Asked(self.command, path, self.headers.get("Range"), authorized is not None)
        with hub.lock:
            hub.asked.append(asked)
            fault = _next_fault(hub.faults, path)
        if fault.status is not None:
            return self._send(fault.status, fault.headers, fault.body or b"")
        if fault.body is not None:
            return self._send(200, {"Content-Type": "text/html"}, fault.body, fault.sized)
        if self.server is hub.cdn:
            name, commit = path.split("/", 3)[3], path.split("/")[1]
            repo = next(r for r in hub.repos.values() if commit in r.commits)
            return self._send_file(repo.commits[commit][name], fault, asked, {})
        repo_name, tail = _split(path)
        repo = hub.repos.get(repo_name)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        if path.startswith("/api/models/"):
            return self._describe(repo_name, repo, tail)
        return self._resolve(repo, tail, fault, asked, authorized)

    def _describe(self, name: str, repo: Repo, tail: str) -> None:
        revision = tail.removeprefix("/revision/") or "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound")
        siblings = []
        for filename, file in repo.commits[commit].items():
            size = repo.declared.get(filename, file.n_bytes)
            lfs = {"sha256": file.sha256, "size": size, "pointerSize": 134}
            entry = {"rfilename": filename, "size": size, "blobId": file.oid}
            siblings.append(entry | ({"lfs": lfs} if file.lfs else {}))
        facts = {"id": name, "sha": commit, "siblings": siblings, "private": False}
        facts["gated"] = "manual" if repo.token else False
        facts["cardData"] = {"license": repo.licence} if repo.licence else {}
        if repo.n_weights:
            total = sum(repo.n_weights.values())
            facts["safetensors"] = {"parameters": repo.n_weights, "total": total}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def _resolve(
        self, repo: Repo, tail: str, fault: Fault, asked: Asked, authorized: str | None
    ) -> None:
        revision, _, filename = tail.removeprefix("/resolve/").partition("/")
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound")
        if filename not in repo.commits[commit]:
            return self._refuse(404, "EntryNotFound")
        if repo.token is not None and authorized != f"Bearer {repo.token}":
            return self._refuse(403 if authorized else 401, "GatedRepo")
        file = repo.commits[commit][filename]
        facts = {"X-Repo-Commit": commit}
        if not file.lfs:
            return self._send_file(file, fault, asked, facts | {"ETag": f'"{file.oid}"'})
        facts |= {"X-Linked-Size": str(file.n_bytes), "X-Linked-Etag": f'"{file.sha256}"'}
        cdn = f"http://127.0.0.1:{self.server.owner.cdn.server_port}"
        facts["Location"] = f"{cdn}/{commit}/file/{filename}"
        self._send(302, facts, b"")

    def _send_file(self, file: File, fault: Fault, asked: Asked, headers: dict[str, str]) -> None:
        data = bytearray(file.path.read_bytes())
        if fault.flip is not None:
            data[fault.flip] ^= 1
        start = 0
        if asked.range is not None and not fault.whole:
            start = int(asked.range.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                return self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self._start(206 if "Content-Range" in headers else 200, headers, len(data) - start)
        if self.command == "HEAD":
            return
        for at in range(start, len(data), CHUNK):
            chunk = data[at : at + CHUNK]
            for limit in (fault.cut_after, fault.stall_after):
                if limit is not None:
                    chunk = chunk[: max(0, start + limit - at)]
            self.wfile.write(chunk)
            asked.n_sent += len(chunk)
            if len(chunk) < min(CHUNK, len(data) - at):
                if fault.stall_after is not None:
                    self.server.owner.closing.wait(30)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            time.sleep(self.server.owner.seconds_per_chunk)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code}, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes, sized: bool = True) -> None:
        self._start(status, headers, len(body) if sized else None)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _start(self, status: int, headers: dict[str, str], n_bytes: int | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if n_bytes is None:
            self.send_header("Connection", "close")  # which ends the body
        else:
            self.send_header("Content-Length", str(n_bytes))
        self.end_headers()


def _next_fault(faults: dict[str, list[Fault]], path: str) -> Fault:
    for piece, waiting in faults.items():
        if piece in path and waiting:
            return waiting[0] if waiting[0].forever else waiting.pop(0)
    return Fault()


def _split(path: str) -> tuple[str, str]:
    """A path of the API, or of a file -> owner/name, and what follows it."""
    parts = path.removeprefix("/api/models").strip("/").split("/")
    rest = "/".join(parts[2:])
    return "/".join(parts[:2]), f"/{rest}" if rest else ""
