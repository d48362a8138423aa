"""uvicorn, where heads of requests are bounded, readers too, and a signal lets those in flight finish."""

import asyncio
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.generation import CacheTooSmallError
from serving.errors import ApiError

log = logging.getLogger("llama.serving")

_HEAD_BYTES = 65_536
_HEAD_SECONDS = 30.0
_OPEN_FILES = 65_536
_STALL_SECONDS = 60.0
_LAST_BYTES_SECONDS = 5
"""For what is already answered to reach its readers, before the process ends."""
_IDLE_SECONDS = 75
"""That a connection is kept for the next request: longer than clients pause that ask now and then."""
_UPGRADE = re.compile(rb"(?i)(?<=\r\nupgrad)e(?=[ \t]*:)")
"""What makes a field of a head an offer to speak another protocol: HTTP/2 by Java's client, WebSockets."""


class BoundedProtocol(HttpToolsProtocol):
    """HTTP, of which a client can neither send an endless head nor take forever over it or over an answer."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _in_body = False
    _in_trailers = False
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        self._in_body = True
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        # Behind that of the last chunk come fields as in a head, and nobody's body.
        self._in_trailers, self._head_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        self._in_trailers = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = self._in_trailers = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_stall()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            # The parser takes such an offer for accepted, and drops the body. It need not be accepted.
            head, blank, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"-", head) + blank + rest
        super().data_received(data)
        if self._head_timer is not None or self._in_trailers:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._refuse_head()

    def send_400_response(self, msg: str) -> None:
        body = ApiError(400, msg).body.model_dump_json()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
        self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{head}\r\n\r\n{body}".encode("ascii"))
        self.transport.close()

    def _begin_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(_HEAD_SECONDS, self._refuse_head)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _refuse_head(self) -> None:
        self._end_head()
        if not self.transport.is_closing():
            self.send_400_response(f"The head is larger than {_HEAD_BYTES} bytes, or took too long.")


class Server(uvicorn.Server):
    """Ends on a signal when those in flight have their answers; on a second one at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        """
        Args:
            drain: refuses new requests and returns when there are none in flight any more.
        """
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1 or not self.started:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
            os._exit(128 + sig)  # of which the first process in a container does not die
        else:
            self._loop.call_soon_threadsafe(self._begin_to_end)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        sockets = sockets or []
        try:
            await super().startup(sockets)
            for bound in sockets:
                bound.listen(self.config.backlog)  # once more: uvloop does not tell that it could not
        except OSError:
            log.error("--port %d: another server, bound to it too, was the first to listen", self.config.port)
            await self.lifespan.shutdown()
            sys.exit(1)
        self._log_started_message(sockets)  # which uvicorn leaves to whoever has bound them

    def _begin_to_end(self) -> None:
        self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        log.info("finishing what is in flight; a second signal ends at once")
        try:
            await self._drain()
        finally:
            self.should_exit = True
            self._loop.call_later(_LAST_BYTES_SECONDS, self._disconnect)

    def _disconnect(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def raise_file_limit() -> None:
    """Lets the process have as many files open as it may: each client is one, and more would be dropped."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int) -> socket.socket:
    """Takes a port that is opened later: until a server listens, it refuses connections.

    Raises:
        ValueError: if it can't be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if sys.platform != "win32":
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
    if bound.family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:
        bound.close()
        raise ValueError(f"--host {host} --port {port}: {error}") from error
    return bound


def _told_in_a_line(app: ASGIApp) -> ASGIApp:
    """The app; that there is no memory for it is logged without uvicorn's traceback."""

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_text(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and isinstance(
                sys.exception(), CacheTooSmallError
            ):
                message["message"] = str(sys.exception())
            await send(message)

        await app(scope, receive, send_text if scope["type"] == "lifespan" else send)

    return told


def serve(
    app: ASGIApp, bound: socket.socket, *, host: str, port: int, drain: Callable[[], Awaitable[None]]
) -> None:
    """Serves until a signal comes and `drain` has returned.

    Args:
        bound: to `host` and `port`, by `bind`.
    """
    raise_file_limit()
    config = uvicorn.Config(
        _told_in_a_line(app),
        host=host,
        port=port,
        http=BoundedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=2 * _LAST_BYTES_SECONDS,
    )
    Server(config, drain).run([bound])
