"""What /docs shows beside what FastAPI finds out by itself."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serving.errors import ErrorBody

_REF = "#/components/schemas/{model}"

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The body is not JSON, or the prompt does not fit into the context",
        401: "There is no API key, or a wrong one",
        408: "The body did not come in time, or the client did not read its answer",
        413: "The body is too large",
        422: "A field is missing, unknown, of the wrong type or out of bounds",
        429: "The queue is full, or the key has too many requests in flight; see Retry-After",
        500: "The request failed in the engine",
        503: "The server is shutting down, or the engine has stopped; see Retry-After",
        504: "The answer took longer than the server allows",
    }.items()
}

OPENAI_ERRORS = {status: error for status, error in ERRORS.items() if status != 422} | {
    400: ERRORS[422],
    404: {"model": ErrorBody, "description": "There is no such model"},
}
"""Those of /v1, where OpenAI's clients expect 400 of what the schema refuses."""


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that the route reads itself."""
    content = {"schema": {"$ref": _REF.format(model=schema.__name__)}}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def document(app: FastAPI, *schemas: type[BaseModel]) -> None:
    """Adds the schemas that `json_body` refers to."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        known = generate()["components"]["schemas"]
        for schema in schemas:
            described = schema.model_json_schema(ref_template=_REF)
            known |= described.pop("$defs", {}) | {schema.__name__: described}
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
