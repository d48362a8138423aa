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
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface


@dataclass(frozen=True)
class Span:
    """One sequence's part of a step."""

    queries: slice
    """Its tokens among the step's."""
    context: slice
    """The tokens it attends to: those computed before and those of this step, in the cache, or, if its
    blocks do not lie side by side there, in the copy that is made of such blocks."""
    is_copied: bool
    mask: Tensor | None
    """[queries, context], True where a query may look; None if it may look at all."""


@dataclass(frozen=True)
class Contexts:
    """What queries see, one a sequence, as tensors: for CUDA, whose graphs read them at every step."""

    block_tables: Tensor
    """[sequences, blocks], int32; what stands behind a sequence's last block is not read."""
    lens: Tensor
    """[sequences], int32, tokens."""


@dataclass(frozen=True)
class AttentionBatch:
    """Where a step's keys and values go, and what its queries see."""

    kv_cache: list[Tensor]
    """One for each layer: [blocks, block_size, 2, kv_heads, head_dim], keys and values."""
    slots: Tensor
    """[tokens] The place of each token in the cache: block * block_size + offset."""
    copied_blocks: Tensor
    """The blocks of all sequences whose blocks do not lie side by side, one sequence behind the other."""
    spans: list[Span]
    contexts: Contexts | None = None
    """Of the step's first tokens, those that no span covers."""


def plan_spans(
    parts: list[tuple[int, int, list[int]]], start: int, block_size: int, device: torch.device
) -> tuple[list[Span], Tensor]:
    """Finds out where each sequence of a step has its context.

    Args:
        parts: for each sequence its number of tokens in the step, its number of tokens then, and the
            blocks that hold those, in order.
        start: the first one's first token in the step.

    Returns:
        The spans, and the blocks to copy.
    """
    spans: list[Span] = []
    copied: list[int] = []
    for num_queries, context_len, blocks in parts:
        is_copied = blocks != list(range(blocks[0], blocks[0] + len(blocks)))
        first = (len(copied) if is_copied else blocks[0]) * block_size
        if is_copied:
            copied += blocks
        mask = _causal_mask(num_queries, context_len, device) if num_queries > 1 else None
        queries = slice(start, start + num_queries)
        spans.append(Span(queries, slice(first, first + context_len), is_copied, mask))
        start += num_queries
    return spans, torch.tensor(copied, dtype=torch.long, device=device)


def _causal_mask(num_queries: int, context_len: int, device: torch.device) -> Tensor:
    if device.type == "cuda":  # a mask by name only, which the fast kernels know
        bias: Tensor = causal_lower_right(num_queries, context_len)
        return bias
    return torch.ones(num_queries, context_len, dtype=torch.bool).tril(context_len - num_queries)


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
    blocks = batch.kv_cache[module.layer_idx]  # type: ignore[index]
    cache = blocks.flatten(0, 1)
    cache.index_copy_(0, batch.slots, torch.stack((key[0], value[0])).permute(2, 0, 1, 3))
    copy = blocks.index_select(0, batch.copied_blocks).flatten(0, 1) if batch.spans else cache
    queries = query[0].transpose(0, 1)
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if batch.contexts is not None:
        from engine.decode_attention import decode_attention  # Triton comes with torch for CUDA only

        decoding = len(batch.contexts.lens)
        output[:decoding] = decode_attention(queries[:decoding], blocks, batch.contexts, scaling)
    for span in batch.spans:
        context = (copy if span.is_copied else cache)[span.context]
        output[span.queries] = _attend(queries[span.queries], context, span.mask, scaling)
    return output.unsqueeze(0), None


def _attend(query: Tensor, context: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Grouped-query attention of one sequence, without repeating its keys for the heads that share them.

    Args:
        query: [queries, heads, head_dim].
        context: [tokens, 2, kv_heads, head_dim], keys and values.

    Returns:
        [queries, heads, head_dim]
    """
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = context.shape[2]
    key, value = context.permute(1, 2, 0, 3).unbind()
    group = num_heads // num_kv_heads
    if num_queries == 1:  # the heads of a group, as queries that see all
        grouped = query.view(1, num_kv_heads, group, head_dim)
        attended = F.scaled_dot_product_attention(
            grouped, key.unsqueeze(0), value.unsqueeze(0), scale=scaling
        )
        return attended.reshape(1, num_heads, head_dim)
    grouped = query.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    key, value = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (key, value))
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return attended.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


AttentionInterface.register("paged", paged_attention)
