"""JSON schemas of clients, written anew as what the grammar library keeps exactly.

llguidance sees no client's schema, only one of keywords whose meaning it keeps, of a size that it takes in a
moment, and never one schema to be intersected with another. All else is refused, by name. Schemas are read as
of the draft 2020-12 (json-schema.org).
"""

import json
import re
from typing import Any, NoReturn
from urllib.parse import unquote

# What a schema may be. Measured with the worst that fits in: a second to compile, 0.1 s for the first mask.
# llguidance recurses, once for each property of an object: with 5,000 of them it overflows a stack of 1 MB.
_MAX_DEPTH = 64
_MAX_VALUES = 20_000
_MAX_TEXT = 200_000
_MAX_SCHEMAS = 3_000
_MAX_PROPERTIES = 1_000
_MAX_DEFINITIONS = 500
_MAX_PATTERN = 1_000
_MAX_MULTIPLE = 1_000
_MAX_MULTIPLES = 10_000
"""The sum of all multipleOf: each makes an automaton of as many states."""
_MAX_LENGTH = 8_000
"""Characters, or items, that can be asked for at least. A higher maximum is lowered to it, as an automaton
counts up to it; what is shorter is within the higher one too."""
_MAX_NUMBER = 2**53
"""Beyond it, llguidance's floats are not exact."""

_TYPES = {
    "object": ["properties", "required", "additionalProperties"],
    "array": ["items", "prefixItems", "minItems", "maxItems"],
    "string": ["minLength", "maxLength", "pattern", "format"],
    "number": ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
    "integer": ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
    "boolean": [],
    "null": [],
}  # fmt: skip
_FORMATS = {
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
}  # fmt: skip
# llguidance allows February 29 in each year.
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DAYS_OF_FEBRUARY = f"^(?:[0-9]{{4}}-(?:0[13-9]|1|02-(?:[01]|2[0-8]))|{_LEAP_YEAR}-02-29)"
# RFC 3339 knows a second 60 once in years; validators refuse it at any other time, or always.
_SECONDS = "[0-9]{2}:[0-9]{2}:[0-5]"
_FORMAT_PATTERNS = {
    "date": _DAYS_OF_FEBRUARY,
    "date-time": f"{_DAYS_OF_FEBRUARY}[^tT]*[tT]{_SECONDS}",
    "time": f"^{_SECONDS}",
}
_ANNOTATIONS = {
    "$schema", "$comment", "$defs", "definitions", "title", "description", "default", "example", "examples",
    "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "discriminator",
}  # fmt: skip

_Schema = dict[str, Any]


class GrammarError(ValueError):
    """A schema that can't be followed, or an answer that has become too complex to follow it further."""


def translate(schema: Any) -> dict[str, Any]:
    """The schema as llguidance is given it.

    Raises:
        GrammarError: if it can't be taken. The message says what is wrong with it.
    """
    return _Translation(schema).result


def _fail(path: str, problem: str) -> NoReturn:
    raise GrammarError(f"{'#' + path[-200:] if path else 'the schema'}: {problem}")


# In a constant, llguidance would leave such a control character out, as the \u escape for it is forbidden.
_NOT_TEXT = re.compile("[\\0-\\x07\\x0b\\x0e-\\x1f\\x7f\\ud800-\\udfff]")


def _check_size(schema: Any) -> None:
    """Raises GrammarError if there is too much of it, or what can't be JSON. Walks without recursion."""
    values = [(schema, 0)]
    num_values = num_characters = 0
    while values:
        value, depth = values.pop()
        num_values += 1
        # Before its parts are listed: a list of millions holds others up.
        if num_values + len(values) + (len(value) if isinstance(value, dict | list) else 0) > _MAX_VALUES:
            _fail("", f"it is too large: at most {_MAX_VALUES} values are supported")
        if isinstance(value, dict):
            values += [(child, depth + 1) for pair in value.items() for child in pair]
        elif isinstance(value, list):
            values += [(child, depth + 1) for child in value]
        elif isinstance(value, str):
            num_characters += len(value)
            if _NOT_TEXT.search(value):
                _fail("", "it has a string with control characters or lone surrogates")
        elif isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
            _fail("", f"numbers beyond {_MAX_NUMBER} are not supported")
        if depth > _MAX_DEPTH:
            _fail("", f"it is nested too deeply: at most {_MAX_DEPTH} levels are supported")
        if num_characters > _MAX_TEXT:
            _fail("", f"it is too large: at most {_MAX_TEXT} characters are supported")


