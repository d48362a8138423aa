"""Steps that are launched before the one before them has ended change no answer.

On the CPU: all but the graphs themselves is what runs on CUDA."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.decode_graphs import DecodeGraphs, DecodeInputs
from engine.engine import Engine
from engine.generation import GenerationError
from engine.model_runner import ModelRunner
from engine.scheduler import Chunk
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from tests.engine.test_engine import all_blocks_are_back, ask, run, running, spoiled, text, until, user
from tests.engine.test_prompt_lookup import CASES, DRAWN, FEW, check_same
from tests.engine.test_same_tokens import (
    assert_same_tokens,
    generate,
    load_runner,
    random_sequences,
    run_together,
)
from tests.models import SHAPES, make_model


class PlainGraphs(DecodeGraphs):
    """Computes what a graph would repeat. As with a graph, the logits are overwritten by the next run."""

    def _capture(self, size: int) -> Callable[[], Tensor]:
        return self._record(size)

    def _record(self, size: int, *, fused: bool = False) -> Callable[[], Tensor]:
        logits = self._inputs.forward(self._model, size, fused=fused)
        return lambda: logits.copy_(self._inputs.forward(self._model, size, fused=fused))


@torch.inference_mode()
def give_graphs(runner: ModelRunner, max_num_seqs: int) -> None:
    inputs = DecodeInputs(runner._kv_cache, max_num_seqs=max_num_seqs, max_blocks=512 // BLOCK_SIZE)
    runner._graphs = PlainGraphs(runner._model, inputs, max_num_seqs=max_num_seqs)


@asynccontextmanager
async def running_ahead(model: Path, **options: Any) -> AsyncIterator[tuple[Engine, list[int]]]:
    """An engine, and how many sequences were in each step that was launched ahead."""
    async with running(model, **options) as engine:
        give_graphs(engine._runner, len(engine._scheduler._free_rows))
        schedule_ahead, sizes = engine._scheduler.schedule_ahead, []

        def recorded(batch: Any) -> Any:
            ahead = schedule_ahead(batch)
            sizes.append(len(ahead))
            return ahead

        engine._scheduler.schedule_ahead = recorded  # type: ignore[method-assign]
        yield engine, sizes


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_of_transformers(shape: str, tmp_path: Path) -> None:
    """Whoever comes and goes, and is preempted, in between."""
    model = make_model(tmp_path, shape)
    sequences = random_sequences(60, seed=5, prompt=range(2, 40), answer=range(1, 80), penalties=[1.0, 1.1])
    expected = generate(model, [list(s.token_ids) for s in sequences], [s.params for s in sequences])
    runner = load_runner(model, 20)
    give_graphs(runner, 24)

    scheduler = run_together(runner, sequences, num_blocks=20, max_batch_tokens=48, every=7)

    assert_same_tokens(model, sequences, expected)
    assert scheduler.num_preemptions
    assert scheduler.pool.num_unused == 20


async def answers(model: Path, params: SamplingParams, schema: dict[str, Any] | None, ahead: bool) -> Any:
    """Some at once, of different lengths."""
    async with running_ahead(model) as (engine, sizes):
        if not ahead:
            engine._runner._graphs = None
        grammar = await engine.compile(schema) if schema else None

        found = await asyncio.gather(*(
            ask(
                engine,
                f"say it {'again ' * number}",
                replace(params, seed=number, max_tokens=params.max_tokens - 5 * number),
                grammar,
            )
            for number in range(6)
        ))  # fmt: skip
        await until(lambda: all_blocks_are_back(engine))
        return found, sum(sizes)


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_the_same(tiny_model: Path, case: str) -> None:
    async def scenario() -> None:
        plain, none = await answers(tiny_model, CASES[case], None, ahead=False)
        ours, num_ahead = await answers(tiny_model, CASES[case], None, ahead=True)
        check_same(ours, plain)
        assert num_ahead > 100 > none == 0

    run(scenario())


def test_an_answer_by_a_schema_is_the_same(tiny_model: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["b", "cd"]}}, "additionalProperties": False}
    params = replace(DRAWN, max_tokens=120, logit_bias=())

    async def scenario() -> None:
        plain, _ = await answers(tiny_model, params, schema, ahead=False)
        ours, num_ahead = await answers(tiny_model, params, schema, ahead=True)
        check_same(ours, plain)
        assert any(deltas[-1].finish_reason == "stop" for deltas in ours)
        assert num_ahead

    run(scenario())


def test_a_step_is_launched_before_the_tokens_that_it_reads_are_waited_for(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_ahead(tiny_model) as (engine, _):
            events = []
            sample, graphs = engine._runner._sampler.sample, engine._runner._graphs
            assert graphs is not None
            launch = graphs.run

            def sampling(*args: Any) -> Any:
                drawn = sample(*args)
                read = drawn.read

                def reading() -> Any:
                    events.append("read")
                    return read()

                drawn.read = reading  # type: ignore[method-assign]
                return drawn

            def launching(batch: Any, *drawn: Any) -> Any:
                events.append("launch")
                return launch(batch, *drawn)

            engine._runner._sampler.sample, graphs.run = sampling, launching  # type: ignore[method-assign]
            await ask(engine, "a", SamplingParams(max_tokens=4))
            # Of the prompt; of three tokens, of which the first is known, and the last has none behind it.
            # The first attempt at a graph is that of the prompt, which has none.
            assert events == ["launch", "read", "launch", "launch", "read", "launch", "read", "read"]

    run(scenario())


class Waits(TorchFunctionMode):
    """Notes what would wait for a GPU, were there one: whatever goes to it from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_list = func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list)
        is_sent = func is Tensor.to and any(isinstance(arg, torch.device | str) for arg in args[1:2])
        is_made_there = func is torch.tensor and "device" in kwargs
        if is_list or is_made_there or (is_sent and not kwargs.get("non_blocking")):
            self.found.append(f"{func.__name__} {args[1:]}")
        return func(*args, **kwargs)


