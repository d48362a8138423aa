"""A linear layer for the CPU: its weights packed once into the order in which the processor reads them."""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer that is up to several times faster at the few rows of a decode step.

    `F.linear` hands oneDNN the plain matrix, which it reorders in every call, or multiplies slowly; torch's
    own inductor packs weights when it freezes a model, with these same operators.
    """

    # The row count that the layout is chosen for: no other from 1 to 256 is better at any number of rows, on
    # processors with AVX2 and with AVX-512.
    _ROWS = 64

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


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of a type there, and the processor computes in it."""
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
