"""Real servers for the tests: `python api.py` in a process of its own, over real HTTP."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import torch

from tests.models import make_model

# Tiny tensors: handing them out to other threads takes longer than the work.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
START_LIMIT = 120.0
"""Seconds. Importing torch and transformers takes most of it on a small machine."""


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
def server(start_server: Callable[..., Server]) -> Server:
    """The demo model, served."""
    return start_server("demo")


@pytest.fixture(scope="session")
def demo_server(server: Server) -> str:
    """Its URL."""
    return server.url


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, whose answers go on until they are told to end."""
    return make_model(tmp_path_factory.mktemp("model"))
