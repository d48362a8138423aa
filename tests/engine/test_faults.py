"""Faults in every stage of a request: who fails, who does not, and that nothing is left behind."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.chat_format import ChatFormat
from engine.detokenizer import Detokenizer
from engine.engine import Engine
from engine.generation import (
    Choice,
    DeadlineError,
    DrainingError,
    EngineDeadError,
    Generation,
    GenerationError,
    QueueFullError,
    SlowReaderError,
)
from engine.model_runner import ModelRunner
from engine.sampler import Sampler
from engine.scheduler import Chunk, Scheduler
from engine.sequence import SamplingParams, Sequence
from tests.engine.test_engine import (
    GREEDY,
    all_blocks_are_back,
    ask,
    recorded,
    run,
    running,
    text,
    until,
    user,
)
from tests.models import make_model

# Greedy: each request's seed is its number, and nothing else.
REQUESTS = [replace(GREEDY, seed=number, max_tokens=12 + 3 * number) for number in range(6)]
VICTIM = 1
REQUESTS[VICTIM] = replace(REQUESTS[VICTIM], stop=("☠",))
LONG = SamplingParams(temperature=0, max_tokens=400)


class Fault(RuntimeError):
    pass


class Panic(BaseException):
    """What a fault in Rust becomes where Python called it."""


def sequences_in(*things: Any) -> Iterator[Sequence]:
    """Those that a method's arguments are about."""
    for thing in things:
        match thing:
            case Sequence():
                yield thing
            case Chunk() | Choice():
                yield thing.sequence
            case list():
                yield from sequences_in(*thing)


def is_victims(things: tuple[Any, ...]) -> bool:
    """Whether a method's arguments are about the victim."""
    texts = [thing for thing in things if isinstance(thing, list) and thing and isinstance(thing[0], dict)]
    return (
        any(sequence.params.seed == VICTIM for sequence in sequences_in(*things))
        or any(isinstance(thing, Detokenizer) and thing._stop == ("☠",) for thing in things)
        or user(question(VICTIM)) in texts
    )


@contextmanager
def fault_in(
    owner: type, method: str, at: int = 0, kind: type[BaseException] = Fault
) -> Iterator[list[tuple[Any, ...]]]:
    """Makes a method raise at a call, or, if that is 0, once it is about the victim.

    Yields:
        The arguments with which it did.
    """
    original = getattr(owner, method)
    calls = 0
    hits = []

    def faulty(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if (calls == at) if at else (is_victims(args) and not hits):
            hits.append(args)
            raise kind("the secret cause")
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, faulty)
        yield hits
    assert hits, "there was no fault"


def question(number: int) -> str:
    return f"question {number}"


async def ask_all(engine: Engine) -> list[Any]:
    """What all requests get, made at once: three run, the others wait."""
    asked = (ask(engine, question(number), params) for number, params in enumerate(REQUESTS))
    return await asyncio.gather(*asked, return_exceptions=True)


async def ask_each(engine: Engine) -> list[str]:
    """What they get each by itself."""
    return [text(await ask(engine, question(n), params)) for n, params in enumerate(REQUESTS)]


def check(told: list[Any], whole: list[str], *, failed: set[int]) -> None:
    """Those in `failed` have failed; the others' answers are as if nothing had been."""
    for number, answer in enumerate(told):
        if number in failed:
            assert isinstance(answer, GenerationError | Fault), (number, answer)
        else:
            assert isinstance(answer, list), (number, answer)
            assert text(answer) == whole[number]


async def check_nothing_is_left(engine: Engine) -> None:
    await until(lambda: all_blocks_are_back(engine))
    assert engine._generations == {}
    assert len(engine._scheduler._free_rows) == 3
    assert engine.failure is None


@pytest.mark.parametrize(
    ("owner", "method"),
    [(ChatFormat, "encode_dialog"), (Detokenizer, "feed"), (Detokenizer, "flush"), (Generation, "put")],
)
def test_a_fault_over_one_request_fails_it_alone(tiny_model: Path, owner: type, method: str) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            whole = await ask_each(engine)
            with fault_in(owner, method):
                told = await ask_all(engine)
            check(told, whole, failed={VICTIM})
            await check_nothing_is_left(engine)
            assert await ask_each(engine) == whole

    run(scenario())


@pytest.mark.parametrize("at", [0, 1, 5], ids=["victim", "prefill", "decode"])
@pytest.mark.parametrize(
    ("owner", "method"),
    [(ModelRunner, "launch"), (ModelRunner, "finish"), (ModelRunner, "_forward"), (Sampler, "sample")],
)
def test_a_fault_in_computing_fails_those_in_the_step_and_nobody_who_waits(
    tiny_model: Path, owner: type, method: str, at: int
) -> None:
    async def scenario() -> None:
        # A budget in which the prompts of all that run fit, so that whoever is in a step samples.
        async with running(tiny_model, max_num_seqs=3, max_batch_tokens=256) as engine:
            whole = await ask_each(engine)
            with fault_in(owner, method, at) as hits:
                told = await ask_all(engine)
            failed = {sequence.params.seed for sequence in sequences_in(*hits[0])}
            assert 0 < len(failed) <= 3
            check(told, whole, failed=failed)
            await check_nothing_is_left(engine)
            assert await ask_each(engine) == whole

    run(scenario())


