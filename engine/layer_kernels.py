"""What lies between the matrices of a layer, as one Triton kernel each: on CUDA a launch costs more than most
of them compute. The functions are those of `engine.ops`, which says what they do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 1024
"""Of a row, computed by a program."""


def add_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """
    Args:
        residual, delta: [tokens, size], contiguous.
        weight: [size].

    Returns:
        [tokens, size]
    """
    num_tokens, size = residual.shape
    output = torch.empty_like(residual)
    if num_tokens:
        padded = triton.next_power_of_2(size)
        _add_norm[(num_tokens,)](
            residual, delta, weight, output, size, eps, PADDED=padded, num_warps=min(8, max(1, padded // 256))
        )
    return output


def rotate_and_store(heads: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> None:
    """
    Args:
        heads: [tokens, heads + 2 * kv_heads, head_dim], contiguous.
        cos, sin: [tokens, head_dim], contiguous; the first half of `sin` is negated.
        slots: [tokens].
        cache: [blocks, block_size, 2, kv_heads, head_dim].
    """
    num_tokens, num_heads, head_dim = heads.shape
    _rotate_and_store[(num_tokens, num_heads)](
        heads, cos, sin, slots, cache,
        KV_HEADS=cache.shape[3], HALF=head_dim // 2, PADDED=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )  # fmt: skip


def silu_mul(gate_up: Tensor) -> Tensor:
    """
    Args:
        gate_up: [tokens, 2 * size], contiguous.

    Returns:
        [tokens, size]
    """
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        _silu_mul[(num_tokens, triton.cdiv(size, _CHANNELS))](gate_up, output, size, CHANNELS=_CHANNELS)
    return output


@triton.jit
def _add_norm(residual, delta, weight, output, size, eps, PADDED: tl.constexpr):
    """One token. The sum is rounded to the stream's type before its norm is taken, as transformers does."""
    channel = tl.arange(0, PADDED)
    is_channel = channel < size
    at = tl.program_id(0).to(tl.int64) * size + channel
    dtype: tl.constexpr = residual.dtype.element_ty
    x = tl.load(residual + at, mask=is_channel, other=0.0).to(tl.float32)
    x = (x + tl.load(delta + at, mask=is_channel, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(residual + at, x, mask=is_channel)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)).to(dtype).to(tl.float32)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(output + at, normed * scale, mask=is_channel)


@triton.jit
def _rotate_and_store(
    heads, cos, sin, slots, cache, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr
):
    """One head of one token. Queries come first, then keys, then values."""
    token, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    channel = tl.arange(0, PADDED)
    is_channel = channel < HALF
    at = heads + (token * num_heads + head) * 2 * HALF + channel
    first = tl.load(at, mask=is_channel, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=is_channel, other=0.0).to(tl.float32)
    kv_head = head - (num_heads - 2 * KV_HEADS)
    if kv_head < KV_HEADS:
        angle = token * 2 * HALF + channel
        x, y = first, second
        first = x * tl.load(cos + angle, mask=is_channel, other=0.0).to(tl.float32)
        first += y * tl.load(sin + angle, mask=is_channel, other=0.0).to(tl.float32)
        second = y * tl.load(cos + angle + HALF, mask=is_channel, other=0.0).to(tl.float32)
        second += x * tl.load(sin + angle + HALF, mask=is_channel, other=0.0).to(tl.float32)
    if kv_head < 0:
        tl.store(at, first, mask=is_channel)
        tl.store(at + HALF, second, mask=is_channel)
    else:
        slot = tl.load(slots + token)
        to = cache + (slot * 2 * KV_HEADS + kv_head) * 2 * HALF + channel
        tl.store(to, first, mask=is_channel)
        tl.store(to + HALF, second, mask=is_channel)


@triton.jit
def _silu_mul(gate_up, output, size, CHANNELS: tl.constexpr):
    """A part of one token's channels."""
    token, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < size
    gate = tl.load(gate_up + token * 2 * size + channel, mask=is_channel, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * size + size + channel, mask=is_channel, other=0.0).to(tl.float32)
    gated = (gate / (1 + tl.exp(-gate))).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + token * size + channel, gated * up, mask=is_channel)
