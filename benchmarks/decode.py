"""Measures the engine against what the hardware allows, and against what else serves this model in PyTorch.

    python -m benchmarks.decode      Llama-3-8B's shape, random bfloat16 weights, on a GPU: some minutes
    python -m benchmarks.decode --device cpu --dtype float32 --layers 2 --hidden-size 512 --batch 1 8

A decode step must read all weights once, but for the embeddings, and all keys and values of its sequences.
That many bytes over the read bandwidth measured here is the shortest time it can take; the share of the copy
bandwidth, where bytes read and bytes written count, is given too. A prefill must do the multiplications of
all layers, and of the causal half of the attention; its bound is the rate of one large matrix product.

The baselines run first, on the plain model: `model.generate` as the tutorial calls it, one request after the
other, and transformers' continuous batching. The engine then does the same work, all requests at once. What
does not fit into the memory is named and skipped. At last `http_rates` measures what of the highest rate
reaches streaming clients, with steps that take as long. The last line of the output is the whole result as
one JSON document.
"""

import argparse
import asyncio
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import chain, pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from benchmarks.serving import ROOT, cpu_model
from engine.block_pool import BlockPool
from engine.chat_format import ChatFormat
from engine.engine import Engine
from engine.generation import Generation
from engine.llama import Llama
from engine.model_runner import ModelRunner, kv_bytes_per_token, kv_tokens_that_fit
from engine.scheduler import Chunk, Scheduler
from engine.sequence import BLOCK_SIZE, SamplingParams, Sequence
from serving.settings import DEMO_MODEL

WARM_UP_STEPS = 5
MAX_MODEL_LEN = 8192
SAMPLING: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1}
"""The tutorial's."""


