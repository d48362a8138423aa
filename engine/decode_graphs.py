"""Decode steps on CUDA as graphs: one launch for the forward pass, instead of hundreds from Python."""

import logging
from typing import Any

import torch
from torch import Tensor

from engine.attention import AttentionBatch, Contexts
from engine.llama import Llama
from engine.scheduler import Chunk, only_decodes
from engine.sequence import BLOCK_SIZE

log = logging.getLogger("llama.engine")


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

    def fill(self, batch: list[Chunk], size: int) -> None:
        """Writes a step, padded to `size` queries."""
        self._write_new_blocks(batch)
        token_ids = [token_id for chunk in batch for token_id in chunk.input_ids]
        positions = [position for chunk in batch for position in chunk.positions]
        rows = [chunk.sequence.row for chunk in batch for _ in chunk.positions]
        rest = size - len(rows)
        inputs = [token_ids + [0] * rest, positions + [0] * rest, rows + [self._idle_row] * rest]
        self._inputs[:, :size].copy_(self._on_device(inputs))

    def forward(self, model: Llama, size: int) -> Tensor:
        """The logits that follow each of the first `size` tokens: [size, vocab_size], float32."""
        token_ids, positions, rows = self._inputs[:, :size]
        blocks = self._block_tables[rows, positions // BLOCK_SIZE]
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        contexts = Contexts(slice(0, size), self._block_tables[rows], (positions + 1).int())
        logits: Tensor = model(token_ids, positions, AttentionBatch(self._kv_cache, slots, [contexts], []))
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
            rows, indices, blocks = self._on_device(new).T
            self._block_tables[rows, indices] = blocks.int()

    def _on_device(self, values: list[Any]) -> Tensor:
        tensor = torch.tensor(values, pin_memory=self._inputs.is_cuda)
        return tensor.to(self._inputs.device, non_blocking=True)


class DecodeGraphs:
    """The forward pass of a decode step, captured for 1, 2, 4, 8, ... tokens."""

    def __init__(self, model: Llama, inputs: DecodeInputs, *, max_num_seqs: int) -> None:
        """
        Args:
            inputs: what the graphs will read.
            max_num_seqs: the most sequences that run at once, and the most tokens of a step.
        """
        self._inputs = inputs
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = None
        for size in reversed(padded_sizes(max_num_seqs)):  # the others fit into the memory of the largest
            graph = torch.cuda.CUDAGraph()
            inputs.forward(model, size)
            with torch.cuda.graph(graph, pool=pool):
                logits = inputs.forward(model, size)
            self._graphs[size] = graph, logits
            pool = graph.pool()
            log.info("captured the decode step of %d tokens", size)

    def run(self, batch: list[Chunk]) -> Tensor | None:
        """The logits that follow each token: [tokens, vocab_size], float32, until the next run. None if the
        step does more than decode, or is too large."""
        num_tokens = sum(len(chunk.positions) for chunk in batch)
        size = min((size for size in self._graphs if size >= num_tokens), default=None)
        if size is None or not only_decodes(batch):
            return None
        self._inputs.fill(batch, size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:num_tokens]


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of tokens for which there are graphs: each needs no more than twice its own work."""
    return [*(1 << n for n in range((max_num_seqs - 1).bit_length())), max_num_seqs]
