"""Thousands of generated requests, from nearly right to no sense at all: each is answered as documented."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.conftest import Server

DESCRIBED = 60
"""Requests after the API's description, and as many against it, for each route that takes a body."""
PATHS = 100
"""Requests to each other route, if there are as many."""
RAW = 1600
"""Bodies of our own making for each route that takes one."""
CLIENTS = 8

BODIES = {
    "/": ("ChatRequest", {"prompt": '"a"'}),
    "/v1/chat/completions": (
        "ChatCompletionRequest",
        {"model": '"tiny"', "messages": '[{"role": "user", "content": "a"}]'},
    ),
    "/v1/completions": ("CompletionRequest", {"model": '"tiny"', "prompt": '"a"'}),
}
"""Of each route: the name of the body's schema, and the fields without which it is wrong."""

T = TypeVar("T")


def generated(strategy: st.SearchStrategy[T], number: int) -> list[T]:
    """As many at most: fewer if there are no more."""
    all_of_them: list[T] = []

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(one: T) -> None:
        all_of_them.append(one)

    collect()
    return all_of_them


def narrowed(description: dict[str, Any]) -> dict[str, Any]:
    """The same with bounds that only the server knows, so that more of the right requests are right."""
    description = json.loads(json.dumps(description))
    for name, _ in BODIES.values():
        fields = description["components"]["schemas"][name]["properties"]
        for field in {"max_tokens", "max_completion_tokens"} & fields.keys():
            fields[field] = {"type": "integer", "minimum": 1, "maximum": 16}
        if "model" in fields:
            fields["model"] = {"const": "tiny"}
    return description


def described_requests(description: dict[str, Any]) -> list[schemathesis.Case]:
    cases: list[schemathesis.Case] = []
    for result in schemathesis.openapi.from_dict(narrowed(description)).get_all_operations():
        operation = result.ok()
        if not operation.body:
            cases += generated(operation.as_strategy(), PATHS)
        else:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                cases += generated(operation.as_strategy(generation_mode=mode), DESCRIBED)
    return cases


WRONG = [
    "null", "true", "0", "-1", "1.5", "1e999", "-0.0", "NaN", "9" * 400, "2147483648", '""', '"\\u0000"',
    '"\\ud800"', '"' + "x" * 70 + '"', "[]", '["a"]', "[[]]", '["a", 1]', "[null]", "{}", '{"a": 1}',
    "[" * 300, "[" * 40 + "]" * 40, '[{"role": "tool", "content": "a"}]', '{"type": "json_schema"}',
]  # fmt: skip
RIGHT = {
    "prompt": ['"你好"', '"<|eot_id|>"', '"\\u0000a"', '"a\\u200b\\u202eb"', '"xxxxxxxxxxxxxxxx"'],
    "history": ["null", '[{"role": "system", "content": ""}, {"role": "user", "content": "<|eot_id|>"}]'],
    "messages": [
        '[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]',
        '[{"role": "system", "content": "a"}, {"role": "assistant", "content": null}]',
    ],
    "temperature": ["0", "1e-9", "2"], "top_p": ["1e-300", "1"], "top_k": ["0", "1", "99999999999"],
    "min_p": ["1"], "repetition_penalty": ["1e-300", "2"], "presence_penalty": ["-2", "2"],
    "frequency_penalty": ["-2", "2"], "seed": ["-9223372036854775808", "7"],
    "stop": ["null", '"a"', '["\\u0000", "<|eot_id|>"]'], "stream": ["true", "false"], "n": ["1", "8"],
    "max_tokens": ["1", "2", "64"], "max_completion_tokens": ["3"], "logit_bias": ['{"0": 100, "5": -100}'],
    "logprobs": ["true", "0", "20"], "top_logprobs": ["0", "20"], "echo": ["true"], "best_of": ["1"],
    "min_tokens": ["2"], "ignore_eos": ["true"], "stream_options": ['{"include_usage": true}'],
    "response_format": ['{"type": "text"}', '{"type": "json_object"}'],
}  # fmt: skip

