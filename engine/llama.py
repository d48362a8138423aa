"""Llama's forward pass over the tokens of a step, packed one sequence behind the other, without padding.

The weights are those that transformers has loaded, but matrices that read the same input are joined to one:
alone, those of keys and values are too small to keep a processor busy. What lies between two matrices is
one function of `engine.ops`.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.attention import AttentionBatch, attend
from engine.int8_linear import Int8Linear, quantize
from engine.narrow_linear import NarrowLinear, can_narrow, is_bfloat16
from engine.ops import linear, norm_linear, rotate_and_store, silu_linear
from engine.packed_linear import PackedLinear, can_pack

log = logging.getLogger("llama.engine")

_LAYERS_TOLD = 8
"""After so many of them the log says how far loading is."""


class Llama(nn.Module):
    """A Llama of any size, with the weights of transformers' and a paged KV cache."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        int8: bool = False,
    ) -> None:
        """Takes the weights out of `model`, a layer at a time: there is never a second copy of them all.

        Args:
            device, dtype: where to compute, and in which type; None: as `model` is.
            int8: whether matrices are quantized, where `model` is. The embedding is not.

        Raises:
            ValueError: if the model computes what this does not.
        """
        super().__init__()
        self.config: LlamaConfig = model.config
        if self.config.hidden_act != "silu":
            raise ValueError(f"the model's activation is {self.config.hidden_act}; only silu is computed")
        self.device = device or model.device
        self.dtype = dtype or model.dtype
        # First: where the head has the same weights, they have moved with it.
        self.embedding: Any = model.model.embed_tokens.to(self.device, self.dtype)
        joined = partial(join, device=self.device, dtype=self.dtype, int8=int8)
        self.head = joined(model.lm_head)
        self.cos: Tensor
        self.sin: Tensor
        for name, table in zip(("cos", "sin"), rotary_tables(model), strict=True):
            self.register_buffer(name, table.to(self.device, self.dtype), persistent=False)
        self.layers = nn.ModuleList()
        num_layers = len(model.model.layers)
        while model.model.layers:
            layer = Layer(model.model.layers.pop(0), joined)
            self.layers.append(layer.to(self.device, self.dtype))
            if len(self.layers) % _LAYERS_TOLD == 0:
                log.info("%d of %d layers are loaded", len(self.layers), num_layers)
        self.norm: Any = model.model.norm.to(self.device, self.dtype)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kept: Tensor | None = None,
        *,
        fused: bool = False,
    ) -> Tensor:
        """Stores the keys and values of a step's tokens, and computes the logits that follow some of them.

        Args:
            token_ids, positions: [tokens].
            kept: [rows], which of the tokens those are; None: all.
            fused: for one token on CUDA: whether by the kernels of `engine.vector_kernels`.

        Returns:
            [rows, vocab_size], float32.
        """
        delta = self.embedding(token_ids)
        residual = torch.zeros_like(delta)
        cos, sin = self.cos[positions], self.sin[positions]
        last = self.layers[-1]
        for layer, cache in zip(self.layers, batch.kv_cache, strict=True):
            # Of most of a prompt, the last layer's keys and values are wanted, and nothing else of it.
            rows = kept if layer is last else None
            residual, delta = layer(residual, delta, cos, sin, batch, cache, rows, fused=fused)
        _, logits = norm_linear(residual, delta, self.norm, self.head, fused=fused)
        return logits.float()


def rotary_tables(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` as `rotate_and_store` wants them, of each position: [positions, head_dim], float32."""
    positions = torch.arange(model.config.max_position_embeddings, device=model.device)
    cos, sin = (table[0] for table in model.model.rotary_emb(positions.float(), positions.unsqueeze(0)))
    sin[:, : sin.shape[1] // 2].neg_()
    return cos, sin


class Layer(nn.Module):
    """Attention and MLP. What they compute is added to the residual stream by whoever reads it next."""

    def __init__(self, layer: LlamaDecoderLayer, joined: Callable[..., nn.Module]) -> None:
        """
        Args:
            joined: makes one linear layer of several, as `join` does.
        """
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self.attention_norm = layer.input_layernorm
        self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = joined(attention.o_proj)
        self.mlp_norm = layer.post_attention_layernorm
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        self.down = joined(mlp.down_proj)

    def forward(
        self,
        residual: Tensor,
        delta: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: AttentionBatch,
        cache: Tensor,
        kept: Tensor | None,
        *,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            residual: [tokens, hidden_size], the residual stream; it may be changed.
            delta: [tokens, hidden_size], what the layer before has computed.
            cos, sin: as in rotate_and_store.
            cache: this layer's, as in AttentionBatch.
            kept, fused: as in Llama.forward.

        Returns:
            Of the tokens that are kept, the residual stream, and what is to be added to it next.
        """
        residual, heads = norm_linear(residual, delta, self.attention_norm, self.qkv, fused=fused)
        heads = heads.view(len(delta), -1, self._head_dim)
        queries = rotate_and_store(heads, cos, sin, batch.slots, cache)
        attended = attend(queries, cache, batch, self._scaling).flatten(1)
        if kept is not None:
            residual, attended = residual[kept], attended[kept]
        delta = linear(attended, self.output, fused=fused)
        residual, gate_up = norm_linear(residual, delta, self.mlp_norm, self.gate_up, fused=fused)
        return residual, silu_linear(gate_up, self.down, fused=fused)


def join(*layers: nn.Linear, device: torch.device, dtype: torch.dtype, int8: bool) -> nn.Module:
    """One linear layer that gives what `layers` give, side by side.

    Args:
        device, dtype: where it will compute, and in which type.
        int8: as in Llama.
    """
    weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    bias = torch.cat(biases).to(device, dtype) if biases else None
    if int8:
        if can_narrow(torch.int8, device, dtype):
            return NarrowLinear(*quantize(weight), bias)
        return Int8Linear(weight, bias).to(device, dtype)
    if can_narrow(torch.bfloat16, device, dtype) and is_bfloat16(weight):
        return NarrowLinear(weight.bfloat16(), None, bias)
    weight = weight.to(device, dtype)
    if can_pack(device, dtype):
        return PackedLinear(weight, bias)
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined
