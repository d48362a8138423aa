"""Who may ask: API keys, over real HTTP, and what of them can be seen anywhere else."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from openapi_spec_validator import validate

from client import CompletionError, get_completion, stream_completion
from serving.settings import Settings
from tests.conftest import ROOT, START_LIMIT, Server, read_events

ALICE, BOB, CAROL = "sk-alice-77f1", "sk-bob-93ab-密钥", "sk-carol-01cd"
PAGE = "https://chat.example.com"
MAX_PER_KEY = 3


class KeyedServer(Server):
    """One that asks for a key, of which it has two from its command line and one from a file."""

    def get(self, path: str, key: str | None, **headers: str) -> requests.Response:
        return requests.get(self.url + path, headers=headers | bearer(key), timeout=60)

    def ask(self, key: str | None, **body: object) -> requests.Response:
        return requests.post(self.url, json={"prompt": "x"} | body, headers=bearer(key), timeout=60)

    @contextmanager
    def asked(self, key: str) -> Iterator[requests.Response]:
        """A long answer, while it is being streamed: to leave it frees its place."""
        body = {"prompt": "x", "max_tokens": 8000, "stream": True}
        with requests.post(self.url, json=body, headers=bearer(key), stream=True, timeout=60) as response:
            events = read_events(response)  # kept: without it the connection would be closed
            next(events)
            yield response


def bearer(key: str | None) -> dict[str, Any]:
    return {} if key is None else {"Authorization": f"Bearer {key}".encode()}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, long_model: Path) -> Iterator[KeyedServer]:
    """With a model whose answers take long, if they are let."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys.txt"
    keys.write_text(f"\n  {CAROL}  \n")
    server = KeyedServer(
        long_model, folder, "--api-key", f"{ALICE}, {BOB}", "--api-key-file", str(keys),
        "--cors-origin", PAGE, "--max-per-key", str(MAX_PER_KEY), "--max-queue", "4", "--max-num-seqs", "8",
        "--kv-cache-tokens", "65536",
    )  # fmt: skip
    yield server
    server.stop()


