"""A FastAPI server for Llama-3-8B-Instruct.

python api.py                                   serves the model that model_download.py has fetched
python api.py --model demo                      serves the small one that comes with the source
curl -X POST http://127.0.0.1:6006 -d '{"prompt": "你好"}'
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from engine.engine import Delta, Engine, EngineDeadError, check, load
from serving import docs, errors
from serving.errors import ApiError, parse, to_api_error
from serving.exchange import EventStream, Exchange, RequestIds
from serving.limits import read_body, unless_client_leaves
from serving.schemas import ChatAnswer, ChatRequest
from serving.settings import Settings

log = logging.getLogger("llama")
router = APIRouter()


@router.post("/", response_model=ChatAnswer, responses=docs.ERRORS, openapi_extra=docs.json_body(ChatRequest))
async def create_answer(request: Request) -> Response:
    """Answers a prompt, in one piece or, with `stream`, as server-sent events."""
    settings: Settings = request.app.state.settings
    chat = parse(ChatRequest, await read_body(request, settings.max_body_bytes))
    exchange = await begin(request, chat)
    if chat.stream:
        return EventStream(events(exchange), exchange)
    try:
        answer = await unless_client_leaves(request.receive, whole(exchange))
    finally:
        exchange.close()
    return Response(answer.model_dump_json(), media_type="application/json")


@router.get("/")
async def describe(request: Request) -> JSONResponse:
    """What this server is, and how to ask it."""
    settings: Settings = request.app.state.settings
    return JSONResponse({
        "model": settings.model_path.name if settings.model != "demo" else "demo",
        "ask": f"curl -X POST http://127.0.0.1:{settings.port} -d '{{\"prompt\": \"你好\"}}'",
        "docs": "/docs",
        "health": "/health",
    })  # fmt: skip


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the server can answer, 503 with the reason when it can't."""
    engine: Engine = request.app.state.engine
    if engine.failure is not None:
        raise EngineDeadError(str(engine.failure))
    return JSONResponse({"status": "ok"})


async def begin(request: Request, chat: ChatRequest) -> Exchange:
    """Hands a request to the engine, which may refuse it."""
    engine: Engine = request.app.state.engine
    settings: Settings = request.app.state.settings
    if "max_tokens" in chat.model_fields_set and chat.max_tokens > engine.max_model_len:
        raise ApiError(422, f"max_tokens: at most {engine.max_model_len}, the context", param="max_tokens")
    generation = await engine.generate(chat.messages, chat.sampling_params)
    return Exchange(request.state.request_id, generation, chat.prompt if settings.log_content else None)


async def whole(exchange: Exchange) -> ChatAnswer:
    """The answer in one piece: what the pieces of a stream add up to."""
    deltas = [delta async for delta in exchange]
    last = deltas[-1]
    return ChatAnswer.of(Delta("".join(delta.text for delta in deltas), last.finish_reason, last.usage))


async def events(exchange: Exchange) -> AsyncIterator[str]:
    """The answer as server-sent events. An error is the last of them."""
    try:
        async for delta in exchange:
            yield f"data: {ChatAnswer.of(delta).model_dump_json(exclude_none=True)}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {to_api_error(error, exchange.request_id).body.model_dump_json()}\n\n"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Loads the model, serves, and stops. If the engine fails for good, the process ends."""
    settings: Settings = app.state.settings
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    engine = app.state.engine = load(
        settings.model_path,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        max_model_len=settings.max_model_len,
        max_queue=settings.max_queue,
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        kv_cache_tokens=settings.kv_cache_tokens,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )
    engine.start()
    if settings.is_public:
        log.warning("anybody who reaches %s can use this server: it asks for no key", settings.host)
    watch = asyncio.create_task(exit_with(engine))
    yield
    watch.cancel()
    await engine.stop()


async def exit_with(engine: Engine) -> None:
    """Ends the process, as failed, when the engine is: a supervisor starts it again."""
    await engine.stopped.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def build_app(settings: Settings) -> FastAPI:
    """The app. It loads nothing until it starts."""
    app = FastAPI(title="Llama-3-8B-Instruct", lifespan=lifespan)
    app.state.settings = settings
    app.add_middleware(RequestIds)
    app.include_router(router)
    errors.install(app)
    docs.document(app, ChatRequest)
    return app


def main() -> None:
    settings = Settings.from_command_line()
    try:
        check(settings.model_path, settings.device)
    except ValueError as error:
        print(f"api.py: {error}", file=sys.stderr)
        sys.exit(2)
    uvicorn.run(build_app(settings), host=settings.host, port=settings.port, access_log=False)


def __getattr__(name: str) -> FastAPI:
    """Makes `app` when `uvicorn api:app` asks for it, and not while `python api.py` reads its flags."""
    if name != "app":
        raise AttributeError(name)
    return build_app(Settings.from_command_line([]))


if __name__ == "__main__":
    main()
