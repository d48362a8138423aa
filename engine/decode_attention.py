"""Paged attention on CUDA for sequences that decode: one query each, and as many contexts as there are.

A Triton kernel reads each block of the cache in place, once for all query heads that share it. A context is
split among several programs, so that a single long one keeps the whole GPU busy, and their parts are joined
afterwards ("Flash-Decoding", Dao, Haziza, Massa, Sizov, 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention import Contexts

_TOKENS = 64
"""Of a context, read at a time."""
_MIN_ROWS = 16
"""The smallest number of rows that the matrix units multiply."""


def decode_attention(
    query: Tensor, blocks: Tensor, contexts: Contexts, scaling: float, splits: int | None = None
) -> Tensor:
    """
    Args:
        query: [sequences, heads, head_dim], each sequence's heads side by side.
        blocks: a layer's cache, [blocks, block_size, 2, kv_heads, head_dim].
        splits: parts of a context, a power of two; None: as many as keep the GPU busy.

    Returns:
        [sequences, heads, head_dim]
    """
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, _, num_kv_heads, _ = blocks.shape
    group = num_heads // num_kv_heads
    # By the sizes that graphs have, so that a step without one needs no kernel but theirs.
    splits = splits or choose_splits(triton.next_power_of_2(num_seqs) * num_kv_heads, query.device)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    parts, stats = output, None
    if splits > 1:
        parts = torch.empty(num_seqs, num_heads, splits, head_dim, dtype=torch.float32, device=query.device)
        stats = torch.empty(num_seqs, num_heads, splits, 2, dtype=torch.float32, device=query.device)
    _attend_to_part[(num_seqs, num_kv_heads, splits)](
        query, blocks, contexts.block_tables, contexts.lens, parts, stats,
        scaling, query.stride(0), contexts.block_tables.stride(0),
        KV_HEADS=num_kv_heads, GROUP=group, ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TOKENS=_TOKENS, SPLITS=splits,
    )  # fmt: skip
    if splits > 1:
        _join_parts[(num_seqs, num_heads)](parts, stats, output, HEAD_DIM=head_dim, SPLITS=splits)
    return output


def choose_splits(programs: int, device: torch.device) -> int:
    """Into how many parts, a power of two, to cut the work of so many programs to keep a GPU busy."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(min(64, triton.next_power_of_2(max(1, 2 * processors // programs))))


@triton.jit(do_not_specialize=["table_stride"])  # it changes from step to step: one kernel for all
def _attend_to_part(
    query, blocks, block_tables, lens, parts, stats,
    scaling, query_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One sequence, one key/value head with the query heads that share it, one part of the context."""
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + seq)
    part_len = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    start = split * part_len
    end = tl.minimum(start + part_len, length)

    row = tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    head = seq * KV_HEADS * GROUP + kv_head * GROUP + row
    is_head = row < GROUP
    q_at = query + seq * query_stride + (kv_head * GROUP + row)[:, None] * HEAD_DIM + channel[None, :]
    q = tl.load(q_at, mask=is_head[:, None], other=0.0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        is_token = token < end
        block = tl.load(block_tables + seq * table_stride + token // BLOCK_SIZE, mask=is_token, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        at = blocks + (slot * 2 * KV_HEADS + kv_head)[:, None] * HEAD_DIM + channel[None, :]
        key = tl.load(at, mask=is_token[:, None], other=0.0)
        value = tl.load(at + KV_HEADS * HEAD_DIM, mask=is_token[:, None], other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision="ieee") * scaling
        score = tl.where(is_token[None, :], score, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - new_highest[:, None])
        kept = tl.exp(highest - new_highest)
        total = total * kept + tl.sum(weight, 1)
        attended = attended * kept[:, None]
        attended += tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        highest = new_highest
    part = head * SPLITS + split
    if SPLITS == 1:
        attended /= total[:, None]
    else:
        tl.store(stats + part * 2, highest, mask=is_head)
        tl.store(stats + part * 2 + 1, total, mask=is_head)
    part_at = parts + part[:, None] * HEAD_DIM + channel[None, :]
    tl.store(part_at, attended.to(parts.dtype.element_ty), mask=is_head[:, None])


@triton.jit
def _join_parts(parts, stats, output, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One query head: the parts of its context, weighted by their shares of the softmax."""
    head = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    part = head * SPLITS + tl.arange(0, SPLITS)
    channel = tl.arange(0, HEAD_DIM)
    highest = tl.load(stats + part * 2)
    share = tl.exp(highest - tl.max(highest, 0))
    total = tl.sum(tl.load(stats + part * 2 + 1) * share, 0)
    attended = tl.load(parts + part[:, None] * HEAD_DIM + channel[None, :])
    joined = tl.sum(attended * share[:, None], 0) / total
    tl.store(output + head * HEAD_DIM + channel, joined.to(output.dtype.element_ty))
