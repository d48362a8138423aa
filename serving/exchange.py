"""One request and its answer: its id, the client that may leave, and its line in the log."""

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.generation import Delta, Generation, Usage
from engine.sequence import FinishReason, Logprobs
from serving.errors import to_api_error
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


@dataclass
class Answer:
    """One answer, or a piece of it: what pieces of a stream add up to."""

    text: str = ""
    finish_reason: FinishReason | None = None
    """None of a piece of an answer that goes on."""
    logprobs: list[Logprobs] = field(default_factory=list)


async def read_whole(request: Request, exchange: Exchange) -> tuple[list[Answer], Usage]:
    """All answers of an exchange, which is closed then.

    Raises:
        ClientDisconnect: if the client leaves before they are there.
    """

    async def read() -> tuple[list[Answer], Usage]:
        answers: defaultdict[int, Answer] = defaultdict(Answer)
        async for delta in exchange:
            answer = answers[delta.choice]
            answer.text += delta.text
            answer.logprobs += delta.logprobs
            answer.finish_reason = delta.finish_reason or answer.finish_reason
        assert delta.usage is not None
        return [answers[choice] for choice in sorted(answers)], delta.usage

    try:
        return await unless_client_leaves(request.receive, read())
    finally:
        exchange.close()


class EventStream(StreamingResponse):
    """Server-sent events (html.spec.whatwg.org, section 9.2), until they end or the client leaves.

    Whichever comes first, and also if the first event was never asked for, the exchange is closed.
    """

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, to_json: Callable[[Delta], Iterable[str]]) -> None:
        """
        Args:
            to_json: what is sent of a piece of an answer, as JSON documents, each of which becomes an event.
        """
        # A proxy that collects the answer before it passes it on would undo the streaming.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(exchange, to_json), headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self.stream_response(send))
        finally:
            self._exchange.close()


async def _events(exchange: Exchange, to_json: Callable[[Delta], Iterable[str]]) -> AsyncIterator[str]:
    try:
        async for delta in exchange:
            for document in to_json(delta):
                yield f"data: {document}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already: an error is the last event
        yield f"data: {to_api_error(error, exchange.request_id).body.model_dump_json()}\n\n"
