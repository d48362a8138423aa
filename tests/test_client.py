"""client.py against the real server, and against connections that break in ways the real one does not."""

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from client import CompletionError, get_completion, stream_completion

ROOT = Path(__file__).parent.parent

JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"

Script = Callable[[socket.socket, bytes], None]  # (connection, the request's bytes)


def event(text: str, **fields: Any) -> bytes:
    body = {"response": text, "status": 200, "time": "2024-05-01 12:00:00", **fields}
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


LAST_EVENT = event("", finish_reason="stop", usage={})


def read_request(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as stream:
        head = b"".join(iter(stream.readline, b"\r\n"))
        length = next(line for line in head.splitlines() if line.lower().startswith(b"content-length:"))
        return head + stream.read(int(length.split(b":")[1]))


def body_of(request: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.splitlines()[-1])
    return body


@contextmanager
def scripted_server(*scripts: Script) -> Iterator[str]:
    """Listens on a free port and plays one script for each connection; yields its URL."""

    def serve() -> None:
        for script in scripts:
            connection, _ = listener.accept()
            with connection:
                script(connection, read_request(connection))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()


def sends(answer: bytes) -> Script:
    return lambda connection, request: connection.sendall(answer)


@contextmanager
def pausing_server() -> Iterator[tuple[str, threading.Event]]:
    """Streams one piece, and the other once it is told to; yields its URL, and what tells it."""
    go_on = threading.Event()

    def script(connection: socket.socket, request: bytes) -> None:
        connection.sendall(EVENTS + event("one"))
        assert go_on.wait(30)
        connection.sendall(event("two") + LAST_EVENT + DONE)

    with scripted_server(script) as url:
        yield url, go_on


def run_client(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "client.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


# With the real server


def test_returns_an_answer(demo_server: str) -> None:
    assert get_completion(prompt="你好", url=demo_server).strip()


def test_pieces_of_a_stream_join_to_the_whole_answer(demo_server: str) -> None:
    pieces = list(stream_completion("你好", url=demo_server, seed=7, temperature=1.0))
    assert len(pieces) > 1
    assert "".join(pieces) == get_completion("你好", url=demo_server, seed=7, temperature=1.0)


@pytest.mark.parametrize("name", ["Anna", "Tom"])
def test_history_reaches_the_model(demo_server: str, name: str) -> None:
    history = [
        {"role": "user", "content": f"My name is {name}."},
        {"role": "assistant", "content": f"Nice to meet you, {name}! 👋"},
    ]
    answer = get_completion("What is my name?", history, url=demo_server, temperature=0)
    assert answer == f"Your name is {name}."


@pytest.mark.parametrize("ask", [get_completion, lambda *args, **kw: list(stream_completion(*args, **kw))])
def test_an_error_carries_the_message_and_status_of_the_server(
    demo_server: str, ask: Callable[..., Any]
) -> None:
    with pytest.raises(CompletionError, match="temperature") as raised:
        ask("你好", url=demo_server, temperature=9)
    assert raised.value.status == 422


def test_command_line_prints_one_answer(demo_server: str) -> None:
    result = run_client("你好", "--url", demo_server)
    assert result.stdout.strip()
    assert (result.returncode, result.stderr) == (0, "")


def test_what_the_output_has_no_character_for_is_replaced(demo_server: str) -> None:
    result = run_client("What is your name?", "--url", demo_server, PYTHONIOENCODING="ascii:strict")
    assert (result.returncode, result.stderr) == (0, "")
    hello = run_client("你好", "--url", demo_server, PYTHONIOENCODING="ascii:strict")
    assert (hello.returncode, hello.stderr) == (0, "")
    assert "?" in hello.stdout


@pytest.mark.parametrize("question", ["as an argument", "in the chat"])
def test_a_reader_who_has_enough_is_no_fault(question: str) -> None:
    pipe = subprocess.PIPE
    with pausing_server() as (url, go_on):
        arguments = ["x"] if question == "as an argument" else []
        command = [sys.executable, "client.py", *arguments, "--url", url]
        with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            assert client.stderr is not None
            client.stdin.write(b"x\n")
            client.stdin.close()
            assert client.stdout.read(3) == b"one"
            client.stdout.close()
            go_on.set()
            assert client.stderr.read() == b""
        assert client.returncode == 1


def test_chat_answers_each_line_of_its_input(demo_server: str) -> None:
    result = run_client("--url", demo_server, stdin="你好\n\nWho are you?\n")
    assert len(result.stdout.split("\n")) >= 3
    assert (result.returncode, result.stderr) == (0, "")


# When the connection fails


def test_a_closed_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(CompletionError, match=f"no connection to {url}") as raised:
        get_completion("hi", url=url)
    assert raised.value.status is None

    result = run_client("hi", "--url", url)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: {raised.value}\n"


@pytest.mark.parametrize("url", ["localhost:6006", "127.0.0.1:6006", "127.0.0.1", "http://[::1"])
def test_what_is_not_a_url_is_named(url: str) -> None:
    with pytest.raises(CompletionError, match=re.escape(f"{url} is not an address")):
        get_completion("hi", url=url)


def test_a_silent_server_is_given_up() -> None:
    with (
        scripted_server(lambda connection, request: wait_for_close(connection)) as url,
        pytest.raises(CompletionError, match=f"{url} does not answer in time"),
    ):
        get_completion("hi", url=url, timeout=0.2)


def test_an_error_in_the_middle_of_a_stream() -> None:
    error = {"error": {"message": "the engine failed", "type": "server_error"}, "status": 500}
    script = sends(EVENTS + event("Hel") + event("lo") + f"data: {json.dumps(error)}\n\n".encode())
    pieces: list[str] = []
    with (
        scripted_server(script) as url,
        pytest.raises(CompletionError, match=r"^the engine failed$") as raised,
    ):
        pieces.extend(stream_completion("hi", url=url))
    assert pieces == ["Hel", "lo"]
    assert raised.value.status == 500


def test_the_error_page_of_a_proxy_becomes_one_line() -> None:
    page = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>\n</html>"
    with scripted_server(sends(page)) as url, pytest.raises(CompletionError) as raised:
        get_completion("hi", url=url)
    assert str(raised.value) == f"{url} answered 502 Bad Gateway"
    assert raised.value.status == 502


@pytest.mark.parametrize("ask", [get_completion, lambda *args, **kw: list(stream_completion(*args, **kw))])
def test_a_web_page_is_no_answer(ask: Callable[..., Any]) -> None:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html></html>"
    with (
        scripted_server(sends(page)) as url,
        pytest.raises(CompletionError, match=f"{url} is not this server"),
    ):
        ask("hi", url=url)


CHUNKED = EVENTS.replace(b"Connection: close", b"Transfer-Encoding: chunked")
FIRST_EVENT = event("Hel")
CUT_STREAMS = {
    "between events": EVENTS + FIRST_EVENT,
    "within an event": EVENTS + FIRST_EVENT + event("lo")[:15],
    "between chunks": CHUNKED + b"%x\r\n%s\r\n" % (len(FIRST_EVENT), FIRST_EVENT),
    "within a chunk": CHUNKED + b"%x\r\n%s\r\nff\r\ndata:" % (len(FIRST_EVENT), FIRST_EVENT),
}


@pytest.mark.parametrize("answer", CUT_STREAMS.values(), ids=CUT_STREAMS.keys())
def test_a_cut_stream_is_not_taken_for_a_whole_answer(answer: bytes) -> None:
    pieces: list[str] = []
    with (
        scripted_server(sends(answer)) as url,
        pytest.raises(CompletionError, match=f"{url} closed the connection"),
    ):
        pieces.extend(stream_completion("hi", url=url))
    assert pieces == ["Hel"]


def test_command_line_shows_what_came_before_an_error() -> None:
    with scripted_server(sends(EVENTS + event("Hello"))) as url:
        result = run_client("hi", "--url", url)
    assert (result.returncode, result.stdout) == (1, "Hello\n")
    assert result.stderr.startswith("error: ")


# What goes over the wire


def wait_for_close(connection: socket.socket) -> None:
    connection.settimeout(30)
    with suppress(ConnectionError):
        assert connection.recv(1) == b""


def test_utf8_whatever_the_header_says() -> None:
    latin1 = b"; charset=iso-8859-1\r\n"
    answer = JSON.replace(b"json\r\n", b"json" + latin1) + '{"response": "你好"}'.encode()
    stream = EVENTS.replace(b"stream\r\n", b"stream" + latin1) + event("你") + event("好") + LAST_EVENT + DONE
    with scripted_server(sends(answer), sends(stream)) as url:
        assert get_completion("hi", url=url) == "你好"
        assert list(stream_completion("hi", url=url)) == ["你", "好"]


def test_a_piece_is_there_before_the_next_is_sent() -> None:
    with pausing_server() as (url, go_on):
        pieces = stream_completion("hi", url=url)
        assert next(pieces) == "one"
        go_on.set()
        assert list(pieces) == ["two"]


def test_comments_and_carriage_returns_in_a_stream() -> None:
    stream = (event("one") + b": still here\n\n" + event("two") + LAST_EVENT + DONE).replace(b"\n", b"\r\n")
    with scripted_server(sends(EVENTS + stream)) as url:
        assert list(stream_completion("hi", url=url)) == ["one", "two"]


def test_stopping_the_iteration_closes_the_connection() -> None:
    def script(connection: socket.socket, request: bytes) -> None:
        connection.sendall(EVENTS + event("one"))
        wait_for_close(connection)

    with scripted_server(script) as url:
        for _ in stream_completion("hi", url=url):
            break


def test_key_from_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bytes] = []

    def script(connection: socket.socket, request: bytes) -> None:
        requests.append(request)
        connection.sendall(JSON + b'{"response": ""}')

    monkeypatch.setenv("LLAMA_API_KEY", "from-environment")
    with scripted_server(script, script, script) as url:
        get_completion("hi", url=url)
        get_completion("hi", url=url, api_key="from-argument")
        get_completion("hi", url=url, api_key="密钥")
    assert b"Authorization: Bearer from-environment\r\n" in requests[0]
    assert b"Authorization: Bearer from-argument\r\n" in requests[1]
    assert "Authorization: Bearer 密钥\r\n".encode() in requests[2]


def test_a_proxy_of_the_environment_is_not_asked_for_a_local_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with scripted_server(sends(JSON + b'{"response": "direct"}')) as url:
        assert get_completion("hi", url=url) == "direct"
    with pytest.raises(CompletionError, match=r"cannot reach http://llama\.invalid through the proxy"):
        get_completion("hi", url="http://llama.invalid")


# The terminal


def test_an_answer_that_reached_its_limit_says_so() -> None:
    stream = event("Hello") + event("", finish_reason="length", usage={}) + DONE
    with scripted_server(sends(EVENTS + stream)) as url:
        result = run_client("hi", "--url", url)
    assert (result.returncode, result.stdout) == (0, "Hello\n")
    assert "limit of tokens" in result.stderr


def test_chat_sends_the_earlier_turns_but_not_those_that_failed() -> None:
    bodies: list[dict[str, Any]] = []

    def answers(text: bytes) -> Script:
        def script(connection: socket.socket, request: bytes) -> None:
            bodies.append(body_of(request))
            connection.sendall(EVENTS + text)

        return script

    good = event("你好！") + LAST_EVENT + DONE
    with scripted_server(answers(good), answers(event("cut")), answers(good)) as url:
        result = run_client("--url", url, "--system", "Be brief.", stdin="one\ntwo\nthree\n")
    assert result.returncode == 0
    assert [body["prompt"] for body in bodies] == ["one", "two", "three"]
    assert bodies[0]["history"] == [{"role": "system", "content": "Be brief."}]
    assert bodies[2]["history"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "你好！"},
    ]


