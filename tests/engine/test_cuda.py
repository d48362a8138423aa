"""CUDA graphs give the tokens of transformers: run where there is a GPU."""

import random
from pathlib import Path

import pytest
import torch

from engine.block_pool import BlockPool
from engine.model_runner import ModelRunner, load_model
from engine.scheduler import Scheduler
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from tests.engine.test_same_tokens import assert_same_tokens, generate
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
    generator = random.Random(1)
    sequences = [
        Sequence(
            [generator.randrange(256) for _ in range(generator.randrange(2, 150))],
            SamplingParams(
                max_tokens=generator.randrange(1, 60),
                temperature=0,
                repetition_penalty=generator.choice([1, 1.1]),
            ),
        )
        for _ in range(60)
    ]
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])
    scheduler = Scheduler(
        BlockPool(60, BLOCK_SIZE),
        max_batch_tokens=64,
        max_num_seqs=12,
        max_drafts=max_drafts,
        max_drafted_tokens=12,
    )
    loaded = load_model(model, torch.device("cuda"), torch.float32, int8=int8)
    runner = ModelRunner(loaded, num_blocks=60, max_num_seqs=12)
    runner.capture_graphs(12, 512)
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        batch = scheduler.schedule()
        runner.run(batch)
        scheduler.postprocess(batch)
    assert_same_tokens(model, sequences, expected)
    assert scheduler.pool.num_unused == 60
    assert bool(scheduler.num_right_drafts) == bool(max_drafts)
