"""Middleware of Ray Serve's proxies: what becomes of a request whose replica refuses it, or dies."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError

_SESSION = b"x-session-id"
_HINTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Headers in which Ray would let clients decide what is not theirs to decide."""

_RAYS_REFUSALS = (404, 408, 429, 503)
"""Of which none but 408, that no replica came up in time, can be another after a moment."""
_RETRY_AFTER = "5"


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names."""
    return [Middleware(Failover)]


class Failover:
    """Asks another replica while none of an answer is sent. A stream that has begun ends with an error event.

    It asks once: a request that kills replicas must not kill them all.
    """

    def __init__(self, app: ASGIApp) -> None:
        """
        Args:
            app: a proxy. It returns before an answer, or in the middle of it, when the replica has died.
        """
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own
            await self._app(scope, receive, send)
            return
        request, answer = _Request(receive), _Answer(send)
        # The second time it need not be the session's own replica.
        for unheard in (_HINTS, (_SESSION,)):
            scope["headers"] = [header for header in scope["headers"] if header[0] not in unheard]
            await self._app(scope, request.replay(), answer)
            if answer.has_begun or answer.came_too_late or request.client_left:
                break
            answer.refusals_count = True
        if not answer.is_complete and not request.client_left:
            await answer.fail(scope, receive)


class _Request:
    """What a client sends, kept so that it can be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self.client_left = False

    def replay(self) -> Receive:
        read_before = iter(self._messages.copy())

        async def receive() -> Message:
            message = next(read_before, None)
            if message is None:
                message = await self._receive()
                self._messages.append(message)
                self.client_left = message["type"] == "http.disconnect"
            return message

        return receive


class _Answer:
    """An answer on its way to the client: one replica's, or another's after it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message = {}
        self._sent_head: Message = {}
        self.has_begun = False
        """Whether something of the body is sent. A stream's head is, as soon as it is there."""
        self.is_complete = False
        self.came_too_late = False
        self.refusals_count = False
        """Whether a replica's 429 or 503 is an answer; else it is as if none had come."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            if _is_stream(message):
                await self._send_head()
            return
        if not self.has_begun:
            if self._is_refusal():
                return
            await self._send_head()
        self.has_begun = True
        self.is_complete = not message.get("more_body", False)
        await self._send(message)

    def _is_refusal(self) -> bool:
        status: int = self._head["status"]
        content_type = Headers(raw=self._head["headers"]).get("Content-Type", "")
        if status in _RAYS_REFUSALS and content_type.startswith("text/plain"):
            self.came_too_late = status == 408
            return True
        if self._sent_head:  # a stream's, which only a stream can go on
            return not _is_stream(self._head)
        return status in (429, 503) and not self.refusals_count

    async def _send_head(self) -> None:
        if not self._sent_head:
            self._sent_head = self._head
            headers = MutableHeaders(scope=self._head)
            headers["X-Request-ID"] = headers["X-Request-ID"]  # once: the proxy adds it to the replica's own
            await self._send(self._head)

    async def fail(self, scope: Scope, receive: Receive) -> None:
        """Tells the client that there will be no answer, or no more of it."""
        if not self._sent_head:
            error = ApiError(503, "no replica can answer at present")
            headers = {"Retry-After": _RETRY_AFTER, "X-Request-ID": Headers(scope=scope)["X-Request-ID"]}
            body = error.body.model_dump_json()
            await Response(body, 503, headers, "application/json")(scope, receive, self._send)
        elif _is_stream(self._sent_head):
            error = ApiError(503, "the replica that wrote this answer has stopped")
            event = f"data: {error.body.model_dump_json()}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode()})


def _is_stream(head: Message) -> bool:
    return Headers(raw=head["headers"]).get("Content-Type", "").startswith("text/event-stream")
