"""/v1: what OpenAI's clients expect."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from engine.detokenizer import Detokenizer
from engine.engine import Engine
from engine.generation import Delta, InvalidPromptError, PromptTooLongError, Usage
from engine.grammar import Grammar
from engine.json_schema import GrammarError
from engine.sequence import FinishReason, Logprobs, TokenLogprob
from serving import docs
from serving.errors import ApiError, parse
from serving.exchange import Answer, EventStream, Exchange, read_whole
from serving.limits import count_answers, read_body, unless_client_leaves
from serving.openai_schemas import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChoiceLogprobs,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    SamplingRequest,
    TextChoice,
    TextLogprobs,
    TokenLogprobs,
    TopLogprob,
)
from serving.schemas import ChatUsage
from serving.settings import Settings

router = APIRouter(prefix="/v1")

T = TypeVar("T", bound=SamplingRequest)

_COMPLETION_TOKENS = 16
"""What /v1/completions makes where max_tokens is not given, as OpenAI's does."""


@router.get("/models", responses=docs.only(401))
async def list_models(request: Request) -> ModelList:
    """The model that is served, by its name and its aliases."""
    settings: Settings = request.app.state.settings
    return ModelList(data=[_model(request, name) for name in settings.model_names])


@router.get("/models/{name:path}", responses=docs.only(401, 404))
async def describe_model(request: Request, name: str) -> Model:
    """One model."""
    _check_model(request, name)
    return _model(request, name)


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses=docs.OPENAI_ERRORS | docs.streams(ChatCompletionChunk),
    openapi_extra=docs.json_body(ChatCompletionRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """Answers a dialog, in one piece or, with `stream`, as server-sent events."""
    chat = await _read(request, ChatCompletionRequest)
    engine: Engine = request.app.state.engine
    max_tokens = chat.max_completion_tokens or chat.max_tokens or engine.max_model_len
    params = chat.params(engine.sampling_defaults, max_tokens=max_tokens, logprobs=chat.num_logprobs)
    _check_limits(engine, chat, max_tokens)
    grammar = await unless_client_leaves(request.receive, _grammar(engine, chat))
    messages = [message.message for message in chat.messages]
    count_answers(request, chat.n or 1)
    try:
        generating = engine.generate(messages, params, n=chat.n or 1, grammar=grammar)
        generation = await unless_client_leaves(request.receive, generating)
    except PromptTooLongError as error:
        raise ApiError(400, f"messages: {error}", param="messages", reason="too_long") from None
    except InvalidPromptError as error:
        raise ApiError(400, f"n: {error}", param="n") from None
    exchange = Exchange(request, generation, messages[-1]["content"])
    stamp = _stamp(request, "chatcmpl", chat.model)
    if chat.stream:
        return EventStream(exchange, _ChatChunks(engine, chat, stamp))
    answers, usage = await read_whole(request, exchange)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=answer.text),
            logprobs=_chat_logprobs(engine, answer.logprobs) if chat.logprobs else None,
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(answers)
    ]
    return _json(ChatCompletion(**stamp, choices=choices, usage=ChatUsage.of(usage)))