class _Translation:
    """A client's schema, written anew for llguidance: every schema that a $ref points to is a definition, and
    each keyword has been understood."""

    def __init__(self, schema: Any) -> None:
        _check_size(schema)
        self._root = schema
        self._names: dict[int, str] = {}
        self._definitions: dict[str, _Schema | bool] = {}
        self._pending: list[tuple[str, Any, str]] = []
        self._one_of: list[tuple[list[_Schema | bool], str]] = []
        self._num_schemas = self._num_properties = self._num_multiples = 0

        root = self._ref("#", "")
        while self._pending:
            name, body, path = self._pending.pop()
            self._definitions[name] = self._schema(body, path)
        for branches, path in self._one_of:
            self._check_apart(branches, path)
        self._check_finite()
        self.result: _Schema = {"$ref": root, "$defs": self._definitions}

    def _ref(self, pointer: Any, path: str) -> str:
        """The new $ref for a client's, to a definition that will be written in its turn."""
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            _fail(path, f"$ref must point into the schema itself, as #/$defs/..., not to {pointer!r:.100}")
        target = self._root
        for part in unquote(pointer).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and part.isdecimal() and int(part[:9]) < len(target):
                target = target[int(part[:9])]
            else:
                _fail(path, f"$ref points to {pointer!r:.100}, which does not exist")
        if id(target) not in self._names:
            if len(self._names) == _MAX_DEFINITIONS:
                _fail("", f"its $refs point to too many places: at most {_MAX_DEFINITIONS} are supported")
            name = self._names[id(target)] = str(len(self._names))
            self._pending.append((name, target, unquote(pointer)[1:]))
        return f"#/$defs/{self._names[id(target)]}"

    def _schema(self, schema: Any, path: str) -> _Schema | bool:
        self._count(1)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            _fail(path, "a schema must be an object, true or false")
        keywords = {
            keyword: value
            for keyword, value in schema.items()
            if keyword not in _ANNOTATIONS and not keyword.startswith("x-")
        }
        if schema is self._root:
            keywords.pop("$id", None)
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in keywords:
                if others := keywords.keys() - {keyword}:
                    _fail(path, f"{keyword} is not supported together with {min(others)}")
                return self._combination(keyword, keywords[keyword], path)
        if "enum" in keywords or "const" in keywords:
            return self._enum(keywords, path)
        return self._typed(keywords, path)

    def _count(self, num_schemas: int) -> None:
        self._num_schemas += num_schemas
        if self._num_schemas > _MAX_SCHEMAS:
            _fail("", f"it is too large: at most {_MAX_SCHEMAS} schemas are supported in it")

    def _count_properties(self, num_properties: int) -> None:
        self._num_properties += num_properties
        if self._num_properties > _MAX_PROPERTIES:
            _fail("", f"it has too many properties: at most {_MAX_PROPERTIES} are supported")

    def _combination(self, keyword: str, value: Any, path: str) -> _Schema | bool:
        if keyword == "$ref":
            return {"$ref": self._ref(value, path)}
        path = f"{path}/{keyword}"
        if not isinstance(value, list) or not value:
            _fail(path, "it must be a list of schemas, not an empty one")
        if keyword == "allOf" and len(value) > 1:
            _fail(path, "allOf is not supported with more than one schema")
        branches = [self._schema(branch, f"{path}/{i}") for i, branch in enumerate(value)]
        if keyword == "allOf":
            return branches[0]
        if keyword == "oneOf":
            self._one_of.append((branches, path))
        return {"anyOf": branches}

    def _enum(self, keywords: _Schema, path: str) -> _Schema:
        if others := keywords.keys() - {"enum", "const", "type"}:
            _fail(path, f"{min(others)} is not supported together with enum or const")
        values = keywords.get("enum", [keywords.get("const")])
        if not isinstance(values, list):
            _fail(path, "enum must be a list")
        if "const" in keywords:
            constant = json.dumps(keywords["const"], sort_keys=True)
            values = [value for value in values if json.dumps(value, sort_keys=True) == constant]
        types = self._types(keywords, path)
        values = [value for value in values if _has_type(value, types)]
        if not values:
            _fail(path, "no value fits enum or const")
        self._count_properties(sum(map(_num_properties, values)))
        return {"enum": values}

    def _types(self, keywords: _Schema, path: str) -> set[str]:
        types = keywords.get("type", list(_TYPES))
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list) or not types or not all(isinstance(t, str) for t in types):
            _fail(path, "type must be a string or a list of strings")
        for name in types:
            if name not in _TYPES:
                _fail(path, f"the type {name!r:.50} is unknown")
        return set(types) - {"integer"} if "number" in types else set(types)

    def _typed(self, keywords: _Schema, path: str) -> _Schema | bool:
        if not keywords:
            return True
        types = self._types(keywords, path)
        self._count(len(types) - 1)
        known = {"type"}.union(*_TYPES.values())
        for keyword in keywords:
            if keyword not in known:
                _fail(path, f"{keyword!r:.50} is not supported")
        written: _Schema = {"type": sorted(types)}
        for keyword, value in keywords.items():
            if keyword != "type":
                written[keyword] = self._keyword(keyword, value, f"{path}/{keyword}")
        undeclared = set(written.get("required", [])) - written.get("properties", {}).keys()
        self._count_properties(len(undeclared))
        if "number" in types:
            _check_range(written, path)
        if written.get("format") in _FORMAT_PATTERNS:
            if "pattern" in written:
                _fail(path, f"pattern is not supported together with the format {written['format']}")
            written["pattern"] = _FORMAT_PATTERNS[written["format"]]
        return written

    def _keyword(self, keyword: str, value: Any, path: str) -> Any:
        match keyword:
            case "properties":
                return self._properties(value, path)
            case "required":
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    _fail(path, "it must be a list of strings")
                return list(dict.fromkeys(value))
            case "additionalProperties":
                return self._schema(value, path)
            case "items":
                if isinstance(value, list):
                    _fail(path, "it must be one schema; for a list of them, use prefixItems")
                return self._schema(value, path)
            case "prefixItems":
                if not isinstance(value, list):
                    _fail(path, "it must be a list of schemas")
                return [self._schema(item, f"{path}/{i}") for i, item in enumerate(value)]
            case "minItems" | "maxItems" | "minLength" | "maxLength":
                return _length(keyword, value, path)
            case "pattern":
                return _pattern(value, path)
            case "format":
                if not isinstance(value, str) or value not in _FORMATS:
                    _fail(path, f"{value!r:.50} is not supported: only {', '.join(sorted(_FORMATS))} are")
                return value
            case "multipleOf":
                return self._multiple(value, path)
        return _bound(value, path)

    def _properties(self, value: Any, path: str) -> _Schema:
        if not isinstance(value, dict):
            _fail(path, "it must be an object")
        self._count_properties(len(value))
        return {name: self._schema(schema, f"{path}/{name}") for name, schema in value.items()}

    def _multiple(self, value: Any, path: str) -> int:
        # By a fraction, validators divide floats: 0.07 would be no multiple of 0.01.
        if not _is_number(value) or value != int(value) or not 0 < value <= _MAX_MULTIPLE:
            _fail(path, f"it must be a whole number from 1 to {_MAX_MULTIPLE}")
        self._num_multiples += int(value)
        if self._num_multiples > _MAX_MULTIPLES:
            _fail(path, f"all of them together may be at most {_MAX_MULTIPLES}")
        return int(value)

    def _resolve(self, schema: _Schema | bool) -> _Schema | bool:
        """What a chain of $refs leads to; one that leads in a circle is refused afterwards."""
        seen = set()
        while isinstance(schema, dict) and "$ref" in schema and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            schema = self._definitions[schema["$ref"].removeprefix("#/$defs/")]
        return schema

    def _check_apart(self, branches: list[_Schema | bool], path: str) -> None:
        """Refuses branches that a value might fit two of: with none such, oneOf is anyOf."""
        schemas = [self._resolve(branch) for branch in branches]
        objects = [s for s in schemas if isinstance(s, dict) and s.get("type") == ["object"]]
        types = [name for s in schemas for name in self._types_of(s)]
        # Objects count as one: they are told apart by a tag.
        if len(types) > len(set(types)) + max(len(objects) - 1, 0) or (
            len(objects) > 1 and not self._have_tag(objects)
        ):
            _fail(
                path,
                "oneOf is supported only if its schemas differ in type, or in the constant of a property "
                "that all of them require; use anyOf",
            )

    def _have_tag(self, objects: list[_Schema]) -> bool:
        """Whether a property that all require has other constants in each."""
        for name in set.intersection(*(set(schema.get("required", [])) for schema in objects)):
            tags = [self._resolve(schema.get("properties", {}).get(name, True)) for schema in objects]
            constants = [tag["enum"] if isinstance(tag, dict) and "enum" in tag else [None] for tag in tags]
            values = [value for each in constants for value in each]
            if all(isinstance(value, str) for value in values) and len(values) == len(set(values)):
                return True
        return False

    def _types_of(self, schema: _Schema | bool) -> set[str]:
        """The types that a value may have, at most."""
        if isinstance(schema, dict):
            if "enum" in schema:
                return {_type_of(value) for value in schema["enum"]}
            if "type" in schema:
                return {"number" if name == "integer" else name for name in schema["type"]}
        return set(_TYPES) - {"integer"}

    def _check_finite(self) -> None:
        """Refuses what would never end: a definition that requires itself."""
        finite: set[str] = set()
        unknown = list(self._definitions)
        while unknown:
            # What comes later is mostly what the earlier needs.
            for name in reversed(unknown):
                if _ends(self._definitions[name], finite):
                    finite.add(f"#/$defs/{name}")
            rest = [name for name in unknown if f"#/$defs/{name}" not in finite]
            if len(rest) == len(unknown):
                _fail("", "a $ref in it leads back to itself, so that no answer would ever end")
            unknown = rest


