"""Thousands of generated requests, from nearly right to no sense at all: each is answered as documented."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.conftest import Server

SCHEMATHESIS_EXAMPLES = 120
"""Of each kind, right and wrong, for each route that takes a body."""
RAW_EXAMPLES = 1500
"""For each of these routes."""

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

quickly = settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Witness:
    """Sends requests to a server, and remembers what was wrong with any of the answers."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self.session = requests.Session()
        self.description: dict[str, Any] = self.session.get(f"{self.url}/openapi.json", timeout=60).json()
        self.statuses: Counter[int] = Counter()

    def check(self, method: str, path: str, response: requests.Response, sent: object) -> None:
        self.statuses[response.status_code] += 1
        documented = self.description["paths"][path][method.lower()]["responses"]
        assert response.status_code < 500, (sent, response.text)
        assert str(response.status_code) in documented, (sent, response.text)
        if response.status_code >= 400:
            assert response.json()["status"] == response.status_code
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n"), (sent, response.text)

    def post(self, path: str, body: bytes) -> None:
        response = self.session.post(self.url + path, data=body, timeout=120)
        self.check("POST", path, response, body)


@pytest.fixture(scope="module")
def witness(start_server: Callable[..., Server], tiny_model: Path) -> Iterator[Witness]:
    """Of a server whose context is short: no request, however it comes out, takes long. Beside all of them
    runs a stream, which must not notice."""
    server = start_server(tiny_model, "--max-model-len", "128", "--served-model-name", "tiny")
    done = threading.Event()
    disturbed: list[str] = []
    streams = 0

    def neighbour() -> str:
        body = {"prompt": "a neighbour", "seed": 3, "temperature": 1.2, "stream": True}
        return requests.post(server.url, json=body, timeout=120).text

    def without_times(stream: str) -> list[object]:
        return [json.loads(event)["response"] for event in stream.split("data: ")[1:-1]]

    alone = without_times(neighbour())

    def live_next_door() -> None:
        nonlocal streams
        while not done.is_set():
            streams += 1
            heard = neighbour()
            if "".join(map(str, without_times(heard))) != "".join(map(str, alone)):
                disturbed.append(heard)

    thread = threading.Thread(target=live_next_door)
    thread.start()
    yield (witness := Witness(server))
    done.set()
    thread.join()
    total = witness.statuses.total()
    print(f"{total} generated requests: {dict(witness.statuses)}; {streams} streams beside them")
    assert not disturbed
    assert total >= 5000
    assert "Traceback" not in server.log


def narrowed(description: dict[str, Any]) -> dict[str, Any]:
    """The same with bounds that only the server knows, so that more of the right requests are right."""
    description = json.loads(json.dumps(description))
    for name in ("ChatRequest", "ChatCompletionRequest", "CompletionRequest"):
        fields = description["components"]["schemas"][name]["properties"]
        for field in {"max_tokens", "max_completion_tokens"} & fields.keys():
            fields[field] = {"type": "integer", "minimum": 1, "maximum": 128}
        if "model" in fields:
            fields["model"] = {"const": "tiny"}
    return description


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda m: m.value)
def test_requests_after_the_description_of_the_api_and_against_it(
    witness: Witness, mode: GenerationMode
) -> None:
    for result in schemathesis.openapi.from_dict(narrowed(witness.description)).get_all_operations():
        operation = result.ok()
        has_input = operation.body or operation.path_parameters
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(quickly, max_examples=SCHEMATHESIS_EXAMPLES if has_input else 1)
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            response = case.call(base_url=witness.url, session=witness.session, timeout=120)
            witness.check(case.method, case.operation.path, response, case.body)

        ask()


LITERALS = [
    "null", "true", "0", "1", "-1", "1.5", "1e999", "-0.0", "NaN", "9" * 400, "2147483648", '""', '"a"', '"你好"',
    '"\\u0000"', '"\\ud800"', '"<|eot_id|>"', '"' + "x" * 70 + '"', "[]", "[1]", '["a"]', "[[]]", "[[1, 2], [3]]",
    '["a", 1]', "[null]", "{}", '{"a": 1}', '{"1": 5}', '{"type": "text"}', '{"type": "json_object"}',
    '{"include_usage": true}', "[" * 300, "[" * 40 + "]" * 40,
    '[{"role": "system", "content": "a"}, {"role": "user", "content": "<|eot_id|>"}]',
    '[{"role": "user", "content": [{"type": "text", "text": "a"}]}]', '[{"role": "tool", "content": "a"}]',
]  # fmt: skip

json_schemas = st.recursive(
    st.sampled_from([
        True, False, {}, None, 1, "string", {"type": "string"}, {"type": "integer"}, {"type": ["null", "number"]},
        {"type": "nothing"}, {"const": 1}, {"enum": ["a", None, 2]}, {"enum": []}, {"$ref": "#"}, {"$ref": "#/a"},
        {"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "(a|a)*(?=b)"}, {"pattern": "["},
        {"type": "string", "format": "date"}, {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "integer", "minimum": 3, "maximum": 5, "multipleOf": 2}, {"type": "number", "multipleOf": 0},
        {"minimum": 1e300}, {"type": "array", "minItems": 10**9},
    ]),
    lambda inner: st.one_of(
        st.builds(lambda a: {"type": "array", "items": a}, inner),
        st.builds(lambda a, b: {"type": "object", "properties": {"a": a, "b": b}, "required": ["a"]}, inner, inner),
        st.builds(lambda a: {"type": "object", "additionalProperties": a}, inner),
        st.builds(
            lambda k, a: {k: a}, st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(inner, max_size=3)
        ),
        st.builds(lambda a: {"$defs": {"a": a}, "$ref": "#/$defs/a"}, inner),
        st.builds(lambda a: {"not": a}, inner),
    ),
    max_leaves=6,
)  # fmt: skip


def response_format(schema: Any) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def raw_bodies(known: list[str], right: dict[str, str]) -> st.SearchStrategy[bytes]:
    """Bodies that are right but for some fields, and some of them not even JSON."""
    values = st.sampled_from(LITERALS)
    fields = st.tuples(st.sampled_from([*known, "promt", ""]), values)
    if "response_format" in known:
        fields |= st.tuples(st.just("response_format"), json_schemas.map(response_format))

    def write(others: list[tuple[str, str]]) -> bytes:
        pairs = [*right.items(), *others]
        return ("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in pairs) + "}").encode()

    def damage(body: bytes, at: int, noise: bytes, cut: int) -> bytes:
        at %= len(body)
        return body[:at] + noise + body[at + cut :]

    whole = st.lists(fields, max_size=4).map(write)
    damaged = st.builds(
        damage, whole, st.integers(0, 500), st.binary(max_size=3), st.sampled_from([0, 1, 1, 500])
    )
    return st.one_of(whole, whole, whole, damaged, st.binary(max_size=40))


@pytest.mark.parametrize(
    ("path", "schema", "right"),
    [
        ("/", "ChatRequest", {"prompt": '"a"'}),
        (
            CHAT,
            "ChatCompletionRequest",
            {"model": '"tiny"', "messages": '[{"role": "user", "content": "a"}]'},
        ),
        (TEXT, "CompletionRequest", {"model": '"tiny"', "prompt": '"a"'}),
    ],
)
def test_raw_bodies(witness: Witness, path: str, schema: str, right: dict[str, str]) -> None:
    known = list(witness.description["components"]["schemas"][schema]["properties"])

    @settings(quickly, max_examples=RAW_EXAMPLES)
    @given(raw_bodies(known, right))
    def ask(body: bytes) -> None:
        witness.post(path, body)

    ask()
