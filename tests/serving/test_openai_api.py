"""/v1 over real HTTP, against real server processes, as the official client and LangChain see it."""

import asyncio
import codecs
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
import requests
from jsonschema import Draft202012Validator
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, CompletionChoice
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from openapi_spec_validator import validate
from pydantic import BaseModel
from tokenizers import Tokenizer

from benchmarks.soak import read_metrics
from serving.settings import DEMO_MODEL
from tests.conftest import Server, occupied, until

CHAT, TEXT = "/chat/completions", "/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    TEXT: {"model": "tiny", "prompt": "x", "max_tokens": 2},
}
EXTENSIONS = {"top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens"}
ABSENT = object()
"""In a table: the field is left out."""


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def tiny(tiny_server: Server) -> Iterator[OpenAI]:
    with client_of(tiny_server) as client:
        yield client


@pytest.fixture(scope="module")
def demo(server: Server) -> Iterator[OpenAI]:
    """The demo model, whose answers are Chinese, English and emoji."""
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def documented(tiny_server: Server) -> Any:
    """What the server says of itself."""
    return requests.get(f"{tiny_server.url}/openapi.json", timeout=30).json()


def create(client: OpenAI, route: str, **fields: Any) -> Any:
    """Asks as a user of the client does; its own fields by their names, ours in extra_body."""
    extra = {name: fields.pop(name) for name in EXTENSIONS & fields.keys()}
    create = client.chat.completions.create if route == CHAT else client.completions.create
    return create(**{**BODIES[route], **fields}, extra_body=extra)


def say(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def text_of(choice: Any) -> str:
    text: str = choice.text if isinstance(choice, CompletionChoice) else choice.message.content
    return text


def texts(answer: Any) -> list[str]:
    return [text_of(choice) for choice in answer.choices]


def fits(value: Any, schema: str, documented: Any) -> bool:
    """Whether it is what /docs says."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": documented["components"]}
    return bool(Draft202012Validator(whole).is_valid(value))


# What a stream adds up to.


def logprobs_of(choice: Any) -> list[Any]:
    """An entry for each token, in either route's form."""
    if choice.logprobs is None:
        return []
    fields = choice.logprobs.model_dump()
    if "content" in fields:
        return list(fields["content"])
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return list(zip(*(fields[name] for name in names), strict=True))


def of_whole(answer: ChatCompletion | Completion) -> tuple[list[Any], dict[str, int]]:
    choices = [(text_of(choice), choice.finish_reason, logprobs_of(choice)) for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(len(choices)))
    assert answer.usage is not None
    return choices, answer.usage.model_dump(exclude_none=True)


def of_stream(chunks: list[Any]) -> tuple[list[Any], dict[str, int]]:
    """Checks what is true of every stream too."""
    *pieces, last = chunks
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert not last.choices
    texts: defaultdict[int, str] = defaultdict(str)
    reasons: dict[int, str] = {}
    logprobs: defaultdict[int, list[Any]] = defaultdict(list)
    for chunk in pieces:
        [choice] = chunk.choices
        assert chunk.usage is None
        assert choice.index not in reasons, "a piece behind the last"
        if isinstance(chunk, ChatCompletionChunk):
            first = choice.index not in texts
            assert choice.delta.role == ("assistant" if first else None)
        texts[choice.index] += (
            (choice.delta.content or "") if isinstance(chunk, ChatCompletionChunk) else choice.text
        )
        logprobs[choice.index] += logprobs_of(choice)
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason
    assert reasons.keys() == texts.keys()
    choices = [(texts[index], reasons[index], logprobs[index]) for index in sorted(texts)]
    return choices, last.usage.model_dump(exclude_none=True)


def both(client: OpenAI, route: str, **fields: Any) -> tuple[list[Any], dict[str, int]]:
    """The same answers, whole and as a stream, of which it is asserted that they are the same."""
    whole = of_whole(create(client, route, **fields))
    stream = create(client, route, **fields, stream=True, stream_options={"include_usage": True})
    assert of_stream(list(stream)) == whole
    return whole


SAMPLED = {"temperature": 1.5, "top_p": 1, "seed": 5}
VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0},
    SAMPLED,
    {**SAMPLED, "n": 3},
    {**SAMPLED, "n": 8, "max_tokens": 5},
    {**SAMPLED, "n": 2, "stop": ["e", "1"]},
    {**SAMPLED, "repetition_penalty": 1.3, "presence_penalty": 1, "frequency_penalty": 0.5},
    {**SAMPLED, "logit_bias": {"40": 20, "41": 20}, "stop": "JIJ"},
    {"temperature": 1, "top_k": 40, "min_p": 0.01, "seed": -7, "n": 2},
]


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("route", [CHAT, TEXT])
@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_adds_up_to_the_answer_in_one_piece(
    tiny: OpenAI, route: str, fields: dict[str, Any], logprobs: bool
) -> None:
    """Random bytes: hardly one fits the one before it, and an answer may end in the middle of a character."""
    asked: dict[str, Any] = {}
    if logprobs:
        asked = {"logprobs": True, "top_logprobs": 3} if route == CHAT else {"logprobs": 3}
    fields = {"max_tokens": 60, **fields, **asked}
    choices, usage = both(tiny, route, **fields)
    assert len(choices) == fields.get("n", 1)
    if logprobs:
        assert sum(len(told) for _, _, told in choices) == usage["completion_tokens"]


