"""What CUDA graphs replay, run without them: padding changes nothing."""

import random
from pathlib import Path

import pytest
import torch

from engine.decode_graphs import DecodeInputs, padded_sizes
from engine.model_runner import ModelRunner, load_model
from engine.scheduler import Chunk
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from tests.models import SHAPES, make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 200, 256])
def test_every_number_of_sequences_has_a_size_of_less_than_twice_its_own(max_num_seqs: int) -> None:
    sizes = padded_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for number in range(1, max_num_seqs + 1):
        assert min(size for size in sizes if size >= number) < 2 * number


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_padded_steps_give_the_logits_of_plain_ones(shape: str, tmp_path: Path) -> None:
    generator = random.Random(0)
    model = load_model(make_model(tmp_path, shape), CPU, torch.float32)
    runner = ModelRunner(model, num_blocks=40, max_num_seqs=8)
    blocks = generator.sample(range(40), 40)
    sequences = []
    for row in range(8):
        length = generator.choice([1, 15, 16, 17, 40])
        sequence = Sequence(generator.choices(range(256), k=length), SamplingParams(temperature=0), row=row)
        sequence.block_table = [blocks.pop() for _ in range(length // BLOCK_SIZE + 1)]
        sequence.append(runner.run([Chunk(sequence, length)])[0])
        sequence.num_computed = length
        sequences.append(sequence)
    inputs = DecodeInputs(runner._kv_cache, max_num_seqs=8, max_blocks=5)
    # What larger steps have left behind counts no more.
    for number, size in [(8, 8), (5, 8), (1, 2), (3, 4), (1, 1)]:
        step = generator.sample(sequences, number)
        expected = runner._forward([Chunk(sequence, 1) for sequence in step])
        inputs.fill(step, size)
        padded = inputs.forward(model, size)
        torch.testing.assert_close(padded[:number], expected, rtol=1e-4, atol=1e-4)
