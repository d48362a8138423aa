"""Paged attention: each token attends to its own sequence's tokens, wherever their blocks lie.

A step's tokens come packed, one sequence behind the other, without padding. Its `AttentionBatch` says what
belongs together.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.sequence import BLOCK_SIZE


@dataclass(frozen=True)
class Contexts:
    """What sequences attend to that have one query each: all tensors, which CUDA graphs read anew."""

    queries: slice
    """Theirs among the step's tokens."""
    block_tables: Tensor
    """[sequences, blocks]; behind a sequence's last block stands any other, which counts for nothing. The
    plain function reads it nevertheless, and all of the last block: there must be numbers."""
    lens: Tensor
    """[sequences], tokens."""

    @cached_property
    def bias(self) -> Tensor:
        """[sequences, 1, 1, blocks * block_size], to be added to scores: 0 in a context, -inf behind it."""
        position = torch.arange(self.block_tables.shape[1] * BLOCK_SIZE, device=self.lens.device)
        bias = torch.zeros(len(self.lens), 1, 1, len(position), device=self.lens.device)
        return bias.masked_fill_(position >= self.lens[:, None, None, None], -torch.inf)


@dataclass(frozen=True)
class Span:
    """What a sequence attends to that has several queries: a part of a prompt, or guesses."""

    queries: slice
    """Its tokens among the step's."""
    blocks: Tensor
    """Those that hold its tokens, in order."""
    context_len: int
    """Tokens: those computed before and those of this step."""
    mask: Tensor
    """[queries, context_len], True where a query may look."""


@dataclass(frozen=True)
class AttentionBatch:
    """Where a step's keys and values go, and what its queries see."""

    kv_cache: list[Tensor]
    """One for each layer: [blocks, block_size, 2, kv_heads, head_dim], keys and values."""
    slots: Tensor
    """[tokens] The place of each token in the cache: block * block_size + offset."""
    contexts: list[Contexts]
    """Of the step's first tokens, in order; the spans are of those behind them."""
    spans: list[Span]


def causal_mask(num_queries: int, context_len: int, device: torch.device) -> Tensor:
    """[num_queries, context_len], for queries that are the last tokens of their context."""
    if device.type == "cuda":  # a mask by name only, which the fast kernels know; its import takes seconds
        from torch.nn.attention.bias import causal_lower_right

        bias: Tensor = causal_lower_right(num_queries, context_len)
        return bias
    return torch.ones(num_queries, context_len, dtype=torch.bool).tril(context_len - num_queries)


def attend(queries: Tensor, blocks: Tensor, batch: AttentionBatch, scaling: float) -> Tensor:
    """
    Args:
        queries: [tokens, heads, head_dim].
        blocks: a layer's cache, in which the step's own keys and values are already.

    Returns:
        [tokens, heads, head_dim]
    """
    parts = [
        _attend_to_contexts(queries[contexts.queries], blocks, contexts, scaling)
        for contexts in batch.contexts
    ]
    parts += [_attend_to_span(queries[span.queries], blocks, span, scaling) for span in batch.spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_to_contexts(queries: Tensor, blocks: Tensor, contexts: Contexts, scaling: float) -> Tensor:
    if blocks.is_cuda:
        from engine.decode_attention import decode_attention  # Triton comes with torch for CUDA only

        return decode_attention(queries, blocks, contexts, scaling)
    return plain_decode_attention(queries, blocks, contexts, scaling)


# Grouped-query attention without repeating the keys for the heads that share them, in two forms.


def plain_decode_attention(query: Tensor, blocks: Tensor, contexts: Contexts, scaling: float) -> Tensor:
    """The heads of a group are the queries of one key/value head, and see all of it.

    Args:
        query: [sequences, heads, head_dim].
        blocks: a layer's cache.

    Returns:
        [sequences, heads, head_dim]
    """
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = blocks.shape[3]
    context = blocks.index_select(0, contexts.block_tables.flatten())
    context = context.view(num_seqs, -1, 2, num_kv_heads, head_dim)
    key, value = context.permute(2, 0, 3, 1, 4).unbind()
    grouped = query.view(num_seqs, num_kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=contexts.bias.to(query.dtype), scale=scaling
    )
    return attended.reshape(num_seqs, num_heads, head_dim)


def _attend_to_span(query: Tensor, blocks: Tensor, span: Span, scaling: float) -> Tensor:
    """Each key/value head is a batch of its own, seen by the heads of its group.

    Args:
        query: [queries, heads, head_dim].
        blocks: a layer's cache.

    Returns:
        [queries, heads, head_dim]
    """
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = blocks.shape[3]
    group = num_heads // num_kv_heads
    context = blocks.index_select(0, span.blocks).flatten(0, 1)[: span.context_len]
    key, value = context.permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, group, -1, -1).unbind()
    grouped = query.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=span.mask, scale=scaling)
    return attended.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