def test_chat_says_what_to_do_when_the_dialog_has_become_too_long() -> None:
    refusal = b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": {"message": "the prompt has 2049 tokens"}}'
    good = EVENTS + event("hi") + LAST_EVENT + DONE
    with scripted_server(sends(refusal), sends(good), sends(refusal)) as url:
        result = run_client("--url", url, stdin="too long itself\none\ntwo\n")
    assert result.stderr.splitlines() == [
        "error: the prompt has 2049 tokens",
        "error: the prompt has 2049 tokens",
        "(the dialog has become too long: Ctrl-D ends it)",
    ]


CTRL_C, CTRL_D = b"\x03", b"\x04"

# Makes the pseudo-terminal on its stdin the one that Ctrl-C comes from, as a login shell does.
IN_A_TERMINAL = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_path("client.py", run_name="__main__")
"""


class Terminal:
    """client.py in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._keyboard, terminal = pty.openpty()
        self._unread = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, *arguments],
            cwd=ROOT,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)

    def read_until(self, text: str) -> None:
        """Reads the screen up to `text`; fails if it does not come."""
        while text.encode() not in self._unread:
            assert select.select([self._keyboard], [], [], 30)[0], f"{text!r} not in {self._unread!r}"
            self._unread += os.read(self._keyboard, 1024)
        self._unread = self._unread.partition(text.encode())[2]

    def press(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def press_until_it_ends(self, keys: bytes) -> int:
        """Returns the exit code. Python misses a Ctrl-C that comes just before it waits for input."""
        for _ in range(30):
            self.press(keys)
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(1)
        raise AssertionError("client.py did not end")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    bodies: list[dict[str, Any]] = []

    def endless(connection: socket.socket, request: bytes) -> None:
        connection.sendall(EVENTS + event("Once upon"))
        wait_for_close(connection)

    def short(connection: socket.socket, request: bytes) -> None:
        bodies.append(body_of(request))
        connection.sendall(EVENTS + event("The end.") + LAST_EVENT + DONE)

    with scripted_server(endless, short) as url, closing(Terminal("--url", url)) as terminal:
        terminal.read_until("> ")
        terminal.press(b"a story\n")
        terminal.read_until("Once upon")
        terminal.press(CTRL_C)
        terminal.read_until("> ")
        terminal.press(b"go on\n")
        terminal.read_until("The end.")
        terminal.read_until("> ")
        assert terminal.press_until_it_ends(CTRL_C) == 0
    assert bodies[0]["history"] == [
        {"role": "user", "content": "a story"},
        {"role": "assistant", "content": "Once upon"},
    ]


def test_ctrl_d_leaves_the_chat() -> None:
    with closing(Terminal()) as terminal:
        terminal.read_until("> ")
        assert terminal.press_until_it_ends(CTRL_D) == 0


def test_ctrl_c_ends_a_single_question() -> None:
    def endless(connection: socket.socket, request: bytes) -> None:
        connection.sendall(EVENTS + event("Once upon"))
        wait_for_close(connection)

    with scripted_server(endless) as url, closing(Terminal("a story", "--url", url)) as terminal:
        terminal.read_until("Once upon")
        assert terminal.press_until_it_ends(CTRL_C) == 128 + signal.SIGINT
