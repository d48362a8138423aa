"""One request and its answer: its id, the client that may leave, and its line in the log."""

import asyncio
import logging
import re
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.generation import Delta, Generation, Usage
from engine.sequence import FinishReason, Logprobs
from serving.errors import to_api_error
from serving.limits import unless_client_leaves
from serving.metrics import Metrics, Outcome
from serving.settings import Settings

log = logging.getLogger("llama.requests")

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What a client's id may be: nothing that would forge a line in a log."""

_COUNT_SECONDS = 1.0
"""How often tokens are counted in the metrics, so that their rate is seen while a long answer is made."""


class RequestIds:
    """Middleware that gives each request an id, and tells it in the header X-Request-ID.

    It is the one that the client gave in this header, if that is sane.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("X-Request-ID", "")
        if not _SANE_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class Exchange:
    """An answer on its way to its client: iterate over it, and close it, whatever happens."""

    def __init__(self, request: Request, generation: Generation, prompt: str | list[Any]) -> None:
        """
        Args:
            prompt: what is logged of the request, if content is.
        """
        settings: Settings = request.app.state.settings
        request.state.is_logged = True  # by this: an error that it ends with gives no line of its own
        self.request_id: str = request.state.request_id
        self.metrics: Metrics = request.app.state.metrics
        self._generation = generation
        self._content: str | None = None
        if settings.log_content:
            self._content = prompt if isinstance(prompt, str) else repr(prompt)
        self._answer = ""
        self._begun: float = request.state.came
        self._first_token: float | None = None
        self._last_piece: dict[int, float] = {}
        self._counted = 0
        self._counted_at = self._begun
        self._outcome: Outcome = "aborted"

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
        self._observe(delta.choice)
        if self._content is not None:
            self._answer += delta.text
        if delta.usage is not None and delta.finish_reason is not None:
            self._outcome = delta.finish_reason
        return delta

    def _observe(self, choice: int) -> None:
        """Times a piece of one of the answers."""
        now = time.monotonic()
        if self._first_token is None:
            self._first_token = now
            self.metrics.first_token.observe(now - self._begun)
            self.metrics.prompt_tokens.inc(self._generation.usage.prompt_tokens)
        elif choice in self._last_piece:
            self.metrics.next_token.observe(now - self._last_piece[choice])
        self._last_piece[choice] = now
        if now - self._counted_at > _COUNT_SECONDS:
            self._counted_at = now
            self._count_tokens()

    def _count_tokens(self) -> None:
        num_tokens = self._generation.usage.completion_tokens
        self.metrics.generation_tokens.inc(num_tokens - self._counted)
        self._counted = num_tokens

    def close(self) -> None:
        """Frees what the engine holds for it, counts it, and writes the log's line."""
        self._generation.close()
        usage = self._generation.usage
        duration = time.monotonic() - self._begun
        self._count_tokens()
        self.metrics.finished.labels(self._outcome).inc()
        if self._outcome in ("stop", "length"):
            self.metrics.whole_answer.observe(duration)
            self.metrics.prompt_length.observe(usage.prompt_tokens)
            self.metrics.answer_length.observe(usage.completion_tokens)
        self._log(usage, duration)

    def _log(self, usage: Usage, duration: float) -> None:
        ttft = None if self._first_token is None else self._first_token - self._begun
        line = (
            f"{self.request_id} prompt_tokens={usage.prompt_tokens} "
            f"completion_tokens={usage.completion_tokens} "
            f"ttft={'-' if ttft is None else f'{ttft:.3f}s'} duration={duration:.3f}s "
            f"finish_reason={self._outcome}"
        )
        fields = {
            "message": "request",
            "request_id": self.request_id,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "ttft": None if ttft is None else round(ttft, 6),
            "duration": round(duration, 6),
            "finish_reason": self._outcome,
        }
        if self._content is not None:
            line += f" prompt={self._content!r} response={self._answer!r}"
            fields |= {"prompt": self._content, "response": self._answer}
        log.info(line, extra={"fields": fields})


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
            answer.finish_reason = delta.finish_reason
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
            with suppress(ClientDisconnect):  # an answer that has begun can't be answered with an error
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
        told = to_api_error(error, exchange.request_id)
        told.count(exchange.metrics)
        yield f"data: {told.body.model_dump_json()}\n\n"
