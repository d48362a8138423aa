"""A linear layer whose weights are int8, of half the memory of bfloat16's; what it computes with is not.

On CUDA it is a Triton kernel of our own. On the CPU it is an operator of torch, where NarrowLinear can't be.
What else there is, on 2026-11-24:

- torch's `_weight_int8pack_mm` on CUDA is one thread, later one warp, for each number of the output, which
  reads the weights again for each row, and copies what it is given to float32 (aten/native/cuda/int8mm.cu).
- torchao 0.18's Int8WeightOnlyConfig leaves the multiplication to torch.compile: without it, each call first
  writes the matrix in the model's type to memory (8.0 ms where F.linear took 1.2: 7168 x 1024, 1 row, CPU).
- torch's operator on the CPU is made for bfloat16; in float32 it takes 2 to 32 times as long as F.linear, at
  1 to 512 rows. In bfloat16 it takes 0.11 ms where PackedLinear in float32 takes 0.28 (1 row), 0.19 and 0.21
  (4), 0.66 and 0.52 (16), 2.8 and 2.0 (64): 7168 x 1024, 2 cores with AVX-512.

The model's head is quantized too: of the demo's next tokens 99.921% are then as in float32, else 99.925%.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 4096
"""Of a matrix, quantized at a time: what that needs beside it is small."""
_WIDTH = 16
"""Torch's operator reads so many weights at once, without a look at where a row ends."""


class Int8Linear(nn.Module):
    """Weights of a row share a scale, so that the largest is 127; activations stay as they are.

    On the CPU inputs and outputs are rounded to bfloat16, while sums are float32. What a row gives does not
    depend on how many there are beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """
        Args:
            weight: [out_features, in_features]; bias: [out_features].
        """
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        quantized, scale = quantize(weight)
        self.register_buffer("weight", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]"""
        if x.is_cuda:
            from engine import int8_kernels  # Triton comes with torch for CUDA only

            return int8_kernels.linear(x, self.weight, self.scale, self.bias)
        if x.shape[1] % _WIDTH:
            y = F.linear(x.float(), self.weight.float()) * self.scale
        else:
            y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.weight, self.scale.bfloat16())
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        weight: [rows, columns].

    Returns:
        [rows, columns], int8, and [rows], bfloat16, whose product is nearest to `weight`. Where a row is not
        all numbers, its scale is none, and so is all that comes of it.
    """
    parts = [_quantize(part) for part in torch.split(weight.detach(), _ROWS)]
    return torch.cat([quantized for quantized, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    highest = torch.linalg.vector_norm(weight, float("inf"), dim=1, dtype=torch.float32)
    scale = (highest / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    return (weight.float() / scale.unsqueeze(1)).round_().to(torch.int8), scale
