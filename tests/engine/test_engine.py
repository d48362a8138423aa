"""The whole engine in this process: asyncio in front, its thread behind."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import engine as engine_module
from engine.chat_format import Message
from engine.engine import Engine, load
from engine.generation import (
    Delta,
    EngineDeadError,
    GenerationError,
    InvalidPromptError,
    PromptTooLongError,
    QueueFullError,
    Usage,
)
from engine.grammar import Grammar
from engine.scheduler import Chunk
from engine.sequence import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


@asynccontextmanager
async def running(model: Path, **options: Any) -> AsyncIterator[Engine]:
    engine = load(model, device="cpu", **{"kv_cache_tokens": 2048, "max_num_seqs": 32, **options})
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def ask(
    engine: Engine, content: str, params: SamplingParams = GREEDY, grammar: Grammar | None = None
) -> list[Delta]:
    generation = await engine.generate(user(content), params, grammar=grammar)
    try:
        return [delta async for delta in generation]
    finally:
        generation.close()


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # the engine's thread sets no event


def all_blocks_are_back(engine: Engine) -> bool:
    scheduler = engine._scheduler
    return scheduler.pool.num_unused == scheduler.pool.num_blocks and not scheduler.has_work


def spoiled(engine: Engine, generator: random.Random, share: float) -> Callable[..., Any]:
    """The engine's `Sampler.sample`, given logits that are no numbers for a share of all rows."""
    sample = engine._runner._sampler.sample

    def spoiling(logits: Any, sequences: Any) -> Any:
        logits = logits.clone()
        logits[[generator.random() < share for _ in sequences]] = float("nan")
        return sample(logits, sequences)

    return spoiling


@contextmanager
def recorded(engine: Engine, *, seconds: float = 0) -> Iterator[list[list[Chunk]]]:
    """All steps of the engine, each made to take so much longer."""
    steps: list[list[Chunk]] = []
    run_step = engine._runner.finish

    def recording(batch: list[Chunk], *ahead: Any) -> None:
        steps.append(batch)
        if seconds:
            time.sleep(seconds)
        run_step(batch, *ahead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._runner, "finish", recording)
        yield steps


