"""Who may ask, how much a client may send, and what happens when it leaves."""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine
from hashlib import sha256
from hmac import compare_digest
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import ApiError

T = TypeVar("T")

SWAGGER = "/docs/swagger"
"""Where the files are of which /docs is made."""

# What is left of a body will not be read, however long it is: the connection can't be used again.
_CLOSE = {"Connection": "close"}
_BODY_SECONDS = 60.0
_ONE_AT_A_TIME = "1"
"""Seconds: a place comes free with each answer that ends."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, of which no more than `max_bytes` are ever held. The request counts as come when it is
    there: its state keeps the time.

    Raises:
        ApiError: 413 if it is larger, 408 if it does not come in time.
        ClientDisconnect: if the client leaves before its end.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ApiError(413, f"the body is larger than {max_bytes} bytes", headers=_CLOSE)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} s", headers=_CLOSE) from None
    request.state.came = time.monotonic()
    return bytes(body)


class ApiKeys:
    """Middleware that lets in who has a key, and nobody with too many requests at once.

    Whether the server lives, and what holds no secret, the chat page and the docs, is for everybody.
    """

    def __init__(self, app: ASGIApp, keys: frozenset[str], max_per_key: int) -> None:
        """
        Args:
            keys: at least one.
            max_per_key: the most answers in flight with one of them.
        """
        self._app = app
        self._max_per_key = max_per_key
        self._digests = [_digest(key.encode()) for key in keys]
        self._in_flight: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        digest = _digest(_bearer(Headers(scope=scope)))
        places = 0

        def take(answers: int) -> None:
            nonlocal places
            self._check_places(answers, self._in_flight[digest] - places)
            self._in_flight[digest] += answers - places
            places = answers

        try:
            self._check(digest)
            take(1)
        except ApiError as refusal:
            await refusal.response(scope, receive, send)
            return
        scope["state"]["take_places"] = take
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[digest] -= places

    def _check(self, digest: bytes) -> None:
        # All are compared, in the same time: a guess learns nothing from how long its refusal takes.
        if not sum(compare_digest(digest, known) for known in self._digests):
            challenge = {"WWW-Authenticate": "Bearer"} | _CLOSE
            raise ApiError(401, "an API key is needed: Authorization: Bearer <key>", headers=challenge)

    def _check_places(self, answers: int, others: int) -> None:
        if answers > self._max_per_key:
            raise ApiError(
                400, f"{answers} answers are more than the {self._max_per_key} that a key may ask for"
            )
        if others + answers > self._max_per_key:
            headers = {"Retry-After": _ONE_AT_A_TIME} | _CLOSE
            raise ApiError(429, f"{others} requests with this key are in flight", headers=headers)


def count_answers(request: Request, answers: int) -> None:
    """Lets a request count, with its key, as so many: else one could take the whole queue.

    Raises:
        ApiError: 429 if the key has too many in flight, 400 if it never may have so many.
    """
    if take := getattr(request.state, "take_places", None):
        take(answers)


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key."""
    return (
        path in ("/health", "/docs", "/openapi.json")
        or path.startswith(f"{SWAGGER}/")
        or (path == "/" and method in ("GET", "HEAD"))
    )


def _bearer(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves before it is there.

    Args:
        receive: of a request whose body has been read: nothing but a disconnect can come.

    Raises:
        ClientDisconnect: if the client has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
