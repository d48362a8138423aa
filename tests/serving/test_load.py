"""More clients than there is room for, clients that leave, and too little memory: nobody else notices."""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import soak
from benchmarks.soak import Case, case
from engine.engine import Engine, load
from engine.generation import Delta
from engine.scheduler import Chunk
from engine.sequence import Sequence
from serving.server import raise_file_limit
from serving.settings import DEMO_MODEL
from tests.conftest import ROOT, Server
from tests.engine.test_engine import SamplingParams, all_blocks_are_back, ask, running, text, until, user

resource = pytest.importorskip("resource", reason="this system has no limit on open files")

PROMPTS = ["你好", "讲个故事", "How do I stream?", "Thanks", "What is your port?", "多谢", "Who are you?"]


def address(server: Server) -> tuple[str, int]:
    return "127.0.0.1", server.port


@pytest.fixture(scope="module")
def crowded(start_server: Callable[..., Server]) -> Server:
    """The demo with a short queue, started where a process has few open files, as on many systems."""
    raise_file_limit()  # of the clients' side
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        return start_server("demo", "--max-queue", "64")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_each_of_a_thousand_clients_at_once_is_answered_right_or_told_when_to_come_back(
    crowded: Server,
) -> None:
    cases = [
        asked
        for prompt in PROMPTS
        for asked in (
            case("/", prompt=prompt, temperature=0, max_tokens=20),
            case("/", prompt=prompt, temperature=0, max_tokens=20, stream=True),
            case("/v1/completions", model="demo", prompt=prompt, temperature=0, stream=True),
        )
    ]
    process = psutil.Process(crowded.process.pid)

    async def storm() -> list[tuple[Case, soak.Reply]]:
        asked = [cases[n % len(cases)] for n in range(1000)]
        replies = await asyncio.gather(*(soak.ask(address(crowded), one) for one in asked))
        return list(zip(asked, replies, strict=True))

    alone = asyncio.run(soak.alone(address(crowded), cases))
    before = process.memory_info().rss
    for _ in range(8):  # what is kept on purpose is there when memory grows no more
        asyncio.run(storm())
        colder, before = before, process.memory_info().rss
        if before < colder * 1.005:
            break
    replies = asyncio.run(storm())
    after = process.memory_info().rss
    print(
        f"1000 clients at once: {Counter(reply.status for _, reply in replies)}, "
        f"memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB"
    )
    for asked, reply in replies:
        if reply.status == 200:
            assert reply.texts == alone[asked]
        else:
            assert reply.status in (429, 503)
            assert int(reply.headers["retry-after"]) >= 1
    assert any(reply.status == 200 for _, reply in replies)
    assert after <= before * 1.05


def test_nothing_is_left_of_clients_that_leave_at_any_moment(
    start_server: Callable[..., Server], tiny_model: Path
) -> None:
    """Half a request, a unary wait, before the first token, in the middle of a stream; by a reset or not."""
    server = start_server(tiny_model, "--max-queue", "600")
    chance = random.Random(1)
    # They would go on until the context is full.
    long = [
        case("/", prompt="x", max_tokens=480, stream=True),
        case("/", prompt="x", max_tokens=480, stream=False),
        case("/v1/completions", model=tiny_model.name, prompt=["x", "y"], n=2, max_tokens=480, stream=True),
    ]
    good = case("/", prompt="x", max_tokens=30, temperature=0)

    async def scenario() -> float:
        alone = await soak.ask(address(server), good)
        before = await soak.at_rest(server.url)
        await asyncio.gather(*(soak.leave(address(server), chance.choice(long), chance) for _ in range(500)))
        left = time.monotonic()
        after = await soak.at_rest(server.url, files=before["process_open_fds"])
        assert soak.in_use(after) == 0
        assert after["process_open_fds"] <= before["process_open_fds"]
        aborted = 'llama_request_finished_total{finished_reason="aborted"}'
        assert after[aborted] > before[aborted]
        finished = [f'llama_request_finished_total{{finished_reason="{end}"}}' for end in ("stop", "length")]
        print(f"500 clients left: {after[aborted] - before[aborted]:.0f} requests aborted, ", end="")
        print(f"{sum(after[end] - before[end] for end in finished):.0f} were complete, ", end="")
        assert (await soak.ask(address(server), good)).texts == alone.texts
        return time.monotonic() - left

    print(f"nothing left of them and an answer after {asyncio.run(scenario()):.1f} s")
    assert "Traceback" not in server.log


