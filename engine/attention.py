"""Paged attention: each token attends to its own sequence's tokens, wherever their blocks lie.

A step's tokens come packed, one sequence behind the other, without padding. transformers' Llama calls
`paged_attention` in every layer; the step's `AttentionBatch` reaches it as a keyword argument of the
model's forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface


@dataclass(frozen=True)
class Span:
    """One sequence's part of a step."""

    start: int
    """Its first query among the step's tokens."""
    end: int
    blocks: slice | Tensor
    """Its blocks in the cache: a slice where they lie side by side (read in place), else their numbers."""
    context_len: int
    """Tokens to attend to: those computed before and those of this step."""
    mask: Tensor | None
    """[queries, context_len], True where a query may look; None if it may look at all."""


@dataclass(frozen=True)
class AttentionBatch:
    """Where a step's keys and values go, and what its queries see."""

    kv_cache: list[tuple[Tensor, Tensor]]
    """For each layer its keys and values, each [blocks, block_size, kv_heads, head_dim]."""
    slots: Tensor
    """[tokens] The place of each token's key and value in the cache: block * block_size + offset."""
    spans: list[Span]


def make_span(
    start: int, num_queries: int, context_len: int, block_table: list[int], device: torch.device
) -> Span:
    """The span of a sequence whose last `num_queries` tokens are the step's tokens from `start` on.

    Args:
        block_table: the blocks that hold the `context_len` tokens, in order.
    """
    first, last = block_table[0], block_table[-1]
    blocks: slice | Tensor
    if block_table == list(range(first, last + 1)):
        blocks = slice(first, last + 1)
    else:
        blocks = torch.tensor(block_table, device=device)
    mask = None
    if num_queries > 1:
        mask = torch.ones(num_queries, context_len, dtype=torch.bool, device=device)
        mask = mask.tril(context_len - num_queries)
    return Span(start, start + num_queries, blocks, context_len, mask)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    batch: AttentionBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Stores a step's keys and values, and attends.

    Args:
        module: the layer, which knows its number.
        query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].

    Returns:
        [1, tokens, heads, head_dim], and no weights.
    """
    keys, values = batch.kv_cache[module.layer_idx]  # type: ignore[index]
    keys.flatten(0, 1).index_copy_(0, batch.slots, key[0].transpose(0, 1))
    values.flatten(0, 1).index_copy_(0, batch.slots, value[0].transpose(0, 1))
    queries = query[0].transpose(0, 1)
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for span in batch.spans:
        context = keys[span.blocks].flatten(0, 1)[: span.context_len]
        content = values[span.blocks].flatten(0, 1)[: span.context_len]
        output[span.start : span.end] = _attend(
            queries[span.start : span.end], context, content, span.mask, scaling
        )
    return output.unsqueeze(0), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Grouped-query attention of one sequence, without repeating its keys for the heads that share them.

    Args:
        query: [queries, heads, head_dim]; key, value: [context, kv_heads, head_dim].

    Returns:
        [queries, heads, head_dim]
    """
    num_queries, num_heads, head_dim = query.shape
    context_len, num_kv_heads, _ = key.shape
    group = num_heads // num_kv_heads
    if num_queries == 1:  # the heads of a group, as queries that see all
        grouped = query.view(1, num_kv_heads, group, head_dim)
        key, value = key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
    else:
        grouped = query.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        shape = (num_kv_heads, group, context_len, head_dim)
        key, value = (x.transpose(0, 1).unsqueeze(1).expand(shape) for x in (key, value))
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    if num_queries == 1:
        return attended.reshape(1, num_heads, head_dim)
    return attended.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


AttentionInterface.register("paged", paged_attention)
