"""Measures what HTTP costs at a GPU's rates: our server with a model that costs nothing (`fake_model.py`).

    python -m benchmarks.http_rates                  1, 64 and 256 streams; steps of 1 and of 12 ms
    python -m benchmarks.http_rates --clients 256 --step-ms 12

The server has a process of its own, and all its clients share another. "alone" is the same engine without
HTTP, and the share is what of its rate reaches the clients; the share of the steps is that of the rate there
would be if nothing took any time but they. Rates are those of the time in which all streams run, from when
the last has begun until the first ends. Where clients are sent several tokens in one event, the event loop
did not keep up. `--host-ops` are small tensor operations, as the engine's thread does between steps: each may
have to wait for Python's lock until the event loop lets go of it.

The last line of the output is the whole result as one JSON document.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import uvloop

from benchmarks.serving import ROOT, Server, ServerError, cpu_model, rounded, start_server

STREAM_TIMEOUT = 300.0  # seconds until all answers are there
TAIL_BYTES = 1000
"""Of an answer, kept: its last event, which has the usage."""


@dataclass(frozen=True)
class Rates:
    """Of one number of clients, and one duration of steps. Times are in seconds."""

    clients: int
    step_ms: float
    alone_tokens_per_s: float
    tokens_per_s: float
    events_per_s: float
    tokens_per_event: float
    share: float
    """Of the engine's own rate, and of that of its steps if there were no time between them."""
    share_of_steps: float
    loop_cpu: float
    """Processor time for 1,000 tokens: of the thread that runs the event loop, and of all others."""
    other_cpu: float
    first_event: float
    """Time to the first event of the client whose first came last."""


class Load:
    """Streams that begin together, and what has come of them."""

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.begun = 0
        self.last_begun = 0.0
        self.first_ended = 0.0
        self.events = 0
        self.steady_events = 0
        """While all streams run."""
        self.tokens = 0

    def count(self, events: int) -> None:
        self.events += events
        if self.begun == self.clients and not self.first_ended:
            self.steady_events += events


class Client(asyncio.Protocol):
    """Asks, and counts events without a look at them."""

    def __init__(self, load: Load, request: bytes) -> None:
        self._load = load
        self._request = request
        self._events = 0
        self._tail = b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's own is of no subclass

    def data_received(self, data: bytes) -> None:
        if events := data.count(b"data: {"):
            if not self._events:
                self._load.begun += 1
                self._load.last_begun = time.perf_counter()
            self._events += events
            self._load.count(events)
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if b"data: [DONE]" in self._tail and not self.ended.done():
            self._load.first_ended = self._load.first_ended or time.perf_counter()
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ServerError(f"a stream broke off: {error}, {self._tail.decode()}"))

    @property
    def tokens(self) -> int:
        """Those of the whole answer, as its usage has them."""
        found = re.search(rb'"completion_tokens":(\d+)', self._tail)
        if found is None:
            raise ServerError(f"an answer ended with {self._tail.decode()}")
        return int(found[1])


async def stream(url: str, clients: int, output_tokens: int) -> Load:
    """Asks for as many answers at the same moment, and reads them all.

    Raises:
        ServerError: if one breaks off, or has another length.
    """
    load = Load(clients)
    loop = asyncio.get_running_loop()
    address = urlsplit(url)

    def request(number: int) -> bytes:
        body = json.dumps({"prompt": f"Question {number}?", "max_tokens": output_tokens, "stream": True})
        head = f"POST / HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        return (head + body).encode()

    connections = [
        await loop.create_connection(
            partial(Client, load, request(i)), address.hostname or "", address.port or 80
        )
        for i in range(clients)
    ]
    async with asyncio.timeout(STREAM_TIMEOUT):
        await asyncio.gather(*(client.ended for _, client in connections))
    for transport, client in connections:
        load.tokens += client.tokens
        transport.close()
    if load.tokens != clients * output_tokens:
        raise ServerError(f"asked for {clients * output_tokens} tokens, got {load.tokens}")
    return load


