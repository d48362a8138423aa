"""Weights of bfloat16 that are multiplied in float32: what that costs is neither bits nor neighbours."""

import logging
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quantization import next_token_logits
from demo.dialogs import load_dialogs, prompts_and_answers
from engine.bfloat16_linear import Bfloat16Linear, can_keep, compiled
from engine.chat_format import ChatFormat
from engine.llama import Llama
from engine.model_runner import load_model
from engine.packed_linear import PackedLinear
from serving.settings import DEMO_MODEL

CPU = torch.device("cpu")
WITHOUT_AVX512 = ("-mno-avx512f",)

needs_compiler = pytest.mark.skipif(compiled() is None, reason="needs a C compiler and a processor with AVX2")
each_processor = pytest.mark.parametrize("flags", [(), WITHOUT_AVX512], ids=["native", "without AVX-512"])


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@each_processor
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size_in", [1, 3, 256, 257, 1000])
@pytest.mark.parametrize("size_out", [1, 16, 37, 320])
def test_it_is_the_product_as_exact_as_in_float32(
    flags: tuple[str, ...], has_bias: bool, size_in: int, size_out: int
) -> None:
    weight = random_tensor(size_out, size_in).bfloat16()
    bias = random_tensor(size_out, seed=1) if has_bias else None
    linear = Bfloat16Linear(weight, bias, flags=flags)
    for rows in (*range(18), 28, 29, 112, 113, 250):
        x = random_tensor(rows, size_in, seed=rows)
        exact = x.double() @ weight.double().T
        largest = x.double().abs() @ weight.double().abs().T
        if bias is not None:
            exact, largest = exact + bias, largest + bias.abs()
        y = linear(x)
        assert y.shape == exact.shape
        assert y.dtype == torch.float32
        assert ((y - exact).abs() <= 1e-6 * largest).all()


@needs_compiler
@each_processor
def test_a_row_gives_the_same_whatever_is_beside_it_and_whoever_computes(flags: tuple[str, ...]) -> None:
    linear = Bfloat16Linear(random_tensor(96, 700).bfloat16(), None, flags=flags)
    x = random_tensor(130, 700)
    alone = torch.cat([linear(row.unsqueeze(0)) for row in x])
    x[5] = float("nan")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (7, 16, 64, 130):
            y = linear(x[:rows])
            assert y[5].isnan().all()
            assert torch.equal(torch.cat([y[:5], y[6:]]), torch.cat([alone[:5], alone[6:rows]]))
    torch.set_num_threads(1)


@needs_compiler
def test_only_what_bfloat16_holds_is_kept_in_it() -> None:
    weight = random_tensor(40, 30).bfloat16()
    assert can_keep(weight, CPU, torch.float32)
    assert can_keep(weight.float(), CPU, torch.float32)
    assert not can_keep(weight, CPU, torch.bfloat16)
    assert not can_keep(weight, torch.device("cuda"), torch.float32)
    for value in (1 + 2**-8, 1e39, float("nan")):
        other = weight.double()
        other[7, 3] = value
        assert not can_keep(other, CPU, torch.float32)


def matrices(model: Llama) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if "Linear" in type(module).__name__}


def logits_of(model: Llama) -> Tensor:
    turns = random.Random(0).sample(prompts_and_answers(load_dialogs()), 3)
    return torch.cat(next_token_logits(model, ChatFormat.from_pretrained(DEMO_MODEL), turns))


@pytest.fixture
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", request.param)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@needs_compiler
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc -mno-avx2"], indirect=True)
def test_without_a_compiler_or_the_processor_for_it_weights_are_float32(
    compiler: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="llama.engine"):
        without = load_model(DEMO_MODEL, CPU, torch.float32)
    assert matrices(without) == {PackedLinear}
    [told] = [message for message in caplog.messages if "gcc" in message]
    assert "AVX2" in told
    monkeypatch.delenv("CC")
    compiled.cache_clear()
    model = load_model(DEMO_MODEL, CPU, torch.float32)
    assert matrices(model) == {Bfloat16Linear}
    expected = logits_of(without)
    possible = expected > -100
    assert 0 < (logits_of(model) - expected)[possible].abs().max() < 1e-3
