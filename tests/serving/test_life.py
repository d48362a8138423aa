"""How a server goes on and ends: deadlines, clients that don't read or never end, faults, signals, death."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import uvicorn
from starlette.types import Receive, Scope, Send

from benchmarks.soak import in_use, read_metrics
from serving import server as server_module
from serving.server import BoundedProtocol
from tests.conftest import LIMIT, LONG, ROOT, Server, begin, read_events, request_of, until
from tests.serving.test_api import stream
from tests.serving.test_openai_api import ROUTES, client_of, create, texts


def ask(url: str, **body: object) -> requests.Response:
    return requests.post(url, json=body, timeout=LIMIT)


@contextmanager
def connected(port: int, *, receive_buffer: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(LIMIT)
        connection.connect(("127.0.0.1", port))
        yield connection


NAME = "m" * 20_000
"""Of a model: it stands in each event of /v1, of which then a few hundred are more than any socket holds."""


@contextmanager
def stalled(server: Server) -> Iterator[socket.socket]:
    """A stream that is not read, of a server whose model has the long name."""
    body = {"model": NAME, "prompt": "x", "max_tokens": 8000, "stream": True, "temperature": 0}
    with connected(server.port, receive_buffer=4096) as connection:
        connection.sendall(request_of(body, "/v1/completions"))
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; a reset is an end too."""
    received = []
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 20):
            received.append(chunk)
    return b"".join(received)


# Deadlines, and clients that take what they don't use.


def test_an_answer_that_takes_too_long_ends_with_504_and_leaves_nothing(
    start_server: Callable[..., Server], long_model: Path
) -> None:
    server = start_server(long_model, "--request-timeout", "0.5", "--max-num-seqs", "2")
    with ThreadPoolExecutor(8) as executor:
        # Two run, two wait.
        unary = [executor.submit(ask, server.url, **LONG) for _ in range(3)]
        events = stream(server, **LONG)
        for response in (future.result() for future in unary):
            assert response.status_code == response.json()["status"] == 504
            assert response.json()["error"]["message"] == "the answer took longer than 0.5 s"
            [line] = [each for each in server.log.splitlines() if response.headers["X-Request-ID"] in each]
            assert line.endswith("finish_reason=error")
    assert events[-1]["status"] == 504
    assert events[-1]["error"]["code"] == "gateway_timeout"
    until(lambda: in_use(read_metrics(server.url)) == 0)
    metrics = read_metrics(server.url)
    assert metrics['llama_request_errors_total{reason="deadline"}'] == 4
    assert metrics['llama_request_finished_total{finished_reason="error"}'] == 4
    assert server.answers()


@pytest.fixture(scope="module")
def patient(start_server: Callable[..., Server], long_model: Path) -> Server:
    """Its answers take long, and the time that it has to end is longer."""
    return start_server(long_model, "--drain-timeout", "3600", "--served-model-name", NAME)


def test_a_client_that_does_not_read_is_cut_off_and_others_are_not(patient: Server) -> None:
    with stalled(patient) as connection:
        # Whoever comes later and reads gets as many tokens: after as many steps for both.
        assert ask(patient.url, prompt="y", max_tokens=1500).json()["usage"]["completion_tokens"] == 1500
        received = read_all(connection)
        assert b"[DONE]" not in received
        last = json.loads(received.split(b"data: ")[-1].split(b"\n")[0])
        assert last["status"] == 408
        assert "were not read" in last["error"]["message"]
    assert "Traceback" not in patient.log


def test_a_client_that_leaves_a_stream_leaves_no_error_in_the_log(patient: Server) -> None:
    for _ in range(3):
        with requests.post(patient.url, json=LONG | {"stream": True}, stream=True, timeout=LIMIT) as response:
            next(read_events(response))
    until(lambda: patient.log.count("finish_reason=aborted") >= 3)
    assert "Traceback" not in patient.log


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nx: ",
        b"GET /",
        # Behind a body come fields too.
        b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
    ],
)
def test_a_head_without_an_end_is_refused(patient: Server, beginning: bytes) -> None:
    piece = b"y" * 1000 if beginning.endswith((b": ", b"/")) else b"y: " + b"z" * 1000 + b"\r\n"
    with connected(patient.port) as connection:
        connection.sendall(beginning)
        sent = 0
        try:
            while sent < 50_000_000:
                connection.sendall(piece)
                sent += len(piece)
        except (ConnectionResetError, BrokenPipeError):
            pass
        # What the system keeps for a connection comes on top of the limit.
        assert sent < 50_000_000
    assert patient.answers()


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: \0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # who speaks TLS
    ],
    ids=lambda request_: ascii(request_[:60]),
)
def test_what_is_no_http_is_refused_as_anything_else_is(patient: Server, request_: bytes) -> None:
    with connected(patient.port) as connection:
        connection.sendall(request_)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert json.loads(body)["status"] == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("chunked", [True, False])
