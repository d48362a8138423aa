"""What CUDA graphs replay, run without them: padding changes nothing."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import attention
from engine.attention import Contexts, plain_decode_attention
from engine.block_pool import BlockPool
from engine.decode_graphs import DecodeInputs, padded_sizes
from engine.model_runner import ModelRunner, load_model
from engine.scheduler import Chunk, Scheduler, only_decodes
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from tests.models import SHAPES, make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 200, 256, 1000])
def test_every_number_of_sequences_has_a_size_of_less_than_twice_its_own(max_num_seqs: int) -> None:
    sizes = padded_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for number in range(1, max_num_seqs + 1):
        padded = min(size for size in sizes if size >= number)
        assert padded < (2 if number <= 128 else 1.5) * number


@torch.inference_mode()
def test_steps_without_a_graph_need_no_other_kernels_than_those_with_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another type would be another kernel, which is compiled while everybody waits."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def recorded(query: Tensor, blocks: Tensor, contexts: Contexts, scaling: float) -> Tensor:
        seen.append((contexts.block_tables.dtype, contexts.lens.dtype))
        return plain_decode_attention(query, blocks, contexts, scaling)

    monkeypatch.setattr(attention, "plain_decode_attention", recorded)
    model = load_model(tiny_model, CPU, torch.float32)
    runner = ModelRunner(model, num_blocks=4, max_num_seqs=2)
    DecodeInputs(runner._kv_cache, max_num_seqs=2, max_blocks=2).forward(model, 2)
    runner.run([Chunk(Sequence([1], SamplingParams(), block_table=[0], row=0), 1)])
    assert len(seen) == 4
    assert len(set(seen)) == 1


@pytest.mark.parametrize("max_drafts", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_padded_steps_give_the_logits_of_plain_ones(shape: str, max_drafts: int, tmp_path: Path) -> None:
    """Whoever came, left, grew, was guessed or was preempted in the steps before."""
    generator = random.Random(0)
    model = load_model(make_model(tmp_path, shape), CPU, torch.float32)
    runner = ModelRunner(model, num_blocks=12, max_num_seqs=6)
    inputs = DecodeInputs(runner._kv_cache, max_num_seqs=6, max_blocks=8)
    scheduler = Scheduler(
        BlockPool(12, BLOCK_SIZE), max_batch_tokens=64, max_num_seqs=6,
        max_drafts=max_drafts, max_drafted_tokens=6,
    )  # fmt: skip
    for _ in range(20):
        prompt = generator.choices(range(256), k=generator.choice([1, 5, 15, 16, 17]))
        params = SamplingParams(
            max_tokens=generator.randrange(2, 100),
            temperature=generator.choice([0, 0.5]),
            repetition_penalty=1,
        )
        scheduler.add(Sequence(prompt, params))
    sizes = set()
    while scheduler.has_work:
        batch = scheduler.schedule()
        if only_decodes(batch):
            num_tokens = sum(len(chunk.positions) for chunk in batch)
            size = min(size for size in padded_sizes(6) if size >= num_tokens)
            sizes.add((num_tokens, size))
            inputs.fill(batch, size)
            expected = runner._forward(batch)
            padded = inputs.forward(model, size)
            torch.testing.assert_close(padded[:num_tokens], expected, rtol=1e-4, atol=1e-4)
        runner.run(batch)
        scheduler.postprocess(batch)
    assert scheduler.num_preemptions
    assert {(3, 4), (5, 6), (1, 1)} <= sizes
    assert bool(scheduler.num_right_drafts) == bool(max_drafts)
