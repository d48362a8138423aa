"""The Triton kernels equal the plain functions: on a GPU compiled, elsewhere in Triton's interpreter."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine import layer_kernels, ops, vector_kernels
from engine.attention import Contexts, plain_decode_attention
from engine.decode_attention import decode_attention
from engine.decode_graphs import DecodeInputs
from engine.int8_linear import Int8Linear
from engine.model_runner import load_model
from engine.packed_linear import PackedLinear
from engine.scheduler import Chunk
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from tests.models import SHAPES, make_model

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


@pytest.fixture(params=["float32", "bfloat16", "int8", "with a bias"])
def matrix(request: pytest.FixtureRequest) -> nn.Linear | Int8Linear:
    """[1100] -> [70]"""
    dtype = torch.float32 if request.param == "float32" else torch.bfloat16
    bias = random_tensor(70, dtype=dtype) if request.param == "with a bias" else None
    weight = random_tensor(70, 1100, dtype=dtype)
    if request.param == "int8":
        return Int8Linear(weight, bias)
    linear = nn.Linear(1100, 70, bias=bias is not None)
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias) if bias is not None else bias
    return linear


def product(matrix: nn.Linear | Int8Linear, x: Tensor) -> Tensor:
    """What it should give, in float64."""
    weight = matrix.weight.double()
    if isinstance(matrix, Int8Linear):
        weight *= matrix.scale.double().unsqueeze(1)
    return x.double() @ weight.T + (0 if matrix.bias is None else matrix.bias.double())


def dtype_of(matrix: nn.Linear | Int8Linear) -> torch.dtype:
    return torch.bfloat16 if isinstance(matrix, Int8Linear) else matrix.weight.dtype


@torch.inference_mode()
def test_a_vectors_products(matrix: nn.Linear | Int8Linear) -> None:
    dtype = dtype_of(matrix)
    x, delta = random_tensor(1, 1100, dtype=dtype), random_tensor(1, 1100, dtype=dtype) * 2
    assert_close(vector_kernels.linear(x, matrix), product(matrix, x), dtype)

    norm = LlamaRMSNorm(1100, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data += random_tensor(1100, dtype=dtype)
    before = x.clone()
    total, output = vector_kernels.norm_linear(x, delta, norm.weight, norm.variance_epsilon, matrix)
    assert torch.equal(x, before)
    assert_close(total, x + delta, dtype)
    assert_close(output, product(matrix, norm.double()((x + delta).double())), dtype)

    gate_up = random_tensor(1, 2200, dtype=dtype)
    expected = product(matrix, ops.silu_mul(gate_up.cpu()).to(DEVICE))
    assert_close(vector_kernels.silu_linear(gate_up, matrix), expected, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_token_alone_has_the_logits_it_has_among_others(shape: str, tmp_path: Path) -> None:
    dtype = torch.float32
    model = load_model(make_model(tmp_path, shape), torch.device(DEVICE), dtype)
    for layer in model.modules():
        if isinstance(layer, PackedLinear):  # on the CPU: the kernels read plain matrices
            layer.weight = layer.weight.to_dense()
    config = model.config
    shape_of_cache = (3, BLOCK_SIZE, 2, config.num_key_value_heads, config.head_dim)
    caches = [random_tensor(*shape_of_cache, dtype=dtype) for _ in range(config.num_hidden_layers)]
    inputs = DecodeInputs(caches, max_num_seqs=1, max_blocks=2)
    sequence = Sequence(list(range(20)), SamplingParams(), num_computed=19, block_table=[1, 0], row=0)
    inputs.fill([Chunk(sequence, 1)], 1)
    plain = inputs.forward(model, 1)
    stored = [cache.clone() for cache in caches]
    fused = inputs.forward(model, 1, fused=True)
    assert_close(fused, plain, dtype)
    for cache, expected in zip(caches, stored, strict=True):
        assert_close(cache, expected, dtype)


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
