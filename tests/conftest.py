"""Real servers for the tests: `python api.py` in a process of its own, over real HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from benchmarks.soak import read_metrics
from tests.models import make_model

# Where a shell has started pytest in the background, Ctrl-C is ignored, and would be by what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny tensors: handing them out to other threads takes longer than the work.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
START_LIMIT = 120.0
"""Seconds. Importing torch and transformers takes most of it on a small machine."""
LIMIT = 120.0
"""Seconds in which what should happen must have happened."""
LONG = {"prompt": "x", "max_tokens": 8000, "temperature": 0}
"""What `long_model` is asked, to be in the middle of an answer: it takes it many seconds, if it is let."""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_events(response: requests.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line:
            assert line.startswith(b"data: ")
            data = line.removeprefix(b"data: ").decode()
            yield data if data == "[DONE]" else json.loads(data)


def request_of(body: dict[str, object], path: str = "/") -> bytes:
    data = json.dumps(body).encode()
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data)


@contextmanager
def posted(server: "Server", path: str = "/", /, **body: object) -> Iterator[socket.socket]:
    """A request of a client that does not read, and leaves at the end."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_of(body, path))
        yield connection


@contextmanager
def occupied(server: "Server", places: int) -> Iterator[None]:
    """Long answers that take so many places of `slow_server`, four of which are such that they run."""
    with ExitStack() as clients:
        for number in range(1, places + 1):
            clients.enter_context(posted(server, **LONG))
            until(lambda number=number: server.load == (min(number, 4), max(0, number - 4)))
        yield
    until(lambda: server.load == (0, 0))


def begin(url: str, executor: ThreadPoolExecutor, **body: object) -> "Future[list[Any]]":
    """A stream whose first event has come, and that is read on; the future is of its other events."""
    begun = threading.Event()

    def read() -> list[Any]:
        with requests.post(url, json=body | {"stream": True}, stream=True, timeout=LIMIT) as response:
            events = read_events(response)
            next(events)
            begun.set()
            return list(events)

    future = executor.submit(read)
    assert begun.wait(LIMIT)
    return future


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ray", action="store_true", help="let the servers of the tests be those of Ray Serve")


class Server:
    """A running `python api.py`."""

    program: tuple[str, ...] = ("api.py",)

    def __init__(self, model: str | Path, folder: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"server-{self.port}.log"
        command = [sys.executable, *self.program, "--model", str(model), "--device", "cpu",
                   "--host", "127.0.0.1", "--port", str(self.port), "--threads", "1", *flags]  # fmt: skip
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_LIMIT
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{self.log}")
            time.sleep(0.1)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except (requests.ConnectionError, requests.Timeout):
            return False

    @property
    def load(self) -> tuple[float, float]:
        """How many answers are computed, and how many wait for it."""
        metrics = read_metrics(self.url)
        return metrics["llama_num_requests_running"], metrics["llama_num_requests_waiting"]

    def post(self, **body: object) -> requests.Response:
        return requests.post(self.url, json=body, timeout=120)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class RayServer(Server):
    """A running `python deploy/ray_serve.py`, with the cluster that it has started."""

    program = ("deploy/ray_serve.py",)

    @property
    def log(self) -> str:
        """As the replicas have written it."""
        return re.sub(r"^\(\S+ pid=\d+\) ", "", self.prefixed_log, flags=re.MULTILINE)

    @property
    def prefixed_log(self) -> str:
        """As Ray passes it on, with the writer's name and pid before each line."""
        return super().log

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            super().stop()


@pytest.fixture(scope="session")
def start_server(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Callable[..., Server]]:
    """Starts a server for a model, with flags; all are stopped at the end."""
    servers: list[Server] = []
    kind = RayServer if pytestconfig.getoption("ray") else Server

    def start(model: str | Path, *flags: str) -> Server:
        servers.append(kind(model, tmp_path_factory.mktemp("server"), *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights over single bytes, whose answers go on until they are told to end."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a context of 8192 tokens: there is time to do something while it answers."""
    return make_model(tmp_path_factory.mktemp("long"), context=8192)


# A start takes seconds: these servers are shared by all tests that do not end them.


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """The demo model, served."""
    return start_server("demo")


@pytest.fixture(scope="session")
def demo_server(server: Server) -> str:
    """Its URL."""
    return server.url


@pytest.fixture(scope="session")
def tiny_server(start_server: Callable[..., Server], tiny_model: Path) -> Server:
    """A context of 512 tokens, small bodies, two names."""
    return start_server(
        tiny_model, "--served-model-name", "tiny,meta-llama/Tiny", "--max-queue", "16",
        "--max-num-seqs", "16", "--max-body-bytes", "100000", "--log-format", "json",
    )  # fmt: skip


@pytest.fixture(scope="session")
def short_server(start_server: Callable[..., Server], tiny_model: Path) -> Server:
    """A context so short that no request takes long, and a log that has everything in it."""
    return start_server(
        tiny_model, "--served-model-name", "tiny", "--max-model-len", "64",
        "--log-format", "json", "--log-content",
    )  # fmt: skip


@pytest.fixture(scope="session")
def slow_server(start_server: Callable[..., Server], long_model: Path) -> Server:
    """Four answers run and four wait, and they take many seconds, if they are let."""
    return start_server(
        long_model, "--served-model-name", "tiny", "--max-num-seqs", "4", "--max-queue", "4", "--log-content"
    )
