"""asyncio in front, one thread behind: requests go in from the event loop, tokens come back to it."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import torch

from engine import weights
from engine.block_pool import BlockPool
from engine.chat_format import ChatFormat, Message
from engine.detokenizer import Detokenizer, TokenBytes
from engine.model_runner import (
    ModelRunner,
    choose_device,
    choose_dtype,
    kv_tokens_that_fit,
    load_model,
)
from engine.scheduler import Scheduler
from engine.sequence import BLOCK_SIZE, FinishReason, SamplingParams, Sequence

log = logging.getLogger("llama.engine")

_LONG_TEXT = 16_384
"""Characters from which on a prompt is tokenized off the event loop: it takes milliseconds."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room in the context for an answer."""


class QueueFullError(RuntimeError):
    """As many requests wait as may wait."""


class EngineDeadError(RuntimeError):
    """The engine has stopped, and will not answer any more."""


class GenerationError(RuntimeError):
    """This request failed; the engine goes on."""


@dataclass(frozen=True)
class Usage:
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. The last one, and no other, has a finish reason and the usage."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Generation:
    """A request in flight: an async iterator over its answer. `close` frees what it holds, at any time."""

    def __init__(self, engine: "Engine", sequence: Sequence, detokenizer: Detokenizer) -> None:
        self._engine = engine
        self._sequence = sequence
        self._detokenizer = detokenizer
        self._outputs: asyncio.Queue[_Output] = asyncio.Queue()
        self._num_tokens = 0
        self._finish_reason: FinishReason | None = None

    @property
    def usage(self) -> Usage:
        """Until now."""
        return Usage(self._sequence.num_prompt_tokens, self._num_tokens)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next piece: everything that has come since the last.

        Raises:
            GenerationError: if this request failed.
            EngineDeadError: if the engine did.
        """
        text = ""
        while not text:
            if self._finish_reason is not None:
                raise StopAsyncIteration
            text += self._take(await self._outputs.get())
            while not self._outputs.empty() and self._finish_reason is None:
                text += self._take(self._outputs.get_nowait())
            if self._finish_reason is not None:
                self.close()
                return Delta(text, self._finish_reason, self.usage)
        return Delta(text)

    def close(self) -> None:
        """Ends the request; the engine forgets it before its next step. Harmless when it has ended."""
        self._engine._release(self._sequence)

    def _take(self, output: "_Output") -> str:
        if output.error is not None:
            raise output.error
        assert output.token_id is not None
        self._num_tokens += 1
        self._finish_reason = output.finish_reason
        text = self._detokenizer.feed(output.token_id)
        if self._detokenizer.stopped:
            self._finish_reason = "stop"
        elif self._finish_reason is not None:
            text += self._detokenizer.flush()
        return text


@dataclass(frozen=True)
class _Output:
    """What a step brought to one request."""

    token_id: int | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


class Engine:
    """Serves every request in flight with every step.

    The scheduler and the model runner belong to the engine's thread alone. What the event loop wants of
    them goes through the inbox; one callback a step brings all new tokens back.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        thread: ThreadPoolExecutor,
        max_model_len: int,
        max_queue: int,
    ) -> None:
        """
        Args:
            thread: of one worker, the engine's own, which has made the runner.
            max_model_len: the most tokens of a prompt and its answer together.
            max_queue: the most requests that wait before they run.
        """
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.failure: Exception | None = None
        """Why the engine has stopped; None while it serves."""
        self.stopped = asyncio.Event()
        self._chat_format = chat_format
        self._token_bytes = TokenBytes(chat_format.tokenizer)
        self._scheduler = scheduler
        self._runner = runner
        self._generations: dict[Sequence, Generation] = {}
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = thread
        self._running: Future[None]
        self._loop: asyncio.AbstractEventLoop

    # On the event loop.

    def start(self) -> None:
        """Starts to serve, for the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._running = self._thread.submit(self._run)

    async def stop(self) -> None:
        """Ends the thread after its present step. Requests in flight are told that the engine has stopped."""
        self._inbox.put(None)
        await asyncio.wrap_future(self._running)
        self._thread.shutdown()
        self._fail(EngineDeadError("the server is shutting down"))

    async def generate(self, messages: list[Message], params: SamplingParams) -> Generation:
        """Takes a request. The caller iterates over its answer, and closes it in the end.

        Raises:
            PromptTooLongError: if the prompt leaves no room for a token of answer.
            QueueFullError: if too many requests wait.
            EngineDeadError: if the engine has stopped.
        """
        if sum(len(message["content"]) for message in messages) < _LONG_TEXT:
            token_ids = self._chat_format.encode_dialog(messages)
        else:
            token_ids = await asyncio.to_thread(self._chat_format.encode_dialog, messages)
        return self._submit(token_ids, params)

    def _submit(self, token_ids: list[int], params: SamplingParams) -> Generation:
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens; the context is {self.max_model_len} tokens, "
                "of which at least one is the answer's"
            )
        if self.failure is not None:
            raise EngineDeadError(str(self.failure))
        if self._inbox.qsize() + len(self._scheduler.waiting) >= self.max_queue:
            raise QueueFullError(f"{self.max_queue} requests wait already")
        params = replace(params, max_tokens=min(params.max_tokens, room))
        sequence = Sequence(token_ids, params, self._chat_format.stop_token_ids)
        generation = Generation(self, sequence, Detokenizer(self._token_bytes, params.stop))
        self._generations[sequence] = generation
        self._inbox.put(partial(self._scheduler.add, sequence))
        return generation

    def _release(self, sequence: Sequence) -> None:
        if self._generations.pop(sequence, None) is not None:
            self._inbox.put(partial(self._scheduler.remove, sequence))

    def _dispatch(self, outputs: list[tuple[Sequence, _Output]]) -> None:
        for sequence, output in outputs:
            if generation := self._generations.get(sequence):
                generation._outputs.put_nowait(output)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._dispatch([(sequence, _Output(error=error)) for sequence in self._generations])
        self.stopped.set()

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._step()
        except Exception:
            log.critical("the engine has failed", exc_info=True)
            self._loop.call_soon_threadsafe(self._fail, EngineDeadError("the engine has failed"))

    def _read_inbox(self) -> bool:
        """Does what the event loop asks for; sleeps while there is nothing else to do. False: stop."""
        idle = not self._scheduler.has_work
        while idle or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return False
            command()
            idle = False
        return True

    def _step(self) -> None:
        batch = self._scheduler.schedule()
        if not batch:
            return
        try:
            token_ids = self._runner.run(batch)
        except Exception as error:
            self._runner.check_device()
            log.error("a step has failed, and with it %d requests", len(batch), exc_info=True)
            failed = [chunk.sequence for chunk in batch]
            for sequence in failed:
                self._scheduler.remove(sequence)
            outputs = [(sequence, _Output(error=GenerationError(str(error)))) for sequence in failed]
        else:
            outputs = [
                (sequence, _output_of(sequence)) for sequence in self._scheduler.postprocess(batch, token_ids)
            ]
        self._loop.call_soon_threadsafe(self._dispatch, outputs)


def _output_of(sequence: Sequence) -> _Output:
    if sequence.failed:
        return _Output(error=GenerationError("the model's logits are not numbers"))
    return _Output(sequence.token_ids[-1], sequence.finish_reason)


def check(model: Path, device: str) -> None:
    """Finds in a moment what would keep `load` from serving.

    Raises:
        ValueError: if weights are missing, the tokenizer is not Llama-3's, or the device can't be used.
    """
    if missing := weights.problems(model):
        mend = weights.download_command(model)
        raise ValueError(f"{model} can't be served: {'; '.join(missing)}. Complete it with: {mend}")
    ChatFormat.from_pretrained(model)
    choose_device(device)


def load(
    model: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    max_model_len: int = 0,
    max_queue: int = 256,
    max_num_seqs: int = 256,
    max_batch_tokens: int = 0,
    kv_cache_tokens: int = 0,
    gpu_memory_utilization: float = 0.9,
) -> Engine:
    """Builds the engine for the model in the folder `model`. In each option, 0 and "auto" mean: choose.

    Raises:
        ValueError: as `check` does, or if the KV cache can't be as large as asked.
    """
    check(model, device)
    # OpenMP keeps workers for each thread that computes. Two sets of them get in each other's way (steps take
    # twice as long, measured), so whatever computes, the loading too, is done by the engine's thread.
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def build() -> Engine:
        if threads:
            torch.set_num_threads(threads)
        on = choose_device(device)
        loaded = load_model(model, on, choose_dtype(dtype, on))
        batch_tokens = max_batch_tokens or (64 if on.type == "cpu" else 2048)
        num_seqs = min(max_num_seqs, batch_tokens)  # each takes a token of the budget
        context = _context(loaded.config.max_position_embeddings, max_model_len)
        # On the CPU, whose memory is the user's, a few of the longest sequences; more than all is of no use.
        kv_tokens = kv_cache_tokens or min(
            context * (16 if on.type == "cpu" else num_seqs),
            kv_tokens_that_fit(loaded, batch_tokens, num_seqs, gpu_memory_utilization),
        )
        pool = BlockPool(kv_tokens // BLOCK_SIZE, BLOCK_SIZE)
        if pool.num_blocks == 0:
            raise ValueError(
                "no memory is left for the KV cache: free some, or raise --gpu-memory-utilization"
            )
        kv_tokens = pool.num_blocks * BLOCK_SIZE
        log.info("KV cache: %d tokens in %d blocks", kv_tokens, pool.num_blocks)
        if kv_tokens < context:
            log.warning("the context is %d tokens, as the KV cache holds no more", kv_tokens)
        runner = ModelRunner(loaded, num_blocks=pool.num_blocks, max_num_seqs=num_seqs)
        if on.type == "cuda":
            runner.capture_graphs(num_seqs, min(context, kv_tokens))
        return Engine(
            ChatFormat.from_pretrained(model),
            Scheduler(pool, max_batch_tokens=batch_tokens, max_num_seqs=num_seqs),
            runner,
            thread=thread,
            max_model_len=min(context, kv_tokens),
            max_queue=max_queue,
        )

    return thread.submit(build).result()


def _context(trained: int, asked: int) -> int:
    if asked > trained:
        raise ValueError(f"max_model_len is {asked}, but the model was trained for {trained} tokens")
    return asked or trained