def timed(work: Callable[[], object], device: str) -> float:
    """The seconds that a call takes, on a GPU until it has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_hardware(args: argparse.Namespace) -> dict[str, float]:
    """What the device can do: bytes a second that a large copy reads and writes, bytes a second that the
    quickest of some large reductions reads, and floating-point operations a second of a matrix product."""
    device, dtype = args.device, getattr(torch, args.dtype)
    source = torch.randn(args.probe_mib << 18, device=device)
    target = torch.empty_like(source)
    rows = source.view(1 << 10, -1)
    reductions: list[Callable[[], Tensor]] = [
        source.sum,
        source.amax,
        lambda: rows.sum(1),
        lambda: rows.amax(1),
    ]

    def best(work: Callable[[], object]) -> float:
        return min(timed(work, device) for _ in range(10))

    side = args.matmul
    left, right = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    return {
        "copy": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "read": source.nbytes / min(best(reduce) for reduce in reductions),
        "matmul": 2 * side**3 / best(lambda: left @ right),
    }


def make_model(args: argparse.Namespace) -> Any:
    """A Llama with random weights of bfloat16, made on the device. It computes in `args.dtype`."""
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 7 // 2,
        num_attention_heads=args.hidden_size // 128,
        num_key_value_heads=max(1, args.hidden_size // 512),
        vocab_size=args.vocab_size,
        max_position_embeddings=MAX_MODEL_LEN,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to(getattr(torch, args.dtype)).eval().requires_grad_(False)
    if args.device == "cuda":  # as `load_model` does, for the same reason
        torch.backends.cuda.enable_cudnn_sdp(False)
    return model


def random_prompts(count: int, args: argparse.Namespace) -> list[list[int]]:
    return [random.Random(i).choices(range(args.vocab_size), k=args.prompt_tokens) for i in range(count)]


# The baselines.


def measure_generate(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """`model.generate` as the tutorial calls it, one request after the other."""
    prompts = [torch.tensor([prompt], device=args.device) for prompt in random_prompts(args.clients, args)]

    def generate(prompt: Tensor, num_tokens: int) -> None:
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, **SAMPLING,
            min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0,
        )  # fmt: skip

    def generate_all() -> None:
        for prompt in prompts:
            generate(prompt, args.output_tokens)

    generate(prompts[0], 2)
    return work_result(args.clients, args.output_tokens, timed(generate_all, args.device))


def measure_continuous_batching(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """transformers' own, with all requests at once, and as much memory as it takes by itself on a GPU. It
    leaves out the repetition penalty."""
    config = GenerationConfig(
        max_new_tokens=args.batching_output_tokens,
        do_sample=True,
        eos_token_id=-1,
        pad_token_id=0,
        **SAMPLING,
    )
    prompts = random_prompts(args.batching_clients, args)
    options: dict[str, Any] = {"generation_config": config, "persistent_manager": True}
    if args.device == "cpu":
        blocks = len(prompts) * -(-(args.prompt_tokens + args.batching_output_tokens) // 256)
        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=2 * blocks + 2)
    answers: dict[str, Any] = {}
    try:
        model.generate_batch(prompts, **options)  # warms up
        duration = timed(lambda: answers.update(model.generate_batch(prompts, **options)), args.device)
    finally:  # it keeps its cache otherwise
        model.destroy_cached_continuous_batching_manager()
    tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    if tokens != len(prompts) * args.batching_output_tokens:
        raise RuntimeError(f"it made {tokens} tokens of {len(prompts) * args.batching_output_tokens}")
    return work_result(args.batching_clients, args.batching_output_tokens, duration)


def work_result(clients: int, output_tokens: int, duration: float) -> dict[str, float]:
    return {"clients": clients, "duration": duration, "tokens_per_s": clients * output_tokens / duration}


# The engine.


def bytes_read(llama: Llama) -> int:
    """Bytes that a step reads of a model: all but the embedding."""
    layers = (m for m in llama.modules() if m not in (llama, llama.embedding))
    held = (chain(vars(m).values(), m.parameters(False), m.buffers(False)) for m in layers)
    tensors = (tensor for tensor in chain.from_iterable(held) if isinstance(tensor, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_runner(llama: Llama, args: argparse.Namespace) -> tuple[ModelRunner, int]:
    """The runner with as many blocks as the server would have, or as are needed, and their number."""
    max_num_seqs = max(args.batch)
    longest = max(args.context) + WARM_UP_STEPS + args.steps
    needed = max(max_num_seqs * (longest + BLOCK_SIZE), *(n + BLOCK_SIZE for n in args.prefill))
    fit = kv_tokens_that_fit(llama, args.max_batch_tokens, max_num_seqs, args.gpu_memory_utilization)
    num_blocks = min(needed, fit) // BLOCK_SIZE
    if num_blocks == 0:
        raise SystemExit("no memory is left for the KV cache")
    runner = ModelRunner(llama, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    if args.device == "cuda":
        runner.capture_graphs(max_num_seqs, MAX_MODEL_LEN)
    for cache in runner._kv_cache:  # as if prompts had been computed
        cache.normal_()
    return runner, num_blocks


def measure_steps(
    runner: ModelRunner, num_blocks: int, batch_size: int, context: int, args: argparse.Namespace
) -> float | None:
    """The median seconds of decode steps, from the tokens of one to those of the next, sampled as the
    tutorial does. Steps are launched ahead where the engine does so. None if there are too few blocks."""
    blocks_each = -(-(context + WARM_UP_STEPS + args.steps + 1) // BLOCK_SIZE)
    if batch_size * blocks_each > num_blocks:
        return None
    shuffled = random.Random(0).sample(range(num_blocks), batch_size * blocks_each)
    sequences = [
        Sequence(
            random.Random(row).choices(range(args.vocab_size), k=context + 1),
            SamplingParams(seed=row, **SAMPLING),
            num_computed=context,
            block_table=shuffled[row * blocks_each : (row + 1) * blocks_each],
            row=row,
        )
        for row in range(batch_size)
    ]

    ahead: list[Chunk] = []
    ends: list[float] = []
    for _ in range(WARM_UP_STEPS + args.steps):
        batch = ahead or [Chunk(sequence, 1) for sequence in sequences]
        if not ahead:
            runner.launch(batch)
        ahead = [chunk.following() for chunk in batch] if runner.runs_ahead else []
        runner.finish(batch, ahead)
        for sequence in sequences:
            sequence.num_computed += 1
        ends.append(time.perf_counter())
    return statistics.median(end - begin for begin, end in pairwise(ends[WARM_UP_STEPS - 1 :]))


def measure_prefill(runner: ModelRunner, num_tokens: int, args: argparse.Namespace) -> float:
    """The median seconds of the steps in which a prompt is computed, in chunks as the scheduler cuts them."""
    prompt = random.Random(0).choices(range(args.vocab_size), k=num_tokens)

    def prefill() -> None:
        sequence = Sequence(list(prompt), SamplingParams(**SAMPLING), row=0)
        sequence.block_table = list(range(-(-num_tokens // BLOCK_SIZE)))
        while sequence.num_output_tokens == 0:
            chunk = Chunk(sequence, min(sequence.num_pending, args.max_batch_tokens))
            runner.run([chunk])
            sequence.num_computed += chunk.num_tokens

    prefill()
    return statistics.median(timed(prefill, args.device) for _ in range(3))


def prefill_operations(model: Any, num_tokens: int) -> float:
    """Floating-point operations: two for each weight of a layer and token, the head's for the last token
    alone, and two for each channel of each query and key it sees, of scores and of values."""
    config = model.config
    query, kv = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    weights = config.hidden_size * (2 * query + 2 * kv + 3 * config.intermediate_size)
    attention = 4 * query * num_tokens * (num_tokens + 1) / 2
    head = 2 * config.hidden_size * config.vocab_size
    return float(config.num_hidden_layers * (2 * weights * num_tokens + attention) + head)


def make_engine(runner: ModelRunner, scheduler: Scheduler, *, vocab_size: int, max_queue: int) -> Engine:
    """An engine for token ids: its tokenizer is another model's, so its texts are of no interest."""
    return Engine(
        ChatFormat.from_pretrained(DEMO_MODEL),
        scheduler,
        runner,
        thread=ThreadPoolExecutor(1),
        vocab_size=vocab_size,
        sampling_defaults={},
        max_model_len=MAX_MODEL_LEN,
        max_queue=max_queue,
        request_timeout=0,
    )


