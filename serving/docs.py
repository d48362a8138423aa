"""/docs: Swagger UI, and what it shows beside what FastAPI finds out by itself."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.staticfiles import StaticFiles

from serving.errors import ErrorBody
from serving.limits import SWAGGER, is_open

router = APIRouter()

_REF = "#/components/schemas/{model}"
_KEY = "APIKey"

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The body is not JSON, or the prompt does not fit into the context",
        401: "There is no API key, or a wrong one",
        408: "The body did not come in time, or the client did not read its answer",
        413: "The body is too large, or has too many values",
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

_DIALOG = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "你好"}]
_FACT = {
    "type": "object",
    "properties": {"capital": {"enum": ["Paris", "Rome"]}},
    "required": ["capital"],
    "additionalProperties": False,
}
_EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "ChatRequest": {
        "a question": {"prompt": "你好"},
        "a dialog, to be answered the same each time": {
            "prompt": "And what is your port?",
            "history": [
                {"role": "user", "content": "Hello!"},
                {"role": "assistant", "content": "Hello! How can I help you?"},
            ],
            "temperature": 0,
        },
        "a stream": {"prompt": "讲个故事", "max_tokens": 64, "seed": 7, "stream": True},
    },
    "ChatCompletionRequest": {
        "a dialog": {"messages": _DIALOG},
        "a stream, and its usage": {
            "messages": _DIALOG,
            "max_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "two answers with the probabilities of their tokens": {
            "messages": _DIALOG,
            "n": 2,
            "seed": 7,
            "max_tokens": 8,
            "logprobs": True,
            "top_logprobs": 2,
        },
        "JSON by a schema": {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "fact", "schema": _FACT}},
        },
    },
    "CompletionRequest": {
        "a text to go on with": {"prompt": "The capital of France is", "max_tokens": 8},
        "several, with the texts before their ends": {
            "prompt": ["One, two,", "一、二、"],
            "echo": True,
            "max_tokens": 8,
            "stop": ["\n"],
        },
    },
}


@router.head("/docs", include_in_schema=False)
@router.get("/docs", include_in_schema=False)
async def show(request: Request) -> HTMLResponse:
    """Swagger UI, all of it from here: FastAPI's own page needs a host that not everybody can reach. Its URLs
    are relative, and so right behind a proxy too."""
    files = SWAGGER.removeprefix("/")
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title=request.app.title,
        swagger_js_url=f"{files}/swagger-ui-bundle.js",
        swagger_css_url=f"{files}/swagger-ui.css",
        swagger_favicon_url=f"{files}/favicon-32x32.png",
    )


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of a route's `responses`: the errors that it can give, where these are few."""
    return {status: OPENAI_ERRORS[status] for status in statuses}


def streams(event: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Of a route's `responses`: that it may answer with a stream of such events."""
    content = {"schema": {"$ref": _REF.format(model=event.__name__)}}
    return {200: {"content": {"text/event-stream": content}}}


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that the route reads itself."""
    content = {"schema": {"$ref": _REF.format(model=schema.__name__)}}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def document(app: FastAPI, *schemas: type[BaseModel]) -> None:
    """Adds /docs, and what it shows: the schemas that `json_body` and `streams` refer to, examples that run
    as they are, and keys."""
    app.include_router(router)
    app.mount(SWAGGER, StaticFiles(packages=[("fastapi_swagger", "resources")]))
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        described = generate()
        known = described["components"]["schemas"]
        for schema in schemas:
            of_schema = schema.model_json_schema(ref_template=_REF)
            for name, part in (of_schema.pop("$defs", {}) | {schema.__name__: of_schema}).items():
                known.setdefault(name, part)
        if app.state.settings.api_keys:
            described["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
        for route, path in described["paths"].items():
            for method, operation in path.items():
                if app.state.settings.api_keys and not is_open(method.upper(), route):
                    operation["security"] = [{_KEY: []}]
                if "requestBody" in operation:
                    _add_examples(operation["requestBody"]["content"]["application/json"], app)
                # FastAPI's own, of a path's parameters: a name of ours is never refused by its type.
                if operation["responses"].get("422", {}).get("description") == "Validation Error":
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            known.pop(name, None)
        return described

    app.openapi = openapi  # type: ignore[method-assign]


def _add_examples(content: dict[str, Any], app: FastAPI) -> None:
    name = content["schema"]["$ref"].removeprefix(_REF.format(model=""))
    # The model is known only when it is served.
    model = {} if name == "ChatRequest" else {"model": app.state.settings.model_names[0]}
    content["examples"] = {
        title: {"summary": title, "value": model | example} for title, example in _EXAMPLES[name].items()
    }
