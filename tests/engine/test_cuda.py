"""What is special to CUDA equals the reference: run where there is a GPU."""

import random
from pathlib import Path

import pytest
import torch

from engine.attention import Contexts, plain_decode_attention
from engine.block_pool import BlockPool
from engine.model_runner import ModelRunner, load_model
from engine.scheduler import Scheduler
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from tests.engine.test_same_tokens import generate
from tests.models import SHAPES, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (32, 8), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_equals_the_reference_over_random_block_tables(
    heads: tuple[int, int], dtype: torch.dtype
) -> None:
    from engine.decode_attention import decode_attention

    num_heads, num_kv_heads = heads
    generator = random.Random(0)
    torch.manual_seed(0)
    blocks = torch.randn(400, BLOCK_SIZE, 2, num_kv_heads, 64, device="cuda", dtype=dtype)
    for num_seqs in (1, 3, 40):
        lens = [generator.choice([1, 15, 16, 17, 300, 2000]) for _ in range(num_seqs)]
        tables = [generator.sample(range(400), -(-n // BLOCK_SIZE)) for n in lens]
        width = max(map(len, tables))
        padded = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32, device="cuda")
        contexts = Contexts(slice(0, num_seqs), padded, torch.tensor(lens, dtype=torch.int32, device="cuda"))
        query = torch.randn(num_seqs, num_heads, 64, device="cuda", dtype=dtype)
        expected = plain_decode_attention(query.double(), blocks.double(), contexts, 0.125)
        output = decode_attention(query, blocks, contexts, 0.125).double()
        for row in range(num_seqs):
            error = (output[row] - expected[row]).norm() / expected[row].norm()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_give_the_tokens_of_transformers(shape: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, shape)
    generator = random.Random(1)
    sequences = [
        Sequence(
            [generator.randrange(256) for _ in range(generator.randrange(2, 150))],
            SamplingParams(max_tokens=generator.randrange(1, 60), temperature=0, repetition_penalty=1.1),
        )
        for _ in range(60)
    ]
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])
    scheduler = Scheduler(BlockPool(60, BLOCK_SIZE), max_batch_tokens=64, max_num_seqs=12)
    loaded = load_model(model, torch.device("cuda"), torch.float32)
    runner = ModelRunner(loaded, num_blocks=60, max_num_seqs=12)
    runner.capture_graphs(12, 512)
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        batch = scheduler.schedule()
        scheduler.postprocess(batch, runner.run(batch))
    assert [s.token_ids for s in sequences] == expected
    assert scheduler.pool.num_unused == 60
