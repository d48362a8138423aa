import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampler import Sampler, _least_kept, draw_uniform
from engine.sequence import SamplingParams, Sequence

VOCAB = 40
DRAWS = 20_000
# Likely ones, of logits above 0 and below: what a penalty does to others would hardly be seen.
PROMPT = [23, 5, 5, 13]
ANSWER = [39, 13, 39, 39]

OFF = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def make_logits(seed: int = 0) -> torch.Tensor:
    return 2.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) - 4


def make_sequence(params: SamplingParams, row: int = 0) -> Sequence:
    sequence = Sequence(list(PROMPT), params, row=row)
    sequence.token_ids += ANSWER
    return sequence


def sample(logits: torch.Tensor, params: list[SamplingParams]) -> list[int | None]:
    sequences = [make_sequence(p, row) for row, p in enumerate(params)]
    return Sampler(len(params), logits.shape[1], torch.device("cpu")).sample(logits, sequences).read()


def reference_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' generate would draw from; OpenAI's penalties by their formula."""
    counts = torch.bincount(torch.tensor(ANSWER), minlength=VOCAB)
    input_ids = torch.tensor([PROMPT + ANSWER])
    scores = logits.unsqueeze(0)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(input_ids, scores)
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    probs: torch.Tensor = warpers(input_ids, scores)[0].softmax(-1)
    return probs


def fits(tokens: list[int | None], probs: torch.Tensor) -> bool:
    """Whether draws may come from a distribution: never from outside, and in the right proportions."""
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    if counts[probs == 0].sum() > 0:
        return False
    expected = probs.double() * counts.sum()
    likely = expected >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum().unsqueeze(0)])
    wanted = torch.cat([expected[likely], expected[~likely].sum().unsqueeze(0)])
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    if len(observed) < 2:
        return True
    return bool(chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4)


CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_p": 0.6},
    {"temperature": 0.4, "top_p": 0.8},
    {"temperature": 1.9, "top_p": 0.8},
    {"top_k": 5},
    {"top_k": 1000},
    {"min_p": 0.1},
    {"top_k": 10, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.8},
    {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1},
    {
        "temperature": 0.8,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_distribution_is_that_of_transformers(case: dict[str, float]) -> None:
    logits = make_logits()
    params = [SamplingParams(**{**OFF, **case, "seed": seed}) for seed in range(DRAWS)]  # type: ignore[arg-type]
    tokens = sample(logits.expand(DRAWS, -1), params)
    assert fits(tokens, reference_probs(logits, params[0]))


def test_the_test_would_see_top_p_applied_before_temperature() -> None:
    logits = make_logits()
    params = [
        SamplingParams(**{**OFF, "temperature": 1.9, "top_p": 0.8, "seed": seed}) for seed in range(DRAWS)
    ]  # type: ignore[arg-type]
    tokens = sample(logits.expand(DRAWS, -1), params)
    ids = torch.tensor([PROMPT])
    swapped = TemperatureLogitsWarper(1.9)(ids, TopPLogitsWarper(0.8)(ids, logits.unsqueeze(0)))[0].softmax(
        -1
    )
    assert not fits(tokens, swapped)


def test_each_row_has_its_own_parameters() -> None:
    logits = torch.stack([make_logits(n) for n in range(len(CASES) + 1)])
    params = [SamplingParams(**{**OFF, **case, "seed": n}) for n, case in enumerate(CASES)]  # type: ignore[arg-type]
    params.append(SamplingParams(temperature=0, repetition_penalty=1))
    together = sample(logits, params)
    alone = [sample(row.unsqueeze(0), [p])[0] for row, p in zip(logits, params, strict=True)]
    assert together == alone
    assert together[-1] == logits[-1].argmax()


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=1), SamplingParams(logprobs=2)],
    ids=str,
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_row_alone(params: SamplingParams, poison: float) -> None:
    logits = torch.stack([make_logits(n) for n in range(3)])
    logits[1, 7] = poison
    tokens = sample(logits, [params] * 3)
    assert tokens[1] is None
    assert tokens[0] is not None
    assert tokens[2] is not None


def test_where_top_p_is_off_the_least_likely_is_kept_though_the_others_sum_to_1() -> None:
    probs = torch.tensor([[1.0, 1e-9]])
    assert _least_kept(probs, torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.0])) <= probs.min()


def test_the_penalties_follow_the_answer_as_it_grows() -> None:
    sampler = Sampler(1, VOCAB, torch.device("cpu"))
    sequence = Sequence([0], SamplingParams(temperature=0, repetition_penalty=1, frequency_penalty=2), row=0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 9] = 5.0, 4.0
    answer = []
    for _ in range(5):
        token_id = sampler.sample(logits, [sequence]).read()[0]
        sequence.append(token_id)
        answer.append(token_id)
    assert answer == [4, 9, 4, 9, 4]


def test_a_row_that_was_anothers_is_begun_anew() -> None:
    sampler = Sampler(1, VOCAB, torch.device("cpu"))
    params = SamplingParams(temperature=0, repetition_penalty=2)
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 9] = 5.0, 4.0
    assert sampler.sample(logits, [Sequence([4], params, row=0)]).read() == [9]
    assert sampler.sample(logits, [Sequence([0], params, row=0)]).read() == [4]


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 10**30},
        {"top_p": 1e-300},
        {"repetition_penalty": 1e-300},
        {"temperature": 1.1e-5},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_extremes_within_the_bounds_still_give_a_token(extreme: dict[str, float]) -> None:
    logits = make_logits().unsqueeze(0)
    (token,) = sample(logits, [SamplingParams(**extreme)])  # type: ignore[arg-type]
    assert token in range(VOCAB)
    if "repetition_penalty" not in extreme and "top_k" not in extreme:
        assert token == sample(logits, [SamplingParams(temperature=0)])[0]


def test_tiny_temperatures_are_greedy() -> None:
    logits = make_logits().unsqueeze(0)
    assert sample(logits, [SamplingParams(temperature=1e-40, top_p=1, repetition_penalty=1)]) == [
        logits.argmax()
    ]


def test_the_uniform_numbers_are_uniform_and_in_bounds() -> None:
    numbers = torch.tensor([draw_uniform(seed, counter) for seed in range(-50, 50) for counter in range(100)])
    assert numbers.min() > 0
    assert draw_uniform(6_533_000, 0) == 2**-24, "the least there is"
    assert numbers.max() <= 1
    assert chisquare(torch.histc(numbers, 20, 0, 1).double()).pvalue > 1e-3