LEAVES: list[Any] = [
    True, False, {}, None, 1, "string", {"type": "string"}, {"type": "integer"}, {"type": ["null", "number"]},
    {"type": "nothing"}, {"const": 1}, {"enum": ["a", None, 2]}, {"enum": []}, {"$ref": "#"}, {"$ref": "#/a"},
    {"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "(a|a)*(?=b)"}, {"pattern": "["},
    {"type": "string", "format": "date"}, {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "integer", "minimum": 3, "maximum": 5, "multipleOf": 2}, {"type": "number", "multipleOf": 0},
    {"minimum": 1e300}, {"type": "array", "minItems": 10**9},
]  # fmt: skip
json_schemas = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.builds(lambda a: {"type": "array", "items": a}, inner),
        st.builds(lambda a, b: {"type": "object", "properties": {"a": a, "b": b}}, inner, inner),
        st.builds(lambda a: {"type": "object", "additionalProperties": a, "required": ["c"]}, inner),
        st.builds(
            lambda word, a: {word: a}, st.sampled_from(["anyOf", "oneOf"]), st.lists(inner, max_size=3)
        ),
        st.builds(lambda a: {"$defs": {"a": a}, "$ref": "#/$defs/a"}, inner),
        st.builds(lambda a: {"not": a}, inner),
    ),
    max_leaves=6,
)


def response_format(schema: Any) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def raw_bodies(known: list[str], right: dict[str, str]) -> st.SearchStrategy[bytes]:
    """Bodies that are right but for some fields, and some of them not even JSON."""
    fields = st.sampled_from(
        [(name, value) for name in known for value in RIGHT.get(name, []) for _ in range(8)]
        + [(name, value) for name in [*known, "promt", ""] for value in WRONG]
    )
    if "response_format" in known:
        fields |= st.tuples(st.just("response_format"), json_schemas.map(response_format))

    def write(others: list[tuple[str, str]]) -> bytes:
        pairs = [*right.items(), ("max_tokens", "3"), *others]
        return ("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in pairs) + "}").encode()

    def damage(body: bytes, at: int, noise: bytes, cut: int) -> bytes:
        at %= len(body)
        return body[:at] + noise + body[at + cut :]

    whole = st.lists(fields, max_size=4).map(write)
    damaged = st.builds(
        damage, whole, st.integers(0, 500), st.binary(max_size=3), st.sampled_from([0, 1, 1, 500])
    )
    return st.one_of(whole, whole, whole, damaged, st.binary(max_size=40))


def raw_requests(description: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Paths and bodies."""
    schemas = description["components"]["schemas"]
    return [
        (path, body)
        for path, (name, right) in BODIES.items()
        for body in generated(raw_bodies(list(schemas[name]["properties"]), right), RAW)
    ]


def ask(server: Server, session: requests.Session, asked: schemathesis.Case | tuple[str, bytes]) -> Any:
    """Sends one; returns the method, the path and the answer."""
    if isinstance(asked, tuple):
        path, body = asked
        return "post", path, session.post(server.url + path, data=body, timeout=120)
    request = requests.Request(**asked.as_transport_kwargs(base_url=server.url))
    prepared = session.prepare_request(request)
    return asked.method.lower(), asked.operation.path, session.send(prepared, timeout=120)


def test_5000_requests_are_answered_as_documented_and_do_not_disturb_a_stream_beside_them(
    short_server: Server,
) -> None:
    server = short_server
    session = requests.Session()
    description = session.get(f"{server.url}/openapi.json", timeout=60).json()
    requests_to_send = [*described_requests(description), *raw_requests(description)]
    done = threading.Event()

    def stream() -> str:
        body = {"prompt": "a neighbour", "seed": 3, "temperature": 1.2, "stream": True}
        events = requests.post(server.url, json=body, timeout=120).text.split("data: ")
        return "".join(json.loads(event)["response"] for event in events[1:-1])

    def stream_on_and_on() -> list[str]:
        streams = [stream()]
        while not done.wait(0.2):
            streams.append(stream())
        return streams

    alone = stream()
    with ThreadPoolExecutor(1) as neighbour, ThreadPoolExecutor(CLIENTS) as clients:
        beside = neighbour.submit(stream_on_and_on)
        try:
            answers = list(clients.map(lambda asked: ask(server, session, asked), requests_to_send))
        finally:
            done.set()
    statuses = Counter(response.status_code for _, _, response in answers)
    print(f"{len(answers)} generated requests: {statuses}; {len(beside.result())} streams beside them")
    for asked, (method, path, response) in zip(requests_to_send, answers, strict=True):
        assert response.status_code < 500, (asked, response.text)
        assert str(response.status_code) in description["paths"][path][method]["responses"], asked
        if response.status_code >= 400:
            assert response.json()["status"] == response.status_code, asked
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n"), (asked, response.text)
    assert set(beside.result()) == {alone}
    assert len(answers) >= 5000
    assert "Traceback" not in server.log
    assert all(isinstance(json.loads(line), dict) for line in server.log.split("\n")[:-1])
