"""The step: a batch in, token ids out. What is particular to a device is decided here."""

import sys
from collections.abc import Sequence as Seq
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.attention import AttentionBatch, Contexts, Span, causal_mask
from engine.decode_graphs import DecodeGraphs, DecodeInputs, padded_sizes
from engine.llama import Llama
from engine.sampler import Sampler, on_device
from engine.scheduler import Chunk
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence

_SPAN = sys.maxsize


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cuda" or "cpu" means on this machine.

    Raises:
        ValueError: if there is a GPU that torch can't use, or none where one was asked for; or if kernels
            for it can't be compiled.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        _check_triton()
        return torch.device("cuda")
    if Path("/proc/driver/nvidia").exists():
        raise ValueError(
            f"there is a GPU, but this torch ({torch.__version__}) can't use its driver, which is often too "
            "old for the newest torch: install a torch build for the CUDA version that nvidia-smi shows, or "
            "serve without the GPU with --device cpu"
        )
    if name == "cuda":
        raise ValueError("--device cuda: there is no GPU here")
    return torch.device("cpu")


def _check_triton() -> None:
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # for which it compiles a part of itself
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"kernels for the GPU can't be compiled: {reason}. Triton does it, which comes with torch for "
            "CUDA on Linux, and needs a C compiler and Python's headers (on Debian and Ubuntu: apt install "
            "gcc python3-dev); --device cpu serves without the GPU"
        ) from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of weights and cache that "auto", "bfloat16" or "float32" means on a device."""
    if name == "auto":
        # Most processors don't compute in bfloat16: there it is several times slower than float32.
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def load_model(model: Path, device: torch.device, dtype: torch.dtype, *, int8: bool = False) -> Llama:
    """Loads the Llama in the folder `model` onto a device, if asked with weights of int8."""
    # Weights stay on disk until their layer is made of them, and go to the device then: it need not be large
    # enough for what they are made of, and nothing that is left of this takes room from the KV cache.
    loaded = LlamaForCausalLM.from_pretrained(
        model,
        dtype="auto",
        device_map={"": "cpu"},
        local_files_only=True,
    )
    if device.type == "cuda":
        # It plans anew for each length of context, which takes longer than to attend.
        torch.backends.cuda.enable_cudnn_sdp(False)
    llama = Llama(loaded, device=device, dtype=dtype, int8=int8).eval()
    if device.type == "cpu":
        for parameter in llama.parameters():  # what is not a copy yet would keep all of the files mapped
            parameter.data = parameter.data.clone()
    return llama


class ModelRunner:
    """Runs a model over a paged KV cache."""

    def __init__(self, model: Llama, *, num_blocks: int, max_num_seqs: int) -> None:
        """
        Args:
            num_blocks: blocks of the KV cache.
            max_num_seqs: the most sequences of one step.
        """
        config = model.config
        self._model = model
        self._device = model.device
        self._sampler = Sampler(max_num_seqs, config.vocab_size, self._device)
        # One block more than there are to allocate: CUDA graphs write their padding there, it pads tables.
        self._idle_block = num_blocks
        shape = (num_blocks + 1, BLOCK_SIZE, 2, config.num_key_value_heads, config.head_dim)
        self._kv_cache = [
            torch.zeros(shape, dtype=model.dtype, device=self._device)
            for _ in range(config.num_hidden_layers)
        ]
        self._graphs: DecodeGraphs | None = None
        self._logits: Tensor | None = None
        """Of the step that was launched; None: its forward pass is still to come."""
        self._rows: dict[Chunk, int] = {}
        """Which of them follow each of its chunks: the first."""

    @torch.inference_mode()
    def capture_graphs(self, max_num_seqs: int, max_model_len: int) -> None:
        """Makes decode steps of up to `max_num_seqs` sequences, and as many tokens, fast on CUDA. It takes
        seconds."""
        inputs = DecodeInputs(
            self._kv_cache, max_num_seqs=max_num_seqs, max_blocks=-(-max_model_len // BLOCK_SIZE)
        )
        self._graphs = DecodeGraphs(self._model, inputs, max_num_seqs=max_num_seqs)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step can be launched before the tokens that it reads are known here."""
        return self._graphs is not None

    @torch.inference_mode()
    def launch(self, batch: list[Chunk]) -> None:
        """Starts a step. A GPU goes on with it alone; a CPU leaves all of it to `finish`."""
        self._rows = _first_rows(batch)
        self._logits = self._forward(batch) if self._on_cuda else None

    @torch.inference_mode()
    def finish(self, batch: list[Chunk], ahead: list[Chunk] | None = None) -> None:
        """Ends the step that was launched. Each sequence of a chunk that samples gets its next token, and one
        more for each draft that is right; or the reason why none could be drawn.

        Args:
            batch: the step, or what is left of it.
            ahead: what `Scheduler.schedule_ahead` gives of it: it is launched before the tokens are waited
                for. Only where the runner runs ahead.
        """
        logits = self._forward(batch) if self._logits is None else self._logits
        self._sample(logits, {chunk: self._rows[chunk] for chunk in batch if chunk.samples}, ahead)

    def run(self, batch: list[Chunk]) -> None:
        """Computes a step."""
        self.launch(batch)
        self.finish(batch)

    def check_device(self) -> None:
        """Raises if the device is lost. A step that fails may have failed alone."""
        if self._on_cuda:
            torch.cuda.synchronize()

    def _sample(self, logits: Tensor, rows: dict[Chunk, int], ahead: list[Chunk] | None) -> None:
        """Draws the token behind each chunk. Where it is the one that was guessed, the logits of the next are
        there too: it is drawn as if it had come in a step of its own.

        Args:
            logits: [rows, vocab_size].
            rows: of each chunk the first; one for each of its drafts follows.
            ahead: what to launch between the drawing and the reading.
        """
        while rows:
            sequences = [chunk.sequence for chunk in rows]
            all_rows = len(rows) == len(logits)
            drawn_from = logits if all_rows else logits[self._tensor(list(rows.values()))]
            drawn = self._sampler.sample(drawn_from, sequences)
            if ahead and self._graphs is not None:
                self._rows, self._logits = _first_rows(ahead), self._graphs.run(ahead, drawn)
            for sequence, token_id in zip(sequences, drawn.read(), strict=True):
                sequence.append(token_id)
            rows = {chunk: row + 1 for chunk, row in rows.items() if chunk.can_go_on}

    def _forward(self, batch: list[Chunk]) -> Tensor:
        """The logits that follow each chunk that samples, and each of its drafts: [rows, vocab_size],
        float32."""
        if self._graphs is not None and (decoded := self._graphs.run(batch)) is not None:
            return decoded
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kept: dict[Chunk, range] = {}
        contexts: list[Contexts] = []
        spans: list[Span] = []
        for likeness, alike in groupby(sorted(batch, key=self._likeness), self._likeness):
            start, chunks = len(token_ids), list(alike)
            for chunk in chunks:
                if likeness == _SPAN:
                    spans.append(self._span(chunk, start=len(token_ids)))
                token_ids += chunk.input_ids
                positions += chunk.positions
                slots += map(chunk.sequence.slot, chunk.positions)
                if chunk.samples:
                    kept[chunk] = range(len(token_ids) - len(chunk.drafts) - 1, len(token_ids))
            if likeness != _SPAN:
                contexts.append(self._contexts(chunks, start))
        if not self._on_cuda:
            self._clean([slot // BLOCK_SIZE for slot in slots if slot % BLOCK_SIZE == 0])
        logits: Tensor = self._model(
            self._tensor(token_ids),
            self._tensor(positions),
            AttentionBatch(self._kv_cache, self._tensor(slots), contexts, spans),
            self._tensor([row for chunk in batch if chunk.samples for row in kept[chunk]]),
        )
        return logits

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _likeness(self, chunk: Chunk) -> int:
        """Chunks of equal likeness are computed side by side, those of several tokens behind all others.

        CUDA's kernel reads of each context what there is. The plain one reads as much of all as of the
        longest, so those of like length, within a factor of two, are put together.
        """
        if len(chunk.positions) > 1:
            return _SPAN
        return 0 if self._on_cuda else len(chunk.sequence.block_table).bit_length()

    def _clean(self, blocks: list[int]) -> None:
        """Clears blocks that get their first token. What is left in them may be no number, and the plain
        attention reads it too: with a weight of 0, which does not undo that."""
        if blocks:
            index = self._tensor(blocks)
            for cache in self._kv_cache:
                cache.index_fill_(0, index, 0)

    def _contexts(self, chunks: list[Chunk], start: int) -> Contexts:
        """Of chunks of one token, whose rows begin at `start`."""
        sequences = [chunk.sequence for chunk in chunks]
        tables = [s.block_table[: s.num_computed // BLOCK_SIZE + 1] for s in sequences]
        longest = max(map(len, tables))
        padded = [table + [self._idle_block] * (longest - len(table)) for table in tables]
        lens = [sequence.num_computed + 1 for sequence in sequences]
        # int32, as graphs have them: for another type, CUDA's kernels would be compiled anew.
        return Contexts(
            slice(start, start + len(chunks)),
            self._tensor(padded, torch.int),
            self._tensor(lens, torch.int),
        )

    def _span(self, chunk: Chunk, start: int) -> Span:
        """Of a chunk of several tokens, whose rows begin at `start`."""
        num_queries, context_len = len(chunk.positions), chunk.positions.stop
        return Span(
            slice(start, start + num_queries),
            self._tensor(chunk.sequence.block_table[: -(-context_len // BLOCK_SIZE)]),
            context_len,
            causal_mask(num_queries, context_len, self._device),
        )

    def _tensor(self, values: Seq[Any], dtype: torch.dtype = torch.long) -> Tensor:
        return on_device(values, self._device, dtype)


def _first_rows(batch: list[Chunk]) -> dict[Chunk, int]:
    """Of each chunk that samples, the first of the logits that the forward pass gives for it."""
    sampling = [chunk for chunk in batch if chunk.samples]
    ends = accumulate(1 + len(chunk.drafts) for chunk in sampling)
    return dict(zip(sampling, chain([0], ends), strict=False))


def kv_bytes_per_token(model: Llama) -> int:
    """Bytes that a token's keys and values take in all layers."""
    config = model.config
    per_layer = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return int(per_layer * config.num_hidden_layers)


def kv_tokens_that_fit(
    model: Llama, max_batch_tokens: int, max_num_seqs: int, gpu_memory_utilization: float
) -> int:
    """Tokens of KV cache for which there is memory beside the model and what a step needs.

    On a GPU a step of the largest size is run to see what it needs. On the CPU a quarter of the free
    memory is taken: the rest is the user's.
    """
    if model.device.type == "cpu":
        return int(psutil.virtual_memory().available // 4 // kv_bytes_per_token(model))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run_largest_step(model, max_batch_tokens, max_num_seqs)
    step = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    logits = 4 * int(model.config.vocab_size) * sum(padded_sizes(max_num_seqs))  # each graph keeps its own
    usable = int(total * gpu_memory_utilization) - (total - free) - step - logits
    return max(0, usable) // kv_bytes_per_token(model)


def _run_largest_step(model: Llama, max_batch_tokens: int, max_num_seqs: int) -> None:
    num_blocks = -(-max_batch_tokens // BLOCK_SIZE)
    runner = ModelRunner(model, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    decodes = [Sequence([0], SamplingParams(), block_table=[0], row=row) for row in range(max_num_seqs - 1)]
    prompt = Sequence([0] * (max_batch_tokens - len(decodes)), SamplingParams(), row=max_num_seqs - 1)
    prompt.block_table = list(range(num_blocks))
    runner.run([Chunk(sequence, sequence.num_pending) for sequence in [*decodes, prompt]])
