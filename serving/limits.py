"""How much a client may send, and what happens when it leaves."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serving.errors import ApiError

T = TypeVar("T")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, of which no more than `max_bytes` are ever held.

    Raises:
        ApiError: 413 if it is larger.
        ClientDisconnect: if the client leaves before its end.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            # What is left of it will not be read, however long it is: the connection can't be used again.
            raise ApiError(413, f"the body is larger than {max_bytes} bytes", headers={"Connection": "close"})
    return bytes(body)


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
