"""A stand-in for the hubs on loopback: the few requests that their clients make for a download."""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes from which on a file counts as large, as with Git LFS


def sha256(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves one folder as the repository `name`."""

    daemon_threads = True

    def __init__(self, folder: Path, name: str = "someone/tiny"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.name = folder, name
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # (method, file or other path, first byte asked for) in their order.
        self.requests: list[tuple[str, str, int]] = []
        # file -> how often its connection is cut after half of what was asked for
        self.cuts: dict[str, int] = {}
        self.reset = False  # whether a cut is a reset, not an end that came too early
        self.nothing = False  # whether nothing of a file is sent before a cut
        self.ranges = True  # whether parts of files can be asked for
        self.broken: dict[str, bytes] = {}  # file -> bytes that are served instead, as many
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.redirect = False  # whether large files are sent by another host, as from a CDN
        self.strangers: list[str | None] = []  # Authorization headers that the other host got
        self.hold = threading.Event()  # while not set, a large file stops after its first half
        self.hold.set()

    def files(self) -> dict[str, bytes]:
        """Everything in the repository."""
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    def asked(self, method: str = "GET") -> list[tuple[str, int]]:
        """(file, first byte) of the files that were asked for."""
        names = self.files()
        return [
            (what, first) for kind, what, first in self.requests if kind == method and what in names
        ]

    def handle_error(self, request, client_address) -> None:
        """A client that leaves is no event here."""


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    """A server that runs inside the block."""
    with HubServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.hold.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        hub = self.server
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        resolve = re.fullmatch(rf"/{hub.name}/resolve/([^/]+)/(.+)", path)
        if resolve:
            revision, file = resolve.groups()
        elif path == f"/api/v1/models/{hub.name}/repo":
            revision, file = query["Revision"][0], query["FilePath"][0]
        else:
            revision, file = None, None
        hub.requests.append((self.command, file or path, first))
        if hub.refusal:
            status, code = hub.refusal
            self._answer(status, b"no", {"X-Error-Code": code, "X-Error-Message": code})
        elif revision not in (None, "main", "master", COMMIT):
            self._answer(404, b"no", {"X-Error-Code": "RevisionNotFound"})
        elif file is not None:
            self._file(file, first if hub.ranges else 0)
        elif re.fullmatch(rf"/api/models/{hub.name}(/revision/(main|{COMMIT}))?", path):
            self._json(self._hf_listing())
        elif path.startswith(f"/api/models/{hub.name}/"):
            self._answer(404, b"no", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/v1/models/{hub.name}/repo/files":
            if query["Revision"] == ["master"]:
                self._json(self._modelscope_listing())
            else:
                self._json({"Code": 404, "Message": "no such revision", "Success": False}, 404)
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _hf_listing(self) -> dict:
        siblings = []
        for name, data in self.server.files().items():
            entry: dict = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if len(data) >= LARGE:
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.server.name, "sha": COMMIT, "private": False, "siblings": siblings}

    def _modelscope_listing(self) -> dict:
        files = [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": sha256(data)}
            for name, data in self.server.files().items()
        ]
        return {"Code": 200, "Success": True, "Data": {"Files": files}}

    def _file(self, name: str, first: int) -> None:
        hub = self.server
        whole = hub.files().get(name)
        if whole is None:
            self._answer(404, b"no", {"X-Error-Code": "EntryNotFound"})
            return
        etag = sha256(whole)
        data = hub.broken.get(name, whole)[first:]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if len(whole) >= LARGE:
            stranger = self.headers["Host"].startswith("localhost")
            if stranger:
                hub.strangers.append(self.headers.get("Authorization"))
            elif hub.redirect:
                elsewhere = hub.url.replace("127.0.0.1", "localhost") + self.path
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(whole))}
                self._answer(302, b"", headers | {"Location": elsewhere})
                return
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(whole))}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
        self._answer(206 if first else 200, data, headers, name)

    def _json(self, value: dict, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict, name: str = "") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = 0 if self.server.nothing and name in self.server.cuts else len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if self.server.cuts.get(name, 0) > 0:
            self.server.cuts[name] -= 1
            if self.server.reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return
        if len(data) >= LARGE:
            self.server.hold.wait()
        self.wfile.write(data[half:])

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on stderr."""