def _ends(schema: _Schema | bool, finite: set[str]) -> bool:
    """Whether something finite fits, given the $refs of which that is known."""
    if isinstance(schema, bool) or "enum" in schema:
        return True
    if "$ref" in schema:
        return schema["$ref"] in finite
    if "anyOf" in schema:
        return any(_ends(branch, finite) for branch in schema["anyOf"])
    if schema["type"] not in (["object"], ["array"]):
        return True  # another type, of which there is something finite
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    needed = [properties.get(name, others) for name in schema.get("required", [])]
    if num_items := schema.get("minItems", 0):
        prefix = schema.get("prefixItems", [])
        needed += prefix[:num_items] + [schema.get("items", True)] * (num_items > len(prefix))
    return all(_ends(part, finite) for part in needed)


def _type_of(value: Any) -> str:
    """number for integers too."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", list: "array", dict: "object", int: "number", float: "number"}
    return names[type(value)]


def _has_type(value: Any, types: set[str]) -> bool:
    return _type_of(value) in types or (_is_number(value) and value == int(value) and "integer" in types)


def _num_properties(value: Any) -> int:
    """Of all objects in a constant."""
    if isinstance(value, dict):
        return len(value) + sum(map(_num_properties, value.values()))
    return sum(map(_num_properties, value)) if isinstance(value, list) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bound(value: Any, path: str) -> int | float:
    if not _is_number(value):
        _fail(path, "it must be a number")
    # With more, llguidance takes a fraction for none.
    if round(value, 18) != value:
        _fail(path, "more than 18 decimal places are not supported")
    return int(value) if value == int(value) else float(value)


def _check_range(keywords: _Schema, path: str) -> None:
    """Refuses what llguidance gets wrong: to be more than a whole number, and less than the next."""
    lows = [keywords[name] for name in ("minimum", "exclusiveMinimum") if name in keywords]
    highs = [keywords[name] for name in ("maximum", "exclusiveMaximum") if name in keywords]
    if lows and highs and -1 < max(lows) - min(highs) < 0:
        for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(keywords.get(keyword), int):
                _fail(f"{path}/{keyword}", "it is not supported if another bound is less than 1 away")


def _length(keyword: str, value: Any, path: str) -> int:
    if not _is_number(value) or value != int(value) or value < 0:
        _fail(path, "it must be a whole number, not a negative one")
    if value > _MAX_LENGTH and keyword.startswith("min"):
        _fail(path, f"more than {_MAX_LENGTH} is not supported")
    return min(int(value), _MAX_LENGTH)


_PATTERN_TOKEN = re.compile(
    r"""
    (?P<escape> \\[dDwWsSfnrtv] | \\x[0-9a-fA-F]{2} | \\u[0-9a-fA-F]{4} | \\u\{[0-9a-fA-F]+\}
              | \\[pP]\{[^}]*\} | \\[!-/:-;=?@\[-`{-~] )
  | (?P<unknown_escape> \\ )
  | (?P<group> \( (?: \?: | \?<[A-Za-z_]\w*> | (?!\?) ) )
  | (?P<unknown_group> \( )
  | (?P<class> \[(?!\^?\])\^? )
  | (?P<unknown_class> \[ )
  | (?P<rest> . )
    """,
    re.VERBOSE | re.DOTALL,
)


def _pattern(pattern: Any, path: str) -> str:
    """A regular expression of JavaScript, in which JSON schema's are written, in the syntax of Rust's."""
    if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN:
        _fail(path, f"it must be a string of at most {_MAX_PATTERN} characters")
    written = ""
    in_class = False
    for token in _PATTERN_TOKEN.finditer(pattern):
        kind, text = token.lastgroup, token.group()
        if kind == "unknown_escape":
            _fail(path, f"{pattern[token.start() :][:2]} is not supported")
        if in_class:
            if kind != "escape" and text[0] in "[(&~":
                # In Rust, classes nest, and can be intersected.
                text = "".join("\\" + character if character in "[&~" else character for character in text)
            if text == "-" and pattern[token.end() :].startswith("-"):
                _fail(path, "-- in a class is not supported")
            in_class = text != "]"
        elif kind in ("unknown_group", "unknown_class"):
            _fail(path, f"{pattern[token.start() :][:4]} is not supported")
        elif kind == "class":
            in_class = True
        elif text == ".":
            text = r"[^\n\r\u2028\u2029]"
        written += text
    return written