def run(scenario: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            await scenario

    asyncio.run(main())


def test_an_answer_has_a_reason_and_a_usage(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            deltas = await ask(engine, "hello")
            assert deltas[-1].finish_reason == "length"
            # "user" and "assistant" are bytes to this tokenizer
            assert deltas[-1].usage == Usage(4 + 4 + 2 + 5 + 2 + 9 + 2, 12)
            assert all(delta.finish_reason is None and delta.usage is None for delta in deltas[:-1])

    run(scenario())


def test_the_same_seed_gives_the_same_answer_alone_and_among_31_others(tiny_model: Path) -> None:
    params = SamplingParams(seed=7, temperature=1.2, max_tokens=40)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            alone = text(await ask(engine, "who?", params))
            others = [
                ask(engine, f"other {n}", SamplingParams(seed=n, top_p=1, max_tokens=20 + n))
                for n in range(31)
            ]
            answers = await asyncio.gather(*others[:16], ask(engine, "who?", params), *others[16:])
            assert text(answers[16]) == alone
            assert (
                text(await ask(engine, "who?", SamplingParams(seed=8, temperature=1.2, max_tokens=40)))
                != alone
            )

    run(scenario())


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_model_len=100) as engine:
            with pytest.raises(PromptTooLongError, match=r"the prompt has 128 tokens; the context is 100"):
                await engine.generate(user("x" * 105), GREEDY)
            with pytest.raises(PromptTooLongError, match="has 100 tokens"):
                await engine.generate(user("x" * 77), GREEDY)
            assert (await ask(engine, "x" * 76))[-1].usage == Usage(99, 1)

    run(scenario())


def test_a_prompt_of_no_tokens_or_of_ids_that_the_model_does_not_have_is_refused(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            last = engine.vocab_size - 1
            for prompt in ([], [-1], [last + 1]):
                with pytest.raises(InvalidPromptError, match=f"from 0 to {last}, at least one"):
                    await engine.complete([[1], prompt], GREEDY)
            generation = await engine.complete([[0, last]], GREEDY)
            assert [delta async for delta in generation][-1].finish_reason == "length"

    run(scenario())


def test_max_tokens_is_cut_to_what_fits_and_the_answer_says_so(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_model_len=100) as engine:
            last = (await ask(engine, "x" * 67, SamplingParams(max_tokens=90)))[-1]
            assert last.finish_reason == "length"
            assert last.usage == Usage(90, 10)

    run(scenario())


def test_a_stop_string_ends_the_answer_before_it(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            params = SamplingParams(seed=1, temperature=1.0, max_tokens=60)
            whole = text(await ask(engine, "hello", params))
            stop = whole[20:23]
            deltas = await ask(
                engine, "hello", SamplingParams(seed=1, temperature=1.0, max_tokens=60, stop=(stop,))
            )
            assert text(deltas) == whole[: whole.index(stop)]
            assert deltas[-1].finish_reason == "stop"
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_what_comes_behind_a_stop_string_is_not_counted(tiny_model: Path) -> None:
    letters = tuple((token_id, 50.0) for token_id in b"abcdefgh")
    params = SamplingParams(seed=1, temperature=1.0, max_tokens=60, logit_bias=letters)

    async def scenario() -> None:
        async with running(tiny_model) as engine:
            whole = text(await ask(engine, "hello", params))
            stop = whole[20:23]
            generation = await engine.generate(user("hello"), replace(params, stop=(stop,)))
            # It goes on as long as nobody reads.
            await until(lambda: generation._choices[0].sequence.is_finished)
            usage = [delta async for delta in generation][-1].usage
            generation.close()
            assert usage is not None
            assert usage.completion_tokens == whole.index(stop) + 3
            just_enough = replace(params, stop=(stop,), max_tokens=usage.completion_tokens)
            assert (await ask(engine, "hello", just_enough))[-1].finish_reason == "stop"

    run(scenario())


def test_the_queue_is_bounded(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=1, max_queue=2) as engine:
            with recorded(engine, seconds=0.05):
                first = await engine.generate(user("a"), SamplingParams(max_tokens=400))
                await anext(first)
                waiting = [await engine.generate(user("b"), GREEDY) for _ in range(2)]
                with pytest.raises(QueueFullError, match="2 requests"):
                    await engine.generate(user("c"), GREEDY)
                first.close()
            for generation in waiting:
                assert [delta async for delta in generation][-1].finish_reason == "length"

    run(scenario())


def test_who_leaves_frees_everything_before_the_next_step_but_one(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            with recorded(engine) as steps:
                generation = await engine.generate(user("a"), SamplingParams(max_tokens=400))
                await anext(generation)
                generation.close()
                begun = len(steps)
                await until(lambda: all_blocks_are_back(engine))
                assert len(steps) <= begun + 1

    run(scenario())


def test_a_step_that_fails_fails_those_in_it_and_nobody_else(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            expected = text(await ask(engine, "good"))
            run_step = engine._runner.finish
            failures = iter([True])

            def broken(batch: list[Chunk], *ahead: Any) -> None:
                if next(failures, False):
                    raise RuntimeError("out of memory")
                run_step(batch, *ahead)

            engine._runner.finish = broken  # type: ignore[method-assign]
            with pytest.raises(GenerationError):
                await ask(engine, "bad")
            assert text(await ask(engine, "good")) == expected
            assert engine.failure is None
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_a_sequence_whose_logits_are_no_numbers_fails_alone(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            expected = text(await ask(engine, "good"))
            sample = engine._runner._sampler.sample

            def poisoned(logits: Any, sequences: Any) -> Any:
                for row, sequence in enumerate(sequences):
                    if sequence.params.seed == 13:
                        logits = logits.clone()
                        logits[row] = float("nan")
                return sample(logits, sequences)

            engine._runner._sampler.sample = poisoned  # type: ignore[method-assign]
            good, bad = await asyncio.gather(
                ask(engine, "good"),
                ask(engine, "bad", SamplingParams(seed=13)),
                return_exceptions=True,
            )
            assert isinstance(bad, GenerationError)
            assert isinstance(good, list)
            assert text(good) == expected
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())


def test_keys_that_are_no_numbers_harm_nobody_who_gets_their_blocks_or_runs_beside_them(
    tiny_model: Path,
) -> None:
    poison, params = "~", SamplingParams(temperature=0, max_tokens=40, logit_bias=((93, -1e4),))

    async def scenario() -> None:
        async with running(tiny_model, kv_cache_tokens=512, max_num_seqs=8) as engine:
            [token_id] = engine._chat_format.encode_text(poison)[1:]
            assert token_id == 93, "nobody else may draw it"
            with torch.no_grad():
                engine._runner._model.embedding.weight[token_id] = torch.nan
            questions = [f"{n} " * (n % 7 + 1) for n in range(12)]
            expected = [text(await ask(engine, question, params)) for question in questions]
            good = (ask(engine, question, params) for question in questions)
            bad = (ask(engine, "x" * 5 * n + poison, params) for n in range(12))
            told = await asyncio.gather(*(one for pair in zip(bad, good, strict=True) for one in pair),
                                        return_exceptions=True)  # fmt: skip
            assert all(isinstance(answer, GenerationError) for answer in told[::2])
            assert [
                answer if isinstance(answer, Exception) else text(answer) for answer in told[1::2]
            ] == expected
            assert [text(await ask(engine, question, params)) for question in questions] == expected

    run(scenario())


def test_when_the_engine_dies_everybody_is_told_and_nobody_else_is_let_in(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:

            def lost(*_: object) -> None:
                raise RuntimeError("device lost")

            waiting = [
                asyncio.create_task(ask(engine, "a", SamplingParams(max_tokens=400))) for _ in range(4)
            ]
            await until(lambda: len(engine._scheduler.running) == 4)
            engine._scheduler.schedule = lost  # type: ignore[method-assign, assignment]
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(result, EngineDeadError) for result in results)
            assert engine.failure is not None
            assert engine.stopped.is_set()
            with pytest.raises(EngineDeadError):
                await engine.generate(user("b"), GREEDY)

    run(scenario())


def test_a_lost_device_ends_the_engine(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:

            def lost(*_: object) -> Any:
                raise RuntimeError("device lost")

            engine._runner.finish = engine._runner.check_device = lost  # type: ignore[method-assign]
            with pytest.raises(EngineDeadError):
                await ask(engine, "a")
            await engine.stopped.wait()

    run(scenario())


def test_no_mix_of_ends_leaks_a_block(tiny_model: Path) -> None:
    """Finished, stopped, left, refused and failed requests, in a cache that is too small for them all."""
    generator = random.Random(4)

    async def client(engine: Engine, n: int) -> None:
        content = generator.choice(["same beginning " * 3, f"{n} "]) + "x" * generator.randrange(60)
        if n % 10 == 0:
            content = "x" * 600
        params = SamplingParams(
            max_tokens=generator.randrange(1, 60), seed=n, temperature=1.5, stop=("e",) if n % 3 == 0 else ()
        )
        leaves_after = generator.randrange(1, 30) if n % 4 == 0 else 1000
        try:
            generation = await engine.generate(user(content), params)
        except (PromptTooLongError, QueueFullError):
            return
        try:
            async for _ in generation:
                leaves_after -= 1
                if leaves_after == 0:
                    break
        except GenerationError:
            pass
        finally:
            generation.close()

    async def scenario() -> None:
        async with running(tiny_model, kv_cache_tokens=512, max_queue=40, max_num_seqs=16) as engine:
            sample = spoiled(engine, generator, 0.01)

            def unreliable(logits: Any, sequences: Any) -> Any:
                if generator.random() < 0.02:
                    raise RuntimeError("this step")
                return sample(logits, sequences)

            engine._runner._sampler.sample = unreliable  # type: ignore[method-assign]
            await asyncio.gather(*(client(engine, n) for n in range(120)))
            await until(lambda: all_blocks_are_back(engine))
            assert engine._generations == {}
            assert len(engine._scheduler._free_rows) == 16

    run(scenario())


def test_a_long_prompt_does_not_hold_up_the_event_loop_nor_the_streams(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_batch_tokens=32, max_num_seqs=8) as engine:
            with recorded(engine, seconds=0.005) as steps:
                stream = await engine.generate(user("stream"), SamplingParams(max_tokens=400))
                await anext(stream)
                begun = len(steps)
                prompt = asyncio.create_task(ask(engine, "x" * 400, SamplingParams(max_tokens=1)))
                await prompt
                # Every step in which the prompt was prefilled brought the stream a token too.
                prefill = [batch for batch in steps[begun:] if any(chunk.num_tokens > 1 for chunk in batch)]
                assert len(prefill) >= 420 // 31
                streaming = stream._choices[0].sequence
                assert all(any(chunk.sequence is streaming for chunk in batch) for batch in prefill)
                stream.close()

    run(scenario())


def test_what_a_model_was_not_trained_for_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="--max-model-len 513: the model was trained for 512"):
        load(tiny_model, device="cpu", max_model_len=513)


def test_a_folder_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't be served.*config\.json"):
        engine_module.check(tmp_path, "cpu")