def test_a_fault_in_taking_a_token_fails_those_in_the_step_and_nobody_who_waits(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3, max_batch_tokens=256) as engine:
            whole = await ask_each(engine)
            with fault_in(Sequence, "append", 7):
                told = await ask_all(engine)
            failed = {number for number, answer in enumerate(told) if isinstance(answer, Exception)}
            assert 0 < len(failed) <= 3
            check(told, whole, failed=failed)
            await check_nothing_is_left(engine)
            assert await ask_each(engine) == whole

    run(scenario())


def test_a_step_that_is_delivered_to_nobody_fails_all_in_it(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            whole = await ask_each(engine)
            with (
                fault_in(Generation, "put", 4),
                fault_in(Generation, "put", 5),
                fault_in(Generation, "put", 6),
            ):
                told = await ask_all(engine)
            failed = {number for number, answer in enumerate(told) if isinstance(answer, Exception)}
            assert 0 < len(failed) <= 3
            check(told, whole, failed=failed)
            await check_nothing_is_left(engine)

    run(scenario())


# What the scheduler believes of its blocks may be wrong then: dead is better than wrong.
@pytest.mark.parametrize(
    ("owner", "method", "at", "kind"),
    [
        (Scheduler, "_admit", 0, Fault),
        (Scheduler, "schedule", 5, Fault),
        (Scheduler, "postprocess", 5, Fault),
        (Scheduler, "add", 0, Fault),
        (ModelRunner, "finish", 5, Panic),
        (Scheduler, "schedule", 5, Panic),
    ],
)
def test_a_fault_in_the_books_ends_the_engine_and_everybody_is_told(
    tiny_model: Path, owner: type, method: str, at: int, kind: type[BaseException]
) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            with fault_in(owner, method, at, kind):
                async with asyncio.timeout(30):
                    told = await ask_all(engine)
                    await engine.stopped.wait()
            assert all(isinstance(answer, EngineDeadError | list) for answer in told)
            assert sum(isinstance(answer, EngineDeadError) for answer in told) >= 3
            assert all("secret" not in str(answer) for answer in told)
            with pytest.raises(EngineDeadError):
                engine.check_health()
            with pytest.raises(EngineDeadError):
                await ask(engine, "anybody there?")
            assert engine._generations == {}
        assert isinstance(engine.failure, EngineDeadError), "stopping a dead engine hid why it stopped"

    run(scenario())


def test_two_requests_that_fail_at_once(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            whole = await ask_each(engine)
            with fault_in(Detokenizer, "feed", 3), fault_in(Detokenizer, "feed", 4):
                told = await ask_all(engine)
            failed = {number for number, answer in enumerate(told) if isinstance(answer, Exception)}
            assert len(failed) == 2
            check(told, whole, failed=failed)
            await check_nothing_is_left(engine)

    run(scenario())


@contextmanager
def timed_out() -> Iterator[None]:
    with pytest.raises(DeadlineError):
        yield


def test_who_leaves_during_the_prefill_frees_everything(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3, max_batch_tokens=16) as engine:
            with recorded(engine, seconds=0.005) as steps:
                generation = await engine.generate(user("x" * 400), GREEDY)
                await until(lambda: len(steps) >= 3)
                generation.close()
                await check_nothing_is_left(engine)
            assert not any(chunk.samples for batch in steps for chunk in batch)

    run(scenario())


def test_who_leaves_frees_all_of_several_answers(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            generation = await engine.generate(user("a"), LONG, n=5)
            await until(lambda: len(engine._scheduler.running) == 3)
            generation.close()
            await check_nothing_is_left(engine)

    run(scenario())


@pytest.mark.parametrize("at", [1, 9])
def test_one_of_several_answers_that_fails_fails_the_request_whole(tiny_model: Path, at: int) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            generation = await engine.generate(user("a"), LONG, n=3)
            with fault_in(Detokenizer, "feed", at), pytest.raises(Fault):
                _ = [delta async for delta in generation]
            generation.close()
            await check_nothing_is_left(engine)

    run(scenario())


def test_the_deadline_ends_who_waits_who_is_prefilled_and_who_decodes(tiny_model: Path) -> None:
    async def scenario() -> None:
        options = {"max_num_seqs": 3, "max_batch_tokens": 16, "request_timeout": 1}
        async with running(tiny_model, **options) as engine:
            with recorded(engine, seconds=0.04) as steps:
                decoding = await engine.generate(user("x"), LONG)
                await anext(decoding)
                prefilled = await engine.generate(user("x" * 450), LONG)
                third = await engine.generate(user("third"), LONG)
                waiting = await engine.generate(user("waiting"), LONG)
                with timed_out():
                    _ = [delta async for delta in decoding]
                for generation in (prefilled, third, waiting):
                    with timed_out():
                        await anext(generation)
                await check_nothing_is_left(engine)
            [last] = prefilled._choices
            assert last.num_tokens == 0
            assert any(chunk.sequence is last.sequence for batch in steps for chunk in batch)
            assert waiting._choices[0].sequence.num_output_tokens == 0
            async with asyncio.timeout(30):
                answered = await engine.generate(user("hello"), replace(GREEDY, max_tokens=2))
                assert text([delta async for delta in answered])
            answered.close()
            assert answered._deadline is not None
            assert answered._deadline.cancelled()

    run(scenario())


def test_who_does_not_read_is_cut_off_and_told_and_others_are_not(tmp_path: Path) -> None:
    model = make_model(tmp_path, context=2048)
    params = SamplingParams(temperature=0, max_tokens=1100)

    async def scenario() -> None:
        async with running(model, max_num_seqs=3, kv_cache_tokens=8192) as engine:
            unread = await engine.generate(user("a"), params)
            # As many steps for both: who reads is done only after who does not was cut off.
            assert (await ask(engine, "b", params))[-1].finish_reason == "length"
            await check_nothing_is_left(engine)
            assert len(unread._outputs) == 1025
            assert text([await anext(unread)])
            with pytest.raises(SlowReaderError):
                await anext(unread)
            assert unread.usage.completion_tokens == 1025

    run(scenario())


def test_retry_after_is_how_long_the_queue_takes(tiny_model: Path) -> None:
    short = replace(GREEDY, max_tokens=8)

    async def fill_and_wait(engine: Engine) -> tuple[int, float]:
        """What those are told who find the queue full, and how long it takes to empty then."""
        first = [asyncio.create_task(ask(engine, f"{n}", short)) for n in range(8)]
        await until(lambda: sum(task.done() for task in first) >= 6)
        begun = time.monotonic()
        asked = (ask(engine, f"{n}", short) for n in range(40))
        told = await asyncio.gather(*asked, *first, return_exceptions=True)
        took = time.monotonic() - begun
        refused = [answer.retry_after for answer in told if isinstance(answer, QueueFullError)]
        assert len(refused) >= 40 - 24 - 2
        return refused[-1], took

    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=2, max_queue=24) as engine:
            with recorded(engine, seconds=0.04):
                told, took = await fill_and_wait(engine)
                assert 1 < took / 3 <= told <= 4 * took + 1
                # An hour passes in which nobody asks: it is no hour in which nobody could be served.
                for i in range(len(engine._ended)):
                    engine._ended[i] -= 3600
                told, took = await fill_and_wait(engine)
                assert 1 < took / 3 <= told <= 4 * took + 1

    run(scenario())


def test_answers_that_have_ended_do_not_count_as_waiting(tiny_model: Path) -> None:
    """They leave the engine by themselves; the queue has room for as many as it says."""

    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3, max_queue=3) as engine:
            with recorded(engine, seconds=0.2):
                running_too = await engine.generate(user("x"), LONG)
                short = [await engine.generate(user(f"{n}"), replace(GREEDY, max_tokens=1)) for n in range(2)]
                ended = [generation._choices[0].sequence for generation in short]
                await until(lambda: all(one.is_finished and one.row < 0 for one in ended))
                assert engine.stats.waiting == 0
                for generation in short:
                    assert [delta async for delta in generation][-1].finish_reason == "length"
                    generation.close()
                running_too.close()

    run(scenario())


def test_drain_lets_the_running_finish_and_takes_nobody_in(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            whole = await ask_each(engine)
            asked = asyncio.create_task(ask_all(engine))
            await until(lambda: len(engine._generations) == len(REQUESTS))
            draining = asyncio.create_task(engine.drain(60))
            await asyncio.sleep(0)
            with pytest.raises(DrainingError):
                await ask(engine, "late")
            check(await asked, whole, failed=set())
            await draining
            assert not engine.stopped.is_set()

    run(scenario())


@pytest.mark.parametrize("drains", [True, False])
def test_who_is_in_flight_when_the_engine_stops_is_told(tiny_model: Path, drains: bool) -> None:
    async def scenario() -> None:
        async with running(tiny_model) as engine:
            generation = await engine.generate(user("x"), LONG)
            await anext(generation)
            if drains:
                await engine.drain(0.01)
            else:
                await engine.stop()
            async with asyncio.timeout(30):
                with pytest.raises(DrainingError):
                    _ = [delta async for delta in generation]

    run(scenario())


def test_an_engine_that_dies_while_it_drains_tells_everybody_and_drain_ends(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, max_num_seqs=3) as engine:
            generations = [await engine.generate(user("x"), LONG) for _ in range(3)]
            await anext(generations[0])
            draining = asyncio.create_task(engine.drain(60))
            with fault_in(Scheduler, "schedule", 1):
                async with asyncio.timeout(30):
                    for generation in generations:
                        with pytest.raises(EngineDeadError):
                            _ = [delta async for delta in generation]
                    await draining
        assert isinstance(engine.failure, EngineDeadError)
        assert not engine.stopped.is_set()  # the process ends by itself: a second signal would cut it short

    run(scenario())
