"""Several answers to a prompt, and what is told and asked of single tokens: the engine in this process."""

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from engine import generation as generation_module
from engine.engine import Engine
from engine.generation import Delta, Generation, GenerationError, QueueFullError
from engine.grammar import Grammar, GrammarError
from engine.scheduler import Chunk
from engine.sequence import BLOCK_SIZE, Logprobs, SamplingParams, Sequence
from tests.engine.test_engine import all_blocks_are_back, recorded, run, running, text, until, user
from tests.models import make_model

PLAIN = SamplingParams(temperature=1.0, top_p=1, repetition_penalty=1, max_tokens=24)


@pytest.fixture(scope="module")
def model_that_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that may draw any token, control tokens too."""
    return make_model(tmp_path_factory.mktemp("ending"), "mqa-tied")


def token(model: Path, name: str) -> int:
    token_id: int = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(name)
    return token_id


async def read(generation: Generation) -> list[list[Delta]]:
    """The pieces of each answer."""
    answers: list[list[Delta]] = [[] for _ in generation._choices]
    try:
        async for delta in generation:
            answers[delta.choice].append(delta)
    finally:
        generation.close()
    return answers


async def ask(engine: Engine, content: str, params: SamplingParams, **options: Any) -> list[list[Delta]]:
    return await read(await engine.generate(user(content), params, **options))


def logprobs(deltas: list[Delta]) -> list[Logprobs]:
    return [place for delta in deltas for place in delta.logprobs]


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Whatever is asked of the engine meanwhile arrives at once, when it ends."""
    gate = threading.Event()
    engine._inbox.put(gate.wait)  # type: ignore[arg-type]
    try:
        yield
    finally:
        gate.set()


def num_computed(steps: list[list[Chunk]]) -> int:
    return sum(chunk.num_tokens for batch in steps for chunk in batch)


@pytest.mark.parametrize("seed", [5, 2**63 - 2])
def test_n_answers_are_those_to_n_requests_with_the_seeds_that_follow(tiny_model: Path, seed: int) -> None:
    params = replace(PLAIN, seed=seed, logprobs=3, repetition_penalty=1.2)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            together = await ask(engine, "hello", params, n=5)
            for i, answer in enumerate(together):
                wrapped = (seed + i + 2**63) % 2**64 - 2**63
                [alone] = await ask(engine, "hello", replace(params, seed=wrapped))
                assert text(answer) == text(alone)
                assert [p.drawn.token_id for p in logprobs(answer)] == [
                    p.drawn.token_id for p in logprobs(alone)
                ]
            assert len(set(map(text, together))) == 5

    run(scenario())


