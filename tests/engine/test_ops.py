"""What lies between a layer's matrices, in plain PyTorch, against transformers' own."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.ops import add_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_the_norm_is_that_of_transformers(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    residual, delta = (scale * torch.randn(2, 5, 96)).to(dtype)
    total = residual + delta
    with torch.inference_mode():
        normed = add_norm(residual, delta, norm)
        assert normed.dtype == dtype
        assert torch.equal(residual, total)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # transformers rounds once more
        torch.testing.assert_close(normed, norm(total), rtol=tolerance, atol=tolerance)
