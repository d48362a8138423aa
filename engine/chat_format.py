"""Messages -> token ids, in Llama-3's chat format.

The format is built from tokens, not from text, as `ChatFormat` in Meta's reference implementation
(github.com/meta-llama/llama3, llama/tokenizer.py) defines it. So a control token that a user types
is only text: nothing in a message can open a turn, close one, or change its speaker.
"""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Literal, TypedDict

from tokenizers import Tokenizer

Role = Literal["system", "user", "assistant"]

LONG_TEXT = 4_096
"""Characters from which on tokenizing takes milliseconds: it is done where others can run meanwhile."""


class Message(TypedDict):
    """One turn of a dialog."""

    role: Role
    content: str


class ChatFormat:
    """Renders a dialog as the prompt that asks Llama 3 for the next assistant turn.

    A prompt is

        <|begin_of_text|>  then for each message  HEADER(role) enc(content.strip()) <|eot_id|>
        and at the end                            HEADER("assistant")

    where HEADER(role) is `<|start_header_id|> enc(role) <|end_header_id|> enc("\\n\\n")` and `enc` never
    yields a control token.

    Args:
        tokenizer: Llama-3's, or one with the same control tokens. It is switched to encode control
            tokens as text.

    Raises:
        ValueError: if the tokenizer lacks a control token of Llama 3, or would let text become one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True
        self._bos = self._control_token("<|begin_of_text|>")
        self._end_of_text = self._control_token("<|end_of_text|>")
        self._start_header = self._control_token("<|start_header_id|>")
        self._end_header = self._control_token("<|end_header_id|>")
        self._eot = self._control_token("<|eot_id|>")
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        # generation_config.json of the first Llama-3 releases names only one of the two.
        self.stop_token_ids = frozenset({self._end_of_text, self._eot})

    @classmethod
    def from_pretrained(cls, model: Path) -> "ChatFormat":
        """Reads `tokenizer.json` in the folder `model`.

        Raises:
            ValueError: if there is none that can be read, or it is not Llama-3's.
        """
        path = model / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises the bare Exception for every fault
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which control tokens are only text."""
        if len(text) < LONG_TEXT:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        else:  # of tokenizers' methods, only those for batches release Python's global lock
            [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, known without tokenizing it: of megabytes that would
        take seconds, and a hundred times their memory."""
        return len(text) // self._longest_token

    def encode_dialog(self, messages: Seq[Message]) -> list[int]:
        """Token ids of the prompt that asks for the assistant's answer to `messages`."""
        token_ids = [self._bos]
        for message in messages:
            token_ids += self._header(message["role"])
            token_ids += self.encode(message["content"].strip())
            token_ids.append(self._eot)
        return token_ids + self._header("assistant")

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text to go on with, without a dialog around it."""
        return [self._bos, *self.encode(text)]

    def _header(self, role: Role) -> list[int]:
        return [self._start_header, *self.encode(role), self._end_header, *self.encode("\n\n")]

    def _control_token(self, token: str) -> int:
        token_id: int | None = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer is not Llama-3's: it has no control token {token}")
        if token_id in self.encode(token):
            raise ValueError(f"the tokenizer is not Llama-3's: the text {token} becomes the control token")
        return token_id
