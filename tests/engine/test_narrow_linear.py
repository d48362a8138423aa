"""Weights of bfloat16 and int8, multiplied in float32: nothing of a row is lost, or gets into another."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quantization import error
from engine.int8_linear import Int8Linear, quantize
from engine.llama import Llama
from engine.model_runner import load_model
from engine.narrow_linear import NarrowLinear, can_narrow, compiled, is_bfloat16
from engine.packed_linear import PackedLinear
from serving.settings import DEMO_MODEL
from tests.engine.test_int8_linear import CPU, logits_of, random_tensor

WITHOUT_AVX512 = ("-mno-avx512f",)

CPUINFO = Path("/proc/cpuinfo")
CAN_COMPILE = shutil.which("cc") is not None and CPUINFO.exists() and "avx2" in CPUINFO.read_text()

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="needs Linux, a C compiler, a processor with AVX2")
each_processor = pytest.mark.parametrize("flags", [(), WITHOUT_AVX512], ids=["native", "without AVX-512"])
each_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)


def narrow(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """And its scale."""
    return quantize(weight) if dtype == torch.int8 else (weight.bfloat16(), None)


@each_processor
@each_type
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size_in", [1, 3, 256, 258, 1000])
@pytest.mark.parametrize("size_out", [1, 16, 37, 320])
def test_it_is_the_product_as_exact_as_in_float32(
    flags: tuple[str, ...], dtype: torch.dtype, has_bias: bool, size_in: int, size_out: int
) -> None:
    weight, scale = narrow(random_tensor(size_out, size_in), dtype)
    bias = random_tensor(size_out, seed=1) if has_bias else None
    linear = NarrowLinear(weight, scale, bias, flags=flags)
    meant = weight.double() * (1 if scale is None else scale.double().unsqueeze(1))
    for rows in (*range(18), 28, 29, 96, 97, 250):
        x = random_tensor(rows, size_in, seed=rows)
        exact, largest = x.double() @ meant.T, x.double().abs() @ meant.abs().T
        if bias is not None:
            exact, largest = exact + bias, largest + bias.abs()
        y = linear(x)
        assert y.shape == exact.shape
        assert y.dtype == torch.float32
        assert ((y - exact).abs() <= 1e-6 * largest).all()


@each_processor
@each_type
def test_a_row_gives_the_same_whatever_is_beside_it_and_whoever_computes(
    flags: tuple[str, ...], dtype: torch.dtype
) -> None:
    linear = NarrowLinear(*narrow(random_tensor(96, 700), dtype), None, flags=flags)
    x = random_tensor(130, 700)
    alone = torch.cat([linear(row.unsqueeze(0)) for row in x])
    x[5] = float("nan")
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        for rows in (7, 16, 64, 130):
            y = linear(x[:rows])
            assert y[5].isnan().all()
            assert torch.equal(torch.cat([y[:5], y[6:]]), torch.cat([alone[:5], alone[6:rows]]))


@each_type
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype) -> None:
    weight = random_tensor(3, 16)
    weight[1, 5] = float("nan")
    y = NarrowLinear(*narrow(weight, dtype), None)(torch.ones(2, 16))
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


def test_only_what_bfloat16_holds_is_kept_in_it() -> None:
    weight = random_tensor(40, 30).bfloat16()
    assert is_bfloat16(weight)
    assert is_bfloat16(weight.double())
    for value in (1 + 2**-8, 1e39, float("nan")):
        other = weight.double()
        other[7, 3] = value
        assert not is_bfloat16(other)
    for to in (torch.bfloat16, torch.int8):
        assert can_narrow(to, CPU, torch.float32)
        assert not can_narrow(to, CPU, torch.bfloat16)
        assert not can_narrow(to, torch.device("cuda"), torch.float32)


def matrices(model: Llama) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if "Linear" in type(module).__name__}


@pytest.fixture
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", request.param)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc -mno-avx2"], indirect=True)
@pytest.mark.parametrize("int8", [False, True])
def test_without_a_compiler_or_the_processor_for_it_torch_multiplies(
    compiler: None, int8: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="llama.engine"):
        without = load_model(DEMO_MODEL, CPU, torch.float32, int8=int8)
    assert matrices(without) == {Int8Linear if int8 else PackedLinear}
    [told] = [message for message in caplog.messages if "gcc" in message]
    assert "AVX2" in told
    monkeypatch.delenv("CC")
    compiled.cache_clear()
    model = load_model(DEMO_MODEL, CPU, torch.float32, int8=int8)
    assert matrices(model) == {NarrowLinear}
    difference = error([(logits_of(model), logits_of(without))])
    assert 0 < difference < (5e-3 if int8 else 1e-5)  # torch's product with int8 rounds inputs and outputs
