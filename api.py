"""A FastAPI server for Llama-3-8B-Instruct.

python api.py                                   serves the model that model_download.py has fetched
python api.py --model demo                      serves the small one that comes with the source
curl -X POST http://127.0.0.1:6006 -d '{"prompt": "你好"}'
"""

from serving.settings import Settings, hide_key

if __name__ == "__main__":
    hide_key()  # before the imports below: they take seconds, in which a key could be read
    Settings.from_command_line()  # and what is wrong with an option is told before them

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from shlex import quote

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response

from engine.engine import Engine, check, load
from engine.generation import Delta, EngineDeadError
from serving import chat_page, docs, errors, logs, metrics, openai_api
from serving.errors import ApiError, parse
from serving.exchange import EventStream, Exchange, RequestIds, read_whole
from serving.limits import ApiKeys, read_body, unless_client_leaves
from serving.openai_schemas import ChatCompletionChunk, ChatCompletionRequest, CompletionRequest
from serving.schemas import ChatAnswer, ChatRequest
from serving.server import bind, serve

log = logging.getLogger("llama")
router = APIRouter()


@router.post(
    "/",
    response_model=ChatAnswer,
    responses=docs.ERRORS | docs.streams(ChatAnswer),
    openapi_extra=docs.json_body(ChatRequest),
)
async def create_answer(request: Request) -> Response:
    """Answers a prompt, in one piece or, with `stream`, as server-sent events."""
    settings: Settings = request.app.state.settings
    chat = parse(ChatRequest, await read_body(request, settings.max_body_bytes))
    exchange = await begin(request, chat)
    if chat.stream:
        return EventStream(exchange, lambda delta: [ChatAnswer.of(delta).model_dump_json(exclude_none=True)])
    [answer], usage = await read_whole(request, exchange)
    whole = ChatAnswer.of(Delta(answer.text, answer.finish_reason, usage))
    return Response(whole.model_dump_json(), media_type="application/json")


@router.head("/", include_in_schema=False)
@router.get("/", responses={200: {"content": {"text/html": {}}}})
async def describe(request: Request) -> Response:
    """The chat page for browsers; for programs what this server is, and how to ask it."""
    if chat_page.is_wanted(request):
        return chat_page.response()
    settings: Settings = request.app.state.settings
    return JSONResponse({
        "model": settings.model_names[0],
        "ask": f"curl -X POST {quote(str(request.base_url))} -d '{{\"prompt\": \"你好\"}}'",
        "docs": "/docs",
        "health": "/health",
    }, headers={"Vary": "Accept"})  # fmt: skip


@router.head("/health", include_in_schema=False)
@router.get("/health", responses={503: docs.ERRORS[503]})
async def health(request: Request) -> JSONResponse:
    """200 while the server can answer, 503 with the reason when it can't."""
    engine: Engine = request.app.state.engine
    engine.check_health()
    return JSONResponse({"status": "ok"})


async def begin(request: Request, chat: ChatRequest) -> Exchange:
    """Hands a request to the engine, which may refuse it."""
    engine: Engine = request.app.state.engine
    if "max_tokens" in chat.model_fields_set and chat.max_tokens > engine.max_model_len:
        raise ApiError(422, f"max_tokens: at most {engine.max_model_len}, the context", param="max_tokens")
    generating = engine.generate(chat.messages, chat.sampling_params)
    generation = await unless_client_leaves(request.receive, generating)
    return Exchange(request, generation, chat.prompt)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Loads the model, serves, and stops. If the engine fails for good, the process ends."""
    settings: Settings = app.state.settings
    app.state.started = int(time.time())
    engine = app.state.engine = load(
        settings.model_path,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        threads=settings.threads,
        max_model_len=settings.max_model_len,
        max_queue=settings.max_queue,
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        kv_cache_tokens=settings.kv_cache_tokens,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        speculate=settings.speculate,
        request_timeout=settings.request_timeout,
    )
    app.state.metrics = metrics.Metrics(engine)
    engine.start()
    # A full collection would look through all that was made by now, and hold up everybody for half a second.
    gc.freeze()
    if settings.is_public and not settings.api_keys:
        log.warning("anybody who reaches %s can use this server: it asks for no key", settings.host)
    for name in settings.unknown_variables():
        log.warning("%s is no setting, and does nothing: see python api.py --help", name)
    watch = asyncio.create_task(exit_with(engine))
    yield
    watch.cancel()
    await engine.stop()
    gc.unfreeze()  # or libraries that look for leaks at the process's end find them


async def exit_with(engine: Engine) -> None:
    """Ends the process, as failed, when the engine is: a supervisor starts it again."""
    await engine.stopped.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def build_app(settings: Settings) -> FastAPI:
    """The app. It loads nothing until it starts."""
    logs.configure(settings.log_format)
    app = FastAPI(
        title="Llama-3-8B-Instruct", version="1.0.0", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.settings = settings
    if keys := settings.api_keys:
        app.add_middleware(ApiKeys, keys=keys, max_per_key=settings.requests_per_key)
    if origins := settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(RequestIds)
    app.include_router(router)
    app.include_router(openai_api.router)
    app.include_router(metrics.router)
    errors.install(app)
    docs.document(app, ChatRequest, ChatCompletionRequest, ChatCompletionChunk, CompletionRequest)
    return app


def main() -> None:
    settings = Settings.from_command_line()
    try:
        check(
            settings.model_path,
            settings.device,
            max_model_len=settings.max_model_len,
            kv_cache_tokens=settings.kv_cache_tokens,
        )
        bound = bind(settings.host, settings.port)
    except ValueError as error:
        print(f"api.py: {error}", file=sys.stderr)
        sys.exit(2)
    app = build_app(settings)

    async def drain() -> None:
        await app.state.engine.drain(settings.drain_timeout)

    serve(app, bound, host=settings.host, port=settings.port, drain=drain)
    sys.exit(isinstance(app.state.engine.failure, EngineDeadError))


def __getattr__(name: str) -> FastAPI:
    """Makes `app` when `uvicorn api:app` asks for it, and not while `python api.py` reads its flags."""
    if name != "app":
        raise AttributeError(name)
    return build_app(Settings.from_command_line([]))


if __name__ == "__main__":
    main()
