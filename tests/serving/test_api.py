"""POST / over real HTTP, against a real server process."""

import contextlib
import json
import re
import shlex
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from openai import NotFoundError, OpenAI

from serving import docs
from serving.errors import ApiError
from tests.conftest import LONG, Server, occupied, posted, read_events, until

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def stream(server: Server, **body: object) -> list[Any]:
    with requests.post(server.url, json={**body, "stream": True}, stream=True, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["X-Accel-Buffering"] == "no"  # nginx passes it on as it comes
        return list(read_events(response))


def test_an_answer_has_the_keys_of_the_contract(server: Server) -> None:
    response = server.post(prompt="你好")
    answer = response.json()
    assert response.status_code == 200
    assert list(answer) == ["response", "status", "time", "finish_reason", "usage"]
    assert answer["response"]
    assert answer["status"] == 200
    assert TIME.fullmatch(answer["time"])
    assert answer["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "application/json", "text/plain", None]
)
def test_the_body_is_json_whatever_the_content_type_says(server: Server, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    response = requests.post(server.url, data='{"prompt": "你好"}'.encode(), headers=headers, timeout=60)
    assert response.status_code == 200


def test_a_stream_adds_up_to_the_answer_in_one_piece(server: Server) -> None:
    for prompt, seed in (("讲个故事", 3), ("Tell me a story", 4), ("你好", 5)):
        whole = server.post(prompt=prompt, seed=seed).json()
        *pieces, last, done = stream(server, prompt=prompt, seed=seed)
        assert done == "[DONE]"
        assert "".join(piece["response"] for piece in [*pieces, last]) == whole["response"]
        assert all(list(piece) == ["response", "status", "time"] for piece in pieces)
        assert (last["finish_reason"], last["usage"]) == (whole["finish_reason"], whole["usage"])


def test_no_piece_of_a_stream_is_a_broken_character(tiny_server: Server) -> None:
    """Random weights over single bytes: hardly a byte fits the one before it."""
    for seed in range(3):
        body = {"prompt": "x", "seed": seed, "max_tokens": 200, "temperature": 1.5, "top_p": 1}
        *pieces, done = stream(tiny_server, **body)
        assert done == "[DONE]"
        assert "".join(piece["response"] for piece in pieces) == tiny_server.post(**body).json()["response"]


def test_greedy_answers_are_the_same_each_time(tiny_server: Server) -> None:
    answers = [tiny_server.post(prompt="x", temperature=0, max_tokens=30).json() for _ in range(3)]
    assert len({answer["response"] for answer in answers}) == 1


def test_max_tokens_is_honoured_and_told(tiny_server: Server) -> None:
    answer = tiny_server.post(prompt="x", max_tokens=7).json()
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 7)


def test_the_default_of_512_tokens_is_cut_to_the_context_and_told(tiny_server: Server) -> None:
    answer = tiny_server.post(prompt="x" * 300).json()
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


def test_the_default_of_512_tokens_is_no_error_where_the_context_is_smaller(short_server: Server) -> None:
    assert short_server.post(prompt="x").json()["usage"]["total_tokens"] == 64
    assert short_server.post(prompt="x", max_tokens=65).status_code == 422


@pytest.mark.parametrize("stop", ["。", ["zzz", "。"]])
def test_a_stop_string_ends_the_answer(server: Server, stop: object) -> None:
    whole = server.post(prompt="讲个故事", temperature=0).json()["response"]
    assert "。" in whole
    answer = server.post(prompt="讲个故事", temperature=0, stop=stop).json()
    assert answer["response"] == whole.split("。")[0]
    assert answer["finish_reason"] == "stop"


# field or None, body, status: the message must name the field
BAD: list[tuple[str | None, Any, int]] = [
    (None, b"", 400),
    (None, b"{", 400),
    (None, b"prompt=hello", 400),
    (None, b'{"prompt": "\xff\xfe"}', 400),
    (None, b'{"prompt": "\\ud800"}', 400),
    (None, b'{"prompt": "a"} x', 400),
    (None, b"[" * 5000 + b"]" * 5000, 400),
    (None, b'{"prompt": ' + b"[" * 50_000 + b"}", 400),
    ("history.0", b'{"prompt": "a", "history": ' + b"[" * 100 + b"]" * 100 + b"}", 422),
    (None, b"[]", 422),
    (None, b'"prompt"', 422),
    (None, b"null", 422),
    ("prompt", {}, 422),
    ("prompt", {"prompt": None}, 422),
    ("prompt", {"prompt": ""}, 422),
    ("prompt", {"prompt": " \n\t　"}, 422),
    ("prompt", {"prompt": 5}, 422),
    ("prompt", {"prompt": ["a"]}, 422),
    ("promt", {"prompt": "a", "promt": "b"}, 422),
    ("history", {"history": "a"}, 422),
    ("history.0", {"history": ["a"]}, 422),
    ("history.0", {"history": [["user", "a"]]}, 422),
    ("history.0.role", {"history": [{"role": "tool", "content": "a"}]}, 422),
    ("history.0.content", {"history": [{"role": "user", "content": None}]}, 422),
    ("history.1.content", {"history": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, 422),
    ("history.0.name", {"history": [{"role": "user", "content": "a", "name": "x"}]}, 422),
    ("max_tokens", {"max_tokens": 0}, 422),
    ("max_tokens", {"max_tokens": -5}, 422),
    ("max_tokens", {"max_tokens": 513}, 422),
    ("max_tokens", {"max_tokens": 10**30}, 422),
    ("max_tokens", {"max_tokens": "5"}, 422),
    ("max_tokens", {"max_tokens": 5.5}, 422),
    ("max_tokens", {"max_tokens": True}, 422),
    ("max_tokens", {"max_tokens": None}, 422),
    ("temperature", {"temperature": -0.1}, 422),
    ("temperature", {"temperature": 2.1}, 422),
    ("temperature", {"temperature": "hot"}, 422),
    ("temperature", b'{"prompt": "a", "temperature": NaN}', 422),
    ("temperature", b'{"prompt": "a", "temperature": Infinity}', 422),
    ("temperature", b'{"prompt": "a", "temperature": 1e999}', 422),
    ("top_p", {"top_p": 0}, 422),
    ("top_p", {"top_p": 1.1}, 422),
    ("top_p", b'{"prompt": "a", "top_p": NaN}', 422),
    ("top_k", {"top_k": -1}, 422),
    ("top_k", {"top_k": 1.5}, 422),
    ("min_p", {"min_p": -0.1}, 422),
    ("min_p", {"min_p": 1.1}, 422),
    ("repetition_penalty", {"repetition_penalty": 0}, 422),
    ("repetition_penalty", {"repetition_penalty": 2.1}, 422),
    ("presence_penalty", {"presence_penalty": 2.1}, 422),
    ("presence_penalty", b'{"prompt": "a", "presence_penalty": -Infinity}', 422),
    ("frequency_penalty", {"frequency_penalty": -2.1}, 422),
    ("seed", {"seed": "a"}, 422),
    ("seed", {"seed": 2**63}, 422),
    ("seed", {"seed": 1.5}, 422),
    ("stop", {"stop": 5}, 422),
    ("stop.0", {"stop": ""}, 422),
    ("stop.0", {"stop": "x" * 65}, 422),
    ("stop.1", {"stop": ["a", None]}, 422),
    ("stop", {"stop": ["a"] * 5}, 422),
    ("stream", {"stream": "yes"}, 422),
    ("stream", {"stream": 1}, 422),
    ("prompt", {"prompt": "x" * 600}, 400),
]


def test_each_bad_input_gets_its_error_while_a_stream_beside_it_goes_on(tiny_server: Server) -> None:
    quiet = stream(tiny_server, prompt="a stream", seed=1, max_tokens=400)
    beside: list[Any] = []
    thread = threading.Thread(
        target=lambda: beside.extend(stream(tiny_server, prompt="a stream", seed=1, max_tokens=400))
    )
    thread.start()
    for param, body, status in BAD:
        data = (
            body if isinstance(body, bytes) else json.dumps({"prompt": "a"} | body if body else body).encode()
        )
        response = requests.post(tiny_server.url, data=data, timeout=60)
        error = response.json()
        assert response.status_code == status, (body, response.text)
        assert list(error) == ["error", "status", "time"]
        assert error["status"] == status
        assert TIME.fullmatch(error["time"])
        assert list(error["error"]) == ["message", "type", "param", "code"]
        assert error["error"]["type"] == "invalid_request_error"
        assert error["error"]["param"] == param, (body, response.text)
        if param:
            assert param in error["error"]["message"]
    thread.join()
    assert "".join(e["response"] for e in beside[:-1]) == "".join(e["response"] for e in quiet[:-1])
    assert beside[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", 9, "2"),
        ("top_p", 2, "1"),
        ("max_tokens", 600, "512"),
        ("stop", ["a"] * 5, "4"),
        ("stop", "x" * 99, "64"),
    ],
)
def test_an_error_names_the_limit(tiny_server: Server, field: str, value: object, limit: str) -> None:
    assert limit in tiny_server.post(prompt="a", **{field: value}).json()["error"]["message"]


def test_a_body_in_another_encoding_is_told_which_it_must_be(tiny_server: Server) -> None:
    """As curl in a Chinese Windows console sends, and PowerShell writes to a file."""
    for encoding in ("gbk", "utf-16"):
        response = requests.post(tiny_server.url, data='{"prompt": "你好"}'.encode(encoding), timeout=60)
        assert response.status_code == 400
        assert "must be UTF-8" in response.json()["error"]["message"]
    response = requests.post(tiny_server.url, data='{"prompt": "你好'.encode(), timeout=60)
    assert "not JSON" in response.json()["error"]["message"]


def test_what_cmd_makes_of_single_quotes_is_told(tiny_server: Server) -> None:
    response = requests.post(tiny_server.url, data="'{prompt:", timeout=60)
    assert response.status_code == 400
    assert "single quotes" in response.json()["error"]["message"]


def test_openais_client_without_v1_is_told_where_to_go(tiny_server: Server) -> None:
    client = OpenAI(base_url=tiny_server.url, api_key="none", max_retries=0)
    with pytest.raises(NotFoundError, match="under /v1"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(tiny_server: Server) -> None:
    response = tiny_server.post(prompt="x" * 600)
    assert response.status_code == 400
    assert re.search(r"623 tokens.*512 tokens", response.json()["error"]["message"])


def test_a_refused_stream_is_refused_before_it_begins(tiny_server: Server) -> None:
    assert tiny_server.post(prompt="x" * 600, stream=True).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", "/", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
def test_routes_that_are_not_there(
    tiny_server: Server, method: str, path: str, status: int, code: str
) -> None:
    response = requests.request(method, tiny_server.url + path, timeout=30)
    assert response.status_code == response.json()["status"] == status
    assert response.json()["error"]["code"] == code


def test_each_status_has_a_code_that_is_the_same_on_every_python() -> None:
    codes = {
        400: "bad_request", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed",
        408: "request_timeout", 413: "request_entity_too_large", 422: "unprocessable_entity",
        429: "too_many_requests", 500: "internal_server_error", 503: "service_unavailable",
        504: "gateway_timeout",
    }  # fmt: skip
    assert set(codes) == {405, *docs.ERRORS, *docs.OPENAI_ERRORS}
    assert {status: ApiError(status, "").body.error.code for status in codes} == codes


def test_a_body_that_is_too_large_is_refused(tiny_server: Server) -> None:
    response = tiny_server.post(prompt="x" * 200_000)
    assert response.status_code == response.json()["status"] == 413
    for size, status in ((100_000, 200), (100_001, 413)):
        body = b'{"prompt": "x", "max_tokens": 1}'.ljust(size)
        assert requests.post(tiny_server.url, data=body, timeout=60).status_code == status


def test_a_chunked_body_without_an_end_is_refused(tiny_server: Server) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        while True:
            yield b"x" * 10_000

    # It may hang up in the middle of our body, before we have read its answer.
    with contextlib.suppress(requests.ConnectionError):
        assert requests.post(tiny_server.url, data=endless(), timeout=60).status_code == 413
    assert tiny_server.answers()


def test_a_full_queue_refuses_and_says_when_to_come_back(slow_server: Server) -> None:
    with occupied(slow_server, 8):
        refused = [slow_server.post(prompt="x", stream=stream) for stream in (False, True)]
    assert [response.status_code for response in refused] == [429, 429]
    assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    assert all(response.json()["error"]["type"] == "rate_limit_error" for response in refused)
    for request_id in (response.headers["X-Request-ID"] for response in refused):
        line = log_line(slow_server, request_id)
        assert re.search(rf"^[\d-]+ [\d:,]+ INFO {request_id} status=429 reason=queue_full$", line)
    assert slow_server.post(prompt="x", max_tokens=1).status_code == 200


def log_line(server: Server, request_id: str) -> str:
    until(lambda: request_id in server.log)
    return next(line for line in server.log.splitlines() if request_id in line)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_is_noticed_and_its_request_ended(slow_server: Server, streaming: bool) -> None:
    lines = len(slow_server.log.splitlines())
    with posted(slow_server, **LONG | {"stream": streaming}):
        until(lambda: slow_server.load == (1, 0))
    until(lambda: "finish_reason=aborted" in "".join(slow_server.log.splitlines()[lines:]))
    until(lambda: slow_server.load == (0, 0))


def test_a_request_has_a_line_in_the_log_without_its_content(server: Server) -> None:
    response = server.post(prompt="secret 秘密")
    line = log_line(server, response.headers["X-Request-ID"])
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO [\w-]+ prompt_tokens=\d+ completion_tokens=\d+ "
        r"ttft=[\d.]+s duration=[\d.]+s finish_reason=stop$",
        line,
    )
    assert "secret" not in server.log


def test_content_is_logged_only_when_asked_for(slow_server: Server) -> None:
    response = slow_server.post(prompt="hello 你好", max_tokens=3)
    line = log_line(slow_server, response.headers["X-Request-ID"])
    assert "prompt='hello 你好'" in line
    assert f"response={response.json()['response']!r}" in line


def test_one_user_does_not_block_another(slow_server: Server) -> None:
    with occupied(slow_server, 1):
        assert slow_server.post(prompt="x", max_tokens=2).status_code == 200
        assert slow_server.load == (1, 0)


def test_the_history_is_part_of_the_prompt(server: Server) -> None:
    short = server.post(prompt="你好", max_tokens=1).json()["usage"]["prompt_tokens"]
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert server.post(prompt="你好", history=history, max_tokens=1).json()["usage"]["prompt_tokens"] > short
    assert server.post(prompt="你好", history=None, max_tokens=1).json()["usage"]["prompt_tokens"] == short


def test_health(server: Server) -> None:
    response = requests.get(f"{server.url}/health", timeout=30)
    assert (response.status_code, response.json()["status"]) == (200, "ok")


@pytest.mark.parametrize("host", [None, "localhost:8001", "llama.example.com", "[::1]:8001", "$(id)"])
def test_the_command_that_is_told_asks_the_server_where_its_reader_found_it(
    server: Server, host: str | None
) -> None:
    headers = {"Host": host} if host else {}
    told = shlex.split(requests.get(server.url, headers=headers, timeout=30).json()["ask"])
    assert told == ["curl", "-X", "POST", f"http://{host}/" if host else f"{server.url}/", "-d", told[-1]]
    assert requests.post(server.url, data=told[-1].encode(), timeout=60).status_code == 200
    if host == "$(id)":
        assert "'http://$(id)/'" in requests.get(server.url, headers=headers, timeout=30).json()["ask"]


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/docs/swagger/swagger-ui.css"])
@pytest.mark.parametrize("accept", ["*/*", "text/html"])
def test_head_is_get_without_the_body(server: Server, path: str, accept: str) -> None:
    """What `curl -I`, link previews and many a load balancer ask."""
    head, get = (
        requests.request(method, server.url + path, headers={"Accept": accept}, timeout=30)
        for method in ("HEAD", "GET")
    )
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert head.headers["Content-Length"] == str(len(get.content))


def test_the_docs_show_the_request(server: Server) -> None:
    schema = requests.get(f"{server.url}/openapi.json", timeout=30).json()
    assert "ChatRequest" in json.dumps(schema["paths"]["/"]["post"]["requestBody"])
    assert schema["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]["maximum"] == 2
    assert requests.get(f"{server.url}/docs", timeout=30).status_code == 200
