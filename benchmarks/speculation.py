"""Measures what guessing (`--speculate`) gains one client, where the answer repeats its prompt.

    python -m benchmarks.speculation                 235 million parameters in float32, on the CPU
    python -m benchmarks.speculation --device cuda --dtype bfloat16 --layers 32 --hidden-size 4096 \\
        --vocab-size 128256                          Llama-3-8B's shape, on a GPU

How much is gained depends on how often a guess is right, and random weights repeat nothing. So the model is
made to: its layers do all their work but add nothing to the residual stream, and its head gives the token
that stood behind this one in the prompt a chosen probability, and the rest of it to the prompt's other tokens
alike. An answer is then made of quotations, which are the longer the higher that probability is.

Each answer is made with guesses and without, in turns, and has to be the same. The last line of the output is
the whole result as one JSON document.
"""

import argparse
import asyncio
import json
import math
import statistics
import time
from typing import Any

import torch

from benchmarks.decode import MAX_MODEL_LEN, circumstances, free_memory, make_engine, make_model
from engine.block_pool import BlockPool
from engine.engine import max_drafted_tokens
from engine.llama import Llama
from engine.model_runner import ModelRunner
from engine.scheduler import Scheduler
from engine.sequence import BLOCK_SIZE, SamplingParams


@torch.no_grad()
def make_quoting_model(args: argparse.Namespace, probability: float) -> Any:
    """A model that goes from each of the tokens 0 to `period - 1` to the next, in a circle, with a given
    probability, and else to any other of them."""
    model = make_model(args)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    # Of ones alone, but for their sign, so that the last norm leaves them as they are.
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randint_like(embedding, 2) * 2 - 1)
    embedding[:, 0] = 1
    head = model.lm_head.weight
    head.zero_()
    logit = math.log(probability * (args.period - 1) / (1 - probability))
    head[: args.period] = embedding[: args.period].roll(1, 0) * (logit / args.hidden_size)
    head[args.period :, 0] = -1000.0
    return model


def make_runner(args: argparse.Namespace, probability: float) -> ModelRunner:
    torch.manual_seed(0)
    runner = ModelRunner(
        Llama(make_quoting_model(args, probability)).eval(), num_blocks=num_blocks(args), max_num_seqs=64
    )
    if args.device == "cuda":
        runner.capture_graphs(64, MAX_MODEL_LEN)
    return runner


def num_blocks(args: argparse.Namespace) -> int:
    num_tokens: int = 2 * args.period + args.output_tokens
    return 2 + num_tokens // BLOCK_SIZE


def answer(runner: ModelRunner, speculate: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One answer to a prompt that is the circle, twice."""
    params = SamplingParams(
        max_tokens=args.output_tokens, temperature=1, top_p=1, repetition_penalty=1, seed=seed
    )

    async def work() -> dict[str, Any]:
        scheduler = Scheduler(
            BlockPool(num_blocks(args), BLOCK_SIZE),
            max_batch_tokens=2048,
            max_num_seqs=64,
            max_drafts=speculate,
            max_drafted_tokens=max_drafted_tokens(torch.device(args.device)),
        )
        engine = make_engine(runner, scheduler, vocab_size=args.vocab_size, max_queue=1)
        engine.start()
        generation = await engine.complete([list(range(args.period)) * 2], params)
        await anext(generation)  # the prompt is computed
        started = time.perf_counter()
        async for _ in generation:
            pass
        duration = time.perf_counter() - started
        await engine.stop()
        return {
            "token_ids": generation._choices[0].sequence.token_ids,
            "tokens_per_s": (args.output_tokens - 1) / duration,
            "drafts": scheduler.num_drafts,
            "right": scheduler.num_right_drafts,
        }

    return asyncio.run(work())


def measure(runner: ModelRunner, speculate: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same answers with guesses and without, in turns."""
    plain, guessed = [], []
    answer(runner, speculate, 0, args)  # warms up
    for seed in range(args.repetitions):
        plain.append(answer(runner, 0, seed, args))
        guessed.append(answer(runner, speculate, seed, args))
    equal = [one["token_ids"] == other["token_ids"] for one, other in zip(plain, guessed, strict=True)]
    if args.dtype == "float32" and not all(equal):  # bfloat16 rounds so much that a draw may become another
        raise RuntimeError("an answer with guesses is another than without")
    slow, quick = (
        statistics.median(each["tokens_per_s"] for each in answers) for answers in (plain, guessed)
    )
    drafts, right = (sum(each[name] for each in guessed) for name in ("drafts", "right"))
    tokens = args.repetitions * args.output_tokens
    return {
        "speculate": speculate,
        "plain_tokens_per_s": slow,
        "tokens_per_s": quick,
        "gain": quick / slow,
        "right_of_drafts": right / drafts if drafts else None,
        "tokens_per_step": tokens / (tokens - right),
        "equal_answers": statistics.mean(equal),
    }


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=1024, help="a multiple of 512")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument(
        "--period", type=int, default=256, help="tokens after which the prompt repeats itself"
    )
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--speculate", type=int, nargs="+", default=[4, 7])
    parser.add_argument(
        "--probability", type=float, nargs="+", default=[0.95, 0.8, 0.5],
        help="that an answer goes on as its prompt did",
    )  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = []
    print("goes on as the prompt  speculate  tokens/s without  with  gain  guesses right  tokens a step")
    for probability in args.probability:
        runner = make_runner(args, probability)
        for speculate in args.speculate:
            row = {"probability": probability, **measure(runner, speculate, args)}
            rows.append(row)
            right = f"{row['right_of_drafts']:.0%}" if row["right_of_drafts"] is not None else "-"
            print(
                f"{probability:21.1%}  {speculate:9}  {row['plain_tokens_per_s']:16.1f}  "
                f"{row['tokens_per_s']:.1f}  {row['gain']:.2f}  {right:>13}  {row['tokens_per_step']:.2f}",
                flush=True,
            )
        del runner  # before the next model is made
        free_memory(args.device)
    result = {
        **circumstances(args),
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
