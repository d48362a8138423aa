"""Weights of int8: what they compute, what they take, and what the demo model says with them."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import requests
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.decode import bytes_read
from benchmarks.quantization import next_token_logits
from demo.dialogs import load_dialogs, prompts_and_answers
from engine.chat_format import ChatFormat
from engine.int8_linear import Int8Linear, quantize
from engine.llama import Llama, join
from engine.model_runner import load_model
from engine.narrow_linear import NarrowLinear, compiled
from serving.settings import DEMO_MODEL
from tests.conftest import LIMIT, Server
from tests.models import SHAPES, make_model, quantized_copy

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(x: Tensor, linear: Int8Linear) -> Tensor:
    """What the layer should give: the product with what its weights stand for."""
    y = x.double() @ (linear.weight.double() * linear.scale.double().unsqueeze(1)).T
    return y if linear.bias is None else y + linear.bias.double()


def assert_close(actual: Tensor, expected: Tensor, error: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= error * expected.norm()


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    weight = random_tensor(300, 70) * torch.logspace(-6, 6, 300).unsqueeze(1)
    weight[7] = 0
    quantized, scale = quantize(weight)
    step = scale.double().unsqueeze(1)
    assert ((quantized * step - weight).abs() <= 0.5001 * step).all()
    assert (quantized.abs().amax(1) == torch.where(weight.any(1), 127, 0)).all()
    again, same_scale = quantize((quantized * step).float())  # so a quantized model stays as it is
    assert torch.equal(again, quantized)
    assert torch.equal(same_scale[weight.any(1)], scale[weight.any(1)])


def test_what_is_no_number_is_not_hidden() -> None:
    for value in (float("nan"), float("inf")):
        weight = random_tensor(3, 16)
        weight[1, 5] = value
        output = Int8Linear(weight, None)(torch.ones(2, 16))
        assert not output[:, 1].isfinite().any()
        assert output[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size_in", [1, 16, 33, 100, 256, 4112])
@pytest.mark.parametrize("size_out", [5, 37, 320])
def test_a_layer_is_the_product_with_its_weights(
    dtype: torch.dtype, has_bias: bool, size_in: int, size_out: int
) -> None:
    bias = random_tensor(size_out, seed=1).to(dtype) if has_bias else None
    linear = Int8Linear(random_tensor(size_out, size_in).to(dtype), bias).to(DEVICE)
    for rows in (0, 1, 3, 64, 65):
        x = random_tensor(rows, size_in, seed=rows).to(DEVICE, dtype)
        assert linear(x).dtype == dtype
        assert_close(linear(x), product(x, linear), 5e-3)


def test_a_row_gives_the_same_whatever_is_beside_it() -> None:
    linear = Int8Linear(random_tensor(96, 64), None)
    x = random_tensor(65, 64)
    together = linear(x)
    for rows in (1, 2, 5, 16, 64):
        assert torch.equal(linear(x[:rows]), together[:rows])


def test_joined_layers_give_what_they_give_alone() -> None:
    layers = [nn.Linear(64, size, bias=False) for size in (8, 32)]
    x = random_tensor(5, 64)
    joined = partial(join, device=CPU, dtype=torch.float32, int8=True)
    alone = [joined(layer)(x) for layer in layers]
    assert torch.equal(joined(*layers)(x), torch.cat(alone, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(40, 33), (70, 256), (5, 16), (130, 520)])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_the_kernel_is_the_product_too(dtype: torch.dtype, size: tuple[int, int], splits: int) -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")
    from engine import int8_kernels

    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply matrices in bfloat16")
    for has_bias in (False, True):
        bias = random_tensor(size[0], seed=1).to(dtype) if has_bias else None
        linear = Int8Linear(random_tensor(*size).to(dtype), bias).to(DEVICE)
        for rows in (0, 1, 17, 130):
            x = random_tensor(rows, size[1], seed=rows).to(DEVICE, dtype)
            y = int8_kernels.linear(x, linear.weight, linear.scale, linear.bias, splits)
            assert_close(y, product(x, linear), 1e-5 if dtype == torch.float32 else 5e-3)


def logits_of(model: Llama) -> Tensor:
    generator = random.Random(0)
    chat_format = ChatFormat.from_pretrained(DEMO_MODEL)
    turns = generator.sample(prompts_and_answers(load_dialogs()), 5)
    return torch.cat(next_token_logits(model, chat_format, turns))


def test_the_model_is_quantized_and_nothing_else(tmp_path: Path) -> None:
    exact = quantized_copy(DEMO_MODEL, tmp_path)
    expected = logits_of(load_model(exact, CPU, torch.float32)).double()
    assert_close(
        logits_of(load_model(exact, CPU, torch.float32, int8=True)), expected, 7e-3
    )  # int8 itself costs 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_takes_a_byte(shape: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, shape)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [module.weight for module in reference.modules() if isinstance(module, nn.Linear)]
    norms = [parameter for parameter in reference.parameters() if parameter.dim() == 1]
    model = load_model(folder, CPU, torch.float32, int8=True)
    exact = sum(matrix.numel() + 4 * len(matrix) for matrix in matrices) + sum(norm.nbytes for norm in norms)
    assert exact <= bytes_read(model) < exact + 32 * (model.config.hidden_size + 4)  # a panel of the head
    leaves = {type(module) for module in model.modules() if not list(module.children())}
    assert leaves == {nn.Embedding, NarrowLinear if compiled(torch.int8) else Int8Linear, type(model.norm)}
    assert model.embedding.weight.dtype == model.norm.weight.dtype == torch.float32


def test_the_demo_model_goes_on_as_in_float32() -> None:
    chat_format = ChatFormat.from_pretrained(DEMO_MODEL)
    turns = random.Random(0).sample(prompts_and_answers(load_dialogs()), 60)
    expected, actual = (
        torch.cat(
            next_token_logits(load_model(DEMO_MODEL, CPU, torch.float32, int8=int8), chat_format, turns)
        )
        for int8 in (False, True)
    )
    assert len(expected) > 1000
    assert (expected.argmax(1) == actual.argmax(1)).double().mean() >= 0.995
    assert 1e-3 < (expected - actual).norm() / expected.norm() < 3e-2


def test_it_is_served(start_server: Callable[..., Server], server: Server) -> None:
    int8_server = start_server("demo", "--quantization", "int8")
    asked = {"prompt": "What is your port?", "temperature": 0}
    assert int8_server.post(**asked).json()["response"] == server.post(**asked).json()["response"]

    def logprobs(url: str) -> Tensor:
        body = {"model": "demo", "temperature": 0, "logprobs": True,
                "messages": [{"role": "user", "content": "What is your port?"}]}  # fmt: skip
        answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=LIMIT).json()
        return torch.tensor([token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]])

    difference = (logprobs(int8_server.url) - logprobs(server.url)).abs().max()
    assert 1e-6 < difference < 0.2  # the option is taken, and costs little
