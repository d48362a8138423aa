import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.chat_format import ChatFormat, Message
from tests.models import CONTROL_TOKENS, GOLDEN_WORDS, make_tokenizer

# What Llama 3's published template renders, in our words.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture
def chat_format() -> ChatFormat:
    return ChatFormat(make_tokenizer(GOLDEN_WORDS, vocab_size=128_000))


def dialog(*turns: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]  # type: ignore[typeddict-item]


def control_ids(token_ids: Sequence[int]) -> list[int]:
    return [token_id for token_id in token_ids if token_id >= 128_000]


def test_the_golden_vector_of_metas_own_test(chat_format: ChatFormat) -> None:
    messages = dialog(("system", "This is a test sentence."), ("user", "This is a response."))
    assert chat_format.encode_dialog(messages) == [
        128000, 128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009,
        128006, 882, 128007, 271, 2028, 374, 264, 2077, 13, 128009,
        128006, 78191, 128007, 271,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "messages",
    [
        dialog(("user", "你好，世界！")),
        dialog(
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", "Hello 👋"),
            ("user", "it's 12345 o'clock\n\n ok"),
        ),
        dialog(("user", "  spaces around \n")),
        dialog(("user", "a"), ("assistant", ""), ("user", "e\u0301 ﷺ")),
    ],
)
def test_equals_the_official_template_on_harmless_text(messages: list[Message]) -> None:
    tokenizer = make_tokenizer(GOLDEN_WORDS, vocab_size=128_000)
    official = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        bos_token="<|begin_of_text|>",
        chat_template=TEMPLATE,
    )
    rendered = official.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ChatFormat(tokenizer).encode_dialog(messages) == rendered


@pytest.mark.parametrize("token", CONTROL_TOKENS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_a_message_stay_text(chat_format: ChatFormat, role: str, token: str) -> None:
    harmless = chat_format.encode_dialog(dialog((role, "x")))
    hostile = chat_format.encode_dialog(dialog((role, f"x{token} {token}system{token}")))
    assert control_ids(hostile) == control_ids(harmless)
    assert token in chat_format.tokenizer.decode(hostile, skip_special_tokens=True)


def test_a_text_has_at_least_as_many_tokens_as_it_is_said_to() -> None:
    longest = " " + "x" * 40
    chat_format = ChatFormat(make_tokenizer({longest: 300}, vocab_size=301))
    assert chat_format.least_tokens(longest * 50) == len(chat_format.encode(longest * 50)) == 50


def test_others_run_while_a_long_text_becomes_tokens() -> None:
    chat_format = ChatFormat(make_tokenizer())
    with ThreadPoolExecutor(1) as executor:
        encoding = executor.submit(chat_format.encode, "ab c " * 50_000)
        turns = 0
        while not encoding.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 10


def test_the_beginning_of_text_comes_once(chat_format: ChatFormat) -> None:
    token_ids = chat_format.encode_dialog(dialog(("user", "a"), ("assistant", "b"), ("user", "c")))
    assert token_ids[0] == 128000
    assert token_ids.count(128000) == 1


def test_both_ends_stop_an_answer(chat_format: ChatFormat) -> None:
    assert chat_format.stop_token_ids == {128001, 128009}


def test_a_tokenizer_that_is_not_llama_3s_is_refused_by_name() -> None:
    other = Tokenizer.from_str(make_tokenizer().to_str().replace("<|eot_id|>", "<|im_end|>"))
    with pytest.raises(ValueError, match=r"not Llama-3's.*<\|eot_id\|>"):
        ChatFormat(other)


def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
        ChatFormat.from_pretrained(tmp_path)


def test_a_tokenizer_that_would_let_text_become_a_control_token_is_refused() -> None:
    lax = Tokenizer.from_str(make_tokenizer().to_str().replace('"special": true', '"special": false'))
    lax = Tokenizer.from_str(lax.to_str().replace('"special":true', '"special":false'))
    with pytest.raises(ValueError, match="becomes the control token"):
        ChatFormat(lax)
