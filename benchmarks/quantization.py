"""Measures what int8 weights change: the answers, the memory, and the time of a step.

    python -m benchmarks.quantization      on a GPU: the speed with Llama-3-8B's shape, some minutes
    python -m benchmarks.quantization --device cpu --dtype float32 --layers 16 --hidden-size 1024 \
        --vocab-size 8000 --max-batch-tokens 64

The answers are those of a model on disk to the questions of the demo's dialogs. Greedy, they are compared
word for word. And after each token of the dialogs' own answers, the most likely next tokens are compared, and
the Kullback-Leibler divergence of their distributions is taken, in nats. That is done with the model in int8,
in bfloat16 and in float32, each with each.

Speed and memory are those of random weights. The last line of the output is the whole result as one JSON
document.
"""

import argparse
import asyncio
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import (
    bytes_read,
    circumstances,
    free_memory,
    make_model,
    make_runner,
    measure_prefill,
    measure_steps,
)
from demo.dialogs import Turn, load_dialogs, prompts_and_answers
from engine.attention import AttentionBatch, Span, causal_mask
from engine.chat_format import ChatFormat
from engine.engine import load
from engine.llama import Llama
from engine.model_runner import load_model
from engine.sequence import BLOCK_SIZE, SamplingParams
from serving.settings import DEMO_MODEL

# The answers.


@torch.inference_mode()
def next_token_logits(model: Llama, chat_format: ChatFormat, turns: list[Turn]) -> list[Tensor]:
    """For each answer, what the model says to each of its tokens and to its end: [tokens + 1, vocab_size]."""
    found = []
    for prompt, answer in turns:
        prompt_ids = chat_format.encode_dialog(prompt)
        token_ids = [*prompt_ids, *chat_format.encode_text(answer)]
        found.append(logits_from(model, token_ids, len(prompt_ids) - 1).cpu())
    return found


def logits_from(model: Llama, token_ids: list[int], first: int) -> Tensor:
    """What the model says behind each token from number `first` on: [tokens, vocab_size], float32."""
    num_tokens = len(token_ids)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    shape = (num_blocks, BLOCK_SIZE, 2, model.config.num_key_value_heads, model.config.head_dim)
    cache = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.layers]
    positions = torch.arange(num_tokens, device=model.device)
    blocks = torch.arange(num_blocks, device=model.device)
    span = Span(slice(0, num_tokens), blocks, num_tokens, causal_mask(num_tokens, num_tokens, model.device))
    batch = AttentionBatch(cache, positions, [], [span])
    logits: Tensor = model(torch.tensor(token_ids, device=model.device), positions, batch, positions[first:])
    return logits


def answers(
    folder: Path, turns: list[Turn], dtype: str, quantization: str, args: argparse.Namespace
) -> list[str]:
    """The engine's greedy answers, all asked for at once."""
    params = SamplingParams(temperature=0, top_p=1, repetition_penalty=1, max_tokens=args.max_tokens)

    async def ask_all() -> list[str]:
        engine = load(
            folder, device=args.device, dtype=dtype, quantization=quantization, max_queue=len(turns),
            kv_cache_tokens=args.kv_cache_tokens,
        )  # fmt: skip
        engine.start()
        generations = [await engine.generate(prompt, params) for prompt, _ in turns]
        texts = ["".join([delta.text async for delta in generation]) for generation in generations]
        await engine.stop()
        return texts

    texts = asyncio.run(ask_all())
    free_memory(args.device)
    return texts


