"""Requests and answers of /v1, as OpenAI's API reference defines them (platform.openai.com/docs).

A field is honoured or refused. What asks for nothing that we don't do is taken: neutral values of fields that
we don't support, and fields that are only for the client's own books.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationInfo, field_validator

from engine.chat_format import Message
from engine.sequence import FinishReason, SamplingParams
from serving.schemas import ChatUsage, Request, StopString

_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Where the model's makers advise nothing else."""

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")


class StreamOptions(Request):
    """How to stream."""

    include_usage: bool = False
    """End with an event that has the usage and no choices."""
    include_obfuscation: Literal[False] = False


class SamplingRequest(Request):
    """What both kinds of completions have in common."""

    model: str
    """The name that /v1/models gives."""
    max_tokens: int | None = Field(None, ge=1)
    """Most tokens of an answer, at most the context. Cut to what fits behind the prompt."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 always takes the likeliest token. If not given: what the model's makers advise, as for top_p."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    n: int | None = Field(1, ge=1, le=8)
    """Answers to each prompt; with a seed, each has its own that follows from it."""
    stop: list[StopString] = Field([], max_length=4)
    """The answer ends before any of these; one may stand without the list."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed and request give the same answer."""
    presence_penalty: float | None = Field(0, ge=-2, le=2)
    """Taken from the logit of each token that the answer has."""
    frequency_penalty: float | None = Field(0, ge=-2, le=2)
    """Taken from a token's logit each time that the answer has it."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    """Token ids, and what is added to their logits."""
    stream: bool | None = False
    """Send the answer as server-sent events, while it is made."""
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1)
    """Not OpenAI's: draw from this many tokens at most; 0 and -1 are off."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Not OpenAI's: draw from tokens at least this probable, relative to the likeliest."""
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    """Not OpenAI's: over 1 makes tokens of the prompt and the answer less likely."""
    min_tokens: int | None = Field(0, ge=0)
    """Not OpenAI's: the model can't end the answer before."""
    ignore_eos: bool | None = False
    """Not OpenAI's: the model can't end the answer at all."""

    user: str | None = None

    @field_validator("stop", mode="before", json_schema_input_type=str | list[StopString] | None)
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if not all(map(_TOKEN_ID.fullmatch, bias or ())):
            raise ValueError("keys must be token ids")
        return bias

    @field_validator("stream_options")
    @classmethod
    def _needs_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream", True):
            raise ValueError("only with stream")
        return options

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(
        self, defaults: Mapping[str, float], *, max_tokens: int, logprobs: int | None
    ) -> SamplingParams:
        """How to choose the tokens.

        Args:
            defaults: what the model's makers advise.
            max_tokens: the most that the answer may have.
        """
        chosen = {name: getattr(self, name) for name in _NEUTRAL}
        sampling = {
            name: defaults.get(name, neutral) if chosen[name] is None else chosen[name]
            for name, neutral in _NEUTRAL.items()
        }
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=max(0, int(sampling["top_k"])),
            min_p=sampling["min_p"],
            repetition_penalty=sampling["repetition_penalty"],
            presence_penalty=self.presence_penalty or 0,
            frequency_penalty=self.frequency_penalty or 0,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=tuple(self.stop),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
        )


class TextPart(Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class InputMessage(Request):
    """One turn of the dialog."""

    role: Literal["system", "developer", "user", "assistant"]
    """developer is another name for system."""
    content: list[TextPart] = Field(max_length=2048)
    """Its parts, or one text; null of an assistant that has said nothing."""
    name: str | None = None

    # What a client sends back of an answer of ours, or of OpenAI's.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart] | None)
    @classmethod
    def _a_text_is_a_part(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role") == "assistant":
            return []
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def message(self) -> Message:
        """As the engine takes it."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(Request):
    """The schema of an answer."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """The schema is followed in any case."""


class ResponseFormat(Request):
    """What an answer is: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, validate_default=True)
    """With the type json_schema, and no other."""

    @field_validator("json_schema")
    @classmethod
    def _is_there_if_asked_for(cls, schema: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        if "type" in info.data and (schema is not None) != (info.data["type"] == "json_schema"):
            raise ValueError("must be given with the type json_schema, and with no other")
        return schema


class ChatCompletionRequest(SamplingRequest):
    """A dialog, and how to answer."""

    messages: list[InputMessage] = Field(
        min_length=1, max_length=2048, examples=[[{"role": "user", "content": "你好"}]]
    )
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens, and what counts if both are given."""
    logprobs: bool | None = False
    """Tell of each token how probable the model found it, before penalties, biases and temperature."""
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """And of so many of the likeliest in its place."""
    response_format: ResponseFormat | None = None

    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """Llama 3 8B was not trained to use tools: none can be given."""
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None

    @field_validator("tools", "functions", mode="before")
    @classmethod
    def _has_no_tools(cls, tools: Any) -> Any:
        if tools:
            raise ValueError("not supported: Llama 3 8B was not trained to use tools")
        return tools

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count and not info.data.get("logprobs", True):
            raise ValueError("only with logprobs")
        return count

    @field_validator("response_format")
    @classmethod
    def _ends_where_it_is_complete(
        cls, form: ResponseFormat | None, info: ValidationInfo
    ) -> ResponseFormat | None:
        endless = info.data.get("min_tokens") or info.data.get("ignore_eos")
        if form is not None and form.type != "text" and endless:
            raise ValueError("JSON ends where it is complete: no min_tokens, no ignore_eos")
        return form

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """None is any JSON object."""
        described = self.response_format.json_schema if self.response_format else None
        return described.schema_ if described else None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(SamplingRequest):
    """Texts to go on with, and how."""

    prompt: list[str] | list[list[int]] = Field(examples=["The capital of France is"])
    """A text, several, or the token ids of one or several."""
    echo: bool | None = False
    """Begin the answer with the prompt."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Tell of each token how probable the model found it, and so many of the likeliest in its place."""

    best_of: int | None = Field(None, ge=1)
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="before", json_schema_input_type=_Prompt)
    @classmethod
    def _one_is_a_list(cls, prompt: Any) -> Any:
        prompts = [prompt] if _is_prompt(prompt) else prompt
        of_one_kind = isinstance(prompts, list) and len({type(one) for one in prompts}) == 1
        if not of_one_kind or not all(_is_prompt(one) for one in prompts):
            raise ValueError("must be a text, a list of texts, or token ids, and not empty")
        return prompts

    @field_validator("logprobs")
    @classmethod
    def _are_of_the_answer(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and info.data.get("echo"):
            raise ValueError("not with echo, as the prompt has none")
        return count

    @field_validator("best_of")
    @classmethod
    def _is_what_is_asked_for(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of not in (None, info.data.get("n", best_of) or 1):
            raise ValueError("only as many as n")
        return best_of


def _is_prompt(value: Any) -> bool:
    """Whether it is one text, or the token ids of one."""
    return bool(value) and (
        isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value))
    )


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class ChatChunkChoice(BaseModel):
    index: int
    delta: dict[str, str]
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """A piece of the answer of /v1/chat/completions, with `stream`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None = None
    """Of all answers, in a last event without choices, where `stream_options` ask for it."""


class TextLogprobs(BaseModel):
    """One entry for each token, in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answer of /v1/completions, and with `stream` a piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: ChatUsage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