@torch.inference_mode()
def test_a_step_that_only_decodes_waits_for_nothing_but_the_tokens_before_it(tiny_model: Path) -> None:
    """Whatever its sequences ask for, and though one of them has left."""
    runner = load_runner(tiny_model, 20)
    give_graphs(runner, 24)
    asked = [{}, {"logprobs": 2}, {"logit_bias": FEW}, {"min_tokens": 30}, {"presence_penalty": 0.5}]
    sequences = [
        Sequence([1, 2], replace(DRAWN, seed=row, **params), frozenset({257}), block_table=[row], row=row)  # type: ignore[arg-type]
        for row, params in enumerate(asked)
    ]
    runner.run([Chunk(sequence, 2) for sequence in sequences])  # claims the rows of the sampler
    for sequence in sequences:
        sequence.num_computed = 2
    batch = [Chunk(sequence, 1) for sequence in sequences]
    runner.launch(batch)
    runner.finish(batch, ahead := [chunk.following() for chunk in batch])
    left = ahead[1:]
    with Waits() as waits:
        runner.finish(left, [chunk.following() for chunk in left])
    assert [sequence.num_output_tokens for sequence in sequences] == [2, 3, 3, 3, 3]
    assert waits.found == []


def test_who_ends_by_surprise_leaves_no_trace(tiny_model: Path) -> None:
    """By a stop token, a stop string, a failure, or because the client leaves."""
    generator = random.Random(4)
    ended = {"stop token": 0, "stop string": 0, "length": 0, "failed": 0, "left": 0}

    async def client(engine: Engine, n: int) -> None:
        stop_token_id = min(engine._chat_format.stop_token_ids)
        way, params = generator.choice([
            ("left", SamplingParams(max_tokens=60)),
            ("stop token", SamplingParams(min_tokens=n % 20, logit_bias=((stop_token_id, 1e4),))),
            ("stop string", SamplingParams(logit_bias=FEW, stop=("ab",))),
            ("length", SamplingParams(max_tokens=generator.randrange(1, 60))),
        ])  # fmt: skip
        content = f"{n} " + "x" * generator.randrange(60)
        generation = await engine.generate(user(content), replace(params, seed=n, temperature=1.5))
        leaves_after = generator.randrange(1, 30) if way == "left" else 1000
        try:
            async for _ in generation:
                leaves_after -= 1
                if leaves_after == 0:
                    break
            ended[way] += 1
        except GenerationError:
            ended["failed"] += 1
        finally:
            generation.close()

    async def scenario() -> None:
        async with running_ahead(tiny_model, max_num_seqs=16) as (engine, sizes):
            expected = text(await ask(engine, "good"))
            sample = engine._runner._sampler.sample
            engine._runner._sampler.sample = spoiled(engine, generator, 0.003)  # type: ignore[method-assign]
            await asyncio.gather(*(client(engine, n) for n in range(120)))
            await until(lambda: all_blocks_are_back(engine))
            assert min(ended.values()) > 0
            assert sum(sizes) > 100
            assert engine._generations == {}
            assert len(engine._scheduler._free_rows) == 16
            engine._runner._sampler.sample = sample  # type: ignore[method-assign]
            assert text(await ask(engine, "good")) == expected

    run(scenario())


def test_who_waits_is_let_in_after_the_step_that_is_running(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_ahead(tiny_model) as (engine, sizes):
            stream = await engine.generate(user("stream"), SamplingParams(max_tokens=400))
            await anext(stream)
            await until(lambda: sum(sizes) > 10)
            await ask(engine, "b", SamplingParams(max_tokens=1))
            assert stream._choices[0].sequence.num_output_tokens < 400
            stream.close()
            await until(lambda: all_blocks_are_back(engine))

    run(scenario())
