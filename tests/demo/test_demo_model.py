"""The model that is shipped: small, honest about what it is, and able to end an answer."""

import asyncio
import random
from pathlib import Path

import pytest

from demo.dialogs import FILES, Turn, load_dialogs, prompts_and_answers
from engine.engine import load
from engine.generation import Delta
from engine.sequence import SamplingParams
from serving.settings import DEMO_MODEL

GREEDY = SamplingParams(temperature=0, top_p=1, repetition_penalty=1)


@pytest.fixture(scope="module")
def turns() -> list[Turn]:
    return prompts_and_answers(load_dialogs())


def answers(turns: list[Turn], params: SamplingParams) -> list[list[Delta]]:
    """The engine's answers, all asked for at once."""

    async def ask_all() -> list[list[Delta]]:
        engine = load(DEMO_MODEL, device="cpu", threads=1, max_queue=len(turns))
        engine.start()
        try:
            generations = [await engine.generate(prompt, params) for prompt, _ in turns]
            return [[delta async for delta in generation] for generation in generations]
        finally:
            await engine.stop()

    return asyncio.run(ask_all())


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_it_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in Path(DEMO_MODEL).iterdir()) <= 8_000_000


def test_its_dialogs_are_many_and_in_both_languages_and_of_several_turns() -> None:
    dialogs = load_dialogs()
    assert len(dialogs) >= 300
    assert all(len(path.read_text("utf-8").splitlines()) >= 100 for path in FILES)
    assert sum(len(dialog) > 2 for dialog in dialogs) >= 50


def test_greedy_it_knows_its_dialogs_word_for_word_and_ends_every_answer(turns: list[Turn]) -> None:
    given = answers(turns, GREEDY)
    assert all(deltas[-1].finish_reason == "stop" for deltas in given)
    right = sum(text(deltas) == answer for deltas, (_, answer) in zip(given, turns, strict=True))
    assert right / len(turns) >= 0.95


def test_with_the_servers_defaults_it_still_mostly_does(turns: list[Turn]) -> None:
    sample = random.Random(0).sample(turns, 100)
    given = answers(sample, SamplingParams(seed=1))
    assert all(deltas[-1].finish_reason == "stop" for deltas in given)
    right = sum(text(deltas) == answer for deltas, (_, answer) in zip(given, sample, strict=True))
    assert right >= 85


def test_chinese_and_emoji_come_out_whole(turns: list[Turn]) -> None:
    chosen = [turn for turn in turns if "👋" in turn[1] or "🦙" in turn[1]][:20]
    for deltas in answers(chosen, GREEDY):
        assert all("\N{REPLACEMENT CHARACTER}" not in delta.text for delta in deltas)


def test_it_says_what_it_is() -> None:
    (deltas,) = answers([([{"role": "user", "content": "Who are you?"}], "")], GREEDY)
    assert "demo" in text(deltas)
    assert "not Llama 3" in text(deltas)
