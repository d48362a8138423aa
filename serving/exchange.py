"""One request and its answer: its id, the client that may leave, and its line in the log."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Self

from fastapi.responses import StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.engine import Delta, Generation
from serving.limits import unless_client_leaves

log = logging.getLogger("llama.requests")


class RequestIds:
    """Middleware that gives each request an id, and tells it in the header X-Request-ID."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = secrets.token_hex(8)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class Exchange:
    """An answer on its way to its client: iterate over it, and close it, whatever happens."""

    def __init__(self, request_id: str, generation: Generation, content: str | None) -> None:
        """
        Args:
            content: the prompt, if content is to be logged.
        """
        self.request_id = request_id
        self._generation = generation
        self._content = content
        self._answer = ""
        self._begun = time.monotonic()
        self._first_token: float | None = None
        self._outcome = "aborted"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        try:
            delta = await anext(self._generation)
        except (StopAsyncIteration, asyncio.CancelledError):
            raise
        except Exception:
            self._outcome = "error"
            raise
        if self._first_token is None:
            self._first_token = time.monotonic()
        if self._content is not None:
            self._answer += delta.text
        if delta.finish_reason is not None:
            self._outcome = delta.finish_reason
        return delta

    def close(self) -> None:
        """Frees what the engine holds for it, and writes the log's line."""
        self._generation.close()
        usage = self._generation.usage
        duration = time.monotonic() - self._begun
        ttft = "-" if self._first_token is None else f"{self._first_token - self._begun:.3f}s"
        line = (
            f"{self.request_id} prompt_tokens={usage.prompt_tokens} "
            f"completion_tokens={usage.completion_tokens} "
            f"ttft={ttft} duration={duration:.3f}s finish_reason={self._outcome}"
        )
        if self._content is not None:
            line += f" prompt={self._content!r} response={self._answer!r}"
        log.info(line)


class EventStream(StreamingResponse):
    """Server-sent events (html.spec.whatwg.org, section 9.2), until they end or the client leaves.

    Whichever comes first, and also if the first event was never asked for, the exchange is closed.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], exchange: Exchange) -> None:
        # A proxy that collects the answer before it passes it on would undo the streaming.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self.stream_response(send))
        finally:
            self._exchange.close()
