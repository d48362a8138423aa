"""CUDA graphs give the tokens of transformers: run where there is a GPU."""

from pathlib import Path

import pytest
import torch

from engine.model_runner import ModelRunner, load_model
from tests.engine.test_same_tokens import assert_same_tokens, generate, random_sequences, run_together
from tests.models import SHAPES, make_model, quantized_copy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


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
