"""asyncio in front, one thread behind: requests go in from the event loop, tokens come back to it."""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import psutil
import torch

from engine import weights
from engine.block_pool import BlockPool
from engine.chat_format import LONG_TEXT, ChatFormat, Message
from engine.detokenizer import Detokenizer, TokenBytes
from engine.generation import (
    CacheTooSmallError,
    Choice,
    DrainingError,
    EngineDeadError,
    Generation,
    GenerationError,
    InvalidPromptError,
    Output,
    PromptTooLongError,
    QueueFullError,
    SchemaTooComplexError,
)
from engine.grammar import Grammar, Grammars
from engine.model_runner import (
    ModelRunner,
    choose_device,
    choose_dtype,
    kv_bytes_per_token,
    kv_tokens_that_fit,
    load_model,
)
from engine.scheduler import Chunk, Scheduler
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence

log = logging.getLogger("llama.engine")

T = TypeVar("T")

_RATE_OVER = 1024
"""Answers over which the rate is taken at which they end: many more than can end at once."""
_LONGEST_RETRY = 60
"""Seconds that a refused client is asked to wait at most."""


@dataclass(frozen=True)
class Stats:
    """How busy the engine is now, and what it has done since its start."""

    running: int
    waiting: int
    kv_cache_usage: float
    """Share of the KV blocks that are in use."""
    prefix_cache_queries: int
    """Prompt tokens that were looked for in the cache, and of them those that were found."""
    prefix_cache_hits: int
    preemptions: int
    drafts: int
    """Tokens that were guessed and computed, and of them those that were right."""
    right_drafts: int


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
        vocab_size: int,
        sampling_defaults: Mapping[str, float],
        max_model_len: int,
        max_queue: int,
        request_timeout: float,
    ) -> None:
        """
        Args:
            thread: of one worker, the engine's own, which has made the runner.
            vocab_size: the model's.
            sampling_defaults: what the model's makers advise: some of temperature, top_p, top_k, ...
            max_model_len: the most tokens of a prompt and its answer together.
            max_queue: the most answers that wait before they run.
            request_timeout: seconds that a request may take; 0 is no limit.
        """
        self.vocab_size = vocab_size
        self.sampling_defaults = sampling_defaults
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.failure: Exception | None = None
        """Why the engine takes no requests; None while it does."""
        self.stopped = asyncio.Event()
        """Set when the engine has failed for good, unless the server was shutting down already."""
        self.token_bytes = TokenBytes(chat_format.tokenizer)
        self._chat_format = chat_format
        self._grammars = Grammars(chat_format.tokenizer, chat_format.stop_token_ids, vocab_size)
        # One at a time: however many schemas come in, they take one core from the engine, not all.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._scheduler = scheduler
        self._runner = runner
        self._request_timeout = request_timeout
        self._generations: dict[Sequence, tuple[Generation, Choice]] = {}
        self._num_preparing = 0
        self._idle = asyncio.Event()
        self._ended: deque[float] = deque(maxlen=_RATE_OVER)
        """When the last answers ended since the engine was idle, behind when the first of them began."""
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ahead: list[Chunk] = []
        """The step that was launched before the one before it had ended."""
        self._computed: list[Chunk] = []
        """The last step, while the event loop has not been told of it."""
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
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self.failure = self.failure or DrainingError("the server is shutting down")
        self._fail_all(self.failure)

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and returns when those in flight are finished, or ended after `seconds`."""
        self.failure = self.failure or DrainingError("the server is shutting down")
        try:
            async with asyncio.timeout(seconds):
                while self._generations:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            self._fail_all(DrainingError("the server is shutting down"))

    def check_health(self) -> None:
        """
        Raises:
            DrainingError, EngineDeadError: if the engine takes no requests.
        """
        if self.failure is not None:
            raise type(self.failure)(str(self.failure))

    @property
    def stats(self) -> Stats:
        """How busy the engine is, and has been."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return Stats(
            running=len(scheduler.running),
            waiting=self._num_waiting,
            kv_cache_usage=1 - pool.num_unused / pool.num_blocks,
            prefix_cache_queries=scheduler.num_prompt_tokens,
            prefix_cache_hits=scheduler.num_cached_tokens,
            preemptions=scheduler.num_preemptions,
            drafts=scheduler.num_drafts,
            right_drafts=scheduler.num_right_drafts,
        )

    async def generate(
        self, messages: list[Message], params: SamplingParams, *, n: int = 1, grammar: Grammar | None = None
    ) -> Generation:
        """Takes a request for `n` answers to a dialog; the caller iterates over them, and closes it.

        Raises:
            PromptTooLongError: if the prompt leaves no room for a token of answer.
            QueueFullError: if too many requests wait.
            DrainingError: if the server is shutting down.
            EngineDeadError: if the engine has stopped.
        """
        self._check_admission(n)
        texts = [message["content"].strip() for message in messages]
        self._check_length(sum(map(self._chat_format.least_tokens, texts)), "at least ")
        prompt = await self._encode(partial(self._chat_format.encode_dialog, messages), texts)
        return self._submit([prompt], params, n, grammar)

    async def complete(
        self, prompts: list[str] | list[list[int]], params: SamplingParams, *, n: int = 1
    ) -> Generation:
        """Takes a request to go on with texts, or with token ids, `n` times with each. Else as `generate`.

        Raises:
            InvalidPromptError: if a prompt has no tokens, or ids that the model does not have.
        """
        self._check_admission(len(prompts) * n)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        self._check_length(max(map(self._chat_format.least_tokens, texts), default=0), "at least ")
        all_token_ids = await self._encode(partial(self._tokenize, prompts), texts)
        for token_ids in all_token_ids:
            if not token_ids or not all(0 <= token_id < self.vocab_size for token_id in token_ids):
                raise InvalidPromptError(f"token ids must be from 0 to {self.vocab_size - 1}, at least one")
        return self._submit(all_token_ids, params, n)

    async def compile(self, schema: dict[str, Any] | None) -> Grammar:
        """The grammar of answers that are JSON by `schema`; with None, any JSON object.

        Raises:
            GrammarError: if the schema can't be taken.
            QueueFullError, DrainingError, EngineDeadError: as `generate` does.
        """
        with self._preparing():
            return await asyncio.wrap_future(self._compiler.submit(self._grammars.compile, schema))

    def _tokenize(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        return [
            self._chat_format.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts
        ]

    async def _encode(self, encode: Callable[[], T], texts: list[str]) -> T:
        if sum(map(len, texts)) < LONG_TEXT:
            return encode()
        with self._preparing():
            return await asyncio.to_thread(encode)

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        """Counts a request among those who wait while something is made for it, before it is submitted."""
        self._check_admission(1)
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1

    def _submit(
        self, prompts: list[list[int]], params: SamplingParams, n: int, grammar: Grammar | None = None
    ) -> Generation:
        self._check_length(max(map(len, prompts)))
        self._check_admission(len(prompts) * n)  # again: others may have come while it was encoded
        sequences = [
            Sequence(
                list(prompt),
                replace(
                    params,
                    max_tokens=min(params.max_tokens, self.max_model_len - len(prompt)),
                    seed=_wrap(params.seed + i),
                ),
                self._chat_format.stop_token_ids,
                grammar.copy() if grammar else None,
            )
            for prompt in prompts
            for i in range(n)
        ]
        choices = [
            Choice(index, sequence, Detokenizer(self.token_bytes, params.stop))
            for index, sequence in enumerate(sequences)
        ]
        generation = Generation(choices, sum(map(len, prompts)), self._release)
        if self._request_timeout:
            generation.set_deadline(self._loop, self._request_timeout)
        if not self._generations:  # time in which nobody asked says nothing about the rate
            self._ended.clear()
            self._ended.append(time.monotonic())
        for choice in choices:
            self._generations[choice.sequence] = generation, choice
            self._inbox.put(partial(self._scheduler.add, choice.sequence))
        return generation

    def _check_length(self, num_tokens: int, about: str = "") -> None:
        if num_tokens >= self.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {about}{num_tokens} tokens; the context is {self.max_model_len} tokens, "
                "of which at least one is the answer's"
            )

    def _check_admission(self, answers: int) -> None:
        if answers > self.max_queue:
            raise InvalidPromptError(f"{answers} answers are more than the {self.max_queue} that may wait")
        self.check_health()
        waiting = self._num_waiting
        if waiting + answers > self.max_queue:
            raise QueueFullError(f"{waiting} requests wait already", retry_after=self._retry_after(waiting))

    @property
    def _num_waiting(self) -> int:
        # Not those in the inbox and the scheduler's queue: there are some among them whose clients have left.
        waiting = sum(sequence.row < 0 and not sequence.is_finished for sequence in self._generations)
        return waiting + self._num_preparing

    def _retry_after(self, waiting: int) -> int:
        """Seconds until those who wait will have been served, at the rate of late."""
        if len(self._ended) < 2:
            return 1
        rate = (len(self._ended) - 1) / max(time.monotonic() - self._ended[0], 1e-3)
        return min(max(1, round(waiting / rate)), _LONGEST_RETRY)

    def _release(self, sequence: Sequence) -> None:
        if self._generations.pop(sequence, None) is not None:
            if not sequence.is_finished:
                self._inbox.put(partial(self._scheduler.remove, sequence))
            self._ended.append(time.monotonic())
            if not self._generations:
                self._idle.set()

    def _dispatch(self, outputs: list[tuple[Sequence, Output | Exception]]) -> None:
        for sequence, output in outputs:
            if reader := self._generations.get(sequence):
                generation, choice = reader
                try:
                    if isinstance(output, Exception):
                        generation.fail(output)
                    else:
                        generation.put(choice, output)
                except Exception as error:  # without this token the answer would be another
                    log.error("a token could not be delivered", exc_info=True)
                    generation.fail(GenerationError(str(error)))

    def _die(self, error: EngineDeadError) -> None:
        was_draining = self.failure is not None
        self.failure = error
        self._fail_all(error)
        if not was_draining:
            self.stopped.set()

    def _fail_all(self, error: Exception) -> None:
        for generation, _ in list(self._generations.values()):
            generation.fail(type(error)(str(error)))

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._step()
            self._deliver()
        except BaseException:  # a panic in Rust, as of the tokenizer or of a grammar, is no Exception
            log.critical("the engine has failed", exc_info=True)
            self._deliver()
            self._loop.call_soon_threadsafe(self._die, EngineDeadError("the engine has failed"))

    def _read_inbox(self) -> bool:
        """Does what the event loop asks for; sleeps while there is nothing else to do. False: stop."""
        idle = not self._scheduler.has_work
        if idle:
            self._deliver()
        while idle or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return False
            command()
            idle = False
        return True

    def _step(self) -> None:
        launched = [chunk for chunk in self._ahead if chunk.sequence.row >= 0]  # the others have left
        batch = launched or self._scheduler.schedule()
        if not batch:
            return
        self._ahead = self._scheduler.schedule_ahead(batch) if self._runner.runs_ahead else []
        try:
            if not launched:
                self._runner.launch(batch)
            self._deliver()  # while a GPU computes: the event loop may hold up whoever needs Python
            self._runner.finish(batch, self._ahead)
        except Exception as error:
            self._deliver()
            self._runner.check_device()
            log.error("a step has failed, and with it %d requests", len(batch), exc_info=True)
            for chunk in batch:
                chunk.sequence.error = str(error)
                self._scheduler.remove(chunk.sequence)
        else:
            self._scheduler.postprocess(batch)
        self._computed = batch

    def _deliver(self) -> None:
        """Hands the event loop what the last step has brought, unless it has been told."""
        outputs = [(chunk.sequence, output) for chunk in self._computed for output in _outputs_of(chunk)]
        self._computed = []
        if outputs:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)


