"""Decode steps on CUDA as graphs: one launch for the forward pass, instead of hundreds from Python."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.attention import AttentionBatch, Contexts
from engine.llama import Llama
from engine.sampler import Drawn, on_device
from engine.scheduler import Chunk, only_decodes
from engine.sequence import BLOCK_SIZE

log = logging.getLogger("llama.engine")

_REPLAYS = 20
"""Of a step that is timed."""
_MANY = 128
"""Tokens with which a step takes longer for each that is added; with fewer it takes what reading takes."""


class DecodeInputs:
    """What the forward pass of a decode step reads, at places in memory that stay.

    Each token is a query of its own, a sequence's guesses too: they see more and more of its context. A step
    is padded with queries of one token, whose keys and values go to a block that is nobody's. Block tables
    stay on the device, a row for each that runs: only the blocks that a step has added go there.
    """

    def __init__(self, kv_cache: list[Tensor], *, max_num_seqs: int, max_blocks: int) -> None:
        """
        Args:
            kv_cache: as in AttentionBatch; its last block is for padding.
            max_num_seqs: the most sequences that run at once, and the most tokens of a step.
            max_blocks: the most blocks of a sequence.
        """
        self._kv_cache = kv_cache
        idle_block = len(kv_cache[0]) - 1
        device = kv_cache[0].device
        self._idle_row = max_num_seqs
        self._inputs = torch.zeros(3, max_num_seqs, dtype=torch.long, device=device)
        """Token ids, positions, and rows of the block tables."""
        self._block_tables = torch.full(
            (max_num_seqs + 1, max_blocks), idle_block, dtype=torch.int32, device=device
        )
        self._written: list[tuple[list[int], int]] = [([], 0)] * max_num_seqs
        """Of each row: whose block table it is, and how many blocks of it are there."""

    def fill(self, batch: list[Chunk], size: int, drawn: Drawn | None = None) -> None:
        """Writes a step, padded to `size` queries.

        Args:
            drawn: the tokens of the step before, if it is they that this one reads.
        """
        self._write_new_blocks(batch)
        if drawn is None:
            token_ids = [token_id for chunk in batch for token_id in chunk.input_ids]
        else:  # only the device knows them: where to find them
            places = {sequence: place for place, sequence in enumerate(drawn.sequences)}
            token_ids = [places[chunk.sequence] for chunk in batch]
        positions = [position for chunk in batch for position in chunk.positions]
        rows = [chunk.sequence.row for chunk in batch for _ in chunk.positions]
        rest = size - len(rows)
        inputs = [token_ids + [0] * rest, positions + [0] * rest, rows + [self._idle_row] * rest]
        self._inputs[:, :size].copy_(on_device(inputs, self._inputs.device))
        if drawn is not None:
            ids = self._inputs[0, : len(batch)]
            ids.copy_(drawn.token_ids[ids].clamp(min=0))  # where none was drawn, what is computed is dropped

    def forward(self, model: Llama, size: int, *, fused: bool = False) -> Tensor:
        """The logits that follow each of the first `size` tokens: [size, vocab_size], float32.

        Args:
            fused: as in Llama.forward.
        """
        token_ids, positions, rows = self._inputs[:, :size]
        blocks = self._block_tables[rows, positions // BLOCK_SIZE]
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        contexts = Contexts(slice(0, size), self._block_tables[rows], (positions + 1).int())
        batch = AttentionBatch(self._kv_cache, slots, [contexts], [])
        logits: Tensor = model(token_ids, positions, batch, fused=fused)
        return logits

    def _write_new_blocks(self, batch: list[Chunk]) -> None:
        new: list[tuple[int, int, int]] = []
        for chunk in batch:
            row, table = chunk.sequence.row, chunk.sequence.block_table
            owner, count = self._written[row]
            if owner is not table:  # each time that it is admitted, a sequence gets another one
                count = 0
            if count < len(table):
                new += [(row, index, table[index]) for index in range(count, len(table))]
                self._written[row] = table, len(table)
        if new:
            rows, indices, blocks = on_device(new, self._inputs.device).T
            self._block_tables[rows, indices] = blocks.int()


class DecodeGraphs:
    """The forward pass of a decode step, captured for some numbers of tokens."""

    def __init__(self, model: Llama, inputs: DecodeInputs, *, max_num_seqs: int) -> None:
        """
        Args:
            inputs: what the graphs will read.
            max_num_seqs: the most sequences that run at once, and the most tokens of a step.
        """
        self._model = model
        self._inputs = inputs
        self._pool: Any = None
        self._replay: dict[int, Callable[[], Tensor]] = {}
        for size in reversed(padded_sizes(max_num_seqs)):  # the others fit into the memory of the largest
            self._replay[size] = self._capture(size)
            log.info("captured the decode step of %d tokens", size)

    def _capture(self, size: int) -> Callable[[], Tensor]:
        """Records the forward pass of so many tokens. Returns what repeats it, and gives its logits."""
        if size > 1:
            return self._record(size)
        # Which kernels read the weights faster depends on the GPU and on the matrices' sizes.
        plain, fused = (self._record(size, fused=fused) for fused in (False, True))
        times = _milliseconds(plain), _milliseconds(fused)
        log.info("a decode step of one token takes %.2f ms, with kernels of its own %.2f ms", *times)
        return plain if times[0] <= times[1] else fused

    def _record(self, size: int, *, fused: bool = False) -> Callable[[], Tensor]:
        self._inputs.forward(self._model, size, fused=fused)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._inputs.forward(self._model, size, fused=fused)
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def run(self, batch: list[Chunk], drawn: Drawn | None = None) -> Tensor | None:
        """The logits that follow each token: [tokens, vocab_size], float32, until the next run. None if the
        step does more than decode, or is too large.

        Args:
            drawn: as for `DecodeInputs.fill`.
        """
        num_tokens = sum(len(chunk.positions) for chunk in batch)
        size = min((size for size in self._replay if size >= num_tokens), default=None)
        if size is None or not only_decodes(batch):
            return None
        self._inputs.fill(batch, size, drawn)
        return self._replay[size]()[:num_tokens]


def _milliseconds(replay: Callable[[], Tensor]) -> float:
    """What a step takes on the GPU."""
    replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_REPLAYS):
        replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / _REPLAYS * 1000


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of tokens for which there are graphs: no step is padded to twice its tokens, none of many
    to half as many again."""
    powers = [1 << n for n in range(max_num_seqs.bit_length())]
    between = [3 * size // 2 for size in powers if size >= _MANY]
    return sorted({size for size in powers + between if size < max_num_seqs} | {max_num_seqs})
