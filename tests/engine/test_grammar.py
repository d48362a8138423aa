import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from engine.detokenizer import TokenBytes
from engine.grammar import Grammar, GrammarError, Grammars, unpack
from engine.json_schema import translate
from tests.models import make_tokenizer

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = Tokenizer.from_file(str(REPOSITORY / "demo" / "model" / "tokenizer.json"))
BYTES = TokenBytes(TOKENIZER)
CONTROL = set(TOKENIZER.get_added_tokens_decoder())
EOT, END_OF_TEXT = (TOKENIZER.token_to_id(f"<|{name}|>") for name in ("eot_id", "end_of_text"))
STOP = frozenset({EOT, END_OF_TEXT})
PADDING = 37
VOCAB = TOKENIZER.get_vocab_size() + PADDING
SINGLE = {BYTES[i]: i for i in range(VOCAB) if len(BYTES[i]) == 1}

Schema = dict[str, Any]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, STOP, VOCAB)


def allowed(grammar: Grammar) -> list[int]:
    mask = grammar.allowed()
    assert mask.shape == ((VOCAB + 31) // 32,)
    ids: list[int] = unpack(mask.unsqueeze(0), VOCAB)[0].nonzero().flatten().tolist()
    assert ids, "a dead end"
    assert all(i in STOP or BYTES[i] for i in ids), "a control token, or one that the tokenizer lacks"
    assert not STOP.intersection(ids) or set(ids) >= STOP
    return ids


def follows(grammar: Grammar, byte: int) -> bool:
    """Takes the byte, if it may come."""
    token_id = SINGLE[bytes([byte])]
    if token_id not in allowed(grammar):
        return False
    grammar.accept(token_id)
    return True


def accepts(grammars: Grammars, schema: Schema | None, text: str) -> bool:
    """Whether an answer may be `text`, byte by byte, and end there."""
    grammar = grammars.compile(schema)
    return all(follows(grammar, byte) for byte in text.encode()) and EOT in allowed(grammar)


def walk(grammar: Grammar, rng: random.Random, *, likes: bytes = b"", most: int = 800) -> str | None:
    """A random answer, with the bytes in `likes` wherever they may be; None if it gets too long."""
    answer = b""
    for step in range(most):
        ids = allowed(grammar)
        if EOT in ids and (ids == sorted(STOP) or step > 100 or rng.random() < 0.5):
            grammar.accept(EOT)
            assert allowed(grammar) == sorted(STOP)
            return answer.decode()
        # Towards an end: the longer it gets, the surer.
        shortest = [SINGLE[bytes([b])] for b in likes + b'"]}n,' if SINGLE[bytes([b])] in ids]
        choices = [i for i in ids if i not in STOP]
        hurry = likes or rng.random() < step / 100 or rng.random() < 0.2
        token_id = shortest[0] if shortest and hurry else rng.choice(choices)
        answer += BYTES[token_id]
        grammar.accept(token_id)
    return None


NAMES = ["name", "x", "数量", "😀", 'quo"te', "back\\slash", "new\nline", "a b", "$ref", "type", "é"]
PATTERNS = [
    "^[A-Z]{2}-\\d{3}$",
    "^(foo|bar)+$",
    "[0-9]",
    "^[^a-z]*$",
    "^.{2,5}$",
    "^中文?$",
    "^\\w+@\\w+\\.cn$",
    "é$",
]
FORMATS = ["date", "email", "ipv4", "ipv6", "uuid", "date-time", "time"]
CONSTANTS = [
    "red",
    "蓝",
    "",
    'a"b\\',
    "<|eot_id|>",
    0,
    -7,
    2.5,
    True,
    False,
    None,
    [1, "x"],
    {"k": [None]},
    "\b\f\t/",
]

KINDS = ["object", "object", "array", "tuple", "anyOf", "oneOf", "ref", "scalar", "allOf"]
SCALARS = ["string", "length", "pattern", "format", "integer", "number", "enum", "const", "many"]


class RandomSchemas:
    """Schemas of all that is supported."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.definitions = [f"d{i}" for i in range(self.rng.randrange(3))]

    def document(self) -> Schema:
        schema = self.schema(3)
        # A definition may lead to itself, but only by what may be left out.
        bodies = {name: self.maybe_recursive(name) for name in self.definitions}
        return {**schema, "$defs": bodies} if bodies else schema

    def maybe_recursive(self, name: str) -> Schema:
        itself = {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
        properties = {"value": self.scalar(), "next": itself}
        return {
            "type": "object",
            "properties": properties,
            "required": self.rng.choice([[], ["next"], ["value"], ["value", "next"]]),
            "additionalProperties": False,
        }

    def schema(self, depth: int) -> Schema:
        if depth == 0:
            return self.scalar()
        kind = self.rng.choice(KINDS)
        if kind == "ref" and self.definitions:
            return {"$ref": f"#/$defs/{self.rng.choice(self.definitions)}", "description": "a reference"}
        if kind == "anyOf":
            return {"anyOf": [self.schema(depth - 1) for _ in range(self.rng.randint(1, 3))]}
        if kind == "allOf":
            return {"allOf": [self.schema(depth - 1)]}
        if kind == "oneOf":
            return {"oneOf": [self.tagged(tag, depth) for tag in ("甲", "b", "c")[: self.rng.randint(1, 3)]]}
        if kind == "array":
            return self.bounded({"type": "array", "items": self.schema(depth - 1)}, "Items", 4)
        if kind == "tuple":
            prefix = [self.schema(depth - 1) for _ in range(self.rng.randint(1, 3))]
            schema = {
                "type": "array",
                "prefixItems": prefix,
                "items": self.rng.choice([False, self.scalar()]),
            }
            return self.bounded(schema, "Items", len(prefix)) if self.rng.random() < 0.5 else schema
        return self.object(depth) if kind == "object" else self.scalar()

    def object(self, depth: int) -> Schema:
        names = self.rng.sample(NAMES, self.rng.randint(0, 4))
        schema: Schema = {"type": self.rng.choice(["object", ["object", "null"]])}
        schema["properties"] = {name: self.schema(depth - 1) for name in names}
        schema["required"] = [name for name in names if self.rng.random() < 0.5]
        others = self.rng.choice([False, False, True, {"type": "integer"}, None])
        return schema if others is None else {**schema, "additionalProperties": others}

    def tagged(self, tag: str, depth: int) -> Schema:
        properties = {"kind": {"const": tag}, "value": self.schema(depth - 1)}
        return {"type": "object", "properties": properties, "required": ["kind"]}

    def bounded(self, schema: Schema, what: str, most: int) -> Schema:
        least = self.rng.randint(0, most)
        bounds = {f"min{what}": least, f"max{what}": self.rng.randint(least, most)}
        return schema | {name: bound for name, bound in bounds.items() if self.rng.random() < 0.6}

    def scalar(self) -> Schema:
        match self.rng.choice(SCALARS):
            case "string":
                return {"type": "string"}
            case "length":
                return self.bounded({"type": "string"}, "Length", 9)
            case "pattern":
                return {"type": "string", "pattern": self.rng.choice(PATTERNS)}
            case "format":
                return {"type": "string", "format": self.rng.choice(FORMATS)}
            case "integer":
                return self.number("integer", lambda: self.rng.randint(-3000, 3000))
            case "number":
                return self.number("number", lambda: round(self.rng.uniform(-30, 30), self.rng.randint(0, 4)))
            case "enum":
                return {"enum": self.rng.sample(CONSTANTS, self.rng.randint(1, 5))}
            case "const":
                return {"const": self.rng.choice(CONSTANTS)}
        return {"type": self.rng.sample(["string", "null", "boolean", "integer"], 2), "maxLength": 3}

    def number(self, kind: str, draw: Callable[[], float]) -> Schema:
        low, high = sorted([draw(), draw()])
        bounds: Schema = {self.rng.choice(["minimum", "exclusiveMinimum"]): low}
        bounds[self.rng.choice(["maximum", "exclusiveMaximum"])] = high + 20
        chosen = {name: bound for name, bound in bounds.items() if self.rng.random() < 0.6}
        return {"type": kind} | chosen | ({"multipleOf": 5} if self.rng.random() < 0.2 else {})


@pytest.mark.parametrize("batch", range(10))
def test_every_answer_is_valid_by_its_schema(grammars: Grammars, batch: int) -> None:
    finished = 0
    for seed in range(50 * batch, 50 * batch + 50):
        schema = RandomSchemas(seed).document()
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        answer = walk(grammars.compile(schema), random.Random(seed))
        if answer is not None:
            finished += 1
            errors = [error.message for error in validator.iter_errors(json.loads(answer))]
            assert not errors, (seed, schema, answer)
    assert finished >= 40


def test_a_json_object_is_an_object(grammars: Grammars) -> None:
    answers = [walk(grammars.compile(None), random.Random(seed)) for seed in range(40)]
    finished = [answer for answer in answers if answer is not None]
    assert len(finished) >= 35
    assert all(isinstance(json.loads(answer), dict) for answer in finished)
    for text in ("[]", '"a"', "1", "", " {}", "{} "):
        assert not accepts(grammars, None, text)
    assert accepts(grammars, None, '{"名": [1, -2.5e3, {"a": null}], "😀": "\\"\\\\\\n"}')


def test_each_characters_bytes_join(grammars: Grammars) -> None:
    schema: Schema = {"type": "object", "properties": {"数量😀": {"type": "string", "maxLength": 8}}}
    for value in ("中文", "😀👍", "é\u0301", 'a"b\\c/', "\b\f\n\r\t", "\u2028", "\x80", "\U0010ffff"):
        assert accepts(grammars, schema, json.dumps({"数量😀": value}, ensure_ascii=False))
    grammar = grammars.compile({"type": "string"})
    for byte in b'"\xe4\xb8':
        grammar.accept(SINGLE[bytes([byte])])
    # In the midst of a character, nothing but its end.
    assert all(0x80 <= BYTES[i][0] < 0xC0 for i in allowed(grammar))
    # Nor what is no character at all.
    for start in (b'"\xff', b'"\xc0', b'"\xed\xa0', b'"\xf5'):
        grammar = grammars.compile({"type": "string"})
        for byte in start[:-1]:
            grammar.accept(SINGLE[bytes([byte])])
        assert SINGLE[start[-1:]] not in allowed(grammar)


def test_whitespace_has_an_end(grammars: Grammars) -> None:
    item: Schema = {"type": "object", "properties": {"k": {"enum": ["a", None]}}, "required": ["k"]}
    schema: Schema = {
        "type": "array",
        "items": item | {"additionalProperties": False},
        "minItems": 3,
        "maxItems": 3,
    }
    for likes in (b"\n ", b" \n", b"\n\t ", b" "):
        answer = walk(grammars.compile(schema), random.Random(0), likes=likes)
        assert answer is not None
        assert len(json.loads(answer)) == 3
        assert max(len(spaces) for spaces in re.findall(r"\s*", answer)) in (1, 33)
    for text in (
        '[{"k":"a"},{"k":"a"},{"k":null}]',
        json.dumps([{"k": "a"}] * 3),
        json.dumps([{"k": "a"}] * 3, indent=4),
    ):
        assert accepts(grammars, schema, text)


def test_an_additional_property_cant_take_a_declared_name(grammars: Grammars) -> None:
    schema: Schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "\n": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    }
    assert accepts(grammars, schema, '{"a":1,"b":"x"}')
    for text in ('{"a":"x"}', '{"\\u0061":"x"}', '{"\\n":"x"}', '{"\\u000a":"x"}', '{"\\u000A":"x"}'):
        assert not accepts(grammars, schema, text)


def test_numbers_stay_within_their_bounds(grammars: Grammars) -> None:
    rng = random.Random(0)
    near = [0, -0.5, 0.5, 1, -1, 9, 10, 99.5, -12.25, 100, 0.001, 1234567.891]
    for _ in range(60):
        schema: Schema = {"type": rng.choice(["integer", "number", "number"])}
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if rng.random() < 0.4:
                schema[keyword] = rng.choice(near)
        try:
            grammar = grammars.compile(schema)
        except GrammarError:  # nothing fits, or it is one of those that are not supported
            continue
        validator = Draft202012Validator(schema)
        for value in [*near, *(x + y for x in near for y in (-1, -0.001, 0.001, 1))]:
            text = f"{value:.9f}".rstrip("0").rstrip(".")
            if text != "-0":
                number = grammar.copy()
                fits = all(follows(number, byte) for byte in text.encode()) and EOT in allowed(number)
                valid = validator.is_valid(json.loads(text))
                # Of a fraction, not each way to write it is allowed.
                assert fits == valid if schema["type"] == "integer" else fits <= valid, (schema, text)


@pytest.mark.parametrize(
    ("pattern", "fits", "fails"),
    [
        ("^a|b$", ["ax", "xb"], ["xax"]),
        ("^.$", ["中", "😀", "\t"], ["\n", "\r", "\u2028", "ab"]),
        ("^[\\w.&-]+$", ["a.b-&"], ["é", ""]),
        ("^[a&&b[]$", ["a", "&", "[", "b"], ["]"]),
        ("^\\d\\x41\\u4e2d$", ["1A中"], ["٣A中"]),
        ("^(?:a|(?<n>b)){2}$", ["ab"], ["a"]),
        ("x", ["axb"], ["ab"]),
    ],
)
def test_patterns_mean_what_they_do_in_javascript(
    grammars: Grammars, pattern: str, fits: list[str], fails: list[str]
) -> None:
    schema: Schema = {"type": "string", "pattern": pattern}
    assert all(accepts(grammars, schema, json.dumps(text, ensure_ascii=False)) for text in fits)
    assert not any(accepts(grammars, schema, json.dumps(text, ensure_ascii=False)) for text in fails)


@pytest.mark.parametrize("day", ["2023-02-29", "1900-02-29", "2024-02-30", "2024-04-31", "2024-13-01"])
def test_no_date_that_is_none(grammars: Grammars, day: str) -> None:
    for name, end in (("date", ""), ("date-time", "T12:00:00Z")):
        schema: Schema = {"type": "string", "format": name}
        assert not accepts(grammars, schema, f'"{day}{end}"')
        for good in ("2024-02-29", "2000-02-29", "2023-02-28", "2023-10-31", "2023-12-01"):
            assert accepts(grammars, schema, f'"{good}{end}"')


UNSUPPORTED: list[tuple[str, Schema]] = [
    *(
        (keyword, {"type": "object", keyword: value})
        for keyword, value in {
            "patternProperties": {"^a": {}}, "minProperties": 1, "maxProperties": 1, "propertyNames": {},
            "dependentRequired": {}, "dependentSchemas": {}, "dependencies": {},
            "unevaluatedProperties": False,
            "not": {}, "if": {}, "then": {}, "else": {}, "nullable": True, "$anchor": "a",
            "$dynamicRef": "#a", "requird": ["a"],
        }.items()
    ),
    *(
        (keyword, {"type": "array", keyword: value})
        for keyword, value in {
            "uniqueItems": True, "contains": {}, "minContains": 1, "additionalItems": False,
            "unevaluatedItems": False,
        }.items()
    ),
    ("$id", {"properties": {"a": {"$id": "http://a/b"}}}),
    ("allOf", {"allOf": [{"type": "string"}, {"type": "integer"}]}),
    ("oneOf", {"oneOf": [{"type": "string"}, {"minLength": 3}]}),
    ("oneOf", {"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]}),
    ("anyOf", {"type": "object", "anyOf": [{"required": ["a"]}]}),
    ("enum", {"enum": ["a"], "minLength": 3}),
    ("format", {"type": "string", "format": "idn-email"}),
    ("format", {"type": "integer", "format": "int64"}),
    ("multipleOf", {"type": "number", "multipleOf": 0.01}),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}),
    ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}),
    ("minimum", {"type": "number", "minimum": 1e-19}),
    ("pattern", {"type": "string", "format": "date", "pattern": "^2"}),
    ("pattern", {"type": "string", "pattern": "^(?!a)"}),
    ("pattern", {"type": "string", "pattern": "(a)\\1"}),
    ("pattern", {"type": "string", "pattern": "[^]a]"}),
    ("pattern", {"type": "string", "pattern": "(?i)a"}),
]  # fmt: skip


@pytest.mark.parametrize(("keyword", "schema"), UNSUPPORTED, ids=str)
def test_what_is_not_supported_is_refused_by_name(grammars: Grammars, keyword: str, schema: Schema) -> None:
    with pytest.raises(GrammarError, match=re.escape(keyword)):
        grammars.compile({"type": "object", "properties": {"p": schema}} | {"$defs": {}})


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = {"type": "integer"}
    for _ in range(depth):
        value = wrap(value)
    return value


def strings(pattern: str) -> Schema:
    return {"type": "array", "items": {"type": "string", "pattern": pattern}, "minItems": 1}


def doubling(keyword: str) -> Schema:
    definitions: Schema = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, "d40": {"type": "string"}}}


ANY = ["array", "boolean", "null", "object", "string", "number"]
HOSTILE: dict[str, tuple[bool | None, Callable[[], Any]]] = {
    # Whether it is refused; None where either will do.
    "objects in objects": (True, lambda: nested(10_000, lambda s: {"properties": {"a": s}})),
    "anyOf in anyOf": (True, lambda: nested(10_000, lambda s: {"anyOf": [s, {"type": "null"}]})),
    "lists in a constant": (True, lambda: {"const": nested(10_000, lambda s: [s])}),
    "lists in a description": (True, lambda: {"description": nested(10_000, lambda s: [s])}),
    "anyOf doubled 40 times": (False, lambda: doubling("anyOf")),
    "allOf doubled 40 times": (True, lambda: doubling("allOf")),
    "oneOf doubled 40 times": (True, lambda: doubling("oneOf")),
    "megabytes of enum": (True, lambda: {"enum": [f"{i} {'x' * 100}" for i in range(50_000)]}),
    "a megabyte of constant": (True, lambda: {"const": "x" * 1_000_000}),
    "as much constant as may be": (False, lambda: {"const": "a b" * 60_000}),
    "properties": (True, lambda: {"properties": {f"p{i}": {} for i in range(100_000)}}),
    "as many properties as may be": (False, lambda: {"properties": {f"p{i}": {} for i in range(1000)}}),
    "required": (True, lambda: {"type": "object", "required": [f"p{i}" for i in range(5000)]}),
    "properties of a constant": (True, lambda: {"const": {f"p{i}": i for i in range(5000)}}),
    "many wide branches": (
        None,
        lambda: {"anyOf": [{"type": "array", "minItems": i, "items": {"type": ANY}} for i in range(420)]},
    ),
    "many bounded lists": (
        None,
        lambda: {"anyOf": [{"type": "array", "items": {"type": "array", "maxItems": i}} for i in range(990)]},
    ),
    "patternProperties": (True, lambda: {"patternProperties": {"(.*a.{15}b)": {}, "(.*c.{15}d)": {}}}),
    "nested repetition": (None, lambda: strings("^(a+)+b$")),
    "exponential automaton": (None, lambda: strings("^(.*a.{20}){3}$")),
    "repeated repetition": (None, lambda: strings("^((a{1000}){1000}){1000}$")),
    "optional repetition": (None, lambda: strings("^(a?){500}a{500}$")),
    "parentheses": (True, lambda: strings("(" * 480 + ")" * 480)),
    "many parentheses": (True, lambda: strings("(" * 10_000 + ")" * 10_000)),
    "no regular expression": (True, lambda: strings("([")),
    "twenty automata": (
        None,
        lambda: {"anyOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{30}}$"} for i in range(20)]},
    ),
    "maxLength": (False, lambda: {"type": "string", "maxLength": 10**9}),
    "minLength": (True, lambda: {"type": "string", "minLength": 10**9}),
    "maxItems": (False, lambda: {"type": "array", "maxItems": 10**9}),
    "minItems": (True, lambda: {"type": "array", "minItems": 10**9}),
    "a number of 5,000 digits": (True, lambda: {"minimum": 10**5000}),
    "infinity": (True, lambda: {"maximum": float("inf")}),
    "no number": (True, lambda: {"const": float("nan")}),
    "multipleOf": (True, lambda: {"type": "integer", "multipleOf": 1_000_003}),
    "many multipleOf": (True, lambda: {"prefixItems": [{"multipleOf": 900 + i} for i in range(99)]}),
    "multipleOf 0": (True, lambda: {"type": "integer", "multipleOf": 0}),
    "itself": (True, lambda: {"$ref": "#"}),
    "itself, in a circle": (
        True,
        lambda: {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    ),
    "itself, required": (
        True,
        lambda: {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ),
    "itself, required of what is not": (
        True,
        lambda: {"properties": {"b": {"type": "array", "items": {"$ref": "#/properties/b"}, "minItems": 1}}},
    ),
    "itself, or not": (False, lambda: {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]}),
    "remote": (True, lambda: {"$ref": "http://127.0.0.1/schema.json"}),
    "a file": (True, lambda: {"$ref": "file:///etc/passwd"}),
    "nowhere": (True, lambda: {"$ref": "#/$defs/nowhere"}),
    "many places": (True, lambda: {"enum": [0] * 600, "x": [{"$ref": f"#/enum/{i}"} for i in range(600)]}),
    "required and forbidden": (
        True,
        lambda: {"type": "object", "required": ["a"], "additionalProperties": False},
    ),
    "more than the most": (True, lambda: {"type": "integer", "minimum": 5, "maximum": 3}),
    "nothing": (True, lambda: {"enum": []}),
    "false": (True, lambda: {"anyOf": [False]}),
    "surrogates": (True, lambda: {"const": "\ud800"}),
    "control characters": (True, lambda: {"const": "a\x01"}),
    "x-guidance": (False, lambda: {"type": "null", "x-guidance": {"lenient": True, "whitespace": ".*"}}),
    "not an object": (True, lambda: [1]),
    "not a schema": (True, lambda: {"properties": {"a": 7}}),
    **{
        f"{keyword}: {value}": (True, lambda keyword=keyword, value=value: {keyword: value})  # type: ignore[misc]
        for keyword, value in [
            ("type", 7), ("type", []), ("type", "float"), ("type", [["string"]]), ("properties", []),
            ("required", "abc"), ("required", [1]), ("items", 7), ("items", [{}]), ("prefixItems", {}),
            ("additionalProperties", "no"), ("minItems", "x"), ("minItems", -3), ("minItems", 2.5),
            ("maxLength", True), ("minimum", "3"), ("minimum", None), ("multipleOf", "3"), ("enum", 5),
            ("anyOf", {}), ("anyOf", []), ("anyOf", [7]), ("pattern", 5), ("format", ["date"]), ("$ref", 5),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_or_harmless(grammars: Grammars, name: str) -> None:
    """Nor does it hold up the event loop, beside which it is followed, as much as a hundred harmless ones."""
    refused, make = HOSTILE[name]
    schema = make()
    gaps = []

    async def tick() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.01)
            gaps.append(time.perf_counter() - start)

    def follow(schema: Any) -> str | None:
        """Why it is refused, if it is."""
        try:
            grammar = grammars.compile(schema)
        except GrammarError as error:
            return str(error)
        rng = random.Random(0)
        # One that is taken because nothing seems wrong with it may yet fail, alone, when it gets too complex.
        with nullcontext() if refused is False else suppress(GrammarError):
            for _ in range(100):
                grammar.accept(rng.choice(allowed(grammar)))
        return None

    async def run() -> str | None:
        ticker = asyncio.create_task(tick())
        try:
            return await asyncio.wait_for(asyncio.to_thread(follow, schema), 30)
        finally:
            ticker.cancel()

    grammars.compile(None)  # the first takes longer
    start = time.perf_counter()
    assert follow({"type": "string"}) is None
    harmless = time.perf_counter() - start
    error = asyncio.run(run())
    if refused is not None:
        assert (error is not None) == refused
    assert error is None or 0 < len(error) < 500
    assert max(gaps, default=0) < 100 * harmless


def test_how_deep_a_schema_may_be_and_how_many_properties_it_may_have() -> None:
    translate(nested(63, lambda s: {"items": s}))
    with pytest.raises(GrammarError, match="nested too deeply: at most 64 levels"):
        translate(nested(64, lambda s: {"items": s}))
    properties = [str(number) for number in range(1001)]
    translate({"properties": dict.fromkeys(properties[1:], True)})
    with pytest.raises(GrammarError, match="too many properties: at most 1000"):
        translate({"properties": dict.fromkeys(properties, True)})


def test_what_may_not_come_is_refused_when_it_comes(grammars: Grammars) -> None:
    grammar = grammars.compile({"type": "integer"})
    with pytest.raises(GrammarError):
        grammar.accept(SINGLE[b"x"])
    other = grammars.compile({"type": "integer"})
    other.accept(SINGLE[b"7"])
    assert EOT in allowed(other)


def test_copies_go_their_own_ways(grammars: Grammars) -> None:
    grammar = grammars.compile({"enum": ["ab", "ac"]})
    for byte in b'"a':
        grammar.accept(SINGLE[bytes([byte])])
    other = grammar.copy()
    grammar.accept(SINGLE[b"b"])
    other.accept(SINGLE[b"c"])
    for each in (grammar, other):
        assert allowed(each) == [SINGLE[b'"']]
        each.accept(SINGLE[b'"'])
        assert allowed(each) == sorted(STOP)


def test_a_schema_of_pydantic_is_taken(grammars: Grammars) -> None:
    schema: Schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/order",
        "$defs": {
            "A/b": {
                "title": "A",
                "type": "object",
                "properties": {"kind": {"const": "a"}},
                "required": ["kind"],
            },
            "B": {
                "title": "B",
                "type": "object",
                "properties": {"kind": {"const": "b"}},
                "required": ["kind"],
            },
        },
        "title": "Order",
        "type": "object",
        "properties": {
            "item": {
                "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/A~1b", "b": "#/$defs/B"}},
                "oneOf": [{"$ref": "#/$defs/A~1b"}, {"$ref": "#/$defs/B"}, {"type": "null"}],
            },
            "again": {"$ref": "#/properties/item", "description": "the same"},
            "price": {"anyOf": [{"type": "number", "minimum": 0.0}, {"type": "null"}], "default": None},
        },
        "required": ["item"],
        "additionalProperties": False,
    }
    assert accepts(grammars, schema, '{"item": {"kind": "a"}, "again": null, "price": 1.5}')
    assert not accepts(grammars, schema, '{"item": {"kind": "c"}}')
    assert not accepts(grammars, schema, '{"item": null, "price": -1}')


def test_a_vocabulary_of_any_size_and_kind() -> None:
    tokenizer = make_tokenizer({"\n\n": 271}, 300)  # between the bytes and 271, tokens that are no text
    eot = tokenizer.token_to_id("<|eot_id|>")
    for vocab_size in (tokenizer.get_vocab_size(), 32 * 20, 32 * 20 + 1):
        grammar = Grammars(tokenizer, frozenset({eot}), vocab_size).compile({"const": "<|eot_id|>"})
        answer = b""
        while True:
            ids = unpack(grammar.allowed().unsqueeze(0), vocab_size)[0].nonzero().flatten().tolist()
            assert len(ids) == 1
            grammar.accept(ids[0])
            if ids == [eot]:
                break
            answer += TokenBytes(tokenizer)[ids[0]]
        assert answer == b'"<|eot_id|>"'


def test_the_library_is_imported_with_the_first_grammar() -> None:
    code = """
import sys
from tokenizers import Tokenizer
from engine.grammar import Grammars
grammars = Grammars(Tokenizer.from_file("demo/model/tokenizer.json"), frozenset({1}), 5000)
assert "llguidance" not in sys.modules
grammars.compile(None)
assert "llguidance" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
