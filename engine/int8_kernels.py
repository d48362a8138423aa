"""Matrix products with weights of int8 as Triton kernels: they come from memory as such, and become the type
of the input in registers only.

A step of few tokens takes as long as the weights take to be read. Where there are too few rows of them to
keep the GPU busy, each is split among several programs, and the parts are added afterwards, always in the
same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.decode_attention import choose_splits

_MANY = 64
"""Tokens beyond which the weights are multiplied for longer than they are read: in larger tiles."""
_MOST_SPLITS = 16
_CHANNELS = 1024
"""Of a token, added by a program."""


def linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, splits: int | None = None
) -> Tensor:
    """
    Args:
        x: [tokens, in_features], contiguous.
        weight: [out_features, in_features], int8, contiguous.
        scale, bias: [out_features].
        splits: parts of a row of `weight`; None: as many as keep the GPU busy.

    Returns:
        [tokens, out_features]
    """
    (tokens, size_in), size_out = x.shape, len(weight)
    output = torch.empty(tokens, size_out, dtype=x.dtype, device=x.device)
    if not tokens:
        return output
    is_many = tokens > _MANY
    rows = 128 if is_many else 64
    columns = (128 if is_many else 256) // x.element_size()
    padded = 128 if is_many else max(16, triton.next_power_of_2(tokens))
    programs = triton.cdiv(size_out, rows)
    if splits is None:
        steps = triton.next_power_of_2(triton.cdiv(size_in, columns))
        splits = min(choose_splits(programs * triton.cdiv(tokens, padded), x.device), steps, _MOST_SPLITS)
    parts = (
        torch.empty(splits, tokens, size_out, dtype=torch.float32, device=x.device) if splits > 1 else output
    )
    _multiply[(triton.cdiv(tokens, padded), programs, splits)](
        x, weight, scale, bias, parts, tokens, size_in, size_out,
        TOKENS=padded, ROWS=rows, COLUMNS=columns, SPLITS=splits,
        num_warps=8 if is_many else 4, num_stages=3 if is_many else 4,
    )  # fmt: skip
    if splits > 1:
        _add[(tokens, triton.cdiv(size_out, _CHANNELS))](
            parts, scale, bias, output, size_out, CHANNELS=_CHANNELS, SPLITS=splits
        )
    return output


@triton.jit(do_not_specialize=["tokens"])  # it changes from step to step: one kernel for all
def _multiply(
    x, weight, scale, bias, output, tokens, size_in, size_out,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Some rows of the weights, or a part of them, with some tokens. Weights are the left factor: the matrix
    units take that one from registers, where it has been converted."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    is_token, is_row = token < tokens, row < size_out
    part_len = tl.cdiv(tl.cdiv(size_in, SPLITS), COLUMNS) * COLUMNS
    start = split * part_len
    end = tl.minimum(start + part_len, size_in)

    column = tl.arange(0, COLUMNS)
    x_at = x + token.to(tl.int64)[None, :] * size_in + column[:, None]
    weight_at = weight + row.to(tl.int64)[:, None] * size_in + column[None, :]
    product = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(start, end, COLUMNS):
        is_column = first + column < end
        w = tl.load(weight_at + first, mask=is_row[:, None] & is_column[None, :], other=0)
        t = tl.load(x_at + first, mask=is_token[None, :] & is_column[:, None], other=0.0)
        product = tl.dot(w.to(t.dtype), t, product, input_precision="ieee")
    is_output = is_token[None, :] & is_row[:, None]
    at = token.to(tl.int64)[None, :] * size_out + row[:, None]
    if SPLITS == 1:
        product *= tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            product += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
        tl.store(output + at, product.to(output.dtype.element_ty), mask=is_output)
    else:
        tl.store(output + split.to(tl.int64) * tokens * size_out + at, product, mask=is_output)


@triton.jit
def _add(parts, scale, bias, output, size_out, CHANNELS: tl.constexpr, SPLITS: tl.constexpr):
    """A part of one token's channels."""
    token, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens, is_channel = tl.num_programs(0).to(tl.int64), channel < size_out
    product = tl.zeros([CHANNELS], tl.float32)
    for split in range(SPLITS):
        at = parts + (split * tokens + token) * size_out + channel
        product += tl.load(at, mask=is_channel, other=0.0)
    product *= tl.load(scale + channel, mask=is_channel, other=0.0).to(tl.float32)
    if bias is not None:
        product += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(output + token * size_out + channel, product.to(output.dtype.element_ty), mask=is_channel)
