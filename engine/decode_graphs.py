"""Decode steps on CUDA as graphs: one launch for the forward pass, instead of hundreds from Python."""

import logging

import torch
from torch import Tensor

from engine.attention import AttentionBatch, Contexts
from engine.llama import Llama
from engine.sequence import BLOCK_SIZE, Sequence

log = logging.getLogger("llama.engine")


class DecodeInputs:
    """What the forward pass of a decode step reads, at places in memory that stay.

    A step is padded with sequences of one token, whose keys and values go to a block that is nobody's.
    """

    def __init__(self, kv_cache: list[Tensor], *, max_num_seqs: int, max_blocks: int) -> None:
        """
        Args:
            kv_cache: as in AttentionBatch; its last block is for padding.
            max_num_seqs: the most sequences of a step.
            max_blocks: the most blocks of a sequence.
        """
        self._kv_cache = kv_cache
        self._idle_block = len(kv_cache[0]) - 1
        device = kv_cache[0].device
        self._inputs = torch.zeros(3, max_num_seqs, dtype=torch.long, device=device)
        """Token ids, positions and slots."""
        self._block_tables = torch.full(
            (max_num_seqs, max_blocks), self._idle_block, dtype=torch.int32, device=device
        )
        self._lens = torch.ones(max_num_seqs, dtype=torch.int32, device=device)

    def fill(self, sequences: list[Sequence], size: int) -> None:
        """Writes a step of `sequences`, padded to `size` of them."""
        padding = size - len(sequences)
        positions = [sequence.num_computed for sequence in sequences]
        inputs = [
            [sequence.token_ids[-1] for sequence in sequences] + [0] * padding,
            positions + [0] * padding,
            [sequence.slot(position) for sequence, position in zip(sequences, positions, strict=True)]
            + [self._idle_block * BLOCK_SIZE] * padding,
        ]
        width = max(len(sequence.block_table) for sequence in sequences)
        tables = [s.block_table + [self._idle_block] * (width - len(s.block_table)) for s in sequences]
        tables += [[self._idle_block] * width] * padding
        lens = [position + 1 for position in positions] + [1] * padding
        self._inputs[:, :size].copy_(torch.tensor(inputs))
        self._block_tables[:size, :width].copy_(torch.tensor(tables, dtype=torch.int32))
        self._lens[:size].copy_(torch.tensor(lens, dtype=torch.int32))

    def forward(self, model: Llama, size: int) -> Tensor:
        """The logits that follow each of the first `size` sequences: [size, vocab_size], float32."""
        token_ids, positions, slots = self._inputs[:, :size]
        contexts = Contexts(slice(0, size), self._block_tables[:size], self._lens[:size])
        logits: Tensor = model(token_ids, positions, AttentionBatch(self._kv_cache, slots, [contexts], []))
        return logits


class DecodeGraphs:
    """The forward pass of a decode step, captured for 1, 2, 4, 8, ... sequences."""

    def __init__(self, model: Llama, inputs: DecodeInputs, *, max_num_seqs: int) -> None:
        """
        Args:
            inputs: what the graphs will read.
            max_num_seqs: the most sequences of a step.
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
            log.info("captured the decode step of %d sequences", size)

    def run(self, sequences: list[Sequence]) -> Tensor:
        """The logits of each sequence's next token: [sequences, vocab_size], float32, until the next run."""
        size = min(size for size in self._graphs if size >= len(sequences))
        self._inputs.fill(sequences, size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(sequences)]


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of sequences for which there are graphs: each needs no more than twice its own work."""
    return [*(1 << n for n in range((max_num_seqs - 1).bit_length())), max_num_seqs]
