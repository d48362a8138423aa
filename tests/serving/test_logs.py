"""The log as JSON, and the ids by which requests are found in it."""

import json
import logging
import re
import socket
import sys
from datetime import datetime
from typing import Any

import pytest
import requests

from serving.logs import JsonLines
from tests.conftest import Server, until


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.split("\n")[:-1]]


def line_of(server: Server, request_id: str) -> dict[str, Any]:
    until(lambda: any(line.get("request_id") == request_id for line in lines(server)))
    return next(line for line in lines(server) if line.get("request_id") == request_id)


def test_every_line_is_json_with_a_time_in_its_zone(tiny_server: Server) -> None:
    assert {"llama.engine", "uvicorn.error"} <= {line["logger"] for line in lines(tiny_server)}
    for line in lines(tiny_server):
        assert {"time", "level", "logger", "message"} <= set(line)
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
    messages = [line["message"] for line in lines(tiny_server)]
    assert any(message.startswith("Started server process") for message in messages)
    assert any(message.startswith("Uvicorn running on") for message in messages)


def test_a_request_has_a_line_with_its_figures_and_without_its_content(tiny_server: Server) -> None:
    response = tiny_server.post(prompt="secret 秘密", max_tokens=4)
    line = line_of(tiny_server, response.headers["X-Request-ID"])
    usage = response.json()["usage"]
    assert list(line) == [
        "time", "level", "logger", "message",
        "request_id", "prompt_tokens", "completion_tokens", "ttft", "duration", "finish_reason",
    ]  # fmt: skip
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 4)
    assert 0 < line["ttft"] < line["duration"]
    assert (line["message"], line["finish_reason"]) == ("request", "length")
    assert "secret" not in tiny_server.log


def test_content_is_there_when_it_is_asked_for(short_server: Server) -> None:
    prompt = 'a "quoted"\nline 你好\u2028🦙\x00'
    response = short_server.post(prompt=prompt, max_tokens=4)
    line = line_of(short_server, response.headers["X-Request-ID"])
    assert (line["prompt"], line["response"]) == (prompt, response.json()["response"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/", b"{", 400, "invalid"),
        ("POST", "/", b'{"prompt": "secret", "stop": 5}', 422, "invalid"),
        ("POST", "/", b'{"prompt": "secret%b"}' % (b"x" * 600), 400, "too_long"),
        ("POST", "/", b'{"prompt": "secret%b"}' % (b"x" * 200_000), 413, "too_large"),
        ("POST", "/v1/completions", b'{"model": "secret", "prompt": "a"}', 404, "not_found"),
        ("GET", "/secret", b"", 404, "not_found"),
        ("PUT", "/", b"", 405, "invalid"),
    ],
)
def test_a_refused_request_has_one_line_with_the_reason(
    tiny_server: Server, method: str, path: str, body: bytes, status: int, reason: str
) -> None:
    response = requests.request(method, tiny_server.url + path, data=body, timeout=60)
    assert response.status_code == status
    line = line_of(tiny_server, response.headers["X-Request-ID"])
    assert list(line) == ["time", "level", "logger", "message", "request_id", "status", "reason"]
    assert (line["level"], line["message"], line["status"], line["reason"]) == (
        "INFO", "refused", status, reason
    )  # fmt: skip
    assert tiny_server.log.count(line["request_id"]) == 1
    assert "secret" not in tiny_server.log


def test_a_probe_that_is_refused_has_none(tiny_server: Server) -> None:
    health, other = (
        requests.put(tiny_server.url + path, timeout=60).headers["X-Request-ID"] for path in ("/health", "/")
    )
    line_of(tiny_server, other)
    assert health not in tiny_server.log


def test_an_exception_is_one_line() -> None:
    try:
        raise ValueError("of two\nlines")
    except ValueError:
        record = logging.LogRecord("llama", logging.ERROR, __file__, 1, "%s\nfailed", ("it",), sys.exc_info())
    text = JsonLines().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "it\nfailed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: of two\nlines")


def send(server: Server, *headers: bytes) -> list[str]:
    """The ids that an answer has, after a request with lines of a head that no client library would send."""
    head = b"\r\n".join([b"GET /health HTTP/1.1", b"Host: x", b"Connection: close", *headers])
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head + b"\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return re.findall(r"(?mi)^x-request-id: (.*)\r$", answer)


@pytest.mark.parametrize(
    "request_id",
    ["a", "0", "-", "..", "x" * 128, "8f14e45f-ceea-467f-9575-1d4a5b2d2f3e", "Root.1-67891233_abc"],
)
def test_a_sane_id_is_taken_over(tiny_server: Server, request_id: str) -> None:
    assert send(tiny_server, b"X-Request-ID: " + request_id.encode()) == [request_id]
    assert send(tiny_server, b"x-request-id:" + request_id.encode()) == [request_id]


@pytest.mark.parametrize(
    "request_id",
    [
        b"", b" ", b"x" * 129, b"x" * 10_000, b"a b", b"a\tb", b"a/b", b"a;b", b"a,b", b'a"b', b"a\\nb",
        b"a%0ab", b"${jndi:x}", b"<b>", b"a\x85b", b"\xff\xfe", b"a\n b", b"a\r\n b",
        *map(str.encode, ("a\u00e9", "你好", "\uff41", "\u0661")),
    ],
)  # fmt: skip
def test_an_insane_id_is_not(tiny_server: Server, request_id: bytes) -> None:
    made = send(tiny_server, b"X-Request-ID: " + request_id)
    assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in made)
    # Without one, the head itself was refused: it breaks lines.
    assert len(made) == 1 or b"\n" in request_id


def test_without_an_id_each_request_gets_its_own(tiny_server: Server) -> None:
    ids = [send(tiny_server)[0] for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in ids)


def test_an_id_that_was_taken_over_is_that_of_the_line_and_of_an_error(tiny_server: Server) -> None:
    headers = {"X-Request-ID": "mine-1"}
    body = {"prompt": "x", "max_tokens": 2}
    assert (
        requests.post(tiny_server.url, json=body, headers=headers, timeout=60).headers["X-Request-ID"]
        == "mine-1"
    )
    assert line_of(tiny_server, "mine-1")["completion_tokens"] == 2
    refused = requests.post(tiny_server.url, data=b"{", headers=headers, timeout=60)
    assert (refused.status_code, refused.headers["X-Request-ID"]) == (400, "mine-1")
