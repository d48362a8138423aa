"""One request's state."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from engine.prompt_lookup import PromptLookup

if TYPE_CHECKING:
    from engine.grammar import Grammar

BLOCK_SIZE = 16
"""Tokens in a block of the KV cache."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the answer's tokens are chosen, and when it ends. Whoever builds one has checked the bounds."""

    max_tokens: int = 512
    temperature: float = 0.5
    """0 is greedy."""
    top_p: float = 0.9
    """1 is off."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """0 is off."""
    repetition_penalty: float = 1.1
    """Over prompt and answer, as transformers defines it; 1 is off."""
    presence_penalty: float = 0.0
    """Over the answer, as OpenAI defines it; 0 is off."""
    frequency_penalty: float = 0.0
    """Over the answer, as OpenAI defines it; 0 is off."""
    seed: int = 0
    """Of 64 bits, signed. The same seed draws the same numbers, whoever else is being served."""
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    """Until there are as many, no stop token is drawn."""
    ignore_eos: bool = False
    """A stop token does not end the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """What is added to the logits of some tokens."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report at each place, beside the one drawn; None: nothing."""

    @property
    def is_greedy(self) -> bool:
        # Below this, dividing by the temperature could overflow.
        return self.temperature < 1e-5

    @property
    def truncates(self) -> bool:
        """Whether a token can be ruled out by its rank or its probability."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class TokenLogprob(NamedTuple):
    """A token and the logarithm of its probability, as the model has it: before penalties and temperature."""

    token_id: int
    logprob: float


class Logprobs(NamedTuple):
    """The token that was drawn, and the likeliest at its place, likeliest first."""

    drawn: TokenLogprob
    top: list[TokenLogprob]


@dataclass(eq=False)
class Sequence:
    """A prompt and the answer that grows behind it.

    A token is *computed* once its keys and values are in the KV cache. The last token of a sequence that
    decodes is always the one pending: it was sampled, and is the input of the next step.
    """

    token_ids: list[int]
    """Prompt and answer."""
    params: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    grammar: "Grammar | None" = None
    """What the answer may be; None: anything."""
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    """The KV blocks that hold the tokens, in order."""
    block_hashes: list[bytes] = field(default_factory=list)
    """One for each full block of token_ids, as far as they were asked for."""
    row: int = -1
    """Where the sampler keeps what it knows of this sequence; -1 while it is not running."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Why it failed."""
    logprobs: list[Logprobs] = field(default_factory=list)
    """Of the answer's tokens, where they were asked for."""
    lookup: PromptLookup = field(default_factory=PromptLookup)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    def slot(self, position: int) -> int:
        """The place in the KV cache of the token at `position`."""
        return self.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    @property
    def num_pending(self) -> int:
        """Tokens not yet computed: one while decoding, more during prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_missing(self) -> int:
        """Tokens that the answer still may get."""
        return self.params.max_tokens - self.num_output_tokens

    @property
    def is_finished(self) -> bool:
        return self.error is not None or self.finish_reason is not None

    @property
    def is_restricted(self) -> bool:
        """Whether some tokens may not come next, or come with a bias."""
        return (
            self.grammar is not None
            or bool(self.params.logit_bias)
            or self.num_output_tokens < self.params.min_tokens
        )

    def append(self, token_id: int | None) -> None:
        """Adds a sampled token, and finishes the sequence if it is its last, or if none could be sampled."""
        if token_id is None:
            self.error = self.error or "the model's logits are not numbers"
            return
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif self.grammar is not None:
            try:
                self.grammar.accept(token_id)
            except ValueError as error:
                self.error = str(error)
        if self.finish_reason is None and self.num_missing <= 0:
            self.finish_reason = "length"