def thread_seconds(pid: int) -> defaultdict[str, float]:
    """The processor time of a process's main thread, which runs the event loop, and of all its others."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for thread in psutil.Process(pid).threads():
        seconds["loop" if thread.id == pid else "other"] += thread.user_time + thread.system_time
    return seconds


def fake_model(step_ms: float, args: argparse.Namespace) -> list[str]:
    """How it is started."""
    flags = ["--step-ms", str(step_ms), "--host-ops", str(args.host_ops)]
    return [sys.executable, "-m", "benchmarks.fake_model", *flags]


def measure_alone(clients: int, step_ms: float, args: argparse.Namespace) -> float:
    """Tokens/s of the engine without HTTP, in a process of its own."""
    done = subprocess.run(
        [*fake_model(step_ms, args), "--alone", str(clients), "--output-tokens", str(args.output_tokens)],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return float(json.loads(done.stdout)["tokens_per_s"])


def measure(server: Server, clients: int, step_ms: float, args: argparse.Namespace) -> Rates:
    """Streams to so many clients, after a warm-up."""
    assert server.pid is not None
    alone = measure_alone(clients, step_ms, args)
    uvloop.run(stream(server.url, clients, 20))
    before, started = thread_seconds(server.pid), time.perf_counter()
    load = uvloop.run(stream(server.url, clients, args.output_tokens))
    cpu = thread_seconds(server.pid)
    events_per_s = load.steady_events / (load.first_ended - load.last_begun)
    tokens_per_event = load.tokens / load.events
    return Rates(
        clients=clients,
        step_ms=step_ms,
        alone_tokens_per_s=alone,
        tokens_per_s=events_per_s * tokens_per_event,
        events_per_s=events_per_s,
        tokens_per_event=tokens_per_event,
        share=events_per_s * tokens_per_event / alone,
        share_of_steps=events_per_s * tokens_per_event * step_ms / 1000 / clients,
        loop_cpu=1000 * (cpu["loop"] - before["loop"]) / load.tokens,
        other_cpu=1000 * (cpu["other"] - before["other"]) / load.tokens,
        first_event=load.last_begun - started,
    )


def measure_all(args: argparse.Namespace) -> list[Rates]:
    """At each number of clients and duration of steps."""
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for step_ms in args.step_ms:
            with start_server(f"fake-{step_ms}", fake_model(step_ms, args), Path(folder)) as server:
                for clients in args.clients:
                    print(f"{clients} streams, steps of {step_ms} ms", file=sys.stderr, flush=True)
                    rates.append(measure(server, clients, step_ms, args))
    return rates


def print_table(rates: list[Rates]) -> None:
    """Prints one line per measurement; processor time in ms for 1,000 tokens."""
    print(
        "step ms  streams  alone tokens/s  tokens/s  share  of steps  events/s  tokens/event  loop, other CPU"
    )
    for r in rates:
        print(
            f"{r.step_ms:7g}  {r.clients:7}  {r.alone_tokens_per_s:14,.0f}  {r.tokens_per_s:8,.0f}  "
            f"{r.share:5.0%}  {r.share_of_steps:8.0%}  {r.events_per_s:8,.0f}  {r.tokens_per_event:12.2f}  "
            f"{1000 * r.loop_cpu:8.1f}  {1000 * r.other_cpu:9.1f}"
        )


def report(rates: list[Rates], host_ops: int) -> dict[str, Any]:
    """The result with what is needed to judge it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("uvicorn", "uvloop", "starlette", "pydantic")}
        | {"python": platform.python_version()},
        "host_ops": host_ops,
        "rates": [rounded(asdict(r)) for r in rates],
    }


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64, 256], help="default: 1 64 256")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[1, 12], help="default: 1 12")
    parser.add_argument("--host-ops", type=int, default=50, help="tensor operations in a step (default: 50)")
    parser.add_argument("--output-tokens", type=int, default=500, help="per stream (default: 500)")
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the servers would be left behind
    args = parse_args()
    try:
        rates = measure_all(args)
    except ServerError as error:
        sys.exit(str(error))
    print_table(rates)
    print(json.dumps(report(rates, args.host_ops)))


if __name__ == "__main__":
    main()
