"""Decode steps on CUDA as graphs: one launch for the forward pass, instead of a thousand from Python."""

import logging
from typing import Any

import torch
from torch import Tensor

from engine.attention import AttentionBatch, Contexts
from engine.sequence import Sequence

log = logging.getLogger("llama.engine")


class DecodeGraphs:
    """The forward pass of a decode step, captured for 1, 2, 4, 8, ... sequences.

    A step is padded to the next of these sizes with sequences of one token, whose keys and values go to a
    block that is nobody's.
    """

    def __init__(
        self, model: Any, kv_cache: list[Tensor], *, max_num_seqs: int, max_blocks: int, idle_block: int
    ) -> None:
        """
        Args:
            model: as for ModelRunner.
            kv_cache: as in AttentionBatch.
            max_num_seqs: the most sequences of a step.
            max_blocks: the most blocks of a sequence.
            idle_block: the block for padding.
        """
        self._model = model
        self._kv_cache = kv_cache
        self._idle_block = idle_block
        device = model.device
        self._inputs = torch.zeros(3, max_num_seqs, dtype=torch.long, device=device)
        """Token ids, positions and slots: what a graph reads, and `run` overwrites."""
        self._block_tables = torch.full(
            (max_num_seqs, max_blocks), idle_block, dtype=torch.int32, device=device
        )
        self._lens = torch.ones(max_num_seqs, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        sizes = [1 << n for n in range((max_num_seqs - 1).bit_length())]
        pool = None
        for size in [max_num_seqs, *reversed(sizes)]:  # the largest first: the others fit into its memory
            graph = torch.cuda.CUDAGraph()
            self._forward(size)
            with torch.cuda.graph(graph, pool=pool):
                logits = self._forward(size)
            self._graphs[size] = graph, logits
            pool = graph.pool()
        log.info("captured decode steps of %s sequences", ", ".join(map(str, sorted(self._graphs))))

    def run(self, sequences: list[Sequence]) -> Tensor:
        """The logits of each sequence's next token: [sequences, vocab_size], float32, until the next run."""
        size = min(size for size in self._graphs if size >= len(sequences))
        padding = size - len(sequences)
        positions = [sequence.num_computed for sequence in sequences]
        idle_slot = self._idle_block * self._kv_cache[0].shape[1]
        inputs = [
            [sequence.token_ids[-1] for sequence in sequences] + [0] * padding,
            positions + [0] * padding,
            [sequence.slot(position) for sequence, position in zip(sequences, positions, strict=True)]
            + [idle_slot] * padding,
        ]
        width = max(len(sequence.block_table) for sequence in sequences)
        tables = [s.block_table + [self._idle_block] * (width - len(s.block_table)) for s in sequences]
        tables += [[self._idle_block] * width] * padding
        lens = [position + 1 for position in positions] + [1] * padding
        self._inputs[:, :size].copy_(torch.tensor(inputs))
        self._block_tables[:size, :width].copy_(torch.tensor(tables, dtype=torch.int32))
        self._lens[:size].copy_(torch.tensor(lens, dtype=torch.int32))
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(sequences)]

    def _forward(self, size: int) -> Tensor:
        token_ids, positions, slots = self._inputs[:, :size]
        contexts = Contexts(slice(0, size), self._block_tables[:size], self._lens[:size])
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            batch=AttentionBatch(self._kv_cache, slots, [contexts], []),
            use_cache=False,
        )
        logits: Tensor = output.logits[0].float()
        return logits
