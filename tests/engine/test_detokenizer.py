import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer, TokenBytes
from tests.models import make_tokenizer

TOKENIZER = make_tokenizer()
TOKENIZER.encode_special_tokens = True
TOKEN_BYTES = TokenBytes(TOKENIZER)


def pieces(token_ids: list[int], *stop: str) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(TOKEN_BYTES, stop)
    parts = [detokenizer.feed(token_id) for token_id in token_ids]
    return [*parts, detokenizer.flush()], detokenizer.stopped


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return encoded


@given(st.text())
def test_any_text_comes_back_whole(text: str) -> None:
    assert "".join(pieces(ids(text))[0]) == text


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 10)))
def test_no_tokens_whatever_make_it_fail(token_ids: list[int]) -> None:
    raw = b"".join(TOKEN_BYTES[token_id] for token_id in token_ids)
    text = "".join(pieces(token_ids)[0])
    assert raw.decode(errors="replace").startswith(text)


def test_a_character_of_several_tokens_comes_out_at_its_last() -> None:
    assert pieces(ids("好👋"))[0] == ["", "", "好", "", "", "", "👋", ""]


def test_control_tokens_are_not_text() -> None:
    eot = TOKENIZER.token_to_id("<|eot_id|>")
    assert pieces([*ids("a"), eot, *ids("b")])[0] == ["a", "", "b", ""]


def test_an_answer_cut_inside_a_character_ends_before_it() -> None:
    assert "".join(pieces(ids("a好")[:-1])[0]) == "a"


@pytest.mark.parametrize(
    ("text", "stop", "answer"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("SSTOP", ["STOP"], "S"),
        ("aab", ["ab"], "a"),
        ("abc", ["c", "bc"], "a"),
        ("停止符。后面", ["。"], "停止符"),
        ("STO", ["STOP"], "STO"),
    ],
)
def test_stop_strings(text: str, stop: list[str], answer: str) -> None:
    parts, stopped = pieces(ids(text), *stop)
    assert "".join(parts) == answer
    assert stopped == (text != answer)


@settings(max_examples=300)
@given(st.text("ab好", max_size=40), st.lists(st.text("ab好", min_size=1, max_size=4), max_size=4))
def test_an_answer_is_what_stands_before_the_stop_string_that_comes_first(text: str, stop: list[str]) -> None:
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    expected = text
    if ends:  # several may end with the same character: the longest of them began first
        expected = min((text[: min(ends) - len(s)] for s in stop if text[: min(ends)].endswith(s)), key=len)
    assert "".join(pieces(ids(text), *stop)[0]) == expected
