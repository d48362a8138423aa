"""Asks a server for everything at once, right and wrong, for a long time, and looks at what is left of it.

    python -m benchmarks.soak --seconds 600                                 starts the demo's server
    python -m benchmarks.soak --seconds 600 --url http://127.0.0.1:6006     a server that runs already

Answers in one piece and streams, on all routes, several to a request, in JSON, to long prompts; clients that
leave, requests that are wrong, and now and then far more at once than may wait. Each answer is greedy, and is
compared with what the same request gets when it is alone.

The last line of the output is the result as one JSON document. The exit code is 1 if an answer was wrong, a
client was dropped or left to wait, or something was not given back: memory, threads, files, KV blocks. Memory
is compared after a warm-up of the same kind, which fills what is kept on purpose.
"""

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

from benchmarks.serving import ServerError, start_server

PATIENCE = 120.0  # seconds after which a client that has no answer counts as hanging
MAX_QUEUE = 64  # of the server that is started: so few that bursts are refused
BURST = 300  # clients
MEMORY_GROWTH = 1.05
WARM_UPS = 12  # at most; they end when memory grows no more
MORE_THREADS = 8  # pools start theirs when they are first needed, a few of them maybe after the warm-up


@dataclass(frozen=True)
class Case:
    """A request, and the status of its answer."""

    path: str
    body: bytes
    status: int = 200

    @property
    def head(self) -> bytes:
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
            f"Content-Length: {len(self.body)}\r\n\r\n"
        ).encode()


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def texts(self) -> list[str]:
        """The answers in it, as their pieces add up, if it is a stream."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            return _texts([json.loads(self.body)])
        *events, done = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n")[:-1]]
        if done != b"[DONE]":
            raise ValueError(f"a stream ended with {done!r}")
        return _texts([json.loads(event) for event in events])


def _texts(pieces: list[dict[str, Any]]) -> list[str]:
    texts: dict[int, str] = {}
    for piece in pieces:
        if "response" in piece:
            texts[0] = texts.get(0, "") + piece["response"]
        for choice in piece.get("choices", []):
            message = choice.get("message") or choice.get("delta") or {}
            text = choice.get("text") or message.get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return [texts[index] for index in sorted(texts)]


async def ask(address: tuple[str, int], case: Case) -> Reply:
    """Sends a request and reads the whole answer.

    Raises:
        ConnectionError: if the server ends the connection before the answer is complete.
        TimeoutError: if it does not come.
    """
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(case.head + case.body)
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
    if not head:
        raise ConnectionResetError("no answer")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunk(body)
    elif len(body) != int(headers["content-length"]):
        raise ConnectionResetError("a part of an answer")
    return Reply(int(first.split()[1]), headers, body)


def _unchunk(body: bytes) -> bytes:
    whole = b""
    while not body.startswith(b"0\r\n"):
        size, _, body = body.partition(b"\r\n")
        if not body:
            raise ConnectionResetError("a part of a stream")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return whole


async def leave(address: tuple[str, int], case: Case, chance: random.Random) -> None:
    """Begins a request and leaves: in its head or its body, while it waits, or while it reads."""
    request = case.head + case.body
    end = chance.choice([len(request), len(request), chance.randrange(len(case.head)), len(request) - 1])
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(*address)
        if chance.random() < 0.5:  # a reset in the place of an orderly end
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.write(request[:end])
        await writer.drain()
        if end == len(request) and chance.random() < 0.3:
            await reader.read(chance.randrange(1, 3000))
        else:
            await asyncio.sleep(chance.random() * 0.3)
        writer.transport.abort()


def case(path: str, status: int = 200, **body: object) -> Case:
    return Case(path, json.dumps(body).encode(), status)


def good_cases(model: str) -> list[Case]:
    """Requests of all kinds whose answers are always the same.

    Args:
        model: its name.
    """
    prompts = ["你好", "讲个故事", "How do I stream?", "Thanks", "What is your port?", "多谢", "Who are you?"]
    cases = []
    for prompt in prompts:
        chat: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        text: dict[str, Any] = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 20}
        for stream in (False, True):
            cases += [
                case("/", prompt=prompt, temperature=0, max_tokens=100, stream=stream),
                case("/v1/chat/completions", **chat, max_tokens=60, stream=stream),
                case("/v1/completions", **text, stream=stream),
            ]
        cases += [
            case("/v1/chat/completions", **chat, max_tokens=40, n=3),
            case("/v1/completions", **text | {"prompt": [prompt, prompt * 2]}, n=2),
            case("/v1/chat/completions", **chat, max_tokens=30, response_format={"type": "json_object"}),
            case("/", prompt=prompt * 40, temperature=0, max_tokens=10),
        ]
    return cases


def bad_cases(model: str) -> list[Case]:
    """Requests that are refused."""
    chat: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "a"}]}
    impossible = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
    return [
        Case("/", b"{", 400),
        Case("/", b'{"prompt": "\xff"}', 400),
        Case("/", b'{"prompt": "\\ud800"}', 400),
        Case("/", b"[" * 10_000, 400),
        Case("/", b'{"prompt": "a", "history": [' + b"1," * 100_000 + b"1]}", 413),
        case("/", 422, prompt=""),
        case("/", 422, prompt="a", temperature=9),
        case("/", 400, prompt="a" * 100_000),
        case("/", 400, prompt="a" * 1_000_000),
        case("/nowhere", 404),
        case("/health", 405),
        case("/v1/chat/completions", 400, **chat, n=9),
        case("/v1/chat/completions", 404, **chat | {"model": "another"}),
        case("/v1/chat/completions", 400, **chat, response_format=impossible),
        case("/v1/completions", 400, model=model, prompt=[10**9]),
    ]


@dataclass
class Tally:
    """What the clients saw."""

    by_status: Counter[int] = field(default_factory=Counter)
    left: int = 0
    wrong: int = 0
    dropped: int = 0
    hanging: int = 0


@dataclass
class Soak:
    """Clients of one server."""

    address: tuple[str, int]
    good: dict[Case, list[str]]
    """What each is answered when it is alone."""
    bad: list[Case]
    tally: Tally = field(default_factory=Tally)

    async def check(self, asked: Case) -> None:
        """Sends a request, and counts what comes of it."""
        try:
            reply = await ask(self.address, asked)
            self.tally.by_status[reply.status] += 1
            if reply.status in (429, 503):
                right = int(reply.headers["retry-after"]) >= 1
            else:
                right = reply.status == asked.status and (
                    reply.status != 200 or reply.texts == self.good[asked]
                )
        except TimeoutError:
            self.tally.hanging += 1
        except ConnectionError:
            self.tally.dropped += 1
        except (KeyError, ValueError) as error:
            print(f"{asked.path}: {error!r}", file=sys.stderr)
            self.tally.wrong += 1
        else:
            if not right:
                print(f"{asked.path} {asked.body[:200]!r}: {reply.status} {reply.body!r}", file=sys.stderr)
                self.tally.wrong += 1

    async def depart(self, asked: Case, chance: random.Random) -> None:
        """Sends a request, and leaves."""
        try:
            await leave(self.address, asked, chance)
            self.tally.left += 1
        except TimeoutError:
            self.tally.hanging += 1
        except ConnectionError:
            self.tally.dropped += 1

    async def client(self, until: float, chance: random.Random) -> None:
        """One client after the other, of all kinds."""
        good = list(self.good)
        while time.monotonic() < until:
            dice = chance.random()
            if dice < 0.15:
                await self.depart(chance.choice(good), chance)
            elif dice < 0.3:
                await self.check(chance.choice(self.bad))
            else:
                await self.check(chance.choice(good))

    async def bursts(self, until: float, chance: random.Random) -> None:
        """Now and then, far more at once than may wait."""
        good = list(self.good)
        while time.monotonic() < until:
            await asyncio.gather(*(self.check(chance.choice(good)) for _ in range(BURST)))
            await asyncio.sleep(min(10.0, max(0.0, until - time.monotonic())))

    async def run(self, seconds: float, clients: int, chance: random.Random) -> None:
        """Keeps so many clients busy, with bursts beside them."""
        until = time.monotonic() + seconds
        await asyncio.gather(
            self.bursts(until, chance), *(self.client(until, chance) for _ in range(clients))
        )


async def alone(address: tuple[str, int], cases: Sequence[Case]) -> dict[Case, list[str]]:
    """What each request is answered when there is no other."""
    return {asked: (await ask(address, asked)).texts for asked in cases}


def read_metrics(url: str) -> dict[str, float]:
    """The server's own figures, by name, with their labels."""
    with urlopen(f"{url}/metrics", timeout=PATIENCE) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def memory(metrics: dict[str, float]) -> float:
    """MiB of the process."""
    return metrics.get("process_resident_memory_bytes", 0.0) / 2**20


