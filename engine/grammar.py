"""What an answer may still be: a JSON schema as a mask over the vocabulary, token by token.

llguidance does the work, and is imported when the first grammar is asked for. It was chosen by measurement
(2026-11-23, a vocabulary of 128,256 tokens; xgrammar 0.2.8 and llguidance 1.9.1): 3.1 MB and no dependencies
where xgrammar brings Triton, 286 MB, on Linux; imported in 10 ms, not 1.2 s; ordinary schemas compiled in 1 to
133 ms, not in up to 3.3 s. A mask takes 8 to 10 us, where xgrammar takes 6 to 8.
"""

import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.detokenizer import TokenBytes
from engine.json_schema import GrammarError, translate

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_WHITESPACE = r" |\n {0,32}"
"""Between two tokens of JSON: a space, or a line break and the next line's indentation. As little is enough
for JSON as models write it, and no model can lose itself in it."""


class Grammar:
    """What one answer may still be. Its methods belong to one thread at a time."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        """The tokens that may come next, a bit for each: int32, [ceil(vocab_size / 32)], on the CPU.

        Stop tokens are among them exactly when the text is complete, and then, unless it is a number at the
        top, they are the only ones. The mask can be had as soon as the last token has been accepted; other
        threads run meanwhile.

        Raises:
            GrammarError: if it would take too much time or memory. The answer can't be continued.
        """
        mask = torch.zeros((self._vocab_size + 31) // 32, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        # It fails with a mask that allows the stop tokens.
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """Takes the next token of the answer, one that was allowed.

        Raises:
            GrammarError: if it was not.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def copy(self) -> "Grammar":
        """One that goes on from here by itself."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)

    @property
    def has_failed(self) -> bool:
        """Whether the answer can't be continued."""
        return bool(self._matcher.is_error())

    def _check(self) -> None:
        if self.has_failed:
            raise GrammarError(f"the schema can't be followed: {_reason(self._matcher.get_error())}")


def unpack(masks: Tensor, vocab_size: int) -> Tensor:
    """Whether each token is allowed: bool, [n, vocab_size], from n masks in a tensor, on any device."""
    bits = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return (masks.view(torch.uint8).unsqueeze(-1) >> bits & 1).flatten(1)[:, :vocab_size].bool()


class Grammars:
    """Compiles grammars for one tokenizer. Costs nothing until the first is asked for.

    Args:
        tokenizer: a byte-level one.
        stop_token_ids: what may end an answer. All other control tokens are never allowed.
        vocab_size: the model's, which may be larger than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._vocab_size = vocab_size
        self._prepared: tuple[LLTokenizer, LLParserLimits] | None = None

    def compile(self, schema: dict[str, Any] | None) -> Grammar:
        """The grammar of answers that are valid JSON by `schema`; with None, of any JSON object.

        For one worker thread: small schemas take a millisecond, the largest that are taken a second. The
        first call prepares the vocabulary, for another second, half of which no other Python thread runs.

        Raises:
            GrammarError: if the schema can't be taken. The message says what is wrong with it.
        """
        supported: dict[str, Any] = {"type": "object"} if schema is None else translate(schema)
        # No \u escapes: with them, an additional property could be spelled so that it has a declared name.
        supported["x-guidance"] = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": 'nrbtf\\"'}
        # Tokens are the model's choice even where their bytes are not: to find its own tokenization anew,
        # step by step, would take time quadratic in the length of a constant.
        text = f'%llguidance {{"no_forcing": true}}\nstart: %json {json.dumps(supported)}'
        from llguidance import LLMatcher

        tokenizer, limits = self._prepared = self._prepared or self._prepare()
        grammar = Grammar(LLMatcher(tokenizer, text, log_level=0, limits=limits), self._vocab_size)
        grammar.allowed()  # fails here if nothing fits the schema
        return grammar

    def _prepare(self) -> "tuple[LLTokenizer, LLParserLimits]":
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        token_bytes = TokenBytes(self._tokenizer)
        tokens = [_bytes_of(token_bytes, token_id) for token_id in range(self._vocab_size)]
        stop = sorted(self._stop_token_ids)
        # Nothing is ever allowed of tokens without bytes, but for those that stop.
        vocabulary = TokenizerWrapper(SimpleNamespace(tokens=tokens, eos_token_id=stop[0], bos_token_id=None))
        # A state is half a kilobyte; only strings of bounded length need many, nine a character. The larger a
        # grammar, the more can be possible at once, and time is quadratic in that.
        limits = LLParserLimits(
            max_grammar_size=12_000, step_max_items=20_000, max_lexer_states=100_000, verbose_errors=False
        )
        return LLTokenizer(vocabulary, eos_token=stop), limits


def _bytes_of(token_bytes: TokenBytes, token_id: int) -> bytes:
    try:
        return token_bytes[token_id]
    except KeyError:  # no text is made of it: it is not in the byte alphabet
        return b""


def _reason(error: str) -> str:
    """What is of use to the client in llguidance's message."""
    error = error.partition("JSON schema: ")[2] or error
    error = error.partition("\n   1 |")[0].rpartition("error: ")[2]
    return "it is too complex" if error.startswith("panic") else re.split("[\n;]", error)[0][:200]