def _outputs_of(chunk: Chunk) -> Iterator[Output | Exception]:
    """What a step brought to a sequence: its tokens, and the reason if it failed."""
    sequence, token_ids = chunk.sequence, chunk.sampled
    for left, token_id in zip(range(len(token_ids) - 1, -1, -1), token_ids, strict=True):
        logprobs = sequence.logprobs[-1 - left] if sequence.logprobs else None
        yield Output(token_id, None if left else sequence.finish_reason, logprobs)
    if sequence.error is not None:
        is_schemas = sequence.grammar is not None and sequence.grammar.has_failed
        yield (SchemaTooComplexError if is_schemas else GenerationError)(sequence.error)


def _wrap(seed: int) -> int:
    """Into 64 bits, signed."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def check(model: Path, device: str, *, max_model_len: int = 0, kv_cache_tokens: int = 0) -> None:
    """Finds in a moment what would keep `load` from serving.

    Raises:
        ValueError: if weights are missing, the model is no Llama, its tokenizer not Llama-3's, the device
            can't be used, the context is longer than the model's, or the KV cache smaller than a block.
    """
    if missing := weights.problems(model):
        command = weights.download_command(model)
        mend = f". Complete it with: {command}" if command else ""
        raise ValueError(f"{model} can't be served: {'; '.join(missing)}{mend}")
    if (model_type := weights.model_type(model)) != "llama":
        raise ValueError(f"{model} can't be served: its model_type is {model_type!r}, and not 'llama'")
    if max_model_len > (trained := weights.trained_context(model)):
        raise ValueError(f"--max-model-len {max_model_len}: the model was trained for {trained} tokens")
    if 0 < kv_cache_tokens < BLOCK_SIZE:
        raise ValueError(f"--kv-cache-tokens {kv_cache_tokens}: a block of the cache is {BLOCK_SIZE} tokens")
    ChatFormat.from_pretrained(model)
    choose_device(device)


def load(
    model: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    threads: int = 0,
    max_model_len: int = 0,
    max_queue: int = 256,
    max_num_seqs: int = 256,
    max_batch_tokens: int = 0,
    kv_cache_tokens: int = 0,
    gpu_memory_utilization: float = 0.9,
    speculate: int = 0,
    request_timeout: float = 0,
) -> Engine:
    """Builds the engine for the model in the folder `model`. In each option, 0 and "auto" mean: choose.

    Raises:
        ValueError: as `check` does.
        CacheTooSmallError: if there is no memory for the KV cache.
    """
    check(model, device, max_model_len=max_model_len, kv_cache_tokens=kv_cache_tokens)
    # Each step on a CPU reads all weights, which takes longer from pages of 4 KB than from those of 2 MB that
    # torch asks for with this, where the system has them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # OpenMP keeps workers for each thread that computes. Two sets of them get in each other's way (steps take
    # twice as long, measured), so whatever computes, the loading too, is done by the engine's thread.
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def build() -> Engine:
        if threads:
            torch.set_num_threads(threads)
        on = choose_device(device)
        loaded = load_model(model, on, choose_dtype(dtype, on), int8=quantization == "int8")
        batch_tokens = max_batch_tokens or (80 if on.type == "cpu" else 2048)
        num_seqs = min(max_num_seqs, batch_tokens)  # each takes a token of the budget
        context = max_model_len or loaded.config.max_position_embeddings
        _check_memory(kv_cache_tokens, kv_bytes_per_token(loaded), on)
        # On a GPU this compiles kernels too.
        fit = kv_tokens_that_fit(loaded, batch_tokens, num_seqs, gpu_memory_utilization)
        # On the CPU, whose memory is the user's, a few of the longest sequences; more than all is of no use.
        kv_tokens = kv_cache_tokens or min(context * (16 if on.type == "cpu" else num_seqs), fit)
        pool = BlockPool(kv_tokens // BLOCK_SIZE, BLOCK_SIZE)
        if pool.num_blocks == 0:
            raise CacheTooSmallError(
                "no memory is left for the KV cache: free some, or raise --gpu-memory-utilization"
            )
        kv_tokens = pool.num_blocks * BLOCK_SIZE
        log.info("KV cache: %d tokens in %d blocks", kv_tokens, pool.num_blocks)
        if kv_tokens < context:
            log.warning("the context is %d tokens, as the KV cache holds no more", kv_tokens)
        runner = ModelRunner(loaded, num_blocks=pool.num_blocks, max_num_seqs=num_seqs)
        drafted_tokens = max_drafted_tokens(on) if speculate else 0
        if on.type == "cuda":
            runner.capture_graphs(max(num_seqs, drafted_tokens), min(context, kv_tokens))
        return Engine(
            ChatFormat.from_pretrained(model),
            Scheduler(
                pool,
                max_batch_tokens=batch_tokens,
                max_num_seqs=num_seqs,
                max_drafts=speculate,
                max_drafted_tokens=drafted_tokens,
            ),
            runner,
            thread=thread,
            vocab_size=loaded.config.vocab_size,
            sampling_defaults=weights.sampling_defaults(model),
            max_model_len=min(context, kv_tokens),
            max_queue=max_queue,
            request_timeout=request_timeout,
        )

    return thread.submit(build).result()


def max_drafted_tokens(device: torch.device) -> int:
    """Up to so many tokens, a step takes little longer than for one: most of it is reading the weights."""
    return 8 if device.type == "cpu" else 64


def _check_memory(kv_cache_tokens: int, bytes_per_token: int, device: torch.device) -> None:
    needed = kv_cache_tokens * bytes_per_token
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
    if needed > free:
        amounts = f"they take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        raise CacheTooSmallError(f"--kv-cache-tokens {kv_cache_tokens}: {amounts}")
