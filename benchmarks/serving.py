"""Measures servers over HTTP as their users would: tokens/s, time to first token, time per token.

    python -m benchmarks.serving                              our server against the tutorial's, on the CPU
    python -m benchmarks.serving --url http://127.0.0.1:6006  a server that runs already
    python -m benchmarks.serving --url ... --served-model M   one of OpenAI's kind: /v1/completions is asked

Each burst sends one request per client, all at the same moment. Every prompt is new, so that no cache
can know it. An answer that does not have exactly the number of tokens that was asked for ends the run:
ours come from a model that cannot stop by itself (see `random_model.py`).

The last line of the output is the whole result as one JSON document.
"""

import argparse
import http.client
import itertools
import json
import math
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.pseudo_words import pseudo_words

ROOT = Path(__file__).parent.parent
REQUEST_TIMEOUT = 600.0  # seconds without a byte
START_TIMEOUT = 300.0  # seconds until a server listens

prompt_seeds = itertools.count(time.time_ns())  # a server that was measured before has not seen them either


class ServerError(Exception):
    """A server that does not start, or does not do what it is asked."""


@dataclass(frozen=True)
class Server:
    """A running server. Without `pid`, its processor time is not measured."""

    name: str
    url: str
    pid: int | None = None
    model: str | None = None
    """What it calls its model in /v1/completions, which is asked then; None: POST / is."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else is asked of it, as how to sample."""

    def request(self, prompt: str, output_tokens: int) -> tuple[str, str]:
        """Path and body."""
        body = {"prompt": prompt, "max_tokens": output_tokens, "stream": True, **self.fields}
        if self.model is None:
            return "/", json.dumps(body)
        options = {"model": self.model, "stream_options": {"include_usage": True}}
        return "/v1/completions", json.dumps(body | options)


@dataclass(frozen=True)
class Answer:
    """What a client saw of one request. Times are in seconds after it was sent."""

    event_times: list[float]
    prompt_tokens: int
    completion_tokens: int

    @property
    def ttft(self) -> float:
        """Time to the first token; that of the whole answer if the server does not stream."""
        return self.event_times[0]

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 if the server does not stream."""
        return (self.event_times[-1] - self.event_times[0]) / max(self.completion_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """The times between one event and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.event_times)]


@dataclass(frozen=True)
class Burst:
    """What came of requests that were sent at the same moment. Times are in seconds."""

    answers: list[Answer]
    duration: float
    server_cpu: float
    generator_cpu: float


@dataclass(frozen=True)
class Measurement:
    """One server at one number of clients. Times are in seconds; `None` where they have no meaning.

    Percentiles are over the answers of all bursts; the rest are means or medians of the bursts.
    """

    server: str
    clients: int
    tokens_per_s: float
    """Output tokens, of all clients together."""
    cpu_per_token: float | None
    generator_cpu_per_token: float
    prompt_tokens: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float | None
    tpot_p99: float | None
    step: float | None
    """The median time between two events of a stream: that of one step of the engine."""
    all_prefilled: float
    """The median time after which every client of a burst had its first token."""
    ttft_lag: float
    """How much later than half of that time the median client of a burst had its own: see `print_lag`."""


def ask(server: Server, prompt: str, output_tokens: int) -> Answer:
    """Sends one request and reads the answer, spending as little processor time as it can.

    Raises:
        ServerError: if the answer has another number of tokens, or there is none.
    """
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=REQUEST_TIMEOUT)
    path, body = server.request(prompt, output_tokens)
    times = []
    last_event = b""
    started = time.perf_counter()
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.headers.get_content_type() == "text/event-stream":
        for line in response:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - started)
                last_event = line.removeprefix(b"data: ")
    else:
        last_event = response.read()
        times.append(time.perf_counter() - started)
    connection.close()
    usage = (json.loads(last_event).get("usage") or {}) if response.status == 200 else {}
    if usage.get("completion_tokens") != output_tokens:
        raise ServerError(
            f"asked {server.name} for {output_tokens} tokens, got "
            f"HTTP {response.status}: {last_event.decode()}"
        )
    if server.model is not None:  # the last event, with the usage, comes behind the last token
        times.pop()
    return Answer(times, usage["prompt_tokens"], usage["completion_tokens"])


def new_prompts(count: int, words: int) -> list[str]:
    """Prompts that no server has seen."""
    return [pseudo_words(words, next(prompt_seeds)) for _ in range(count)]


