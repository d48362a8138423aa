"""Matrix products of a step of one token as Triton kernels, each with what comes before it in the layer.

Such a step takes as long as the weights take to be read, and a kernel in between, however small, makes the
memory wait. So each program that multiplies some rows also computes the vector that it multiplies them with.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_ROWS = 4
"""Of a matrix, multiplied by a program; twice as many where the vector takes long to compute."""
_COLUMNS = 1024
"""Of them, read at a time."""


def linear(x: Tensor, matrix: nn.Module) -> Tensor:
    """[1, in_features] -> [1, out_features]

    Args:
        matrix: a linear layer with weights of the type of `x`, or of int8.
    """
    return _launch(matrix, x, "nothing")


def norm_linear(
    residual: Tensor, delta: Tensor, gain: Tensor, eps: float, matrix: nn.Module
) -> tuple[Tensor, Tensor]:
    """`layer_kernels.add_norm`, and the product with what it gives. The residual stream stays as it is.

    Args:
        residual, delta: [1, in_features].
        gain: [in_features], the norm's weights.

    Returns:
        The sum of residual and delta, [1, in_features], and the product, [1, out_features].
    """
    total = torch.empty_like(residual)
    return total, _launch(matrix, residual, "norm", delta, gain, total, eps)


def silu_linear(gate_up: Tensor, matrix: nn.Module) -> Tensor:
    """`layer_kernels.silu_mul`, and the product with it: [1, 2 * in_features] -> [1, out_features]"""
    return _launch(matrix, gate_up, "silu")


def _launch(
    matrix: nn.Module,
    x: Tensor,
    before: str,
    delta: Tensor | None = None,
    gain: Tensor | None = None,
    total: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    layer: Any = matrix
    weight, bias, scale = layer.weight, layer.bias, getattr(layer, "scale", None)
    size_out, size_in = weight.shape
    output = torch.empty(1, size_out, dtype=x.dtype, device=x.device)
    rows = 2 * _ROWS if before == "silu" else _ROWS
    _multiply[(triton.cdiv(size_out, rows),)](
        x, delta, gain, weight, scale, bias, total, output, size_in, size_out, eps,
        BEFORE=before, ROWS=rows, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return output


@triton.jit
def _multiply(
    x, delta, gain, weight, scale, bias, total, output, size_in, size_out, eps,
    BEFORE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows. The norm's divisor is known at their end only, and divides the product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < size_out
    dtype: tl.constexpr = x.dtype.element_ty
    weight_at = weight + row.to(tl.int64)[:, None] * size_in
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, size_in, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_column = column < size_in
        is_weight = is_row[:, None] & is_column[None, :]
        w = tl.load(weight_at + column[None, :], mask=is_weight, other=0, eviction_policy="evict_first")
        t = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
        if BEFORE == "norm":
            t += tl.load(delta + column, mask=is_column, other=0.0).to(tl.float32)
            t = t.to(dtype).to(tl.float32)
            if tl.program_id(0) == 0:
                tl.store(total + column, t.to(dtype), mask=is_column)
            squares += t * t
            t *= tl.load(gain + column, mask=is_column, other=0.0).to(tl.float32)
        elif BEFORE == "silu":
            t = (t / (1 + tl.exp(-t))).to(dtype).to(tl.float32)
            t *= tl.load(x + size_in + column, mask=is_column, other=0.0).to(tl.float32)
        product += w.to(tl.float32) * t[None, :]
    y = tl.sum(product, 1)
    if BEFORE == "norm":
        y *= tl.rsqrt(tl.sum(squares, 0) / size_in + eps)
    if scale is not None:
        y *= tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + row, y.to(dtype), mask=is_row)
