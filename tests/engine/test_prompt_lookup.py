"""Guessing changes how many steps an answer takes, and nothing else."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.generation import Delta
from engine.prompt_lookup import PromptLookup
from engine.sequence import SamplingParams
from tests.engine.test_engine import all_blocks_are_back, ask, recorded, run, running, until
from tests.engine.test_same_tokens import (
    assert_same_tokens,
    generate,
    load_runner,
    random_sequences,
    run_together,
)
from tests.models import SHAPES, make_model


def propose(text: str, count: int) -> str:
    return "".join(map(chr, PromptLookup().propose(list(map(ord, text)), count)))


def test_what_came_behind_the_last_tokens_is_proposed() -> None:
    assert propose("the cat sat. the cat", 5) == " sat."


def test_the_last_of_several_places_counts() -> None:
    assert propose("abcX abcY abc", 2) == "Y "


def test_what_was_not_there_before_is_not_guessed() -> None:
    assert propose("abcd", 4) == ""
    assert propose("ab", 4) == ""
    assert propose("", 4) == ""
    assert propose("abXab", 4) == ""


def test_what_repeats_itself_at_the_end_goes_on() -> None:
    assert propose("xyxyxy", 5) == "xyxyx"
    assert propose("aaaa", 3) == "aaa"


def test_a_text_that_grows_is_looked_up_as_if_it_were_new() -> None:
    generator = random.Random(1)
    for _ in range(50):
        text: list[int] = []
        lookup = PromptLookup()
        for _ in range(40):
            text += generator.choices(range(3), k=generator.randrange(3))
            assert lookup.propose(text, 6) == PromptLookup().propose(text, 6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_of_transformers_with_guesses_and_preemption(shape: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, shape)
    sequences = random_sequences(
        30, seed=4, prompt=range(2, 40), answer=range(20, 80), penalties=[1.0, 1.0, 1.1]
    )
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])

    scheduler = run_together(
        load_runner(model, 14), sequences, num_blocks=14, max_batch_tokens=48, max_drafts=6
    )

    assert_same_tokens(model, sequences, expected)
    assert scheduler.num_preemptions
    assert 0 < scheduler.num_right_drafts < scheduler.num_drafts
    assert scheduler.pool.num_unused == 14


FEW = tuple((token_id, 50.0) for token_id in b"abc")
"""A bias with which an answer is made of three letters, and often repeats itself."""
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1, max_tokens=60, logit_bias=FEW)
CASES = {
    "greedy": replace(DRAWN, temperature=0, logit_bias=()),
    "drawn": DRAWN,
    "penalties": replace(DRAWN, repetition_penalty=1.02, frequency_penalty=0.05, presence_penalty=0.1),
    "logprobs": replace(DRAWN, logprobs=3),
    "min_tokens": replace(DRAWN, min_tokens=30),
}


async def answers(model: Path, params: SamplingParams, schema: dict[str, Any] | None, **options: Any) -> Any:
    """Some at once, and how many steps and right guesses they took."""
    async with running(model, **options) as engine:
        grammar = await engine.compile(schema) if schema else None

        with recorded(engine) as steps:
            found = await asyncio.gather(*(
                ask(engine, "say it again, again, again: again", replace(params, seed=number), grammar)
                for number in range(3)
            ))  # fmt: skip
        await until(lambda: all_blocks_are_back(engine))
        return found, len(steps), engine.stats.right_drafts


def check_same(guessed: list[list[Delta]], plain: list[list[Delta]]) -> None:
    for ours, theirs in zip(guessed, plain, strict=True):
        assert "".join(delta.text for delta in ours) == "".join(delta.text for delta in theirs)
        assert (ours[-1].finish_reason, ours[-1].usage) == (theirs[-1].finish_reason, theirs[-1].usage)
        logprobs, expected = (
            [place for delta in deltas for place in delta.logprobs] for deltas in (ours, theirs)
        )
        assert [place.drawn.token_id for place in logprobs] == [place.drawn.token_id for place in expected]
        assert [place.drawn.logprob for place in logprobs] == pytest.approx(
            [place.drawn.logprob for place in expected], abs=1e-3
        )


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_the_same_with_guesses_and_takes_fewer_steps(tiny_model: Path, case: str) -> None:
    async def scenario() -> None:
        plain, num_plain, _ = await answers(tiny_model, CASES[case], None)
        guessed, num_guessed, num_right = await answers(tiny_model, CASES[case], None, speculate=4)
        check_same(guessed, plain)
        assert num_right > 0
        assert num_guessed < num_plain

    run(scenario())


def test_an_answer_by_a_schema_is_the_same_with_guesses(tiny_model: Path) -> None:
    item = {
        "type": "object",
        "properties": {"a long name": {"type": "boolean"}},
        "required": ["a long name"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": item, "minItems": 3, "maxItems": 3}
    params = replace(DRAWN, max_tokens=200, logit_bias=())

    async def scenario() -> None:
        plain, num_plain, _ = await answers(tiny_model, params, schema)
        guessed, num_guessed, num_right = await answers(tiny_model, params, schema, speculate=4)
        check_same(guessed, plain)
        assert all(deltas[-1].finish_reason == "stop" for deltas in guessed)
        assert num_right > 0
        assert num_guessed < num_plain

    run(scenario())
