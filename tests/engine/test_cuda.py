"""What runs on CUDA gives the tokens of transformers: on a GPU, or else where tensors pretend it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model_runner import ModelRunner, load_model
from tests.conftest import ROOT
from tests.engine.test_same_tokens import assert_same_tokens, generate, random_sequences, run_together
from tests.models import SHAPES, make_model, quantized_copy


def output_of(module: str, *arguments: str, **options: Any) -> str:
    """What a module prints, as a program."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("max_drafts", [0, 4])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_give_the_tokens_of_transformers(
    shape: str, int8: bool, max_drafts: int, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", shape)
    if int8:  # and transformers the same weights, as float32
        model = quantized_copy(model, tmp_path / "quantized")
    sequences = random_sequences(60, seed=1, prompt=range(2, 150), answer=range(1, 60), penalties=[1.0, 1.1])
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])
    loaded = load_model(model, torch.device("cuda"), torch.float32, int8=int8)
    runner = ModelRunner(loaded, num_blocks=60, max_num_seqs=12)
    runner.capture_graphs(12, 512)
    scheduler = run_together(
        runner, sequences, num_blocks=60, max_batch_tokens=64, max_num_seqs=12, max_drafts=max_drafts, every=9
    )
    assert_same_tokens(model, sequences, expected)
    assert scheduler.pool.num_unused == 60
    assert bool(scheduler.num_right_drafts) == bool(max_drafts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("shape", "quantization"), [("mqa-tied", "none"), ("gqa-2", "int8")])
def test_a_pretended_gpu_gives_the_tokens_of_transformers(
    shape: str, quantization: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")
    model = make_model(tmp_path / "model", shape)
    if quantization == "int8":
        model = quantized_copy(model, tmp_path / "quantized")
    sequences = random_sequences(7, seed=5, prompt=range(2, 40), answer=range(1, 20), penalties=[1.0, 1.1])
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])
    for sequence in sequences[::2]:  # what changes no token
        sequence.params = replace(sequence.params, logprobs=2, logit_bias=((7, 0.0),), min_tokens=1)
    asked = json.dumps([(s.token_ids, asdict(s.params)) for s in sequences])
    answered = output_of("tests.engine.pretended_gpu", str(model), quantization, input=asked)
    for sequence, token_ids in zip(sequences, json.loads(answered), strict=True):
        sequence.token_ids = token_ids
    assert_same_tokens(model, sequences, expected)


KERNELS = {
    "_add", "_add_norm", "_attend_to_part", "_choose", "_join_parts", "_multiply", "_penalize",
    "_rotate_and_store", "_silu_mul",
}  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "shared_memory"), [(86, 101_376), (90, 232_448)], ids=["RTX 3090", "H100"]
)
def test_the_kernels_compile_for_the_cards_and_fit_into_them(
    capability: int, shared_memory: int, tmp_path: Path
) -> None:
    """Bytes that a program can have, by CUDA's programming guide. What an interpreter takes, a compiler
    need not."""
    pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(tmp_path)
    lines = output_of("tests.engine.compiled", str(capability), env=variables).splitlines()
    needs = [(name, int(needed)) for name, _, needed in map(str.split, lines)]
    assert {name for name, _ in needs} == KERNELS
    assert max(needed for _, needed in needs) <= shared_memory
