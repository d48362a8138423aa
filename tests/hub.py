"""A ModelScope hub on this machine, with faults on demand.

The two routes that modelscope's client needs to download a model, over real HTTP, as its source defines them
(modelscope_hub/_legacy_api.py, `_list_files_page` and `download_stream`).
"""

import hashlib
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

LISTING = "(listing)"
PIECE = 64 * 1024


@dataclass
class Fault:
    """What goes wrong with the answers for one file.

    Args:
        path: the file, or LISTING.
        kind: "cut" ends the connection, "hold" falls silent until `release` is set and then goes on, "status"
            answers with `status`, "flip" sends one wrong byte, "body" sends `body` in place of the real one.
        after: the bytes of the file that are sent before that.
        times: how many requests it hits.
    """

    path: str
    kind: Literal["cut", "hold", "status", "flip", "body"]
    after: int = 0
    times: int = 1
    status: int = 503
    retry_after: int | None = None
    body: bytes = b""
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Hub:
    """Serves one model until the `with` block ends.

    Args:
        model_id: `owner/name`; any other answers 404.
        files: what the model consists of.
    """

    def __init__(self, model_id: str, files: dict[str, bytes]) -> None:
        self.model_id = model_id
        self.files = files
        self.listing = [
            {"Path": path, "Name": path, "Type": "blob", "Size": len(content), "Sha256": sha256(content)}
            for path, content in files.items()
        ]
        self.faults: list[Fault] = []
        self.requests = 0
        self.listings = 0
        self.tokens: set[str] = set()
        self.served: dict[str, int] = {}  # bytes sent, by file
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _RequestHandler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, fault: Fault) -> Fault:
        """From now on `fault` hits the requests for its file; those added earlier go first."""
        self.faults.append(fault)
        return fault

    def take_fault(self, path: str) -> Fault | None:
        """The fault that hits this request, if any."""
        with self._lock:
            self.listings += path == LISTING
            for fault in self.faults:
                if fault.path == path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def count(self, path: str, size: int) -> None:
        """Notes that `size` bytes of a file were sent."""
        with self._lock:
            self.served[path] = self.served.get(path, 0) + size

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for fault in self.faults:
            fault.release.set()
        self._server.shutdown()
        self._server.server_close()


def sha256(content: bytes) -> str:
    """The hash as the hub lists it."""
    return hashlib.sha256(content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is no news here
            super().handle_error(request, client_address)


class _RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self.server.hub.requests += 1
        self.server.hub.tokens |= {self.headers["Authorization"]} - {None}
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        repository = f"/api/v1/models/{self.server.hub.model_id}/repo"
        if url.path == f"{repository}/files":
            self._serve_listing()
        elif url.path == repository and query.get("FilePath") in self.server.hub.files:
            self._serve_file(query["FilePath"])
        else:
            self._answer(404, _error_body("no such model or file"))

    def _serve_listing(self) -> None:
        fault = self.server.hub.take_fault(LISTING)
        files = {"Files": self.server.hub.listing}
        body = json.dumps({"Code": 200, "Success": True, "Data": files}).encode()
        if fault is None:
            self._answer(200, body)
        elif fault.kind == "status":
            self._refuse(fault)
        else:
            self._answer(200, fault.body)

    def _serve_file(self, path: str) -> None:
        fault = self.server.hub.take_fault(path)
        if fault and fault.kind == "status":
            self._refuse(fault)
            return
        content = self.server.hub.files[path]
        start = self._range_start()
        if start >= len(content) > 0:
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        if fault and fault.kind == "flip":
            content = flip(content, fault.after)
        self._send_head(206 if start else 200, len(content) - start, _range_header(start, len(content)))
        pause = max(start, fault.after) if fault and fault.kind in ("cut", "hold") else len(content)
        self._send(path, content[start:pause])
        if fault and pause < len(content):
            self._pause(fault)
            self._send(path, content[pause:])

    def _range_start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def _send(self, path: str, content: bytes) -> None:
        for begin in range(0, len(content), PIECE):
            piece = content[begin : begin + PIECE]
            self.wfile.write(piece)
            self.server.hub.count(path, len(piece))

    def _pause(self, fault: Fault) -> None:
        fault.reached.set()
        if fault.kind == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        fault.release.wait()

    def _refuse(self, fault: Fault) -> None:
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        self._answer(fault.status, _error_body("as the test asked"), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._send_head(status, len(body), headers or {})
        self.wfile.write(body)

    def _send_head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def flip(content: bytes, position: int) -> bytes:
    """`content` with one bit of one byte turned over."""
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def _error_body(message: str) -> bytes:
    return json.dumps({"Success": False, "Message": message}).encode()


def _range_header(start: int, size: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