def test_within_two_steps_nothing_is_left_of_500_clients_that_leave(tiny_model: Path) -> None:
    steps: list[set[Sequence]] = []
    left: list[tuple[int, list[Sequence]]] = []
    chance = random.Random(2)

    async def client(engine: Engine) -> None:
        params = SamplingParams(max_tokens=400, seed=chance.randrange(1000))
        await asyncio.sleep(chance.random() * 3)
        generation = await engine.generate(user("x" * chance.randrange(1, 200)), params)
        sequences = [choice.sequence for choice in generation._choices]
        if chance.random() < 0.3:  # before its first token, mostly
            await asyncio.sleep(chance.random() * 0.1)
        else:
            for _ in range(chance.randrange(1, 8)):
                await anext(generation)
        generation.close()
        left.append((len(steps), sequences))

    async def scenario() -> None:
        async with running(tiny_model, max_queue=500, max_num_seqs=32) as engine:
            run_step = engine._runner.finish

            def recorded(batch: list[Chunk], *ahead: Any) -> None:
                steps.append({chunk.sequence for chunk in batch})
                run_step(batch, *ahead)

            engine._runner.finish = recorded  # type: ignore[method-assign]
            async with asyncio.timeout(120):
                await asyncio.gather(*(client(engine) for _ in range(500)))
            last_left = len(steps)
            await until(lambda: all_blocks_are_back(engine))
            assert len(steps) <= last_left + 2
            assert not engine._generations

    asyncio.run(scenario())
    last_step = {sequence: number for number, batch in enumerate(steps, 1) for sequence in batch}
    extra = [last_step.get(one, 0) - begun for begun, sequences in left for one in sequences]
    print(f"{len(left)} clients left, {len(steps)} steps; the longest stayed {max(extra)} steps more")
    assert len(left) == 500
    assert max(extra) <= 2


@pytest.mark.parametrize("kv_cache_tokens", [16, 64])
def test_50_clients_get_their_answers_from_the_smallest_caches(kv_cache_tokens: int) -> None:
    """One block serves one after the other; in four, those who run take them away from each other."""
    params = SamplingParams(temperature=0, max_tokens=60)

    async def main() -> None:
        engine = load(
            DEMO_MODEL, device="cpu", kv_cache_tokens=kv_cache_tokens, max_model_len=kv_cache_tokens
        )
        engine.start()
        prompts = ["你好", "Hi", "Thanks", "多谢", "Who are you?"]
        alone = {prompt: whole(await ask(engine, prompt, params)) for prompt in prompts}
        before = engine.stats.preemptions
        async with asyncio.timeout(120):
            asked = [prompts[n % len(prompts)] for n in range(50)]
            answers = await asyncio.gather(*(ask(engine, prompt, params) for prompt in asked))
        preemptions = engine.stats.preemptions - before
        print(f"{kv_cache_tokens} tokens of cache: 50 answers, {preemptions} preemptions")
        assert [whole(answer) for answer in answers] == [alone[prompt] for prompt in asked]
        assert preemptions > 0 or kv_cache_tokens == 16
        await until(lambda: all_blocks_are_back(engine))
        await engine.stop()

    asyncio.run(main())


def whole(deltas: list[Delta]) -> tuple[str, str | None]:
    return text(deltas), deltas[-1].finish_reason


def test_a_soak_leaves_nothing_behind() -> None:
    """The real one takes longer: python -m benchmarks.soak --seconds 600."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--seconds", "30"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    print(result.stdout.splitlines()[-1])
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["requests"] > 100
