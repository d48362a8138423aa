"""The app behind Ray Serve: what its proxies, its routers and its controller make of it, under load.

The API's own tests run against it with
pytest --ray tests/serving/test_api.py tests/serving/test_openai_api.py
"""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests

from serving.settings import Settings
from tests.conftest import ROOT, RayServer, begin, until
from tests.models import make_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: requirements-ray.txt"
)

REPLICA = "ray::ServeReplica"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, whose answers go on for as long as they are told to."""
    return make_model(tmp_path_factory.mktemp("model"), context=8192)


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    server = RayServer(model, tmp_path_factory.mktemp("server"), "--replicas", "2")
    until(lambda: "2 replicas serve on" in server.log)  # it answers when there is one
    yield server
    server.stop()


def replicas(server: RayServer) -> list[psutil.Process]:
    """The processes of those that serve: their title is Ray's."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())  # one that is ending has none
            if process.status() != psutil.STATUS_ZOMBIE and title.startswith(REPLICA):
                found.append(process)
    return found


class Load:
    """Clients that ask one after the other, half of them for streams, and what became of their requests."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopping = threading.Event()
        self.ends: Counter[str] = Counter()
        """How requests ended: "whole", "error event" of a stream that had begun, or what went wrong."""

    def _ask(self, number: int) -> str:
        body = {"prompt": f"client {number}", "max_tokens": 200, "seed": number, "stream": number % 2 == 0}
        with requests.post(self._url, json=body, stream=True, timeout=120) as response:
            if response.status_code != 200:
                return f"{response.status_code}: {response.text}"
            if not body["stream"]:
                return "whole" if response.json()["usage"]["completion_tokens"] == 200 else "cut"
            *events, last = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
        if last == b"[DONE]":
            return "whole"
        return "error event" if events and json.loads(last)["status"] == 503 else f"ended by {last!r}"

    def _client(self, number: int) -> None:
        while not self._stopping.is_set():
            try:
                end = self._ask(number)
            except requests.RequestException as error:
                end = repr(error)
            self.ends[end] += 1

    @contextmanager
    def running(self, clients: int = 8) -> Iterator[None]:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join()


def answering(server: RayServer) -> set[str]:
    """The processes that answer a few requests, by Ray's prefix of their lines in the log."""
    ids = [f"who-{time.monotonic_ns()}-{n}" for n in range(8)]
    for request_id in ids:
        requests.post(server.url, json={"prompt": "x", "max_tokens": 1}, headers={"X-Request-ID": request_id})
    return set(pids_of(server, ids))


def pids_of(server: RayServer, request_ids: list[str]) -> list[str]:
    """The processes that answered these requests."""
    lines: dict[str, str] = {}

    def all_found() -> bool:
        found = re.findall(r"^\(\S+ pid=(\d+)\) .* INFO (\S+) prompt_tokens=", server.prefixed_log, re.M)
        lines.update({request_id: pid for pid, request_id in found})
        return all(request_id in lines for request_id in request_ids)

    until(all_found)
    return [lines[request_id] for request_id in request_ids]


def test_a_session_stays_with_its_replica_and_others_go_where_there_is_room(two: RayServer) -> None:
    ids: dict[str, list[str]] = {}
    for session in ("a", "b", "c", "d", "e", "f", None):
        for n in range(4):
            headers = {"X-Request-ID": f"{session}-{n}"} | ({"X-Session-ID": session} if session else {})
            body = {"prompt": "x", "max_tokens": 1}
            assert requests.post(two.url, json=body, headers=headers, timeout=60).status_code == 200
            ids.setdefault(session or "none", []).append(f"{session}-{n}")
    homes = {session: set(pids_of(two, request_ids)) for session, request_ids in ids.items()}
    assert all(len(pids) == 1 for session, pids in homes.items() if session != "none")
    until(lambda: len(answering(two)) == 2)


def test_a_killed_replica_costs_nobody_an_answer_that_had_not_begun(two: RayServer) -> None:
    load = Load(two.url)
    with ThreadPoolExecutor(8) as executor, load.running():
        begun = [begin(two.url, executor, prompt="x", max_tokens=1000, seed=n) for n in range(8)]
        victim, survivor = replicas(two)
        victim.kill()
        killed = time.monotonic()
        ends = [stream.result()[-1] for stream in begun]
        until(lambda: len({process.pid for process in replicas(two)} - {victim.pid}) == 2)
        until(lambda: len(answering(two)) == 2)
        back = time.monotonic() - killed
    broken = [end for end in ends if end != "[DONE]"]
    lost = sum(load.ends.values()) - load.ends["whole"] - load.ends["error event"]
    print(
        f"a replica killed under load: {len(broken)} of 8 long streams that had begun, and "
        f"{load.ends['error event']} others, ended with an error event; {load.ends['whole']} whole answers, "
        f"{lost} answers lost that had not begun; two replicas again after {back:.0f} s"
    )
    assert lost == 0, load.ends
    assert 0 < len(broken) < 8
    assert all(end["status"] == 503 for end in broken)
    assert survivor.pid in {process.pid for process in replicas(two)}


