"""One error body, on every route."""

import logging
import re
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from engine.generation import (
    DeadlineError,
    DrainingError,
    EngineDeadError,
    EngineError,
    GenerationError,
    InvalidPromptError,
    PromptTooLongError,
    QueueFullError,
    SchemaTooComplexError,
    SlowReaderError,
)
from serving.metrics import Metrics, Reason
from serving.schemas import now

log = logging.getLogger("llama.serving")
requests_log = logging.getLogger("llama.requests")

T = TypeVar("T", bound=BaseModel)

_MAX_VALUES = 65_536
"""In a request's JSON: numbers, strings, lists and objects. A whole context of token ids is fewer."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)

_RETRY_AFTER = "5"
"""Seconds after which a server that was stopped may be back."""

_REASONS: dict[int, Reason] = {
    401: "key",
    404: "not_found",
    408: "too_slow",
    413: "too_large",
    429: "key_limit",
    500: "internal",
    504: "deadline",
}
"""What a status means where the error does not say more."""

_CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_entity_too_large",
    422: "unprocessable_entity",
    429: "too_many_requests",
    500: "internal_server_error",
    503: "service_unavailable",
    504: "gateway_timeout",
}
"""Not those of http.HTTPStatus, which calls 413 and 422 otherwise from Python 3.13 on."""


class ErrorDetail(BaseModel):
    """What is wrong: in words, and for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorDetail
    status: int
    time: str


class ApiError(Exception):
    """What is wrong with a request, or with the server, as the client is told it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        reason: Reason | None = None,
    ) -> None:
        """
        Args:
            reason: as what it is counted, if the status does not say.
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers
        self.reason: Reason = reason or _REASONS.get(status, "invalid")

    @property
    def body(self) -> ErrorBody:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        # OpenAI's name of it, by which its clients tell it from other bad requests.
        code = "context_length_exceeded" if self.reason == "too_long" else _CODES[self.status]
        detail = ErrorDetail(message=str(self), type=kind, param=self.param, code=code)
        return ErrorBody(error=detail, status=self.status, time=now())

    @property
    def response(self) -> Response:
        return _ErrorResponse(self)

    def count(self, metrics: Metrics) -> None:
        """Lets it be seen in the metrics."""
        metrics.errors.labels(self.reason).inc()


class _ErrorResponse(Response):
    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body.model_dump_json(), error.status, error.headers, "application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/health":  # a probe asks again and again: one cause would count as many
            self._error.count(scope["app"].state.metrics)
            # Each request has one line: what fails here, and not in the engine, has that with the exception.
            if self.status_code != 500:
                _log(scope["state"], self.status_code, self._error.reason)
        await super().__call__(scope, receive, send)


def _log(state: dict[str, Any], status: int, reason: str) -> None:
    """The line of a request that does not come to the engine."""
    if not state.get("is_logged"):
        request_id = state["request_id"]
        fields = {"message": "refused", "request_id": request_id, "status": status, "reason": reason}
        requests_log.info("%s status=%d reason=%s", request_id, status, reason, extra={"fields": fields})


def to_api_error(error: Exception, request_id: str) -> ApiError:
    """What a client is told of an exception: of the engine's and the server's own, no internals."""
    match error:
        case ApiError():
            return error
        case HTTPException(status_code=404):
            return ApiError(404, "no such route: /docs shows all, and OpenAI's are under /v1")
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
        case PromptTooLongError():
            return ApiError(400, str(error), param="prompt", reason="too_long")
        case InvalidPromptError():
            return ApiError(400, str(error), param="prompt")
        case QueueFullError():
            headers = {"Retry-After": str(error.retry_after)}
            return ApiError(429, f"the server is busy: {error}", headers=headers, reason="queue_full")
        case EngineDeadError() | DrainingError():
            reason: Reason = "draining" if isinstance(error, DrainingError) else "engine_dead"
            return ApiError(503, str(error), headers={"Retry-After": _RETRY_AFTER}, reason=reason)
        case DeadlineError():
            return ApiError(504, str(error))
        case SlowReaderError():
            return ApiError(408, str(error))
        case SchemaTooComplexError():
            return ApiError(400, f"response_format: {error}", param="response_format")
        case GenerationError():
            return ApiError(500, f"request {request_id} failed in the engine")
    told = f"request {request_id} failed"
    log.error(told, exc_info=error, extra={"fields": {"message": told, "request_id": request_id}})
    return ApiError(500, told)


def _check_number_of_values(body: bytes) -> None:
    # Of millions, each perhaps with a fault of its own, the refusal would hold up everybody for a minute.
    strings_at_least = (body.count(b'"') - body.count(b'\\"')) // 2
    if strings_at_least > _MAX_VALUES or (
        _separators(body) > _MAX_VALUES and _separators(_STRING.sub(b"", body)) > _MAX_VALUES
    ):
        raise ApiError(413, f"the body has more than {_MAX_VALUES} values")


def _separators(json: bytes) -> int:
    """As many as there are values, but for a few, if no string is left in it."""
    return json.count(b",") + json.count(b"[") + json.count(b"{")


def _check_is_utf8(body: bytes) -> None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body must be UTF-8, and byte {error.start} of it is not") from None


def parse(schema: type[T], body: bytes, *, refusal: int = 422) -> T:
    """Reads a request's body, whatever its Content-Type: the tutorial's curl line sends a form's.

    Args:
        refusal: the status of what the schema refuses.

    Raises:
        ApiError: 413 if it has too many values; 400 if it is not JSON; `refusal`, with the field's name, if
            the schema refuses it.
    """
    _check_number_of_values(body)
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        _check_is_utf8(body)
        advice = "; single quotes are no quotes in cmd: see client.py" if body.startswith(b"'") else ""
        raise ApiError(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}{advice}")
    named = [
        (".".join(map(str, fault["loc"]))[:100], fault["msg"].removeprefix("Value error, "))
        for fault in faults[:8]
    ]
    message = "; ".join(f"{name}: {text}" if name else text for name, text in named)
    raise ApiError(refusal, message, param=named[0][0] or None)


async def _client_left(request: Request, error: Exception) -> Response:
    # Nobody reads it; 499 is what nginx calls it.
    _log(request.scope["state"], 499, "aborted")
    return Response(status_code=499)


async def _answer(request: Request, error: Exception) -> Response:
    response = to_api_error(error, request.state.request_id).response
    # One that nobody expected is answered outside of the middleware that does this.
    response.headers["X-Request-ID"] = request.state.request_id
    return response


def install(app: FastAPI) -> None:
    """Lets every error of the app be answered in the one form."""
    for kind in (ApiError, HTTPException, EngineError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(Exception, _answer)
    app.add_exception_handler(ClientDisconnect, _client_left)