def send_burst(server: Server, prompts: list[str], output_tokens: int) -> Burst:
    """Sends each prompt from a client of its own, at the same moment; returns when all are answered."""
    ready = threading.Barrier(len(prompts))

    def client(prompt: str) -> Answer:
        ready.wait()
        return ask(server, prompt, output_tokens)

    cpu_before, generator_before = cpu_seconds(server.pid), time.process_time()
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(client, prompts))
    return Burst(
        answers,
        duration=time.perf_counter() - started,
        server_cpu=cpu_seconds(server.pid) - cpu_before,
        generator_cpu=time.process_time() - generator_before,
    )


def measure(
    server: Server, clients: int, *, repetitions: int, prompt_words: int, output_tokens: int
) -> Measurement:
    """Sends `repetitions` bursts of `clients` requests, after a warm-up."""
    send_burst(server, new_prompts(1, prompt_words), output_tokens)
    bursts = [
        send_burst(server, new_prompts(clients, prompt_words), output_tokens) for _ in range(repetitions)
    ]
    return summary(server, bursts)


def summary(server: Server, bursts: list[Burst]) -> Measurement:
    """Of bursts of the same number of clients."""
    answers = [answer for burst in bursts for answer in burst.answers]
    tokens = sum(answer.completion_tokens for answer in answers)
    return Measurement(
        server=server.name,
        clients=len(bursts[0].answers),
        tokens_per_s=tokens / len(bursts) / statistics.median(burst.duration for burst in bursts),
        cpu_per_token=sum(burst.server_cpu for burst in bursts) / tokens if server.pid else None,
        generator_cpu_per_token=sum(burst.generator_cpu for burst in bursts) / tokens,
        **latencies([burst.answers for burst in bursts]),
    )


