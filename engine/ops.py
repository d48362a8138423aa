"""What lies between the matrices of a layer: in plain PyTorch, and on CUDA as one kernel each.

Where a step is of one token, and `fused` says so, that can be a part of the matrix's own kernel instead.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def norm_linear(
    residual: Tensor, delta: Tensor, norm: LlamaRMSNorm, matrix: nn.Module, *, fused: bool
) -> tuple[Tensor, Tensor]:
    """The product of a linear layer with what `add_norm` gives.

    Returns:
        The residual stream with `delta` added, maybe in place, and [tokens, out_features].
    """
    if fused:
        from engine import vector_kernels  # Triton comes with torch for CUDA only

        return vector_kernels.norm_linear(residual, delta, norm.weight, norm.variance_epsilon, matrix)
    return residual, matrix(add_norm(residual, delta, norm))


def linear(x: Tensor, matrix: nn.Module, *, fused: bool) -> Tensor:
    """[tokens, in_features] -> [tokens, out_features]"""
    if fused:
        from engine import vector_kernels

        return vector_kernels.linear(x, matrix)
    y: Tensor = matrix(x)
    return y


def silu_linear(gate_up: Tensor, matrix: nn.Module, *, fused: bool) -> Tensor:
    """[tokens, 2 * in_features] -> [tokens, out_features]: the product of a linear layer with `silu_mul`."""
    if fused:
        from engine import vector_kernels

        return vector_kernels.silu_linear(gate_up, matrix)
    y: Tensor = matrix(silu_mul(gate_up))
    return y


def add_norm(residual: Tensor, delta: Tensor, norm: LlamaRMSNorm) -> Tensor:
    """Adds `delta` to `residual` in place, and gives the sum's RMS norm (Zhang, Sennrich, 2019).

    Args:
        residual, delta: [tokens, hidden_size].

    Returns:
        [tokens, hidden_size]
    """
    if residual.is_cuda:
        from engine import layer_kernels

        return layer_kernels.add_norm(residual, delta, norm.weight, norm.variance_epsilon)
    return F.rms_norm(residual.add_(delta), norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate_and_store(heads: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of queries and keys, in place; keys and values then go to
    the cache. The second half of a head's channels are the partners of the first, as in the weights that
    transformers reads.

    Args:
        heads: [tokens, heads + 2 * kv_heads, head_dim]: queries, keys, values.
        cos, sin: [tokens, head_dim]; the first half of `sin` is negated.
        slots, cache: as in AttentionBatch, of one layer.

    Returns:
        The queries, [tokens, heads, head_dim], a part of `heads`.
    """
    num_kv_heads = cache.shape[3]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    if heads.is_cuda:
        from engine import layer_kernels

        layer_kernels.rotate_and_store(heads, cos, sin, slots, cache)
    else:
        rotated = heads[:, : num_heads + num_kv_heads]
        partners = rotated.roll(rotated.shape[-1] // 2, -1)
        rotated.mul_(cos.unsqueeze(1)).addcmul_(partners, sin.unsqueeze(1))
        cache.flatten(0, 1).index_copy_(0, slots, heads[:, num_heads:].view(len(heads), 2, num_kv_heads, -1))
    return heads[:, :num_heads]


def silu_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * n] -> [tokens, n]: the second half, gated by the first (Shazeer, 2020, "SwiGLU")."""
    if gate_up.is_cuda:
        from engine import layer_kernels

        return layer_kernels.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
