"""A Hub on the loopback: serves folders as the revisions of one model, as far as huggingface_hub 1.33 asks.

    with HubServer("org/name", {"main": folder}) as hub:
        os.environ["HF_ENDPOINT"] = hub.url  # before huggingface_hub is imported

A revision's commit is the SHA-1 of its name, so it differs from folder to folder and is known to the test.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 14


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class HubServer:
    """Serves while used as a context.

    requests  (method, path) of each request, in order
    sent      bytes of each repository file that were sent, by file
    gated     files are refused, as they are to who was not granted access
    ranges    whether Range is honored; a proxy may not
    broken    the status that every request is answered with, or None
    """

    def __init__(self, repo: str, revisions: Mapping[str, Path], *, gated: bool = False, ranges: bool = True) -> None:
        self.repo = repo
        self.revisions = {name: folder for revision, folder in revisions.items() for name in (revision, commit_of(revision))}
        self.commits = {name: commit_of(revision) for revision in revisions for name in (revision, commit_of(revision))}
        self.gated = gated
        self.ranges = ranges
        self.broken: int | None = None
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self._hold: tuple[str, int] | None = None
        self.connections: list[socket.socket] = []
        self.held = threading.Event()
        self.release = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def hold(self, file: str, after: int) -> None:
        """Sends no more than `after` bytes of `file` until `release` is set; `held` is set once they are sent."""
        self._hold = (file, after)

    def wait(self, file: str, done: int) -> None:
        if self._hold and self._hold[0] == file and done >= self._hold[1]:
            self.held.set()
            self.release.wait(30)

    def stop(self) -> None:
        """From here on nobody answers: new connections are refused, open ones are cut."""
        self.release.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def __init__(self, hub: HubServer, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def setup(self) -> None:
        self.hub.connections.append(self.request)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)  # else megabytes count as sent that nobody read
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.broken:
            return self._refuse(self.hub.broken, "")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if not found:
            return self._refuse(404, "")
        if found[1] != self.hub.repo:
            return self._refuse(401, "RepoNotFound")
        revision = (found[3] if api else found[2]) or "main"
        if revision not in self.hub.revisions:
            return self._refuse(404, "RevisionNotFound")
        folder, commit = self.hub.revisions[revision], self.hub.commits[revision]
        if file:
            return self._file(folder, file[3], commit)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if api and api[2] == "tree":
            return self._json(
                [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": etag(folder / f)} for f in files]
            )
        return self._json({"id": self.hub.repo, "sha": commit, "siblings": [{"rfilename": f} for f in files]})

    def _file(self, folder: Path, name: str, commit: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        if self.hub.gated:
            return self._refuse(403, "GatedRepo")
        size = path.stat().st_size
        begin, end = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.hub.ranges:
            begin, end = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self._send(name, path, begin, end)
        return None

    def _send(self, name: str, path: Path, begin: int, end: int) -> None:
        try:
            with path.open("rb") as file:
                file.seek(begin)
                while begin < end:
                    self.hub.wait(name, begin)
                    data = file.read(min(CHUNK, end - begin))
                    self.hub.sent[name] += len(data)  # before they go: the client may be done, and the test look, at once
                    begin += self.wfile.write(data)
        except OSError:  # whoever asked has gone
            self.close_connection = True

    def _json(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