def measure_engine(
    runner: ModelRunner, num_blocks: int, clients: int, output_tokens: int, args: argparse.Namespace
) -> dict[str, float]:
    """The engine, with all requests at once."""
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, **SAMPLING)

    async def read(generation: Generation) -> None:
        async for _ in generation:
            pass

    async def work() -> float:
        scheduler = Scheduler(
            BlockPool(num_blocks, BLOCK_SIZE),
            max_batch_tokens=args.max_batch_tokens,
            max_num_seqs=max(args.batch),
        )
        engine = make_engine(runner, scheduler, vocab_size=args.vocab_size, max_queue=clients)
        engine.start()
        started = time.perf_counter()
        generations = [await engine.complete([prompt], params) for prompt in random_prompts(clients, args)]
        await asyncio.gather(*map(read, generations))
        duration = time.perf_counter() - started
        await engine.stop()
        return duration

    asyncio.run(work())  # warms up
    return work_result(clients, output_tokens, asyncio.run(work()))


# The report.


def baselines(model: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Those that run: transformers' continuous batching may not."""
    found = {"generate": measure_generate(model, args)}
    print_work("generate", found["generate"])
    try:
        found["continuous_batching"] = measure_continuous_batching(model, args)
        print_work("continuous batching", found["continuous_batching"])
    except Exception as error:  # whatever it does not do here is to be read, and ends nothing else
        print(f"transformers' continuous batching failed: {error!r}", file=sys.stderr, flush=True)
    free_memory(args.device)
    return found


def decode_rows(
    model: Any, runner: ModelRunner, num_blocks: int, weights: int, hardware: dict[str, float],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """One of each batch and context."""
    rows: list[dict[str, Any]] = []
    print("batch  context  ms/step  tokens/s  GB to read  of read bandwidth  of copy bandwidth")
    for context in args.context:
        for batch_size in args.batch:
            seconds = measure_steps(runner, num_blocks, batch_size, context, args)
            if seconds is None:
                print(f"{batch_size:5}  {context:7}  does not fit into {num_blocks * BLOCK_SIZE} tokens")
                continue
            to_read = weights + batch_size * context * kv_bytes_per_token(model)
            row = {
                "batch": batch_size,
                "context": context,
                "step_s": seconds,
                "tokens_per_s": batch_size / seconds,
                "bytes": to_read,
                "of_read_bandwidth": to_read / seconds / hardware["read"],
                "of_copy_bandwidth": to_read / seconds / hardware["copy"],
            }
            print(
                f"{batch_size:5}  {context:7}  {1000 * seconds:7.2f}  {row['tokens_per_s']:8.0f}  "
                f"{to_read / 1e9:10.1f}  {row['of_read_bandwidth']:17.0%}  {row['of_copy_bandwidth']:17.0%}",
                flush=True,
            )
            rows.append(row)
    return rows


def prefill_rows(
    model: Any, runner: ModelRunner, num_blocks: int, hardware: dict[str, float], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One of each length."""
    rows: list[dict[str, Any]] = []
    print("prompt  ms  tokens/s  of the matrix rate")
    for num_tokens in args.prefill:
        if num_tokens > num_blocks * BLOCK_SIZE:
            print(f"{num_tokens:6}  does not fit into {num_blocks * BLOCK_SIZE} tokens")
            continue
        seconds = measure_prefill(runner, num_tokens, args)
        share = prefill_operations(model, num_tokens) / seconds / hardware["matmul"]
        rows.append({"tokens": num_tokens, "seconds": seconds, "of_matmul": share})
        print(f"{num_tokens:6}  {1000 * seconds:.1f}  {num_tokens / seconds:.0f}  {share:.0%}", flush=True)
    return rows


def measure_http(decodes: list[dict[str, Any]]) -> dict[str, float] | None:
    """What of the highest of the rates would reach streaming clients, one for each sequence of its step."""
    if not decodes:
        return None
    row = max(decodes, key=lambda row: row["tokens_per_s"])
    flags = f"--clients {row['batch']} --step-ms {1000 * row['step_s']} --output-tokens 200"
    command = [sys.executable, "-m", "benchmarks.http_rates", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"http_rates failed: {done.stderr[-1000:]}", file=sys.stderr, flush=True)
        return None
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["rates"][0]
    print(f"HTTP, {row['batch']} streams: {rates['share']:.1%} of the tokens/s of such steps", flush=True)
    return rates


def print_work(name: str, result: dict[str, float]) -> None:
    print(f"{name}, {result['clients']} clients: {result['tokens_per_s']:.1f} tokens/s", flush=True)


def free_memory(device: str) -> None:
    """Gives back what nothing holds any more, and counts the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """When, where and with what a benchmark ran."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_model(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": vars(args),
    }


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--quantization", default="none", choices=["none", "int8"], help="of the engine's")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 512")
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024, 4096], help="before a step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="of a prompt in one step")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--clients", type=int, default=32, help="against generate")
    parser.add_argument("--batching-clients", type=int, default=64, help="against continuous batching")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each client")
    parser.add_argument("--output-tokens", type=int, default=64, help="of each, against generate")
    parser.add_argument("--batching-output-tokens", type=int, default=256, help="of each, against the other")
    parser.add_argument("--probe-mib", type=int, default=4096, help="of the copy and the reductions")
    parser.add_argument("--matmul", type=int, default=8192, help="rows and columns of the matrices")
    args = parser.parse_args()
    if max(max(args.context) + WARM_UP_STEPS + args.steps, *args.prefill) > MAX_MODEL_LEN:
        parser.error(f"--context with --steps, --prefill: at most {MAX_MODEL_LEN} tokens")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    hardware = measure_hardware(args)
    print(
        f"copy {hardware['copy'] / 1e9:.0f} GB/s, read {hardware['read'] / 1e9:.0f} GB/s, "
        f"matrix product {hardware['matmul'] / 1e12:.2f} TFLOP/s"
    )
    model = make_model(args)
    work = baselines(model, args)
    llama = Llama(model, int8=args.quantization == "int8").eval()
    weights = bytes_read(llama)
    print(f"weights read in a step: {weights / 1e9:.2f} GB", flush=True)
    runner, num_blocks = make_runner(llama, args)
    decodes = decode_rows(model, runner, num_blocks, weights, hardware, args)
    prefills = prefill_rows(model, runner, num_blocks, hardware, args)
    kv_cache = num_blocks * BLOCK_SIZE * kv_bytes_per_token(model)
    peak = peak_memory(args.device)
    print(f"peak memory {peak / 1e9:.1f} GB, of which {kv_cache / 1e9:.1f} GB are the KV cache")
    ratios = {}
    for name, clients, output_tokens in (
        ("generate", args.clients, args.output_tokens),
        ("continuous_batching", args.batching_clients, args.batching_output_tokens),
    ):
        ours = work[f"engine_{clients}"] = measure_engine(runner, num_blocks, clients, output_tokens, args)
        print_work("engine", ours)
        if name in work:
            ratios[name] = ours["tokens_per_s"] / work[name]["tokens_per_s"]
            print(f"that is {ratios[name]:.2f} times {name}")
    result = {
        **circumstances(args),
        "hardware": hardware,
        "weights": weights,
        "decode": decodes,
        "prefill": prefills,
        "peak_memory": peak,
        "kv_cache": kv_cache,
        "work": work,
        "ratios": ratios,
        "http": measure_http(decodes),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
