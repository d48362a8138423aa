"""A request in flight: its answers, as they come from the engine's thread and are read on the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

from engine.detokenizer import Detokenizer
from engine.sequence import FinishReason, Logprobs, Sequence

_MAX_UNREAD = 1024
"""Tokens that wait for a client to read them. One that lags by more is cut off, and not waited for: an answer
that pauses would keep its KV blocks from the others."""


class CacheTooSmallError(ValueError):
    """There is no memory for the KV cache."""


class EngineError(Exception):
    """Why a request gets no answer, or not the whole of it."""


class InvalidPromptError(EngineError):
    """The prompt is nothing that the model can read, or asks for more answers than can wait."""


class PromptTooLongError(EngineError):
    """The prompt leaves no room in the context for an answer."""


class QueueFullError(EngineError):
    """As many requests wait as may wait."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        """
        Args:
            retry_after: seconds after which it is worth another try.
        """
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(EngineError):
    """The engine has stopped, and will not answer any more."""


class GenerationError(EngineError):
    """This request failed; the engine goes on."""


class SchemaTooComplexError(GenerationError):
    """The answer can't be continued by its grammar: nobody could tell before."""


class DrainingError(EngineError):
    """The server is shutting down, and takes no new requests."""


class DeadlineError(EngineError):
    """The answer was not complete when its time was up."""


class SlowReaderError(EngineError):
    """The client does not read its answer."""


@dataclass(frozen=True)
class Usage:
    """What a request cost, in tokens."""

    prompt_tokens: int
    """Those of the cache too; of a prompt with several answers once."""
    completion_tokens: int


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. The last one of each answer, and no other, has a finish reason."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """With the last piece of all."""
    choice: int = 0
    """Which of several answers it belongs to."""
    logprobs: tuple[Logprobs, ...] = ()
    """Of its tokens, where asked for: of all but the stop token."""


class Output(NamedTuple):
    """What a step brought to one answer."""

    token_id: int
    finish_reason: FinishReason | None
    logprobs: Logprobs | None


class Choice:
    """One of a request's answers, as far as it has been read."""

    def __init__(self, index: int, sequence: Sequence, detokenizer: Detokenizer) -> None:
        self.sequence = sequence
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.has_news = False
        self._index = index
        self._detokenizer = detokenizer
        self._text = ""
        self._logprobs: list[Logprobs] = []

    def take(self, output: Output) -> None:
        """Reads on."""
        if self.finish_reason is not None:  # a stop string ended it, of which the engine did not know yet
            return
        self.num_tokens += 1
        self.finish_reason = output.finish_reason
        self._text += self._detokenizer.feed(output.token_id)
        if output.logprobs is not None and output.finish_reason != "stop":
            self._logprobs.append(output.logprobs)
        if self._detokenizer.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            self._text += self._detokenizer.flush()
        self.has_news = bool(self._text) or self.finish_reason is not None

    def give(self, usage: Usage | None) -> Delta:
        """What was read since it was last called."""
        delta = Delta(self._text, self.finish_reason, usage, self._index, tuple(self._logprobs))
        self._text, self._logprobs, self.has_news = "", [], False
        return delta


class Generation:
    """A request in flight: an async iterator over its answers. `close` frees what it holds, at any time."""

    def __init__(
        self, choices: list[Choice], num_prompt_tokens: int, release: Callable[[Sequence], None]
    ) -> None:
        """
        Args:
            num_prompt_tokens: of all prompts, each counted once.
            release: what tells the engine that nobody waits for a sequence any more.
        """
        self._choices = choices
        self._num_prompt_tokens = num_prompt_tokens
        self._release = release
        self._outputs: deque[tuple[Choice, Output]] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def set_deadline(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Ends the request in so many seconds, if it has not ended by then."""
        error = DeadlineError(f"the answer took longer than {seconds:g} s")
        self._deadline = loop.call_later(seconds, self.fail, error)

    @property
    def usage(self) -> Usage:
        """Until now."""
        return Usage(self._num_prompt_tokens, sum(choice.num_tokens for choice in self._choices))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next piece: of one answer, everything that has come since its last.

        Raises:
            GenerationError: if this request failed.
            DeadlineError, SlowReaderError: if it was ended.
            EngineDeadError: if the engine has stopped.
        """
        while any(choice.finish_reason is None for choice in self._choices):
            while not self._outputs:
                if self._error is not None:
                    raise self._error
                self._arrived.clear()
                await self._arrived.wait()
            choice = self._outputs[0][0]
            while self._outputs and self._outputs[0][0] is choice:
                choice.take(self._outputs.popleft()[1])
            if choice.finish_reason is not None:
                self._release(choice.sequence)
            if choice.has_news:
                is_last = all(choice.finish_reason is not None for choice in self._choices)
                return choice.give(self.usage if is_last else None)
        raise StopAsyncIteration

    def close(self) -> None:
        """Ends the request; the engine forgets it before its next step. Harmless when it has ended."""
        if self._deadline is not None:
            self._deadline.cancel()
        for choice in self._choices:
            self._release(choice.sequence)

    def fail(self, error: Exception) -> None:
        """Ends the request. Its iterator raises `error` after what has come before."""
        self._error = error
        self._arrived.set()
        self.close()

    def put(self, choice: Choice, output: Output) -> None:
        """Takes in what a step brought to one of the answers."""
        self._outputs.append((choice, output))
        self._arrived.set()
        if len(self._outputs) > _MAX_UNREAD * len(self._choices):
            self.fail(SlowReaderError(f"ended, as {_MAX_UNREAD} tokens of the answer were not read"))