def latencies(bursts: list[list[Answer]]) -> dict[str, Any]:
    """The fields of a `Measurement` that its clients measured."""
    answers = [answer for burst in bursts for answer in burst]
    gaps = [gap for answer in answers for gap in answer.gaps]
    ttfts = [answer.ttft for answer in answers]
    tpots = [answer.tpot for answer in answers]
    ttfts_by_burst = [[answer.ttft for answer in burst] for burst in bursts]
    return {
        "prompt_tokens": statistics.mean(answer.prompt_tokens for answer in answers),
        "ttft_p50": percentile(ttfts, 50),
        "ttft_p99": percentile(ttfts, 99),
        "tpot_p50": percentile(tpots, 50) if gaps else None,
        "tpot_p99": percentile(tpots, 99) if gaps else None,
        "step": percentile(gaps, 50) if gaps else None,
        "all_prefilled": statistics.median(max(burst) for burst in ttfts_by_burst),
        "ttft_lag": statistics.median(percentile(burst, 50) - max(burst) / 2 for burst in ttfts_by_burst),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` percent of all values do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def cpu_seconds(pid: int | None) -> float:
    """The processor time that a process and its children have used; 0 if it is unknown."""
    if pid is None:
        return 0.0
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    # Those of ended children count for their parents.
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))


@contextmanager
def start_server(
    name: str,
    command: list[str],
    folder: Path,
    *,
    variables: Mapping[str, str] | None = None,
    **of_server: Any,
) -> Iterator[Server]:
    """Runs `command` with a free port as its `--port` until the block ends; its log goes to `folder`.

    Args:
        variables: of its environment, beside ours.
        of_server: more fields of the `Server`.

    Raises:
        ServerError: if it does not listen in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | (variables or {}), start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_listening(port, process, log)
        pid = process.pid if platform.system() == "Linux" else None
        yield Server(name, f"http://127.0.0.1:{port}", pid, **of_server)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # processes that it has left behind
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_listening(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server accepts connections.

    Raises:
        ServerError: if it has ended or takes too long.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise ServerError(f"the server did not start; its log ends with\n{log.read_text()[-2000:]}")


def server_commands(model: Path, threads: int) -> dict[str, list[str]]:
    """How to start the servers that are compared, but for their port."""
    options = ["--model", str(model), "--threads", str(threads)]
    return {
        "tutorial": [sys.executable, "-m", "benchmarks.tutorial_server", *options],
        "ours": [sys.executable, "api.py", "--device", "cpu", "--host", "127.0.0.1", *options],
    }


def measure_all(args: argparse.Namespace) -> list[Measurement]:
    """Measures the servers that the command line asks for, one after the other."""
    if args.url:
        return measure_server(Server("url", args.url, args.pid, args.served_model), args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = args.model or write_model(folder / "model")
        measurements = []
        for name, command in server_commands(model, args.threads).items():
            if name in args.servers:
                with start_server(name, command, folder) as server:
                    measurements += measure_server(server, args)
        return measurements


def write_model(path: Path) -> Path:
    """Makes the random model in a process of its own, to keep PyTorch out of this one."""
    subprocess.run([sys.executable, "-m", "benchmarks.random_model", str(path)], cwd=ROOT, check=True)
    return path


def measure_server(server: Server, args: argparse.Namespace) -> list[Measurement]:
    """Measures one server at each number of clients."""
    measurements = []
    for clients in args.clients:
        print(f"{server.name}: {clients} at once, {args.repetitions} times", file=sys.stderr)
        measurements.append(
            measure(
                server,
                clients,
                repetitions=args.repetitions,
                prompt_words=args.prompt_words,
                output_tokens=args.output_tokens,
            )
        )
    return measurements


def ratios(measurements: list[Measurement], baseline: str = "tutorial") -> dict[int, float]:
    """Our throughput divided by that of another server, for each number of clients."""
    throughput = {(m.server, m.clients): m.tokens_per_s for m in measurements}
    return {
        clients: throughput["ours", clients] / theirs
        for (server, clients), theirs in throughput.items()
        if server == baseline and ("ours", clients) in throughput
    }


def print_table(measurements: list[Measurement]) -> None:
    """Prints one line per measurement, with times in milliseconds."""
    titles = ["TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "CPU/token", "generator CPU/token"]
    print("server        clients  tokens/s", *titles, "(ms)", sep="  ")
    for m in measurements:
        times = [m.ttft_p50, m.ttft_p99, m.tpot_p50, m.tpot_p99, m.cpu_per_token, m.generator_cpu_per_token]
        cells = ["-" if t is None else f"{1000 * t:.1f}" for t in times]
        aligned = [cell.rjust(len(title)) for cell, title in zip(cells, titles, strict=True)]
        print(f"{m.server:12}  {m.clients:7}  {m.tokens_per_s:8.1f}", *aligned, sep="  ")


def print_ratios(measurements: list[Measurement], baseline: str = "tutorial") -> None:
    """Prints by how much our throughput exceeds that of another server."""
    for clients, ratio in ratios(measurements, baseline).items():
        print(f"{clients} clients: {ratio:.2f} times the throughput of {baseline}")


def print_lag(m: Measurement) -> None:
    """Prints whether prompts that arrive together hold each other up.

    If they are prefilled one after the other, the median client waits half of the time that all of them
    take. On top of that it may wait for one step, the one that runs when it arrives.
    """
    if m.step is None:
        return
    verdict = "good" if m.ttft_lag <= m.step else "TOO LATE"
    print(
        f"{m.server}, {m.clients} clients: all prompts are prefilled after {1000 * m.all_prefilled:.0f} ms; "
        f"TTFT p50 is {1000 * m.ttft_lag:+.0f} ms from half of that, "
        f"where one step ({1000 * m.step:.0f} ms) is allowed: {verdict}"
    )


def report(measurements: list[Measurement], args: argparse.Namespace) -> dict[str, Any]:
    """The result with all that is needed to judge it and to repeat it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "output_tokens": args.output_tokens,
        "repetitions": args.repetitions,
        "measurements": [rounded(asdict(m)) for m in measurements],
        "ratios": rounded(ratios(measurements)),
    }


def rounded(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same without digits that mean nothing: a hundredth of a millisecond is left."""
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="measure this server instead of starting any")
    parser.add_argument("--pid", type=int, help="its process, to measure its processor time (Linux)")
    parser.add_argument(
        "--served-model", help="what it calls its model: /v1/completions is asked, in place of POST /"
    )
    parser.add_argument("--servers", nargs="+", choices=["tutorial", "ours"], default=["tutorial", "ours"])
    parser.add_argument(
        "--model", type=Path, help="a folder that benchmarks.random_model wrote (default: a new one)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch in the servers (default: 2)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    parser.add_argument(
        "--repetitions", type=int, default=3, help="bursts per number of clients (default: 3)"
    )
    parser.add_argument("--prompt-words", type=int, default=25, help="default: 25, about 64 tokens")
    parser.add_argument("--output-tokens", type=int, default=64, help="per request (default: 64)")
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the servers would be left behind
    args = parse_args()
    try:
        measurements = measure_all(args)
    except ServerError as error:
        sys.exit(str(error))
    print_table(measurements)
    print_ratios(measurements)
    print_lag(max(measurements, key=lambda m: (m.step is not None, m.clients)))
    print(json.dumps(report(measurements, args)))


if __name__ == "__main__":
    main()