@pytest.mark.parametrize("content", ["你好", "Show me an emoji.", "讲个故事", "Thanks"])
def test_the_demo_models_chinese_and_emoji_stream_unbroken(demo: OpenAI, content: str) -> None:
    ask: dict[str, Any] = {"model": "demo", "messages": say(content), "max_tokens": None, "seed": 3}
    [(text, reason, _)], _ = both(demo, CHAT, **ask)
    assert reason == "stop"
    for chunk in create(demo, CHAT, **ask, stream=True):
        assert "\N{REPLACEMENT CHARACTER}" not in (chunk.choices[0].delta.content or "")
    assert "\N{REPLACEMENT CHARACTER}" not in text


HARD = "né e\u0301 你好 👩‍💻🇨🇳❤️ ก็ 👍🏽 end"


def exactly(text: str) -> dict[str, Any]:
    """Makes any model write this text, as JSON, byte by byte."""
    schema = {"name": "exactly", "schema": {"const": text}}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def test_no_character_of_several_bytes_is_broken_by_an_event(tiny: OpenAI) -> None:
    [(text, reason, _)], _ = both(tiny, CHAT, **exactly(HARD), max_tokens=200)
    assert (json.loads(text), reason) == (HARD, "stop")
    stream = create(tiny, CHAT, **exactly(HARD), max_tokens=200, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > len(HARD) / 2, "they came one by one"
    assert "".join(pieces) == text


def test_an_answer_that_is_cut_in_a_character_ends_before_it(tiny: OpenAI) -> None:
    written = json.dumps("好👍e\u0301", ensure_ascii=False).encode()
    for length in range(1, len(written)):
        [(text, reason, told)], _ = both(
            tiny, CHAT, **exactly("好👍e\u0301"), max_tokens=length, logprobs=True
        )
        assert text == codecs.getincrementaldecoder("utf-8")().decode(written[:length])
        assert reason == "length"
        assert bytes(byte for place in told for byte in place["bytes"]) == written[:length]


@pytest.mark.parametrize("stop", ["好", "\u0301", "👩‍💻", "💻", "你好 ", ["zzz", "🇳"], "é e"])
def test_a_stop_string_of_several_bytes_ends_the_answer_before_it(tiny: OpenAI, stop: Any) -> None:
    [(text, reason, _)], _ = both(tiny, CHAT, **exactly(HARD), max_tokens=200, stop=stop)
    first = stop if isinstance(stop, str) else stop[-1]
    assert text == '"' + HARD[: HARD.index(first)]
    assert reason == "stop"


def test_what_only_looks_like_a_stop_string_is_given_out_in_the_end(tiny: OpenAI) -> None:
    [(text, _, _)], _ = both(tiny, CHAT, **exactly("ababab"), max_tokens=7, stop=["ababac", "bb", "abz"])
    assert text == '"ababab'


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_json_mode_streams_what_it_answers(tiny: OpenAI, form: str) -> None:
    schema = {
        "type": "object",
        "properties": {"名": {"type": "string", "maxLength": 4}, "ok": {"type": "boolean"}},
        "required": ["名", "ok"],
        "additionalProperties": False,
    }
    described = {"name": "it", "schema": schema, "strict": True}
    fields: dict[str, Any] = {"type": form} | ({"json_schema": described} if form == "json_schema" else {})
    for seed in range(2):
        choices, _ = both(
            tiny, CHAT, response_format=fields, n=2, seed=seed, temperature=1, max_tokens=150, logprobs=True
        )
        for text, reason, _ in choices:
            if reason == "stop":
                assert isinstance(json.loads(text), dict)
            if form == "json_schema":
                assert reason == "stop"
                Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_usage_is_streamed_only_when_asked_for(tiny: OpenAI, tiny_server: Server, route: str) -> None:
    def events(**fields: Any) -> list[Any]:
        body = BODIES[route] | {"stream": True, "n": 2} | fields
        response = requests.post(f"{tiny_server.url}/v1{route}", json=body, timeout=60)
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        *events, end, rest = response.text.split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    assert not any("usage" in event for event in events())
    assert not any("usage" in event for event in events(stream_options=None))
    assert not any("usage" in event for event in events(stream_options={"include_usage": False}))
    *pieces, last = events(stream_options={"include_usage": True})
    assert all(piece["usage"] is None for piece in pieces)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


# Fields.


def test_a_seed_gives_each_of_n_answers_the_next(tiny: OpenAI) -> None:
    for route in (CHAT, TEXT):
        fields = {**SAMPLED, "max_tokens": 30}
        together = texts(create(tiny, route, **fields, n=4))
        alone = [texts(create(tiny, route, **{**fields, "seed": 5 + i}))[0] for i in range(4)]
        assert together == alone


def test_answers_to_several_prompts_come_in_their_order(tiny: OpenAI) -> None:
    fields = {**SAMPLED, "max_tokens": 20, "n": 2}
    prompts = ["one", "two", "three"]
    together = create(tiny, TEXT, prompt=prompts, **fields)
    alone = [create(tiny, TEXT, prompt=prompt, **fields) for prompt in prompts]
    assert texts(together) == [text for answer in alone for text in texts(answer)]
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    both(tiny, TEXT, prompt=prompts, **fields, logprobs=1)
    held_back = [texts(together)[0][0] + "☠"]  # so that the first answer begins after the others
    assert texts(create(tiny, TEXT, prompt=prompts, **fields, stop=held_back)) == texts(together)


def test_a_prompt_may_be_token_ids(demo: OpenAI) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    prompts = ["Hello, who are", "你好，我"]
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    ids = [[begin, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    ask = {"model": "demo", "temperature": 0}
    as_text = create(demo, TEXT, prompt=prompts, **ask)
    assert texts(create(demo, TEXT, prompt=ids, **ask)) == texts(as_text)
    assert texts(create(demo, TEXT, prompt=ids[0], **ask)) == texts(as_text)[:1]
    assert texts(create(demo, TEXT, prompt=prompts[0], **ask)) == texts(as_text)[:1]
    echoed = texts(create(demo, TEXT, prompt=ids, **ask, echo=True))
    assert echoed == [
        f"<|begin_of_text|>{prompt}{text}" for prompt, text in zip(prompts, texts(as_text), strict=True)
    ]


def test_an_echo_begins_each_answer_with_its_prompt(tiny: OpenAI) -> None:
    fields = {**SAMPLED, "prompt": ["你好", "a\n"], "n": 2, "max_tokens": 10}
    plain = texts(create(tiny, TEXT, **fields))
    choices, _ = both(tiny, TEXT, **fields, echo=True)
    assert [text for text, _, _ in choices] == [
        prompt + text for prompt, text in zip(["你好", "你好", "a\n", "a\n"], plain, strict=True)
    ]
    assert create(tiny, TEXT, prompt="x", max_tokens=None).usage.completion_tokens == 16


def test_a_message_may_be_in_parts_and_a_developer_is_the_system(demo: OpenAI) -> None:
    def answer(*messages: dict[str, Any]) -> Any:
        return create(demo, CHAT, model="demo", messages=list(messages), temperature=0, max_tokens=20)

    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    whole = answer({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"})
    in_parts = answer({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts})
    assert texts(whole) == texts(in_parts)
    assert whole.usage == in_parts.usage
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert answer(*history, *say("Hello")).usage.prompt_tokens > answer(*say("Hello")).usage.prompt_tokens


def test_what_the_client_answers_can_be_sent_back(demo: OpenAI) -> None:
    messages: list[Any] = [*say("Hello")]
    for _ in range(2):
        answer = create(demo, CHAT, model="demo", messages=messages, max_tokens=10)
        messages += [answer.choices[0].message, *say("And then?")]
    assert create(demo, CHAT, model="demo", messages=messages, max_tokens=1).choices
    as_sent = [m if isinstance(m, dict) else m.model_dump() for m in messages]
    assert create(demo, CHAT, model="demo", messages=as_sent, max_tokens=1).choices


@pytest.mark.parametrize("certain", [{"top_k": 1}, {"min_p": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_what_leaves_one_token_to_draw_from_is_greedy(tiny: OpenAI, certain: dict[str, float]) -> None:
    greedy = texts(create(tiny, CHAT, temperature=0, max_tokens=20))
    assert texts(create(tiny, CHAT, **{**SAMPLED, **certain}, max_tokens=20)) == greedy
    assert texts(create(tiny, CHAT, **SAMPLED, max_tokens=20)) != greedy


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2}]
)
def test_a_penalty_makes_an_answer_repeat_itself_less(tiny: OpenAI, penalty: dict[str, float]) -> None:
    kinds = [
        len({place["token"] for place in told})
        for [(_, _, told)] in (
            of_whole(create(tiny, CHAT, **SAMPLED, **fields, max_tokens=150, logprobs=True))[0]
            for fields in ({}, penalty)
        )
    ]
    assert kinds[1] > kinds[0]


def test_without_fields_the_sampling_is_what_the_models_makers_advise(demo: OpenAI) -> None:
    advice = json.loads((DEMO_MODEL / "generation_config.json").read_text())
    advised = {name: advice[name] for name in ("temperature", "top_p")}
    assert advised["top_p"] < 1
    ask = {"model": "demo", "prompt": "Once", "max_tokens": 40, "seed": 2}
    plain = texts(create(demo, TEXT, **ask, n=4))
    assert texts(create(demo, TEXT, **ask, **advised, n=4)) == plain
    nulls = dict.fromkeys(["temperature", "top_p", "presence_penalty", "frequency_penalty"])
    assert texts(create(demo, TEXT, **ask, **nulls, n=4)) == plain
    assert texts(create(demo, TEXT, **ask, temperature=2, top_p=1, n=4)) != plain


def test_bias_min_tokens_and_ignore_eos(demo: OpenAI) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    eot = str(tokenizer.token_to_id("<|eot_id|>"))
    ask: dict[str, Any] = {"model": "demo", "messages": say("Hello"), "temperature": 0, "max_tokens": 60}
    ended = create(demo, CHAT, **ask)
    assert ended.choices[0].finish_reason == "stop"
    length = ended.usage.completion_tokens
    at_once = create(demo, CHAT, **ask, logit_bias={eot: 100})
    assert (texts(at_once), at_once.usage.completion_tokens) == ([""], 1)
    later = create(demo, CHAT, **ask, logit_bias={eot: 100}, min_tokens=9)
    assert later.usage.completion_tokens == 10
    longer = create(demo, CHAT, **ask, min_tokens=length + 5)
    assert longer.usage.completion_tokens >= length + 5
    assert text_of(longer.choices[0]).startswith(text_of(ended.choices[0]))
    endless = create(demo, CHAT, **ask, ignore_eos=True)
    assert (endless.choices[0].finish_reason, endless.usage.completion_tokens) == ("length", 60)
    never = create(demo, CHAT, **ask, logit_bias={eot: -100})
    assert never.usage.completion_tokens > length


def test_the_logprobs_of_a_chat_are_of_the_bytes_of_its_text(demo: OpenAI) -> None:
    for content in ("你好", "Show me an emoji."):
        answer = create(
            demo,
            CHAT,
            model="demo",
            messages=say(content),
            max_tokens=100,
            temperature=0,
            logprobs=True,
            top_logprobs=20,
        )
        [choice] = answer.choices
        told = choice.logprobs.content
        assert b"".join(bytes(place.bytes) for place in told).decode() == choice.message.content
        assert len(told) == answer.usage.completion_tokens - 1, "all but the token that ends it"
        for place in told:
            assert len(place.top_logprobs) == 20
            assert place.top_logprobs[0].logprob == place.logprob <= 0
            assert place.top_logprobs[0].bytes == place.bytes


def test_without_top_logprobs_only_the_drawn_are_told(tiny: OpenAI) -> None:
    [choice] = create(tiny, CHAT, logprobs=True).choices
    assert [place.top_logprobs for place in choice.logprobs.content] == [[], []]
    assert create(tiny, CHAT, logprobs=False, top_logprobs=0).choices[0].logprobs is None
    [completion] = create(tiny, TEXT, logprobs=0).choices
    assert [list(top) for top in completion.logprobs.top_logprobs] == [
        [t] for t in completion.logprobs.tokens
    ]


def test_the_logprobs_of_a_completion_say_where_each_token_stands(demo: OpenAI) -> None:
    [choice] = create(
        demo,
        TEXT,
        model="demo",
        prompt="Of course: ",
        max_tokens=40,
        temperature=0,
        logprobs=4,
        ignore_eos=True,
    ).choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert told.text_offset[0] == 0
    for token, logprob, top, offset in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 4
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset:].lstrip("\N{REPLACEMENT CHARACTER}").startswith(token)


def test_each_part_of_a_character_has_a_name_of_its_own(tiny: OpenAI) -> None:
    [choice] = create(tiny, TEXT, logprobs=20, **SAMPLED, max_tokens=60).choices
    assert all(len(top) in (20, 21) for top in choice.logprobs.top_logprobs)
    parts = [token for token in choice.logprobs.tokens if len(token) > 1]
    assert parts
    assert all(re.fullmatch(r"bytes:\\x[0-9a-f]{2}", part) for part in parts)
    assert choice.logprobs.text_offset[-1] <= len(choice.text)


def test_models(tiny: OpenAI) -> None:
    listed = tiny.models.list().data
    assert [model.id for model in listed][:2] == ["tiny", "meta-llama/Tiny"]
    for model in listed:
        assert tiny.models.retrieve(model.id) == model
        assert (model.object, model.created) == ("model", listed[0].created)
        assert create(tiny, CHAT, model=model.id).model == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        tiny.models.retrieve("gpt-4o")
    assert caught.value.param == "model"


# Good and bad requests.

ROUTES = [CHAT, TEXT]
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
FACT = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "fact", "schema": FACT, "strict": True}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# route or None for both, fields
GOOD: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"model": "meta-llama/Tiny"}),
    (None, {"max_tokens": 512}),
    (None, {"max_tokens": None, "stop": "e"}),
    (None, {"stop": None}),
    (None, {"stop": []}),
    (None, {"stop": ["a", "b", "c", "d" * 64]}),
    (None, {"n": None}),
    (None, {"n": 8}),
    (None, {"stream": None, "stream_options": None}),
    (None, {"stream": False}),
    (None, {"temperature": 1}),
    (None, {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}),
    (None, {"top_k": -1, "repetition_penalty": 1, "min_tokens": 0, "ignore_eos": False}),
    (
        None,
        {"top_k": None, "min_p": None, "repetition_penalty": None, "min_tokens": None, "ignore_eos": None},
    ),
    (None, {"top_k": 100_000, "min_p": 1.0, "repetition_penalty": 2}),
    (None, {"presence_penalty": 0, "frequency_penalty": -2.0}),
    (None, {"seed": -(2**63)}),
    (None, {"seed": 2**63 - 1, "n": 2}),
    (None, {"logit_bias": {}}),
    (None, {"logit_bias": None}),
    (None, {"logit_bias": {"0": -100, "255": 100}}),
    (None, {"logprobs": None}),
    (None, {"min_tokens": 2}),
    (None, {"user": "somebody"}),
    (CHAT, {"max_tokens": ABSENT, "max_completion_tokens": 2}),
    (CHAT, {"max_tokens": 5000, "max_completion_tokens": 2}),
    (CHAT, {"max_tokens": 2, "max_completion_tokens": None}),
    (CHAT, {"messages": [{"role": "user", "content": PARTS}]}),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}),
    (CHAT, {"messages": [{"role": "system", "content": "a"}, *say("b")]}),
    (CHAT, {"messages": [{"role": "developer", "content": PARTS}, *say("b")]}),
    (CHAT, {"messages": [*say("a"), {"role": "assistant", "content": None}, *say("b")]}),
    (
        CHAT,
        {"messages": [*say("a"), {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}]},
    ),
    (CHAT, {"messages": [{"role": "assistant", "content": "a", "tool_calls": [], "annotations": []}]}),
    (CHAT, {"messages": [{"role": "user", "content": "a", "name": "somebody"}]}),
    (CHAT, {"logprobs": True}),
    (CHAT, {"logprobs": True, "top_logprobs": 20}),
    (CHAT, {"logprobs": False, "top_logprobs": 0}),
    (CHAT, {"response_format": None}),
    (CHAT, {"response_format": {"type": "text"}, "min_tokens": 1, "ignore_eos": True}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (CHAT, {"response_format": FORM, "n": 2}),
    (CHAT, {"tools": []}),
    (CHAT, {"tools": None, "tool_choice": None, "functions": None, "function_call": None}),
    (CHAT, {"tool_choice": "none"}),
    (CHAT, {"tool_choice": "auto", "parallel_tool_calls": True, "functions": []}),
    (CHAT, {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"}),
    (CHAT, {"modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium"}),
    (TEXT, {"prompt": ["x", "y"]}),
    (TEXT, {"prompt": [1, 2, 3]}),
    (TEXT, {"prompt": [[1, 2], [3]]}),
    (TEXT, {"prompt": " "}),
    (TEXT, {"prompt": "<|begin_of_text|>你好"}),
    (TEXT, {"echo": None, "suffix": None, "best_of": None}),
    (TEXT, {"echo": False, "suffix": "", "best_of": 1, "logprobs": 20}),
    (TEXT, {"n": 2, "best_of": 2, "echo": True}),
]

# route or None for both, fields or a whole body, what the field that is named begins with
BAD: list[tuple[str | None, Any, str | None]] = [
    (None, b"", None),
    (None, b"{", None),
    (None, b"model=tiny&prompt=x", None),
    (None, b'{"model": "\xff"}', None),
    (None, b"[]", None),
    (None, b"null", None),
    (None, {"model": ABSENT}, "model"),
    (None, {"model": None}, "model"),
    (None, {"model": 5}, "model"),
    (None, {"colour": "blue"}, "colour"),
    (None, {"max_tokens": 0}, "max_tokens"),
    (None, {"max_tokens": -1}, "max_tokens"),
    (None, {"max_tokens": 513}, "max_tokens"),
    (None, {"max_tokens": 10**30}, "max_tokens"),
    (None, {"max_tokens": "2"}, "max_tokens"),
    (None, {"max_tokens": 2.5}, "max_tokens"),
    (None, {"max_tokens": True}, "max_tokens"),
    (None, {"temperature": -0.1}, "temperature"),
    (None, {"temperature": 2.1}, "temperature"),
    (None, {"temperature": "1"}, "temperature"),
    (None, {"top_p": 0}, "top_p"),
    (None, {"top_p": 1.1}, "top_p"),
    (None, {"top_k": -2}, "top_k"),
    (None, {"top_k": 1.5}, "top_k"),
    (None, {"min_p": 1.1}, "min_p"),
    (None, {"repetition_penalty": 0}, "repetition_penalty"),
    (None, {"presence_penalty": 2.1}, "presence_penalty"),
    (None, {"frequency_penalty": -2.1}, "frequency_penalty"),
    (None, {"seed": 2**63}, "seed"),
    (None, {"seed": "a"}, "seed"),
    (None, {"n": 0}, "n"),
    (None, {"n": 9}, "n"),
    (None, {"n": "2"}, "n"),
    (None, {"stop": 5}, "stop"),
    (None, {"stop": ["a"] * 5}, "stop"),
    (None, {"stop": ["a", ""]}, "stop.1"),
    (None, {"stop": "x" * 65}, "stop.0"),
    (None, {"stream": "yes"}, "stream"),
    (None, {"stream_options": {"include_usage": True}}, "stream_options"),
    (None, {"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    (None, {"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    (
        None,
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    (None, {"logit_bias": [1]}, "logit_bias"),
    (None, {"logit_bias": {"hello": 1}}, "logit_bias"),
    (None, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (None, {"logit_bias": {"01": 1}}, "logit_bias"),
    (None, {"logit_bias": {"100000": 1}}, "logit_bias"),
    (None, {"logit_bias": {"1": 101}}, "logit_bias.1"),
    (None, {"logit_bias": {"1": "much"}}, "logit_bias.1"),
    (None, {"min_tokens": -1}, "min_tokens"),
    (None, {"min_tokens": 3}, "min_tokens"),
    (None, {"ignore_eos": "no"}, "ignore_eos"),
    (None, {"user": 5}, "user"),
    (None, {"stop_token_ids": [1]}, "stop_token_ids"),
    (CHAT, {"messages": ABSENT}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "x"}, "messages"),
    (CHAT, {"messages": ["x"]}, "messages.0"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    (
        CHAT,
        {"messages": [*say("a"), {"role": "tool", "content": "x", "tool_call_id": "1"}]},
        "messages.1.role",
    ),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "assistant"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "mood": "sad"}]}, "messages.0.mood"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type",
    ),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "messages.0.tool_calls",
    ),
    (CHAT, {"messages": say("x" * 600)}, "messages"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 513}, "max_completion_tokens"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"response_format": "json"}, "response_format"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {**FORM, "type": "json_object"}}, "response_format.json_schema"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": FACT}}},
        "response_format.json_schema.name",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "set"}}}},
        "response_format",
    ),
    (CHAT, {"response_format": FORM, "min_tokens": 1}, "response_format"),
    (CHAT, {"response_format": {"type": "json_object"}, "ignore_eos": True}, "response_format"),
    (CHAT, {"tools": [TOOL]}, "tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities.1"),
    (CHAT, {"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"verbosity": "high"}, "verbosity"),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    (CHAT, {"web_search_options": {}}, "web_search_options"),
    (CHAT, {"moderation": {"model": "omni"}}, "moderation"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (TEXT, {"prompt": ABSENT}, "prompt"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": ["a", ""]}, "prompt"),
    (TEXT, {"prompt": ["a", 5]}, "prompt"),
    (TEXT, {"prompt": ["a", [5]]}, "prompt"),
    (TEXT, {"prompt": [[5], []]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [100_000]}, "prompt"),
    (TEXT, {"prompt": [10**30]}, "prompt"),
    (TEXT, {"prompt": [True]}, "prompt"),
    (TEXT, {"prompt": [1.5]}, "prompt"),
    (TEXT, {"prompt": "x" * 600}, "prompt"),
    (TEXT, {"prompt": ["x"] * 17}, "prompt"),
    (TEXT, {"logprobs": 21}, "logprobs"),
    (TEXT, {"logprobs": True}, "logprobs"),
    (TEXT, {"echo": True, "logprobs": 1}, "logprobs"),
    (TEXT, {"suffix": "the end"}, "suffix"),
    (TEXT, {"best_of": 2}, "best_of"),
    (TEXT, {"messages": say("x")}, "messages"),
]


def body_of(route: str, fields: Any) -> bytes:
    if isinstance(fields, bytes):
        return fields
    body = {name: value for name, value in (BODIES[route] | fields).items() if value is not ABSENT}
    return json.dumps(body).encode()


def on_each_route(table: list[Any]) -> list[Any]:
    return [(route, *row[1:]) for row in table for route in ([row[0]] if row[0] else ROUTES)]


def statuses(documented: Any, route: str) -> set[int]:
    return set(map(int, documented["paths"][f"/v1{route}"]["post"]["responses"]))


def test_good_requests_are_answered(tiny: OpenAI, documented: Any) -> None:
    schemas = {CHAT: "ChatCompletion", TEXT: "Completion"}
    for route, fields in on_each_route(GOOD):
        answer = tiny.post(route, cast_to=object, content=body_of(route, fields))
        assert fits(answer, schemas[route], documented), fields
        if isinstance(fields.get("n"), int):
            assert len(answer["choices"]) == fields["n"]  # type: ignore[index]


def test_bad_requests_raise_the_clients_own_errors_and_name_the_field(tiny: OpenAI, documented: Any) -> None:
    for route, fields, param in on_each_route(BAD):
        with pytest.raises(openai.BadRequestError) as caught:
            tiny.post(route, cast_to=object, content=body_of(route, fields))
        error = caught.value
        assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param), fields
        assert param is None or param.split(".")[0] in error.message
        assert fits(error.response.json(), "ErrorBody", documented)
        assert error.status_code in statuses(documented, route)


@pytest.mark.parametrize("route", ROUTES)
def test_a_model_that_is_not_served_and_a_route_that_is_not_there(
    tiny: OpenAI, documented: Any, route: str
) -> None:
    for model in ("gpt-4o", "", "Tiny"):
        with pytest.raises(openai.NotFoundError, match="'tiny' is") as caught:
            create(tiny, route, model=model)
        assert caught.value.param == "model"
    assert 404 in statuses(documented, route)
    with pytest.raises(openai.NotFoundError):
        tiny.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError):
        tiny.responses.create(model="tiny", input="x")


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_that_is_refused_is_refused_before_it_begins(tiny: OpenAI, route: str) -> None:
    too_long = {"messages": say("x" * 600)} if route == CHAT else {"prompt": "x" * 600}
    with pytest.raises(openai.BadRequestError, match=r"\d+ tokens; the context is 512 tokens"):
        create(tiny, route, **too_long, stream=True)


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_that_the_client_has_may_be_null(tiny: OpenAI, route: str) -> None:
    params = chat_params if route == CHAT else completion_params
    fields = params.CompletionCreateParamsBase.__annotations__.keys() - {"model", "messages", "prompt"}
    assert len(fields) >= 14
    for nulls in ({field: None} for field in fields):
        body = body_of(route, {"max_tokens": 2} | nulls)
        tiny.post(route, cast_to=object, content=body)


# Other clients.


class Verdict(BaseModel):
    colour: Literal["red", "绿"]
    sure: bool


def test_the_clients_helpers_for_streams_and_for_structured_answers(demo: OpenAI, tiny: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "demo", "messages": say("Hello"), "max_tokens": 100, "seed": 4}
    with demo.chat.completions.stream(**ask) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == text_of(final.choices[0]) == texts(create(demo, CHAT, **ask))[0]
    ask |= {"model": "tiny", "max_tokens": 250}
    parsed = tiny.chat.completions.parse(**ask, response_format=Verdict).choices[0].message.parsed
    assert isinstance(parsed, Verdict)
    with tiny.chat.completions.stream(**ask, response_format=Verdict) as structured:
        assert structured.get_final_completion().choices[0].message.parsed == parsed


def test_the_asynchronous_client(tiny_server: Server, tiny: OpenAI) -> None:
    fields = {**BODIES[CHAT], **SAMPLED, "max_tokens": 40}
    expected = [texts(create(tiny, CHAT, **{**fields, "seed": seed}))[0] for seed in range(6)]

    async def scenario() -> None:
        url = f"{tiny_server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:

            async def whole(seed: int) -> str:
                return text_of((await client.chat.completions.create(**{**fields, "seed": seed})).choices[0])

            async def streamed(seed: int) -> str:
                stream = await client.chat.completions.create(**{**fields, "seed": seed}, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            assert await asyncio.gather(*map(whole, range(6))) == expected
            assert await asyncio.gather(*map(streamed, range(6))) == expected
            completion = await client.completions.create(**BODIES[TEXT])
            assert completion.usage is not None
            assert completion.usage.completion_tokens == 2
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**{**fields, "n": 9})

    asyncio.run(scenario())


def test_langchain(server: Server, tiny_server: Server) -> None:
    def model(of: Server, name: str, **options: Any) -> ChatOpenAI:
        return ChatOpenAI(
            model=name, base_url=f"{of.url}/v1", api_key="any", max_retries=0, stream_usage=True, **options
        )

    demo = model(server, "demo", temperature=0)
    answer = demo.invoke([("system", "Be brief."), ("human", "Hello")])
    chunks = list(demo.stream([("system", "Be brief."), ("human", "Hello")]))
    assert "".join(str(chunk.content) for chunk in chunks) == answer.content
    assert len(chunks) > 5
    [usage] = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage == answer.usage_metadata
    structured = model(tiny_server, "tiny", max_tokens=250, seed=1).with_structured_output(Verdict)
    assert isinstance(structured.invoke("red or green?"), Verdict)
    with pytest.raises(openai.BadRequestError, match="tools"):
        demo.bind_tools([TOOL]).invoke("Hello")


# Errors of the server.


def num_refused(server: Server) -> float:
    return read_metrics(server.url)['llama_request_errors_total{reason="queue_full"}']


@pytest.mark.parametrize("route", ROUTES)
def test_a_queue_that_is_full(slow_server: Server, documented: Any, route: str) -> None:
    with client_of(slow_server) as client:
        with occupied(slow_server, 8):
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as full:
                    create(client, route, stream=stream)
                assert full.value.type == "rate_limit_error"
                assert int(full.value.response.headers["Retry-After"]) >= 1
                assert 429 in statuses(documented, route)
        with pytest.raises(openai.BadRequestError, match="5 answers are more than the 4") as caught:
            create(client, route, n=5)
        assert caught.value.param == ("n" if route == CHAT else "prompt")
        # The client waits as it is told, and asks again.
        patient = client.with_options(max_retries=10)
        with ThreadPoolExecutor(1) as executor:
            with occupied(slow_server, 8):
                refused = num_refused(slow_server)
                answer = executor.submit(create, patient, route)
                until(lambda: num_refused(slow_server) > refused)
            assert len(texts(answer.result())) == 1


# /docs


def test_the_docs_are_valid_and_tell_every_route_its_schemas_and_its_errors(documented: Any) -> None:
    validate(documented)
    routes = {(method, path) for path, operations in documented["paths"].items() for method in operations}
    assert routes >= {
        ("get", "/"),
        ("post", "/"),
        ("get", "/health"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{name}"),
        ("post", f"/v1{CHAT}"),
        ("post", f"/v1{TEXT}"),
    }
    assert "503" in documented["paths"]["/health"]["get"]["responses"]
    for method, path in routes:
        operation = documented["paths"][path][method]
        assert operation["description"]
        for status, response in operation["responses"].items():
            assert response["description"]
            if status != "200":
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
        if method == "post":
            answers = operation["responses"]["200"]["content"]
            assert set(answers) == {"application/json", "text/event-stream"}
            assert {"400", "401", "413", "429", "500", "503", "504"} <= operation["responses"].keys()


def test_every_example_of_the_docs_runs_and_is_answered_as_they_say(server: Server) -> None:
    documented = requests.get(f"{server.url}/openapi.json", timeout=30).json()
    num_examples = 0
    for path, operations in documented["paths"].items():
        for method, operation in operations.items():
            if "requestBody" not in operation:
                continue
            answers = operation["responses"]["200"]["content"]
            for title, example in operation["requestBody"]["content"]["application/json"]["examples"].items():
                response = requests.request(method, server.url + path, json=example["value"], timeout=120)
                assert response.status_code == 200, (path, title, response.text)
                kind = response.headers["Content-Type"].partition(";")[0]
                schema = answers[kind]["schema"]["$ref"].rpartition("/")[2]
                values = (
                    [response.json()]
                    if kind == "application/json"
                    else [
                        json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]
                    ]
                )
                assert values
                assert all(fits(value, schema, documented) for value in values), (path, title)
                num_examples += 1
    assert num_examples >= 9
    page = requests.get(f"{server.url}/docs", timeout=30)
    assert page.status_code == 200
    assert "openapi.json" in page.text
