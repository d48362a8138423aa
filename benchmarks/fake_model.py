"""Our server with a model that costs nothing: a step takes the time that it is told to take, and no work.

    python -m benchmarks.fake_model --step-ms 12 --port 6007   serves
    python -m benchmarks.fake_model --step-ms 12 --alone 256   the engine alone, without HTTP

Everything else is the real thing: the app, its server, the engine with its thread, scheduler and detokenizer.
While a step lasts the thread sleeps, as it does while it waits for a GPU. Before that it does as many small
tensor operations as it is told to: each lets go of Python's lock, as those do that launch a GPU's work, and
has to wait until the event loop gives it back.
"""

import argparse
import asyncio
import gc
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import api
from engine.block_pool import BlockPool
from engine.chat_format import ChatFormat
from engine.detokenizer import TokenBytes
from engine.engine import Engine
from engine.generation import Generation
from engine.scheduler import Chunk, Scheduler
from engine.sequence import BLOCK_SIZE, SamplingParams
from serving.settings import DEMO_MODEL

MAX_NUM_SEQS = 256
MAX_BATCH_TOKENS = 2048
MAX_MODEL_LEN = 2048


class FakeRunner:
    """Stands in for `ModelRunner` on a GPU: every token is one of a few words, drawn from nothing."""

    runs_ahead = True

    def __init__(self, token_ids: list[int], step_seconds: float, host_ops: int) -> None:
        self._token_ids = itertools.cycle(token_ids)
        self._step_seconds = step_seconds
        self._host_ops = host_ops
        self._tensor = torch.zeros(256)
        self._ends = 0.0
        self.steps: list[tuple[float, int]] = []
        """When each began, and how many sequences it sampled."""

    def launch(self, batch: list[Chunk]) -> None:
        for _ in range(self._host_ops):
            self._tensor.add_(1)
        self._ends = max(time.perf_counter(), self._ends) + self._step_seconds

    def finish(self, batch: list[Chunk], ahead: list[Chunk]) -> None:
        ends = self._ends
        if ahead:
            self.launch(ahead)
        if (left := ends - time.perf_counter()) > 0:
            time.sleep(left)
        sampling = [chunk.sequence for chunk in batch if chunk.samples]
        for sequence in sampling:
            sequence.append(next(self._token_ids))
        self.steps.append((ends - self._step_seconds, len(sampling)))

    def check_device(self) -> None:
        """There is none that could be lost."""


def load(step_seconds: float, host_ops: int) -> tuple[Engine, FakeRunner]:
    """An engine with the demo's tokenizer, and its runner."""
    chat_format = ChatFormat.from_pretrained(DEMO_MODEL)
    vocab_size = chat_format.tokenizer.get_vocab_size()
    token_bytes = TokenBytes(chat_format.tokenizer)
    words = [token_id for token_id in range(vocab_size) if token_bytes[token_id].isalpha()]
    runner: Any = FakeRunner(words, step_seconds, host_ops)
    pool = BlockPool(MAX_NUM_SEQS * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
    engine = Engine(
        chat_format,
        Scheduler(pool, max_batch_tokens=MAX_BATCH_TOKENS, max_num_seqs=MAX_NUM_SEQS),
        runner,
        thread=ThreadPoolExecutor(1, thread_name_prefix="engine"),
        vocab_size=vocab_size,
        sampling_defaults={},
        max_model_len=MAX_MODEL_LEN,
        max_queue=MAX_NUM_SEQS,
        request_timeout=600,
    )
    return engine, runner


async def run_alone(
    sequences: int, output_tokens: int, step_seconds: float, host_ops: int
) -> dict[str, float]:
    """The engine's own rate: its answers are read on the event loop, as text, and go nowhere."""
    engine, runner = load(step_seconds, host_ops)
    engine.start()
    gc.freeze()  # as the app does
    params = SamplingParams(max_tokens=output_tokens)

    async def read(generation: Generation) -> None:
        async for _ in generation:
            pass

    generations = [
        await engine.generate([{"role": "user", "content": f"Question {i}?"}], params)
        for i in range(sequences)
    ]
    await asyncio.gather(*map(read, generations))
    await engine.stop()
    full = [begun for begun, sampled in runner.steps if sampled == sequences]
    steps_per_s = (len(full) - 1) / (full[-1] - full[0])
    return {"steps_per_s": steps_per_s, "tokens_per_s": steps_per_s * sequences}


def serve(port: int, step_seconds: float, host_ops: int) -> None:
    """Runs the server, which loads the fake model in place of one."""

    def load_fake(model: Path, **options: Any) -> Engine:
        return load(step_seconds, host_ops)[0]

    vars(api)["load"] = load_fake
    sys.argv = ["api.py", "--model", "demo", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    api.main()


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, default=0, help="what a step takes (default: 0)")
    parser.add_argument("--host-ops", type=int, default=0, help="tensor operations in a step (default: 0)")
    parser.add_argument("--port", type=int, default=6007)
    parser.add_argument("--alone", type=int, help="measure the engine with so many sequences, without HTTP")
    parser.add_argument("--output-tokens", type=int, default=500, help="of each, alone (default: 500)")
    args = parser.parse_args()
    step_seconds = args.step_ms / 1000
    if args.alone:
        print(json.dumps(asyncio.run(run_alone(args.alone, args.output_tokens, step_seconds, args.host_ops))))
    else:
        serve(args.port, step_seconds, args.host_ops)


if __name__ == "__main__":
    main()
