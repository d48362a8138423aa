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
        413: "The body is too large",
        422: "A field is missing, unknown, of the wrong type or out of bounds",
        429: "The queue is full; see Retry-After",
        500: "The request failed in the engine",
        503: "The engine has stopped; see Retry-After",
    }.items()
}


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
