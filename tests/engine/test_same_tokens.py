"""Greedy answers equal those of transformers' generate, token for token, however the work is cut up."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, RepetitionPenaltyLogitsProcessor

from engine.block_pool import BlockPool
from engine.model_runner import ModelRunner, load_model
from engine.scheduler import Chunk, Scheduler
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from tests.models import SHAPES, make_model

CPU = torch.device("cpu")
NUM_SEQUENCES = 110


def make_sequences() -> list[Sequence]:
    """Of mixed lengths; a third begins like one before it."""
    generator = random.Random(1)
    sequences: list[Sequence] = []
    for _ in range(NUM_SEQUENCES):
        token_ids = [generator.randrange(256) for _ in range(generator.randrange(2, 150))]
        if sequences and generator.random() < 0.3:
            token_ids = generator.choice(sequences).token_ids[:100] + token_ids[:20]
        penalty = generator.choice([1.0, 1.1, 1.3])
        params = SamplingParams(
            max_tokens=generator.randrange(1, 50), temperature=0, repetition_penalty=penalty
        )
        sequences.append(Sequence(token_ids, params))
    return sequences


def random_sequences(
    count: int, *, seed: int, prompt: range, answer: range, penalties: list[float]
) -> list[Sequence]:
    """Of prompts and answers of so many tokens."""
    generator = random.Random(seed)
    return [
        Sequence(
            [generator.randrange(256) for _ in range(generator.choice(prompt))],
            SamplingParams(
                max_tokens=generator.choice(answer),
                temperature=0,
                repetition_penalty=generator.choice(penalties),
            ),
        )
        for _ in range(count)
    ]


def load_runner(model: Path, num_blocks: int) -> ModelRunner:
    return ModelRunner(load_model(model, CPU, torch.float32), num_blocks=num_blocks, max_num_seqs=24)


def run_together(
    runner: ModelRunner,
    sequences: list[Sequence],
    *,
    num_blocks: int,
    max_batch_tokens: int,
    max_num_seqs: int = 24,
    max_drafts: int = 0,
    every: int = 1,
) -> Scheduler:
    """Some more arrive at each step, or `every` so many."""
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_drafts=max_drafts,
        max_drafted_tokens=12,
    )
    arrivals = list(sequences)
    ahead: list[Chunk] = []
    steps = itertools.count()
    while scheduler.has_work or arrivals:
        if next(steps) % every == 0 or not scheduler.has_work:
            for sequence in arrivals[:4]:
                scheduler.add(sequence)
            del arrivals[:4]
        batch = [chunk for chunk in ahead if chunk.sequence.row >= 0]
        if not batch:
            batch = scheduler.schedule()
            runner.launch(batch)
        ahead = scheduler.schedule_ahead(batch) if runner.runs_ahead else []
        runner.finish(batch, ahead)
        scheduler.postprocess(batch)
    return scheduler


@torch.inference_mode()
def generate(model: Path, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [
        reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=p.max_tokens,
            repetition_penalty=p.repetition_penalty,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
        for prompt, p in zip(prompts, params, strict=True)
    ]


@torch.inference_mode()
def assert_same_tokens(model: Path, sequences: list[Sequence], expected: list[list[int]]) -> None:
    """But where two tokens are as likely as each other, to which float32 rounds them as it happens."""
    ties = 0
    for sequence, token_ids in zip(sequences, expected, strict=True):
        if sequence.token_ids != token_ids:
            pairs = zip(sequence.token_ids, token_ids, strict=True)
            place = next(place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)
            reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64)
            before = torch.tensor([token_ids[:place]])
            penalty = RepetitionPenaltyLogitsProcessor(sequence.params.repetition_penalty)
            scores = penalty(before, reference(before).logits[:, -1])[0]
            assert abs(scores[sequence.token_ids[place]] - scores[token_ids[place]]) < 1e-4
            ties += 1
    assert ties <= len(sequences) // 20


@pytest.mark.parametrize("published_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_of_transformers(shape: str, published_in: torch.dtype, tmp_path: Path) -> None:
    model = make_model(tmp_path, shape, dtype=published_in)
    sequences = make_sequences()
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])

    scheduler = run_together(load_runner(model, 40), sequences, num_blocks=40, max_batch_tokens=48)

    assert_same_tokens(model, sequences, expected)
    assert scheduler.pool.num_unused == 40


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_of_transformers_across_preemption(shape: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, shape)
    sequences = random_sequences(12, seed=3, prompt=range(2, 20), answer=range(40, 80), penalties=[1.1])
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])

    scheduler = run_together(load_runner(model, 14), sequences, num_blocks=14, max_batch_tokens=48)

    assert_same_tokens(model, sequences, expected)
    assert scheduler.num_preemptions > 3


def test_a_cached_prefix_changes_no_token(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    prompt = [random.Random(2).randrange(256) for _ in range(90)]
    first, second = (Sequence(list(prompt), SamplingParams(max_tokens=30, temperature=0)) for _ in range(2))
    scheduler = Scheduler(BlockPool(40, BLOCK_SIZE), max_batch_tokens=256, max_num_seqs=4)
    runner = ModelRunner(load_model(model, CPU, torch.float32), num_blocks=40, max_num_seqs=4)
    computed = []
    for sequence in (first, second):
        scheduler.add(sequence)
        computed.append(0)
        while scheduler.has_work:
            batch = scheduler.schedule()
            computed[-1] += sum(chunk.num_tokens for chunk in batch)
            runner.run(batch)
            scheduler.postprocess(batch)
    assert computed == [90 + 29, 90 + 29 - 80]
    assert first.token_ids == second.token_ids