def test_a_rolling_update_under_load_fails_no_request(two: RayServer, model: Path) -> None:
    [address] = re.findall(r"Ray's address is (\S+)", two.log)
    old = {process.pid for process in replicas(two)}
    load = Load(two.url)
    with load.running():
        update = subprocess.run(
            [sys.executable, "deploy/ray_serve.py", "--model", str(model), "--device", "cpu",
             "--threads", "1", "--replicas", "2", "--max-queue", "99", "--ray-address", address],
            cwd=ROOT, capture_output=True, text=True, timeout=170, check=False,
        )  # fmt: skip
        assert update.returncode == 0, update.stderr
        until(lambda: len(answering(two)) == 2)
    print(f"a rolling update under load: {load.ends['whole']} answers, all of {sum(load.ends.values())}")
    assert set(load.ends) == {"whole"}
    assert not old & {process.pid for process in replicas(two)}


def test_ray_has_the_figures_of_every_replica_under_its_name(two: RayServer) -> None:
    def found() -> bool:
        exported = "".join(ray_metrics(two))
        return len(set(re.findall(r'ray_llama_up\{.*?replica="(\w+)"\} 1', exported))) >= 2

    until(found)


def ray_metrics(server: RayServer) -> Iterator[str]:
    """What the agent of the node shows Prometheus, on a port that it has chosen."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if process.name().startswith("ray::Dash"):
            for connection in process.net_connections("tcp4"):
                if connection.status == psutil.CONN_LISTEN:
                    with suppress(requests.RequestException):
                        url = f"http://127.0.0.1:{connection.laddr.port}/metrics"
                        yield requests.get(url, timeout=5).text


def test_sigterm_finishes_what_is_in_flight_and_stops_what_was_started(two: RayServer) -> None:
    started = psutil.Process(two.process.pid).children(recursive=True)
    body = {"prompt": "x", "max_tokens": 3000, "stream": True}
    with requests.post(two.url, json=body, stream=True, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        two.process.terminate()
        refused = requests.Response()

        def is_refused() -> bool:
            nonlocal refused
            refused = two.post(prompt="x", max_tokens=1)
            return refused.status_code != 200

        until(is_refused)
        *_, last = [line for line in lines if line]
    assert last == b"data: [DONE]"
    assert refused.status_code == refused.json()["status"] == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert two.process.wait(60) == 0
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


# The real server, in whose replicas the device is lost at the hundredth step.
DYING = """
import os, runpy
os.environ["RAY_AUTH_MODE"] = "token"
import ray

def lose_the_device():
    from engine.model_runner import ModelRunner
    run, steps = ModelRunner.finish, iter(range(1_000_000))
    def lost(self):
        raise RuntimeError("the device is lost")
    def dying(self, batch, *ahead):
        if next(steps) < 100:
            return run(self, batch, *ahead)
        lost(self)
    ModelRunner.finish, ModelRunner.check_device = dying, lost

init = ray.init
ray.init = lambda **options: init(**options, runtime_env={"worker_process_setup_hook": lose_the_device})
runpy.run_path("deploy/ray_serve.py", run_name="__main__")
"""


class DyingServer(RayServer):
    program = ("-c", DYING)


def test_a_replica_whose_engine_dies_is_replaced(model: Path, tmp_path: Path) -> None:
    server = DyingServer(model, tmp_path)
    try:
        [first] = replicas(server)
        response = server.post(prompt="x", max_tokens=300)
        assert response.status_code == 503
        until(lambda: [process.pid for process in replicas(server)] not in ([], [first.pid]))
        until(server.answers)
        assert server.post(prompt="x", max_tokens=10).status_code == 200
    finally:
        server.stop()


def test_a_wrong_option_is_named_in_one_line_and_nothing_starts() -> None:
    processes = {
        named: subprocess.Popen(
            [sys.executable, "deploy/ray_serve.py", *flags.split()],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for flags, named in (("--replicas 0", "--replicas"), ("--model nowhere", "nowhere can't be served"))
    }  # fmt: skip
    for named, process in processes.items():
        output, error = process.communicate(timeout=120)
        assert (process.returncode, output) == (2, "")
        assert re.fullmatch(rf"ray_serve\.py: .*{re.escape(named)}.*\n", error)


def test_help_names_the_settings_of_both() -> None:
    shown = subprocess.run(
        [sys.executable, "deploy/ray_serve.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    for name in [*Settings.model_fields, "replicas", "max_replicas", "target_requests", "ray_address"]:
        assert f"--{name.replace('_', '-')} " in shown
