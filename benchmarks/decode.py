"""Measures the engine's decode steps against what the memory allows, and against transformers' generate.

    python -m benchmarks.decode      Llama-3-8B's shape, random bfloat16 weights, on a GPU
    python -m benchmarks.decode --device cpu --dtype float32 --layers 2 --hidden-size 512 --context 128

A decode step must read all weights once, but for the embeddings, and all keys and values of its
sequences. That many bytes, over the bandwidth measured here (a large copy, counting bytes read and bytes
written), is the shortest time a step can take. The last line of the output is the whole result as one
JSON document.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.model_runner import ModelRunner, kv_bytes_per_token
from engine.scheduler import Chunk
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence

WARM_UP_STEPS = 5


def make_model(args: argparse.Namespace) -> Any:
    """A Llama with random weights, made on the device."""
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 7 // 2,
        num_attention_heads=args.hidden_size // 128,
        num_key_value_heads=max(1, args.hidden_size // 512),
        vocab_size=128_256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
    )
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype), attn_implementation="paged"
        ).eval()


def measure_bandwidth(device: str) -> float:
    """Bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.nbytes / min(times)


def timed(work: Callable[[], object], device: str) -> float:
    """The seconds that a call takes, on a GPU until it has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_steps(model: Any, batch_size: int, args: argparse.Namespace) -> list[float]:
    """The seconds of decode steps of `batch_size` sequences, sampled as the tutorial does."""
    blocks_each = -(-(args.context + WARM_UP_STEPS + args.steps) // BLOCK_SIZE)
    runner = ModelRunner(model, num_blocks=batch_size * blocks_each, max_num_seqs=batch_size)
    if args.device == "cuda":
        runner.capture_graphs(batch_size, blocks_each * BLOCK_SIZE)
    for cache in runner._kv_cache:  # as if the prompts had been computed
        cache.normal_()
    shuffled = random.Random(0).sample(range(batch_size * blocks_each), batch_size * blocks_each)
    sequences = [
        Sequence(
            random.Random(row).choices(range(128_000), k=args.context + 1),
            SamplingParams(seed=row),
            num_computed=args.context,
            block_table=shuffled[row * blocks_each : (row + 1) * blocks_each],
            row=row,
        )
        for row in range(batch_size)
    ]

    def step() -> None:
        token_ids = runner.run([Chunk(sequence, 1) for sequence in sequences])
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            sequence.num_computed += 1
            sequence.append(token_id)

    return [timed(step, args.device) for _ in range(WARM_UP_STEPS + args.steps)][WARM_UP_STEPS:]


@torch.inference_mode()
def measure_generate(model: Any, args: argparse.Namespace) -> float:
    """The seconds a token takes in `model.generate`, called as the tutorial does: one sequence at a time."""
    model.set_attn_implementation("sdpa")
    # cuDNN's attention plans anew for each length of context, and would make this several times slower.
    torch.backends.cuda.enable_cudnn_sdp(False)
    prompt = torch.randint(128_000, (1, args.context), device=args.device)

    def generate(num_tokens: int) -> None:
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.5, top_p=0.9,
            repetition_penalty=1.1, min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0,
        )  # fmt: skip

    generate(2)
    prefill, whole = (timed(partial(generate, n), args.device) for n in (1, 1 + args.steps))
    return (whole - prefill) / int(args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 512")
    parser.add_argument("--context", type=int, default=1000, help="tokens before the first step")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    bandwidth = measure_bandwidth(args.device)
    model = make_model(args)
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    print(f"weights {weights / 1e9:.1f} GB a step, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print("batch  ms/step  tokens/s  share of the bandwidth")
    rows = []
    for batch_size in args.batch:
        seconds = statistics.median(measure_steps(model, batch_size, args))
        bound = (weights + batch_size * args.context * kv_bytes_per_token(model)) / bandwidth
        rows.append({"batch": batch_size, "step_s": seconds, "share": bound / seconds})
        print(
            f"{batch_size:5}  {1000 * seconds:7.2f}  {batch_size / seconds:8.0f}  {bound / seconds:.0%}",
            flush=True,
        )
    generate = measure_generate(model, args)
    print(f"generate: {1000 * generate:.2f} ms a token, {1 / generate:.0f} tokens/s")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": vars(args),
        "bandwidth": bandwidth,
        "weights": weights,
        "rows": rows,
        "generate_token_s": generate,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