def test_an_upgrade_that_is_offered_is_not_taken_and_the_body_is_read(
    patient: Server, protocol: bytes, chunked: bool
) -> None:
    """Java's client offers HTTP/2 with each of its requests."""
    body = b'{"prompt": "x", "max_tokens": 2}'
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    offer = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA" % protocol
    )
    head = b"POST / HTTP/1.1\r\nHost: x\r\n%b\r\n%b\r\n\r\n" % (offer, length)
    with connected(patient.port) as connection:
        for _ in range(2):
            connection.sendall(head + (b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body))
            answer = b""
            while not answer.endswith(b"}}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b'"completion_tokens":2' in answer


def test_a_head_that_is_large_and_ends_is_taken(patient: Server) -> None:
    headers = {f"x-{n}": "y" * 1000 for n in range(40)}
    assert requests.post(
        patient.url, json={"prompt": "x", "max_tokens": 1}, headers=headers, timeout=LIMIT
    ).ok


def test_a_body_in_many_small_chunks_is_taken(patient: Server) -> None:
    body = json.dumps({"prompt": "x" * 50, "max_tokens": 1} | {"stop": ["y" * 60] * 4}).encode()
    body += b" " * 20_000
    pieces = (body[i : i + 1] for i in range(len(body)))
    assert requests.post(patient.url, data=pieces, timeout=LIMIT).status_code == 200


@contextmanager
def bounded() -> Iterator[int]:
    """The port of a server with our protocol, and an app that sends without an end."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not done.is_set():
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
            await asyncio.sleep(0)

    done = threading.Event()
    running = uvicorn.Server(
        uvicorn.Config(
            app, port=0, http=BoundedProtocol, lifespan="off", log_config=None, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        done.set()
        running.should_exit = True
        thread.join(LIMIT)
        assert not thread.is_alive()


def has_ended_after_a_pause(connection: socket.socket) -> bool:
    """Whether nothing more comes than sockets hold, from a server that never ends by itself."""
    time.sleep(1)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while received < 100_000_000:
            if not (chunk := connection.recv(1 << 20)):
                return True
            received += len(chunk)
        return False
    return True


def test_who_stalls_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "_STALL_SECONDS", 0.3)
    with bounded() as port:
        for beginning in (b"", b"GET / HTTP/1.1\r\nHost:"):
            with connected(port) as connection:
                connection.sendall(beginning)
                assert read_all(connection).startswith(b"HTTP/1.1 400")
        with connected(port) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            received = 0
            begun = time.monotonic()
            while time.monotonic() < begun + 1:  # who reads is served, for longer than the limit
                received += len(connection.recv(1 << 20))
            assert received
            until(lambda: has_ended_after_a_pause(connection))


# Faults, and the engine's death.

FAULTY = """
import pathlib, sys, api
from serving import limits
from engine.chat_format import ChatFormat
from engine.detokenizer import Detokenizer
from engine.model_runner import ModelRunner

encode, feed, run = ChatFormat.encode_dialog, Detokenizer.feed, ModelRunner.finish
lost = False
def faulty_encode(self, messages):
    if "format" in messages[-1]["content"]:
        raise RuntimeError("the secret cause")
    return encode(self, messages)
def faulty_feed(self, token_id):
    if "detokenize" in self._stop:
        raise RuntimeError("the secret cause")
    return feed(self, token_id)
def faulty_run(self, batch, *ahead):
    global lost
    sequences = [chunk.sequence for chunk in batch]
    lost = pathlib.Path(LOST).exists()
    if lost or any(one.params.seed == 13 and one.num_output_tokens == 6 for one in sequences):
        raise RuntimeError("the secret cause")
    return run(self, batch, *ahead)
def check_device(self):
    if lost:
        raise RuntimeError("the secret cause")
ChatFormat.encode_dialog, Detokenizer.feed = faulty_encode, faulty_feed
ModelRunner.finish, ModelRunner.check_device = faulty_run, check_device
limits._BODY_SECONDS = 0.5
sys.argv[0] = "api.py"
api.main()
"""


FAULTS = [{"prompt": "format"}, {"prompt": "x", "stop": "detokenize"}, {"prompt": "x", "seed": 13}]


@pytest.fixture
def faulty(long_model: Path, tmp_path: Path) -> Iterator[Server]:
    """The real one, where prompts, stop strings and seeds cause faults, and a file the loss of the device."""

    class FaultyServer(Server):
        program = ("-c", f"LOST = {str(tmp_path / 'lost')!r}\n{FAULTY}")

    server = FaultyServer(long_model, tmp_path, "--drain-timeout", "3600", "--served-model-name", "tiny")
    yield server
    server.stop()


def check_told(response: requests.Response, status: int) -> None:
    assert response.status_code == response.json()["status"] == status
    assert "secret" not in response.text
    if status == 500:
        assert response.headers["X-Request-ID"] in response.json()["error"]["message"]
    else:
        assert int(response.headers["Retry-After"]) >= 1


def test_a_fault_is_told_with_its_id_and_a_dead_engine_ends_the_process_as_failed(
    faulty: Server, tmp_path: Path
) -> None:
    whole = ask(faulty.url, prompt="y", temperature=0, max_tokens=20).json()["response"]
    for body in FAULTS:
        check_told(ask(faulty.url, **body), 500)
        assert body.get("prompt") == "format" or "secret" not in str(stream(faulty, **body))
    for body in FAULTS[1:]:
        last = stream(faulty, **body)[-1]
        assert last["status"] == 500
        assert re.search(r"request [0-9a-f]{16} failed", last["error"]["message"])
    assert ask(faulty.url, prompt="y", temperature=0, max_tokens=20).json()["response"] == whole
    assert "the secret cause" in faulty.log  # whoever runs the server wants to know
    check_openais_client_raises_its_own(faulty)
    check_a_body_that_does_not_come_is_waited_for_no_longer_than_it_may_take(faulty)

    with ThreadPoolExecutor(8) as executor:
        streams = [begin(faulty.url, executor, **LONG) for _ in range(2)]
        unary = [executor.submit(ask, faulty.url, **LONG) for _ in range(3)]
        until(lambda: faulty.load == (5, 0))
        (tmp_path / "lost").touch()
        for future in unary:
            check_told(future.result(), 503)
        for events in (future.result() for future in streams):
            assert events[-1]["status"] == 503
            assert "secret" not in str(events[-1])
    assert faulty.process.wait(LIMIT) == 1


def check_openais_client_raises_its_own(faulty: Server) -> None:
    with client_of(faulty) as client:
        for route in ROUTES:
            fields = {"seed": 13, "max_tokens": 20}
            with pytest.raises(openai.InternalServerError, match=r"request \w+ failed") as failed:
                create(client, route, **fields)
            assert (failed.value.status_code, failed.value.type) == (500, "server_error")
            assert "secret" not in failed.value.response.text
            events = create(client, route, **fields, stream=True)
            next(events)
            with pytest.raises(openai.APIError, match=r"request \w+ failed") as broken:
                list(events)
            assert "secret" not in str(broken.value.body)
            assert len(texts(create(client, route, **{**fields, "seed": 14}))) == 1


def check_a_body_that_does_not_come_is_waited_for_no_longer_than_it_may_take(faulty: Server) -> None:
    for path in ("/", "/v1/chat/completions"):
        with connected(faulty.port) as connection:
            connection.sendall(request_of({"prompt": "x"}, path)[:-1])
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["message"] == "the body did not come within 0.5 s"


def test_an_engine_that_dies_while_it_drains_tells_everybody(faulty: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as executor:
        events = begin(faulty.url, executor, **LONG)
        unary = executor.submit(ask, faulty.url, **LONG)
        until(lambda: faulty.load == (2, 0))
        faulty.process.send_signal(signal.SIGTERM)
        until(lambda: not faulty.answers())
        assert faulty.process.poll() is None
        (tmp_path / "lost").touch()
        check_told(unary.result(), 503)
        assert events.result()[-1]["status"] == 503
    assert faulty.process.wait(LIMIT) == 1


# Signals.


def test_a_signal_under_load_loses_no_request_that_was_taken(
    start_server: Callable[..., Server], tiny_model: Path
) -> None:
    clients = 40
    server = start_server(tiny_model, "--max-num-seqs", "16", "--drain-timeout", "3600")
    bodies = [
        {"prompt": f"{n}", "temperature": 0, "max_tokens": 20 + 10 * n, "stream": n % 2 == 0}
        for n in range(10)
    ]

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        """The status and the text; of a stream, the status that it ended with."""
        with requests.post(server.url, json=body, stream=True, timeout=LIMIT) as response:
            if response.status_code != 200:
                assert int(response.headers["Retry-After"]) >= 1
                assert response.json()["status"] == response.status_code
                return response.status_code, ""
            if not body["stream"]:
                return 200, response.json()["response"]
            *pieces, done = read_events(response)
            assert done == "[DONE]"
            return 200, "".join(piece["response"] for piece in pieces)

    alone = [answer(body) for body in bodies]
    assert {status for status, _ in alone} == {200}
    stopping = threading.Event()
    answered = [0] * clients
    refused = [0] * clients

    def client(number: int) -> None:
        """Asks again and again, until the server takes no more, and then until there is none."""
        wanted = number % len(bodies)
        while True:
            try:
                told = answer(bodies[wanted])
            except requests.ConnectionError:
                assert stopping.is_set()
                return
            if told[0] == 503:
                assert stopping.is_set()
                refused[number] += 1
                time.sleep(0.05)
            else:
                assert told == alone[wanted]
                answered[number] += 1

    with ThreadPoolExecutor(clients) as executor:
        futures = [executor.submit(client, number) for number in range(clients)]
        until(lambda: sum(answered) >= clients or any(future.done() for future in futures))
        stopping.set()
        server.process.send_signal(signal.SIGTERM)
        wait(futures, LIMIT)
        for future in futures:
            future.result()
    assert server.process.wait(LIMIT) == 0
    assert sum(refused) > 0
    assert "Traceback" not in server.log
    # Each that got past admission has its line, and a whole answer.
    lines = re.findall(r"finish_reason=(\w+)", server.log)
    assert set(lines) <= {"stop", "length"}
    assert len(lines) == len(alone) + sum(answered)


def test_what_is_not_finished_in_the_time_for_it_is_told(
    start_server: Callable[..., Server], long_model: Path
) -> None:
    server = start_server(
        long_model, "--drain-timeout", "1", "--max-num-seqs", "4", "--served-model-name", NAME
    )
    with ThreadPoolExecutor(8) as executor, stalled(server):
        streams = [begin(server.url, executor, **LONG) for _ in range(2)]
        unary = [executor.submit(ask, server.url, **LONG) for _ in range(4)]
        until(lambda: server.load == (4, 3))
        server.process.send_signal(signal.SIGINT)
        for future in unary:
            check_told(future.result(), 503)
        for events in (future.result() for future in streams):
            assert events[-1]["status"] == 503
            assert events[-1]["error"]["message"] == "the server is shutting down"
        assert server.process.wait(LIMIT) == 0
    assert "Traceback" not in server.log
    assert "Finished server process" in server.log.splitlines()[-1]  # and nobody complains of its end


@pytest.mark.parametrize("in_a_container", [False, True])
def test_a_signal_during_the_start_ends_it_at_once(
    long_model: Path, tmp_path: Path, in_a_container: bool
) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "api.py", "--model", str(long_model), "--device", "cpu", "--port", "0"]
    if in_a_container:  # as the first process there, which signals don't kill by themselves
        unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
        if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
            pytest.skip("no process can be the first one of others here")
        command = unshare + command
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        until(lambda: "Waiting for application startup" in log.read_text() or process.poll() is not None)
        server = psutil.Process(process.pid).children()[0] if in_a_container else process
        server.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) != 0
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell what is loaded")
def test_what_nobody_has_asked_for_is_not_loaded(patient: Server) -> None:
    ask(patient.url, prompt="x", max_tokens=2)
    loaded = Path(f"/proc/{patient.process.pid}/maps").read_text()
    assert "torch" in loaded
    assert "llguidance" not in loaded


# Last, as it ends the server that the tests above share.
def test_a_server_that_drains_tells_so_and_a_second_signal_ends_it_at_once(patient: Server) -> None:
    assert read_metrics(patient.url)["llama_up"] == 1
    with ThreadPoolExecutor(8) as executor:
        events = begin(patient.url, executor, **LONG)
        patient.process.send_signal(signal.SIGINT)
        until(lambda: not patient.answers())
        health = requests.get(f"{patient.url}/health", timeout=LIMIT)
        assert health.json()["error"]["message"] == "the server is shutting down"
        for refused in (health, ask(patient.url, prompt="x"), ask(patient.url, prompt="x", stream=True)):
            check_told(refused, 503)
        metrics = read_metrics(patient.url)
        assert metrics["llama_up"] == 0
        assert metrics['llama_request_errors_total{reason="draining"}'] == 2
        assert not events.done()
        assert patient.process.poll() is None
        patient.process.send_signal(signal.SIGTERM)
        assert patient.process.wait(LIMIT) != 0
        with pytest.raises(requests.RequestException):
            events.result()