@router.post(
    "/completions",
    response_model=Completion,
    responses=docs.OPENAI_ERRORS | docs.streams(Completion),
    openapi_extra=docs.json_body(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """Goes on with a text, or with several, in one piece or, with `stream`, as server-sent events."""
    asked = await _read(request, CompletionRequest)
    engine: Engine = request.app.state.engine
    max_tokens = asked.max_tokens or _COMPLETION_TOKENS
    _check_limits(engine, asked, max_tokens)
    params = asked.params(engine.sampling_defaults, max_tokens=max_tokens, logprobs=asked.logprobs)
    count_answers(request, len(asked.prompt) * (asked.n or 1))
    try:
        generating = engine.complete(asked.prompt, params, n=asked.n or 1)
        generation = await unless_client_leaves(request.receive, generating)
    except InvalidPromptError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from None
    exchange = Exchange(request, generation, asked.prompt)
    pieces = _TextPieces(engine, asked, _stamp(request, "cmpl", asked.model))
    if asked.stream:
        return EventStream(exchange, pieces)
    answers, usage = await read_whole(request, exchange)
    choices = [pieces.choice(index, answer) for index, answer in enumerate(answers)]
    return _json(pieces.completion(choices, usage))


async def _read(request: Request, schema: type[T]) -> T:
    settings: Settings = request.app.state.settings
    asked = parse(schema, await read_body(request, settings.max_body_bytes), refusal=400)
    _check_model(request, asked.model)
    return asked


def _check_model(request: Request, name: str) -> None:
    settings: Settings = request.app.state.settings
    if name not in settings.model_names:
        raise ApiError(
            404, f"model: {name!r:.100} is not served, but {settings.model_names[0]!r} is", param="model"
        )


def _check_limits(engine: Engine, asked: SamplingRequest, max_tokens: int) -> None:
    """Checks what only the engine can know."""
    context, vocab_size = engine.max_model_len, engine.vocab_size
    if max_tokens > context:
        newer = isinstance(asked, ChatCompletionRequest) and asked.max_completion_tokens
        name = "max_completion_tokens" if newer else "max_tokens"
        raise ApiError(400, f"{name}: at most {context}, the context", param=name)
    if (asked.min_tokens or 0) > max_tokens:
        raise ApiError(400, f"min_tokens: at most max_tokens, {max_tokens}", param="min_tokens")
    if any(int(token_id) >= vocab_size for token_id in asked.logit_bias or ()):
        raise ApiError(400, f"logit_bias: token ids are below {vocab_size}", param="logit_bias")


async def _grammar(engine: Engine, chat: ChatCompletionRequest) -> Grammar | None:
    if not chat.wants_json:
        return None
    try:
        return await engine.compile(chat.schema_of_answer)
    except GrammarError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from None


def _stamp(request: Request, kind: str, model: str) -> dict[str, Any]:
    """What is the same in every piece of an answer."""
    return {"id": f"{kind}-{request.state.request_id}", "created": int(time.time()), "model": model}


def _model(request: Request, name: str) -> Model:
    return Model(id=name, created=request.app.state.started, owned_by="meta-llama")


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _chat_logprobs(engine: Engine, logprobs: Iterable[Logprobs]) -> ChoiceLogprobs:
    def top(candidate: TokenLogprob) -> TopLogprob:
        token = engine.token_bytes.name(candidate.token_id)
        text = token.decode(errors="replace")
        return TopLogprob(token=text, logprob=candidate.logprob, bytes=list(token))

    content = [
        TokenLogprobs(**top(place.drawn).model_dump(), top_logprobs=[top(likely) for likely in place.top])
        for place in logprobs
    ]
    return ChoiceLogprobs(content=content)


class _ChatChunks:
    """The events of a streamed chat completion: for each piece of an answer, what the client is sent."""

    def __init__(self, engine: Engine, chat: ChatCompletionRequest, stamp: dict[str, Any]) -> None:
        self._engine = engine
        self._chat = chat
        self._stamp = {**stamp, "object": "chat.completion.chunk"}
        self._begun: set[int] = set()

    def __call__(self, delta: Delta) -> Iterator[str]:
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            yield self._chunk(delta.choice, {"role": "assistant", "content": ""})
        if delta.text or delta.logprobs:
            logprobs = _chat_logprobs(self._engine, delta.logprobs) if self._chat.logprobs else None
            yield self._chunk(delta.choice, {"content": delta.text}, logprobs=logprobs)
        if delta.finish_reason is not None:
            yield self._chunk(delta.choice, {}, finish_reason=delta.finish_reason)
        if delta.usage is not None and self._chat.include_usage:
            yield self._event([], ChatUsage.of(delta.usage))

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        *,
        logprobs: ChoiceLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> str:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return self._event([choice], None)

    def _event(self, choices: list[ChatChunkChoice], usage: ChatUsage | None) -> str:
        chunk = ChatCompletionChunk(**self._stamp, choices=choices, usage=usage)
        return chunk.model_dump_json(exclude=None if self._chat.include_usage else {"usage"})


class _TextPieces:
    """What is sent of text completions, whole ones or the pieces of a stream."""

    def __init__(self, engine: Engine, asked: CompletionRequest, stamp: dict[str, Any]) -> None:
        self._engine = engine
        self._asked = asked
        self._stamp = stamp
        self._offsets: dict[int, int] = {}
        """Of the answers that have begun: characters of their text, as far as their tokens were reported."""
        self._detokenizers: dict[int, Detokenizer] = {}

    def __call__(self, delta: Delta) -> Iterator[str]:
        answer = Answer(delta.text, delta.finish_reason, list(delta.logprobs))
        yield self._event([self.choice(delta.choice, answer)], None)
        if delta.usage is not None and self._asked.include_usage:
            yield self._event([], delta.usage)

    def choice(self, index: int, answer: Answer) -> TextChoice:
        """The next piece of an answer, or all of it."""
        text = answer.text
        if index not in self._offsets:
            echoed = self._prompt(index) if self._asked.echo else ""
            self._offsets[index] = 0
            self._detokenizers[index] = Detokenizer(self._engine.token_bytes)
            text = echoed + text
        logprobs = self._logprobs(index, answer.logprobs) if self._asked.logprobs is not None else None
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=answer.finish_reason)

    def completion(self, choices: list[TextChoice], usage: Usage | None) -> Completion:
        of_usage = None if usage is None else ChatUsage.of(usage)
        return Completion(**self._stamp, choices=choices, usage=of_usage)

    def _event(self, choices: list[TextChoice], usage: Usage | None) -> str:
        exclude = None if self._asked.include_usage else {"usage"}
        return self.completion(choices, usage).model_dump_json(exclude=exclude)

    def _prompt(self, index: int) -> str:
        prompt = self._asked.prompt[index // (self._asked.n or 1)]
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self._engine.token_bytes.name, prompt)).decode(errors="replace")

    def _logprobs(self, index: int, logprobs: list[Logprobs]) -> TextLogprobs:
        offsets = []
        for place in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._detokenizers[index].feed(place.drawn.token_id))
        return TextLogprobs(
            tokens=[self._name(place.drawn.token_id) for place in logprobs],
            token_logprobs=[place.drawn.logprob for place in logprobs],
            top_logprobs=[
                {self._name(token_id): logprob for token_id, logprob in [*place.top, place.drawn]}
                for place in logprobs
            ],
            text_offset=offsets,
        )

    def _name(self, token_id: int) -> str:
        """A token's text; of a part of a character, which has none, its bytes as OpenAI names them."""
        token = self._engine.token_bytes.name(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
