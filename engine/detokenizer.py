"""Token ids -> text, token by token: characters and stop strings that straddle tokens come out whole."""

import codecs
from collections.abc import Sequence as Seq

from tokenizers import Tokenizer


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level BPE vocabulary, inverted.

    Source: OpenAI's GPT-2, encoder.py: visible Latin-1 characters stand for themselves, and the other
    bytes, in order, for the characters from U+0100 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class TokenBytes:
    """The bytes of each token of a byte-level vocabulary; none for control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = dict.fromkeys(tokenizer.get_added_tokens_decoder(), b"")

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            # A model may have more ids than its tokenizer.
            token = self._tokenizer.id_to_token(token_id) or ""
            known = self._known[token_id] = bytes(_BYTE_OF[character] for character in token)
        return known

    def name(self, token_id: int) -> bytes:
        """The bytes of a token; of a control token those of its name, such as <|eot_id|>."""
        return self[token_id] or (self._tokenizer.id_to_token(token_id) or "").encode()


class Detokenizer:
    """One answer's text.

    A character is given out once its last byte is there, and text that may yet become a stop string once
    it is certain that it doesn't. What never becomes a whole character is U+FFFD; an answer that ends in
    the middle of a character ends before it.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Seq[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held_back = ""
        self.stopped = False
        """Whether a stop string has come. It is not given out, nor is anything after it."""

    def feed(self, token_id: int) -> str:
        """Takes the next token, and returns the text that is certain by now."""
        if self.stopped:
            return ""
        text = self._held_back + self._utf8.decode(self._token_bytes[token_id])
        end = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if end is not None:
            self.stopped = True
            self._held_back = ""
            return text[:end]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held_back = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text that was held back: the answer has ended without a stop string."""
        return self._held_back


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
