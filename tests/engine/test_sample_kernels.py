"""The sampler's Triton kernels choose what its plain functions choose."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

from engine import sample_kernels
from engine.sampler import Knobs, Sampler, _choose
from engine.sequence import SamplingParams, Sequence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
VOCAB = 5000  # more than a kernel reads at a time, and no multiple of it

CASES = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 1.9, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.3, "top_k": 10**30},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 300, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.1e-5, "top_p": 1e-300},
]


def random_logits(num_seqs: int) -> Tensor:
    return 3 * torch.randn(num_seqs, VOCAB, generator=torch.Generator().manual_seed(0))


def sequences_of(cases: list[dict[str, float]]) -> list[Sequence]:
    off = {"top_p": 1.0, "repetition_penalty": 1.0}
    return [
        Sequence([5, 6, 7], SamplingParams(**{**off, **case, "seed": row}), row=row)  # type: ignore[arg-type]
        for row, case in enumerate(cases)
    ]


def chosen_by_kernel(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    *_, temperature, top_k, top_p, min_p, uniform = Knobs.of(sequences, VOCAB, DEVICE)
    chosen = sample_kernels.choose(logits.to(DEVICE), temperature, top_k, top_p, min_p, uniform)
    return chosen.tolist()


def test_the_same_tokens() -> None:
    sequences = sequences_of(CASES * 4)
    logits = random_logits(len(sequences))
    expected = _choose(logits, Knobs.of(sequences, VOCAB, CPU), sequences)
    assert chosen_by_kernel(logits, sequences) == expected.tolist()


def test_tokens_of_equal_weight_are_kept_or_cut_together() -> None:
    sequences = sequences_of([{"temperature": 1.0, "top_k": 2, "seed": seed} for seed in range(20)])
    logits = torch.full((20, VOCAB), -5.0)
    logits[:, [3, 4500, 4999]] = 2.0
    expected = _choose(logits, Knobs.of(sequences, VOCAB, CPU), sequences).tolist()
    assert chosen_by_kernel(logits, sequences) == expected
    assert set(expected) == {3, 4500, 4999}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_logits_that_are_no_numbers_fail_their_row_alone(poison: float, params: dict[str, float]) -> None:
    sequences = sequences_of([params] * 3)
    logits = random_logits(3)
    logits[1, 4700 if poison != -float("inf") else slice(None)] = poison
    chosen = chosen_by_kernel(logits, sequences)
    assert chosen[1] == -1
    assert min(chosen[0], chosen[2]) >= 0


def test_ruled_out_tokens_never_come() -> None:
    sequences = sequences_of([{"temperature": 2.0}] * 8)
    logits = torch.full((8, VOCAB), -torch.inf)
    logits[:, [77, 4321]] = torch.tensor([0.0, 1.0])
    assert set(chosen_by_kernel(logits, sequences)) <= {77, 4321}


def test_the_same_penalties() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor([2, 0])
    in_prompt = torch.rand(3, VOCAB, generator=generator) < 0.3
    counts = torch.randint(0, 3, (3, VOCAB), generator=generator, dtype=torch.int32)
    cases = [{"repetition_penalty": 1.3, "frequency_penalty": 0.5}, {"presence_penalty": -1.5}]
    sequences = sequences_of(cases)
    for sequence, row in zip(sequences, rows.tolist(), strict=True):
        sequence.row = row
    sampler = Sampler(3, VOCAB, CPU)
    sampler._in_prompt, sampler._output_counts = in_prompt, counts
    sampler._owners = [sequences[1], None, sequences[0]]
    logits = random_logits(2)
    expected = sampler._penalize(logits, Knobs.of(sequences, VOCAB, CPU), sequences)
    knobs = Knobs.of(sequences, VOCAB, DEVICE)
    on_device = [tensor.to(DEVICE) for tensor in (logits, rows, in_prompt, counts)]
    output = sample_kernels.penalize(*on_device, knobs.repetition, knobs.presence, knobs.frequency)
    torch.testing.assert_close(output.cpu(), expected)