def test_a_text_to_go_on_with_has_its_n_answers_beside_those_of_others(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            params = replace(PLAIN, seed=5)
            answers = await read(await engine.complete(["one", "two", "three"], params, n=2))
            assert len(answers) == 6
            for i, prompt in enumerate(["one", "two", "three"]):
                for k in range(2):
                    [alone] = await read(await engine.complete([prompt], replace(params, seed=5 + k)))
                    assert text(answers[2 * i + k]) == text(alone)

    run(scenario())


def test_the_usage_of_n_answers_counts_the_prompt_once_and_comes_last(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            [alone] = await ask(engine, "hello", PLAIN)
            generation = await engine.generate(user("hello"), PLAIN, n=4)
            deltas = [delta async for delta in generation]
            generation.close()
            usages = [delta.usage for delta in deltas]
            assert usages[:-1] == [None] * (len(deltas) - 1)
            assert usages[-1] is not None
            assert alone[-1].usage is not None
            assert usages[-1].prompt_tokens == alone[-1].usage.prompt_tokens
            assert usages[-1].completion_tokens == 4 * PLAIN.max_tokens

    run(scenario())


def test_n_answers_share_the_prompt_which_is_computed_once(tiny_model: Path) -> None:
    params = replace(PLAIN, max_tokens=8)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            tables: list[list[int]] = []
            run_step = engine._runner.finish

            def looking(batch: list[Chunk], *ahead: Any) -> None:
                if len(batch) == 8:
                    tables[:] = [list(chunk.sequence.block_table) for chunk in batch]
                run_step(batch, *ahead)

            engine._runner.finish = looking  # type: ignore[method-assign]
            with recorded(engine) as steps:
                generation = await engine.generate(user("x" * 150), params, n=8)
                await read(generation)
            length = generation._choices[0].sequence.num_prompt_tokens
            shared = (length - 1) // BLOCK_SIZE
            assert shared >= 10
            decoded = 8 * (params.max_tokens - 1)
            assert num_computed(steps) == length + 7 * (length - shared * BLOCK_SIZE) + decoded
            assert len(tables) == 8
            assert all(table[:shared] == tables[0][:shared] for table in tables)
            own = [block for table in tables for block in table[shared:]]
            assert len(own) == len(set(own))
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_prompts_that_arrive_together_have_their_common_beginning_computed_once(tiny_model: Path) -> None:
    beginning, params = "x" * 200, replace(PLAIN, max_tokens=4)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            alone = [(await ask(engine, f"{beginning} {i}", params))[0] for i in range(6)]
        async with running(tiny_model) as engine:
            with recorded(engine) as steps:
                with held(engine):
                    generations = [await engine.generate(user(f"{beginning} {i}"), params) for i in range(6)]
                together = await asyncio.gather(*map(read, generations))
            # The bytes of the chat format before the content, and the content's beginning.
            shared = (1 + 6 + len(beginning)) // BLOCK_SIZE * BLOCK_SIZE
            lengths = [answer[-1].usage.prompt_tokens for answer in alone if answer[-1].usage]
            assert num_computed(steps) <= shared + sum(lengths) - 6 * shared + 6 * params.max_tokens
            assert [text(answer) for [answer] in together] == [text(answer) for answer in alone]
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_who_waits_for_a_beginning_that_is_coming_takes_over_when_its_first_reader_leaves(
    tiny_model: Path,
) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_batch_tokens=32, max_num_seqs=8) as engine:
            [expected] = await ask(engine, "y" * 300, PLAIN)
        async with running(tiny_model, max_batch_tokens=32, max_num_seqs=8) as engine:
            run_step, steps = engine._runner.finish, itertools.count(1)

            def leaving(batch: list[Chunk], *ahead: Any) -> None:
                if next(steps) == 3:
                    left: Future[None] = Future()
                    engine._loop.call_soon_threadsafe(lambda: left.set_result(first.close()))
                    left.result()
                run_step(batch, *ahead)

            engine._runner.finish = leaving  # type: ignore[method-assign]
            with held(engine):
                first, *others = [await engine.generate(user("y" * 300), PLAIN) for _ in range(4)]
            for [answer] in await asyncio.gather(*map(read, others)):
                assert text(answer) == text(expected)
            assert first._choices[0].sequence.num_output_tokens == 0
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_a_prompt_behind_those_that_wait_for_a_beginning_waits_no_longer_than_it_takes(
    tiny_model: Path,
) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_batch_tokens=32, max_num_seqs=16) as engine:
            with recorded(engine) as steps:
                with held(engine):
                    alike = [await engine.generate(user("z" * 400), PLAIN) for _ in range(6)]
                    other = await engine.generate(user("other"), replace(PLAIN, max_tokens=2))
                await asyncio.gather(*map(read, [*alike, other]))
            first, last = alike[0]._choices[0].sequence, other._choices[0].sequence
            prefill = -(-first.num_prompt_tokens // 32)
            begun = next(i for i, batch in enumerate(steps) if any(c.sequence is last for c in batch))
            # Then each of the others computes what is its own: less than a block, and a token.
            assert begun <= prefill + -(-6 * BLOCK_SIZE // 16)
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_many_with_few_beginnings_in_a_small_cache_all_get_their_answers_and_all_blocks_come_back(
    tiny_model: Path,
) -> None:
    contents = [f"{'abc'[i % 3] * 40}{i % 5}" for i in range(16)]

    def of(i: int) -> SamplingParams:
        return replace(PLAIN, seed=i, max_tokens=20 + 3 * i)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            alone = [(await ask(engine, content, of(i)))[0] for i, content in enumerate(contents)]
        async with running(
            tiny_model, kv_cache_tokens=400, max_num_seqs=16, max_batch_tokens=48, max_queue=100
        ) as engine:
            with held(engine):
                generations = [
                    await engine.generate(user(content), of(i), n=1 + i % 3)
                    for i, content in enumerate(contents)
                ]
            answers = await asyncio.gather(*map(read, generations))
            assert [text(answer[0]) for answer in answers] == [text(answer) for answer in alone]
            assert engine.stats.preemptions > 0
            await until(lambda: all_blocks_are_back(engine))
            assert engine._generations == {}

    run(scenario())


def test_a_client_that_has_left_does_not_wait(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_queue=4) as engine:
            with held(engine):
                for _ in range(10):
                    (await engine.generate(user("?"), PLAIN, n=4)).close()
                stays = await engine.generate(user("?"), PLAIN, n=4)
                with pytest.raises(QueueFullError, match="4 requests wait"):
                    await engine.generate(user("?"), PLAIN)
            assert len(await read(stays)) == 4
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def reference_logprobs(model: Path, sequence: Sequence) -> torch.Tensor:
    """What transformers' own forward makes of each place of an answer: [tokens, vocab_size]."""
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([sequence.token_ids])).logits[0]
    return logits[sequence.num_prompt_tokens - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(
    "params",
    [
        replace(PLAIN, temperature=0, logprobs=20),
        replace(PLAIN, temperature=1.7, seed=3, logprobs=5),
        replace(PLAIN, temperature=0.3, top_p=0.5, repetition_penalty=1.8, seed=3, logprobs=5),
        replace(PLAIN, presence_penalty=2, frequency_penalty=2, logit_bias=((97, 9.0),), logprobs=0),
        replace(PLAIN, temperature=0, min_tokens=20, logit_bias=((97, -100.0),), logprobs=1),
    ],
)
def test_logprobs_are_the_models_own_before_penalties_biases_and_temperature(
    model_that_ends: Path, params: SamplingParams
) -> None:
    async def scenario() -> None:
        async with running(model_that_ends) as engine:
            generation = await engine.generate(user("which?"), params)
            [deltas] = await read(generation)
            sequence = generation._choices[0].sequence
            drawn = sequence.token_ids[sequence.num_prompt_tokens :]
            told = logprobs(deltas)
            expected = reference_logprobs(model_that_ends, sequence)
            assert len(told) == len(drawn) - (deltas[-1].finish_reason == "stop")
            for place, token_id, row in zip(told, drawn, expected, strict=False):
                assert place.drawn.token_id == token_id
                assert place.drawn.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
                assert len(place.top) == params.logprobs
                values = [candidate.logprob for candidate in place.top]
                assert values == sorted(values, reverse=True)
                assert values == pytest.approx(row.topk(len(values)).values.tolist(), abs=1e-3)
                for candidate in place.top:
                    assert candidate.logprob == pytest.approx(float(row[candidate.token_id]), abs=1e-3)

    run(scenario())


def test_the_same_seed_gives_the_same_tokens_whether_or_not_logprobs_are_asked_for(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            for params in (
                PLAIN,
                replace(PLAIN, top_p=0.7, repetition_penalty=1.3),
                replace(PLAIN, min_p=0.1),
            ):
                plain = [text(a) for a in await ask(engine, "?", replace(params, seed=9), n=3)]
                for count in (0, 20):
                    told = await ask(engine, "?", replace(params, seed=9, logprobs=count), n=3)
                    assert [text(answer) for answer in told] == plain

    run(scenario())


def test_logprobs_are_told_to_those_who_ask_and_only_to_them(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            asked = [None, 0, 3, None, 20]
            answers = await asyncio.gather(
                *(ask(engine, f"{i}", replace(PLAIN, logprobs=count)) for i, count in enumerate(asked))
            )
            for [answer], count in zip(answers, asked, strict=True):
                told = [len(place.top) for place in logprobs(answer)]
                assert told == ([] if count is None else [count] * PLAIN.max_tokens)

    run(scenario())


def test_a_bias_forces_a_token_or_forbids_it(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            for temperature in (0, 1.5):
                params = replace(PLAIN, temperature=temperature, max_tokens=40)
                [forced] = await ask(
                    engine, "?", replace(params, logit_bias=((token(tiny_model, "A"), 100.0),))
                )
                assert text(forced) == "A" * 40
                letters = tuple((token(tiny_model, letter), 100.0) for letter in "xyz")
                [chosen] = await ask(engine, "?", replace(params, logit_bias=letters, seed=1))
                assert set(text(chosen)) <= set("xyz")
                # Those that it draws, one after the other, until none of them is left.
                forbidden: set[int] = set()
                for _ in range(4):
                    bias = tuple((token_id, -100.0) for token_id in forbidden)
                    [answer] = await ask(engine, "?", replace(params, logit_bias=bias, logprobs=0))
                    drawn = {place.drawn.token_id for place in logprobs(answer)}
                    assert not drawn & forbidden
                    forbidden |= drawn

    run(scenario())


def test_a_bias_on_a_token_is_that_much_on_its_logit(tiny_model: Path) -> None:
    """With 8 more it is exp(8) times as likely, relative to the others."""

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            [[place, *_]] = [
                logprobs(answer)
                for answer in await ask(engine, "?", replace(PLAIN, temperature=0, max_tokens=1, logprobs=20))
            ]
            best, second = place.top[:2]
            distance = best.logprob - second.logprob
            for bias, wins in ((distance * 0.99, best), (distance * 1.01, second)):
                params = replace(PLAIN, temperature=0, max_tokens=1, logprobs=0)
                [answer] = await ask(engine, "?", replace(params, logit_bias=((second.token_id, bias),)))
                assert logprobs(answer)[0].drawn.token_id == wins.token_id

    run(scenario())


def test_an_answer_does_not_end_before_min_tokens_nor_at_all_with_ignore_eos(model_that_ends: Path) -> None:
    eot = token(model_that_ends, "<|eot_id|>")
    wants_to_end = replace(PLAIN, logit_bias=((eot, 100.0),), max_tokens=30, logprobs=0)

    async def scenario() -> None:
        async with running(model_that_ends) as engine:
            for temperature in (0, 1.0):
                ending = replace(wants_to_end, temperature=temperature)
                for least in (0, 1, 7, 29):
                    [answer] = await ask(engine, "?", replace(ending, min_tokens=least))
                    assert answer[-1].finish_reason == "stop"
                    assert answer[-1].usage is not None
                    assert answer[-1].usage.completion_tokens == least + 1
                    assert len(logprobs(answer)) == least
                [answer] = await ask(engine, "?", replace(ending, min_tokens=30))
                assert answer[-1].finish_reason == "length"
                [answer] = await ask(engine, "?", replace(ending, ignore_eos=True))
                assert answer[-1].finish_reason == "length"
                assert {place.drawn.token_id for place in logprobs(answer)} == {eot}
                assert text(answer) == ""

    run(scenario())


def test_a_stop_token_ends_one_of_n_answers_while_the_others_go_on(model_that_ends: Path) -> None:
    async def scenario() -> None:
        async with running(model_that_ends, kv_cache_tokens=4096) as engine:
            eot = token(model_that_ends, "<|eot_id|>")
            params = replace(PLAIN, seed=1, max_tokens=40, logit_bias=((eot, 4.0),))
            answers = await ask(engine, "?", params, n=5)
            reasons = [answer[-1].finish_reason for answer in answers]
            assert set(reasons) == {"stop", "length"}
            for i, answer in enumerate(answers):
                [alone] = await ask(engine, "?", replace(params, seed=1 + i))
                assert (text(alone), alone[-1].finish_reason) == (text(answer), reasons[i])
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_a_stop_string_ends_one_of_n_answers_which_is_computed_no_further(tiny_model: Path) -> None:
    params = replace(PLAIN, seed=1, max_tokens=60)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            first, second = map(text, await ask(engine, "?", params, n=2))
            stop = next(first[at : at + 2] for at in range(5, 30) if first[at : at + 2] not in second)
            params_with_stop = replace(params, stop=(stop,))
            with recorded(engine, seconds=0.005):
                generation = await engine.generate(user("?"), params_with_stop, n=2)
                answers = await read(generation)
            assert generation._choices[0].sequence.num_output_tokens < 60
            late = await engine.generate(user("?"), params_with_stop, n=2)
            await until(lambda: all(choice.sequence.is_finished for choice in late._choices))
            for stopped, whole in (answers, await read(late)):
                assert [piece.finish_reason for piece in stopped if piece.finish_reason] == ["stop"]
                assert [piece.finish_reason for piece in whole if piece.finish_reason] == ["length"]

    run(scenario())


def test_each_of_n_answers_may_lag_as_far_as_one(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_module, "_MAX_UNREAD", PLAIN.max_tokens)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            generation = await engine.generate(user("?"), PLAIN, n=4)
            await until(lambda: all(choice.sequence.is_finished for choice in generation._choices))
            answers = await read(generation)
            assert [answer[-1].finish_reason for answer in answers] == ["length"] * 4

    run(scenario())


def test_answers_by_a_grammar_are_json_beside_answers_without(tiny_model: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["猫", "😀", 3]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            params = replace(PLAIN, seed=3, max_tokens=100)
            [free] = await ask(engine, "free", params)
            grammar = await engine.compile(schema)
            both = await asyncio.gather(
                ask(engine, "json", params, n=4, grammar=grammar), ask(engine, "free", params)
            )
            for answer in both[0]:
                value = json.loads(text(answer))
                assert answer[-1].finish_reason == "stop"
                assert set(value) == {"a", "b"}
                assert value["b"] in ("猫", "😀", 3)
            assert text(both[1][0]) == text(free)

    run(scenario())


class FailsLater(Grammar):
    """A grammar whose answer becomes too complex to be followed, after some tokens."""

    def __init__(self, matcher: Any, vocab_size: int, tokens: int) -> None:
        super().__init__(matcher, vocab_size)
        self._countdown = itertools.count(tokens, -1)

    def copy(self) -> Grammar:
        return self

    def allowed(self) -> torch.Tensor:
        if next(self._countdown) == 0:
            raise GrammarError("the schema can't be followed: too much of it")
        return super().allowed()


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_a_grammar_that_fails_ends_its_request_alone(tiny_model: Path, tokens: int) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            params = [replace(PLAIN, seed=i, repetition_penalty=1.0 + i / 10) for i in range(4)]
            expected = [text((await ask(engine, f"{i}", params[i]))[0]) for i in range(4)]
            ten_letters = await engine.compile({"const": "abcdefghij"})
            bad = FailsLater(ten_letters._matcher.deep_copy(), engine.vocab_size, tokens)
            failed, *neighbours = await asyncio.gather(
                ask(engine, "bad", PLAIN, grammar=bad),
                *(ask(engine, f"{i}", params[i]) for i in range(4)),
                return_exceptions=True,
            )
            assert isinstance(failed, GenerationError)
            assert "too much of it" in str(failed)
            assert [text(answers[0]) for answers in neighbours if isinstance(answers, list)] == expected
            assert engine.failure is None
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_one_of_n_answers_that_fails_ends_them_all_and_nothing_is_left(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            sample = engine._runner._sampler.sample

            def poisoned(logits: Any, sequences: Any) -> Any:
                for row, sequence in enumerate(sequences):
                    if sequence.params.seed == 13 and sequence.num_output_tokens == 5:
                        logits = logits.clone()
                        logits[row] = float("nan")
                return sample(logits, sequences)

            engine._runner._sampler.sample = poisoned  # type: ignore[method-assign]
            generation = await engine.generate(user("?" * 40), replace(PLAIN, seed=11), n=4)
            with pytest.raises(GenerationError):
                await read(generation)
            await until(lambda: all_blocks_are_back(engine))
            assert engine._generations == {}

    run(scenario())
