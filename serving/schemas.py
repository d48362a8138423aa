"""Requests and answers of POST /."""

import secrets
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from engine.chat_format import Message
from engine.generation import Delta, Usage
from engine.sequence import FinishReason, SamplingParams

StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class Request(BaseModel):
    # Strict, so that "5" is no number and true is no integer: a client's mistake is told, not guessed at.
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ChatMessage(Request):
    """One turn of the dialog."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(Request):
    """A question, the dialog before it, and how to answer."""

    prompt: Annotated[str, Field(examples=["你好"])]
    """What the user says. Not blank."""
    history: list[ChatMessage] = Field([], max_length=2048)
    """The dialog so far, oldest turn first. The server keeps none: send it whole each time."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of the answer, at most the context. Cut to what fits behind the prompt."""
    temperature: float = Field(0.5, ge=0, le=2)
    """0 always takes the likeliest token."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = Field(0, ge=0)
    """Draw from this many tokens at most; 0 is off."""
    min_p: float = Field(0, ge=0, le=1)
    """Draw from tokens at least this probable, relative to the likeliest."""
    repetition_penalty: float = Field(1.1, gt=0, le=2)
    """Over 1 makes tokens of the prompt and the answer less likely."""
    presence_penalty: float = Field(0, ge=-2, le=2)
    """Taken from the logit of each token that the answer has."""
    frequency_penalty: float = Field(0, ge=-2, le=2)
    """Taken from a token's logit each time that the answer has it."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed and request give the same answer."""
    stop: list[StopString] = Field([], max_length=4)
    """The answer ends before any of these; one may stand without the list."""
    stream: bool = False
    """Send the answer as server-sent events, while it is made."""

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("must not be blank")
        return prompt

    @field_validator("history", mode="before", json_schema_input_type=list[ChatMessage] | None)
    @classmethod
    def _null_is_empty(cls, history: Any) -> Any:
        return [] if history is None else history

    @field_validator("stop", mode="before", json_schema_input_type=str | list[StopString] | None)
    @classmethod
    def _one_is_a_list(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    @property
    def messages(self) -> list[Message]:
        """The dialog, with the prompt as its last turn."""
        history: list[Message] = [{"role": m.role, "content": m.content} for m in self.history]
        return [*history, {"role": "user", "content": self.prompt}]

    @property
    def sampling_params(self) -> SamplingParams:
        """How to choose the tokens. Without a seed, a new one is drawn."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=tuple(self.stop),
        )


class ChatUsage(BaseModel):
    """What the request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "ChatUsage":
        total = usage.prompt_tokens + usage.completion_tokens
        return cls(
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, total_tokens=total
        )


def now() -> str:
    """The server's local time, as answers give it."""
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


class ChatAnswer(BaseModel):
    """An answer, or with `stream` a piece of it, of which only the last has finish_reason and usage."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    response: str
    status: Literal[200] = 200
    time: str = Field(default_factory=now, examples=["2024-04-20 16:18:46"])
    finish_reason: FinishReason | None = None
    """stop: it was complete, or a stop string came; length: max_tokens or the context ended it."""
    usage: ChatUsage | None = None

    @classmethod
    def of(cls, delta: Delta) -> "ChatAnswer":
        """The piece of an answer that `delta` is."""
        usage = ChatUsage.of(delta.usage) if delta.usage else None
        return cls(response=delta.text, finish_reason=delta.finish_reason, usage=usage)