def served_model(url: str) -> str:
    """Its name."""
    with urlopen(f"{url}/v1/models", timeout=PATIENCE) as response:
        models = json.load(response)["data"]
    return str(models[0]["id"])


def in_use(metrics: dict[str, float]) -> float:
    """Requests that the engine has, and the share of KV blocks in use: 0 when nobody asks."""
    names = ("llama_num_requests_running", "llama_num_requests_waiting", "llama_kv_cache_usage_perc")
    return sum(metrics[name] for name in names)


async def at_rest(url: str, files: float = float("inf")) -> dict[str, float]:
    """The server's figures when nobody is served any more, or when that takes too long.

    Args:
        files: to wait until no more than these are open: connections close a little after their answers.
    """
    deadline = time.monotonic() + 30
    while True:
        metrics = read_metrics(url)
        is_quiet = in_use(metrics) == 0 and metrics.get("process_open_fds", 0) <= files
        if is_quiet or time.monotonic() > deadline:
            return metrics
        await asyncio.sleep(0.1)


def count_threads(pid: int | None) -> int | None:
    return psutil.Process(pid).num_threads() if pid else None


async def soak(url: str, pid: int | None, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """Warms up, soaks, and says what came of it."""
    chance = random.Random(seed)
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    model = served_model(url)
    good = await alone(address, good_cases(model))
    before = await at_rest(url)
    for _ in range(WARM_UPS):
        await Soak(address, good, bad_cases(model)).run(5, clients, chance)
        colder, before = before, await at_rest(url)
        if memory(before) < memory(colder) * 1.005:
            break
    threads_before = count_threads(pid)
    begun = time.monotonic()
    soaked = Soak(address, good, bad_cases(model))
    await soaked.run(seconds, clients, chance)
    duration = time.monotonic() - begun
    after, threads_after = await at_rest(url, before.get("process_open_fds", 0)), count_threads(pid)
    tally, aborted = soaked.tally, 'llama_request_finished_total{finished_reason="aborted"}'
    return {
        "seconds": round(duration, 1),
        "requests": tally.by_status.total() + tally.left + tally.dropped + tally.hanging,
        "by_status": {str(status): tally.by_status[status] for status in sorted(tally.by_status)},
        "clients_that_left": tally.left,
        "aborted": int(after[aborted] - before[aborted]),
        "wrong_answers": tally.wrong,
        "dropped": tally.dropped,
        "hanging": tally.hanging,
        "rss_mb_before": round(memory(before), 1),
        "rss_mb_after": round(memory(after), 1),
        "threads_before": threads_before,
        "threads_after": threads_after,
        "files_before": int(before.get("process_open_fds", 0)),
        "files_after": int(after.get("process_open_fds", 0)),
        "kv_cache_in_use_after": after["llama_kv_cache_usage_perc"],
        "requests_in_engine_after": int(
            after["llama_num_requests_running"] + after["llama_num_requests_waiting"]
        ),
    }


def is_clean(result: dict[str, Any]) -> bool:
    """Whether all were served right, and nothing was left behind."""
    return (
        result["wrong_answers"] == result["dropped"] == result["hanging"] == 0
        and result["by_status"].get("200", 0) > 0
        and "500" not in result["by_status"]
        and result["rss_mb_after"] <= result["rss_mb_before"] * MEMORY_GROWTH
        and (result["threads_after"] or 0) <= (result["threads_before"] or 0) + MORE_THREADS
        and result["files_after"] <= result["files_before"]
        and result["kv_cache_in_use_after"] == result["requests_in_engine_after"] == 0
    )


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="after the warm-up (default: 60)")
    parser.add_argument("--url", help="soak this server instead of starting one; greedy answers must be its")
    parser.add_argument("--pid", type=int, help="its process, to count its threads")
    parser.add_argument("--clients", type=int, default=16, help="at once, beside the bursts (default: 16)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch in the server (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the mix (default: 0)")
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    args = parse_args()
    if args.url:
        result = asyncio.run(soak(args.url, args.pid, args.seconds, args.clients, args.seed))
    else:
        flags = ["--model", "demo", "--device", "cpu", "--host", "127.0.0.1", "--threads", str(args.threads)]
        command = [sys.executable, "api.py", *flags, "--max-queue", str(MAX_QUEUE)]
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                start_server("soak", command, Path(folder)) as server,
            ):
                result = asyncio.run(soak(server.url, server.pid, args.seconds, args.clients, args.seed))
        except ServerError as error:
            sys.exit(str(error))
    print(json.dumps(result))
    sys.exit(not is_clean(result))


if __name__ == "__main__":
    main()
