"""The Triton kernels equal the plain functions: on a GPU compiled, elsewhere in Triton's interpreter."""

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine import layer_kernels, ops
from engine.attention import Contexts, plain_decode_attention
from engine.decode_attention import decode_attention
from engine.sequence import BLOCK_SIZE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# The interpreter is slow, and has no processors by which to choose the number of splits.
SPLITS = [1, 4, None] if DEVICE == "cuda" else [1, 4]
NUM_SEQS, LONGEST, NUM_BLOCKS = ((1, 3, 40), 2000, 400) if DEVICE == "cuda" else ((1, 5), 300, 60)
ROWS = pytest.mark.parametrize("tokens", [1, 5])


def random_tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@TYPES
@ROWS
@pytest.mark.parametrize("size", [64, 96, 4096])
def test_add_norm(dtype: torch.dtype, tokens: int, size: int) -> None:
    norm = LlamaRMSNorm(size, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data += random_tensor(size, dtype=dtype)
    residual, delta = random_tensor(tokens, size, dtype=dtype), random_tensor(tokens, size, dtype=dtype) * 2
    total = residual + delta
    output = layer_kernels.add_norm(residual, delta, norm.weight, norm.variance_epsilon)
    assert_close(residual, total, dtype)  # the interpreter cuts bfloat16 off where a GPU rounds it
    assert_close(output, norm(total), dtype)


@TYPES
@ROWS
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (6, 1, 24), (32, 8, 128)])
def test_rotate_and_store(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    packed = random_tensor(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    cos, sin = random_tensor(2, tokens, head_dim, dtype=dtype)
    slots = torch.tensor(random.Random(0).sample(range(6 * BLOCK_SIZE), tokens), device=DEVICE)
    caches = [torch.zeros(6, BLOCK_SIZE, 2, kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in "ab"]
    expected = packed.clone().cpu()
    queries = ops.rotate_and_store(expected, cos.cpu(), sin.cpu(), slots.cpu(), plain := caches[0].cpu())
    layer_kernels.rotate_and_store(packed, cos, sin, slots, caches[1])
    assert_close(packed[:, :heads].cpu(), queries, dtype)
    assert_close(caches[1].cpu(), plain, dtype)
    assert torch.equal(caches[1].cpu() == 0, plain == 0)


@TYPES
@ROWS
@pytest.mark.parametrize("size", [160, 14_336])
def test_silu_mul(dtype: torch.dtype, tokens: int, size: int) -> None:
    gate_up = random_tensor(tokens, 2 * size, dtype=dtype)
    assert_close(layer_kernels.silu_mul(gate_up).cpu(), ops.silu_mul(gate_up.cpu()), dtype)


@TYPES
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 1), (32, 8), (8, 8)])
def test_decode_attention_over_random_block_tables(
    dtype: torch.dtype, splits: int | None, num_heads: int, num_kv_heads: int
) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply matrices in bfloat16")
    generator = random.Random(0)
    blocks = random_tensor(NUM_BLOCKS, BLOCK_SIZE, 2, num_kv_heads, 64, dtype=dtype)
    for num_seqs in NUM_SEQS:
        lens = [generator.choice([1, 15, 16, 17, 64, 65, LONGEST]) for _ in range(num_seqs)]
        tables = [generator.sample(range(NUM_BLOCKS), -(-n // BLOCK_SIZE)) for n in lens]
        width = max(map(len, tables))
        padded = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
        contexts = Contexts(
            slice(0, num_seqs), padded.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        )
        packed = random_tensor(num_seqs, num_heads + 2 * num_kv_heads, 64, dtype=dtype)
        query = packed[:, :num_heads]
        expected = plain_decode_attention(query.double(), blocks.double(), contexts, 0.125)
        output = decode_attention(query, blocks, contexts, 0.125, splits)
        for row in range(num_seqs):
            assert_close(output[row], expected[row], dtype)