def measure_agreement(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of int8, bfloat16 and float32, each with each. Beside int8, all else is in `args.dtype`."""
    chat_format = ChatFormat.from_pretrained(folder)
    turns = prompts_and_answers(load_dialogs())
    turns = random.Random(0).sample(turns, min(args.dialogs, len(turns)))
    device = torch.device(args.device)

    def measure(dtype: str, quantization: str) -> tuple[list[Tensor], list[str]]:
        model = load_model(folder, device, getattr(torch, dtype), int8=quantization == "int8")
        logits = next_token_logits(model, chat_format, turns)
        del model
        free_memory(args.device)
        return logits, answers(folder, turns, dtype, quantization, args)

    found = {
        "int8": measure(args.dtype, "int8"),
        "bfloat16": measure("bfloat16", "none"),
        "float32": measure("float32", "none"),
    }
    name = "demo" if folder == DEMO_MODEL else folder.name
    rows = []
    for first, second in combinations(found, 2):
        (logits, texts), (other_logits, other_texts) = found[first], found[second]
        pairs = list(zip(logits, other_logits, strict=True))
        tokens = sum(map(len, logits))
        row = {
            "model": name,
            "weights": first,
            "with": second,
            "answers": len(turns),
            "tokens": tokens,
            "same_next_token": sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in pairs) / tokens,
            "same_answer": sum(a == b for a, b in zip(texts, other_texts, strict=True)) / len(turns),
            "mean_kl": sum(divergence(b, a) for a, b in pairs) / tokens,
            "logit_error": error(pairs),
        }
        rows.append(row)
        print(
            f"{name}, {first} against {second}: {row['same_next_token']:.3%} of {tokens} next tokens, "
            f"{row['same_answer']:.2%} of {len(turns)} answers, KL {row['mean_kl']:.2g}, "
            f"logits' error {row['logit_error']:.2%}",
            flush=True,
        )
    return rows


def divergence(expected: Tensor, actual: Tensor) -> float:
    """Nats, the sum of all rows."""
    log_p, log_q = expected.double().log_softmax(1), actual.double().log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The root mean square of the logits' differences, as a share of the second ones'. Those of tokens that a
    model can't choose are hugely negative, and left out."""
    differences = squares = 0.0
    for actual, expected in pairs:
        possible = expected > -100
        differences += float((actual - expected)[possible].double().square().sum())
        squares += float(expected[possible].double().square().sum())
    return float((differences / squares) ** 0.5)


# Speed and memory.


def measure_speed(quantization: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of each batch size and prefills of each length, and the bytes of the weights."""
    on, is_int8 = args.device, quantization == "int8"
    # As the server loads it: int8 is made on the CPU, so that a GPU need not have room for the others.
    model = make_model(argparse.Namespace(**vars(args) | {"device": "cpu" if is_int8 else on}))
    embedding = model.get_input_embeddings().weight.nbytes
    llama = Llama(model, device=torch.device(on), int8=is_int8).eval()
    read = bytes_read(llama)
    peak = torch.cuda.max_memory_allocated() if on == "cuda" else None
    print(f"{quantization}: weights {(read + embedding) / 1e9:.2f} GB, read in a step {read / 1e9:.2f} GB")
    runner, num_blocks = make_runner(llama, args)
    rows = []
    for batch_size in args.batch:
        seconds = measure_steps(runner, num_blocks, batch_size, args.context[0], args)
        if seconds is not None:
            rows.append({"batch": batch_size, "step_s": seconds, "tokens_per_s": batch_size / seconds})
            print(
                f"{batch_size:5}  {1000 * seconds:.2f} ms/step  {batch_size / seconds:.1f} tokens/s",
                flush=True,
            )
    prefills = []
    for num_tokens in args.prefill:
        seconds = measure_prefill(runner, num_tokens, args)
        prefills.append({"tokens": num_tokens, "tokens_per_s": num_tokens / seconds})
        print(f"prompt of {num_tokens}: {num_tokens / seconds:.1f} tokens/s", flush=True)
    del model, llama, runner
    free_memory(on)
    return {"weights": read + embedding, "read": read, "peak_memory_loaded": peak, "decode": rows,
            "prefill": prefills}  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", nargs="*", default=["demo"], help="those that answer: folders, or demo")
    parser.add_argument("--dialogs", type=int, default=1560, help="of the demo's")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--kv-cache-tokens", type=int, default=32_768, help="for the answers")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 512")
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, nargs=1, default=[128], help="before a step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512])
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="of a prompt in one step")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    agreement = [
        row
        for model in args.model
        for row in measure_agreement(DEMO_MODEL if model == "demo" else Path(model), args)
    ]
    speed = {quantization: measure_speed(quantization, args) for quantization in ("none", "int8")}
    result = {
        **circumstances(args),
        "agreement": agreement,
        "speed": speed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
