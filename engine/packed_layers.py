"""Llama's layers for the CPU: weights packed once into the order in which the processor reads them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from engine.attention import AttentionBatch, attend


class PackedLinear(nn.Module):
    """A linear layer in float32 that is several times faster at the few rows of a decode step.

    `F.linear` hands oneDNN the plain matrix, which it reorders in every call, or multiplies slowly; torch's
    own inductor packs weights when it freezes a model, with these same operators.
    """

    # The row count that the layout is chosen for: good from 2 rows to 256, no worse than others at 1.
    _ROWS = 16

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """
        Args:
            weight: [out_features, in_features]; bias: [out_features].
        """
        super().__init__()
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self._ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class PackedAttention(nn.Module):
    """Llama's attention, with one matrix for queries, keys and values: alone those of keys and values are
    too small to keep two cores busy."""

    def __init__(self, attention: LlamaAttention) -> None:
        super().__init__()
        assert attention.layer_idx is not None
        self._layer: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [part.bias for part in parts if part.bias is not None]
        self.qkv = PackedLinear(
            torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None
        )
        self.output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        batch: AttentionBatch,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, tokens, hidden_size] -> the same, and no weights.

        Args:
            position_embeddings: cosines and sines, each [1, tokens, head_dim].
        """
        heads = self.qkv(hidden_states)[0].unflatten(-1, (-1, self._head_dim))
        num_kv_heads = batch.kv_cache[self._layer].shape[3]
        num_heads = heads.shape[1] - 2 * num_kv_heads
        cos, sin = (embedding[0].unsqueeze(1) for embedding in position_embeddings)
        _rotate(heads[:, : num_heads + num_kv_heads], cos, sin)
        keys_values = heads[:, num_heads:].unflatten(1, (2, num_kv_heads))
        attended = attend(batch, self._layer, heads[:, :num_heads], keys_values, self._scaling)
        return self.output(attended.flatten(1).unsqueeze(0)), None


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding (Su et al., 2021), in place. The second half of a head's channels are the
    partners of the first, as in the weights that transformers reads.

    Args:
        heads: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim].
    """
    first, second = heads.chunk(2, dim=-1)
    partners = torch.cat((-second, first), dim=-1)
    heads.mul_(cos).addcmul_(partners, sin)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of that type."""
    return (
        dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack_layers(module: nn.Module) -> None:
    """Replaces the layers below `module` by their packed forms, and drops the plain weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        elif isinstance(child, LlamaAttention):
            setattr(module, name, PackedAttention(child))
        else:
            pack_layers(child)