def client(server: Server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def name_of(server: Server) -> str:
    return requests.get(server.url, headers=bearer(ALICE), timeout=60).json()["model"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("key", [ALICE, BOB, CAROL])
def test_each_key_lets_in(keyed: KeyedServer, key: str) -> None:
    assert keyed.ask(key, max_tokens=2).status_code == 200
    assert keyed.get("/v1/models", key).status_code == 200
    by_hand = {"Authorization": f"bearer  {key}".encode()}
    assert requests.get(f"{keyed.url}/v1/models", headers=by_hand, timeout=60).status_code == 200


WRONG = [
    {},
    bearer(""),
    bearer("wrong"),
    bearer(ALICE[:-1]),
    bearer(ALICE + "x"),
    bearer(f"{ALICE}, {BOB}"),
    bearer(ALICE.upper()),
    bearer("\xff\xfe"),
    bearer("x" * 10_000),
    {"Authorization": ALICE},
    {"Authorization": f"Basic {ALICE}"},
    {"Authorization": "Bearer"},
    {"X-API-Key": ALICE},
    {"Cookie": f"api_key={ALICE}"},
]


@pytest.mark.parametrize("headers", WRONG)
def test_nobody_else_is_let_in(keyed: KeyedServer, headers: dict[str, Any]) -> None:
    response = requests.post(keyed.url, json={"prompt": "x"}, headers=headers, timeout=60)
    assert response.status_code == response.json()["status"] == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert not any(key in response.text for key in (ALICE, BOB, CAROL))


def test_a_key_in_the_url_is_none(keyed: KeyedServer) -> None:
    assert keyed.get(f"/v1/models?api_key={ALICE}&key={ALICE}", None).status_code == 401


def test_every_route_but_health_and_the_pages_needs_a_key(keyed: KeyedServer) -> None:
    routes = keyed.get("/openapi.json", None).json()["paths"]
    asked = {(method.upper(), path.format(name="demo")) for path, item in routes.items() for method in item}
    assert {("POST", "/"), ("POST", "/v1/chat/completions"), ("GET", "/metrics")} <= asked
    asked |= {("GET", "/redoc"), ("GET", "/nowhere"), ("GET", "/docs/"), ("GET", "/docs/../metrics")}
    asked |= {("POST", "//"), ("GET", "/health/"), ("GET", "/docs/oauth2-redirect"), ("PUT", "/")}
    asked |= {("GET", "/docs/swagger"), ("GET", "/docs/swaggers")}
    asked |= {("GET", "/v1"), ("GET", "/%2e/v1/models"), ("GET", "/health/../v1/models")}
    for method, path in asked - {("GET", "/"), ("GET", "/health")}:
        # Not joined by requests, which would make another path of it.
        request = requests.Request(method, keyed.url).prepare()
        request.url = keyed.url + path
        with requests.Session() as session:
            assert session.send(request, timeout=60).status_code == 401, (method, path)
    assert keyed.get("/health", None).json() == {"status": "ok"}
    assert keyed.get("/", None).status_code == 200
    assert "<html" in keyed.get("/", None, Accept="text/html").text
    assert "<html" in keyed.get("/docs", None).text
    assert "swagger" in keyed.get("/docs/swagger/swagger-ui.css", None).text


def test_the_docs_ask_for_a_key_where_one_is_needed(keyed: KeyedServer, server: Server) -> None:
    described = keyed.get("/openapi.json", None).json()
    validate(described)
    [(name, scheme)] = described["components"]["securitySchemes"].items()
    assert scheme == {"type": "http", "scheme": "bearer"}
    asks = {
        (method, path): operation.get("security")
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
    }
    assert {operation for operation, needed in asks.items() if not needed} == {
        ("get", "/"),
        ("get", "/health"),
    }
    assert all(needed in (None, [{name: []}]) for needed in asks.values())
    open_to_all = requests.get(f"{server.url}/openapi.json", timeout=60).text
    assert '"security' not in open_to_all


def test_the_body_of_who_has_no_key_is_not_even_read(keyed: KeyedServer) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 10_000

    try:
        response = requests.post(keyed.url, data=endless(), timeout=60)
    except requests.ConnectionError:
        return  # it hung up before its answer was read
    assert response.status_code == 401


def test_openais_client(keyed: KeyedServer) -> None:
    model = name_of(keyed)
    answer = client(keyed, ALICE).chat.completions.create(
        model=model, messages=[{"role": "user", "content": "x"}], max_tokens=3
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    stranger = client(keyed, "wrong")
    for refused in (
        stranger.models.list,
        lambda: stranger.models.retrieve(model),
        lambda: stranger.completions.create(model=model, prompt="x"),
        lambda: stranger.chat.completions.create(model=model, messages=[], stream=True),
    ):
        with pytest.raises(openai.AuthenticationError, match="an API key is needed") as caught:
            refused()
        assert caught.value.type == "authentication_error"


def test_who_has_no_key_is_counted(keyed: KeyedServer) -> None:
    def count() -> float:
        text = keyed.get("/metrics", ALICE).text
        [line] = [
            line for line in text.splitlines() if line.startswith('llama_request_errors_total{reason="key"}')
        ]
        return float(line.split()[1])

    before = count()
    assert keyed.get("/metrics", None).status_code == 401
    refused = keyed.ask(None)
    assert refused.status_code == 401
    assert count() == before + 2
    assert f"{refused.headers['X-Request-ID']} status=401 reason=key\n" in keyed.log


def test_our_client(keyed: KeyedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    fields: dict[str, Any] = {"url": keyed.url, "max_tokens": 5, "temperature": 0}
    whole = get_completion("x", api_key=ALICE, **fields)
    assert "".join(stream_completion("x", api_key=CAROL, **fields)) == whole
    for key in (None, "wrong"):
        with pytest.raises(CompletionError, match="API key") as caught:
            get_completion("x", api_key=key, **fields)
        assert caught.value.status == 401
    monkeypatch.setenv("LLAMA_API_KEY", CAROL)
    assert get_completion("x", **fields) == whole


@pytest.mark.parametrize("key", [ALICE, "wrong"])
def test_our_client_in_the_terminal(keyed: KeyedServer, key: str) -> None:
    result = subprocess.run(
        [sys.executable, "client.py", "--url", keyed.url, "--api-key", key, "hello"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode == 0) == (key == ALICE)
    assert ("API key" in result.stderr) == (key != ALICE)
    assert "Traceback" not in result.stderr


def test_one_key_can_not_take_the_place_of_another(keyed: KeyedServer) -> None:
    model = name_of(keyed)
    with ExitStack() as taken:
        for _ in range(MAX_PER_KEY - 1):
            assert taken.enter_context(keyed.asked(ALICE)).status_code == 200
        # One place is left, and not two.
        body = {"model": model, "prompt": "x", "n": 2, "max_tokens": 2}
        refused = requests.post(f"{keyed.url}/v1/completions", json=body, headers=bearer(ALICE), timeout=60)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["Retry-After"]) >= 1
        assert keyed.ask(ALICE, max_tokens=2).status_code == 200
        taken.enter_context(keyed.asked(ALICE))
        for _ in range(3):
            assert keyed.ask(ALICE, max_tokens=2).status_code == 429
            assert keyed.get("/v1/models", ALICE).status_code == 429
            with pytest.raises(openai.RateLimitError):
                client(keyed, ALICE).models.list()
        for key in (BOB, CAROL):
            assert keyed.ask(key, max_tokens=2).status_code == 200
    # Who leaves gives back the place, as the server sees.
    until_ok(lambda: keyed.ask(ALICE, max_tokens=2))
    for _ in range(MAX_PER_KEY + 2):
        assert keyed.ask(ALICE, max_tokens=2).status_code == 200
        assert keyed.ask(ALICE, max_tokens=0).status_code == 422
        assert keyed.get("/nowhere", ALICE).status_code == 404


@pytest.mark.parametrize(
    "body", [{"n": 2, "prompt": ["x", "y"]}, {"prompt": ["x"] * 4}, {"n": 4, "prompt": "x"}]
)
def test_one_request_counts_as_often_as_it_asks_for_answers(keyed: KeyedServer, body: dict[str, Any]) -> None:
    body = {"model": name_of(keyed), "max_tokens": 2} | body
    response = requests.post(f"{keyed.url}/v1/completions", json=body, headers=bearer(BOB), timeout=60)
    assert response.status_code == 400
    assert "4 answers are more than the 3" in response.json()["error"]["message"]
    body |= {"prompt": ["x"] * 3, "n": 1}
    until_ok(lambda: requests.post(f"{keyed.url}/v1/completions", json=body, headers=bearer(BOB), timeout=60))


def until_ok(ask: Callable[[], requests.Response]) -> None:
    """Until those who left are noticed."""
    deadline = time.monotonic() + 60
    while ask().status_code != 200:
        assert time.monotonic() < deadline


def test_the_page_of_another_host_may_ask_if_it_is_named(keyed: KeyedServer) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = requests.options(keyed.url, headers=asks | {"Origin": PAGE}, timeout=60)
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == PAGE
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"].lower()
    refused = requests.options(keyed.url, headers=asks | {"Origin": "https://evil.example.com"}, timeout=60)
    assert "Access-Control-Allow-Origin" not in refused.headers
    # So that the page can tell its user what is wrong.
    no_key = requests.post(keyed.url, json={"prompt": "x"}, headers={"Origin": PAGE}, timeout=60)
    assert (no_key.status_code, no_key.headers["Access-Control-Allow-Origin"]) == (401, PAGE)
    assert "Access-Control-Allow-Credentials" not in no_key.headers


def test_no_page_of_another_host_may_ask_by_default(server: Server) -> None:
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    assert not any(
        name.lower().startswith("access-control-")
        for response in (
            requests.options(server.url, headers=asks, timeout=60),
            requests.get(server.url, headers=asks, timeout=60),
        )
        for name in response.headers
    )


def test_without_keys_one_that_is_sent_does_no_harm(server: Server) -> None:
    response = requests.post(
        server.url, json={"prompt": "x", "max_tokens": 2}, headers=bearer(ALICE), timeout=60
    )
    assert response.status_code == 200


def test_no_key_is_shown_anywhere(keyed: KeyedServer) -> None:
    shown = [keyed.log]
    for path in ("/", "/docs", "/openapi.json", "/health", "/metrics", "/v1/models"):
        response = keyed.get(path, ALICE, Accept="text/html" if path == "/" else "*/*")
        assert response.status_code == 200, path
        shown += [response.text, str(response.headers)]
    for body in (b"{", b'{"prompt": 5}', f'{{"{ALICE}": 1}}'.replace(ALICE, "a").encode()):
        shown.append(requests.post(keyed.url, data=body, headers=bearer(ALICE), timeout=60).text)
    shown.append(command_line(keyed.process.pid))
    shown.append(keyed.log)
    for key in (ALICE, BOB, CAROL):
        assert not any(key in text for text in shown), key


def command_line(process: int) -> str:
    return subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", str(process)], capture_output=True, text=True, check=True
    ).stdout


def test_a_key_is_hidden_before_the_libraries_are_loaded(tmp_path: Path) -> None:
    """Loading them takes seconds, in which `ps` must not show it."""
    command = [sys.executable, "-X", "importtime", "api.py", "--api-key", ALICE, f"--api-key={CAROL}"]
    imports = tmp_path / "imports"
    with imports.open("w") as log:
        process = subprocess.Popen([*command, "--model", "demo", "--port", "0"], cwd=ROOT, stderr=log)
    try:
        deadline = time.monotonic() + START_LIMIT
        while any(key in command_line(process.pid) for key in (ALICE, CAROL)):
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.wait()
    # -X is not handed on: these are the imports of the time before.
    loaded = {line.split("|")[-1].strip() for line in imports.read_text().splitlines()}
    assert "pydantic_settings" in loaded
    assert not loaded & {"torch", "transformers", "fastapi", "uvicorn"}


def test_keys_come_from_the_variable_and_the_file_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", f"{ALICE} ,{BOB},")
    assert Settings.from_command_line([]).api_keys == {ALICE, BOB}
    keys = tmp_path / "keys"
    keys.write_text(f"{CAROL}\n\n")
    both = Settings.from_command_line(["--api-key-file", str(keys)])
    assert both.api_keys == {ALICE, BOB, CAROL}
    assert not any(key in repr(both) + str(both) for key in (ALICE, BOB, CAROL))


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\x00"])
def test_a_file_without_a_key_is_no_open_door(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        Settings.from_command_line(["--api-key-file", str(keys)])
    assert caught.value.code == 2
    assert "--api-key-file" in capsys.readouterr().err
