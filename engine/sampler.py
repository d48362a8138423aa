"""Logits -> token ids, for all sequences of a step at once, each with its own parameters."""

import struct
from collections.abc import Sequence as Seq
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy
import torch
from torch import Tensor

from engine.grammar import unpack
from engine.sequence import Logprobs, Sequence, TokenLogprob


class Knobs(NamedTuple):
    """The parameters of a step's sequences, each [sequences], on the sampler's device."""

    rows: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    temperature: Tensor
    """0 is greedy."""
    top_k: Tensor
    """The vocabulary's size is off."""
    top_p: Tensor
    """1 is off."""
    min_p: Tensor
    uniform: Tensor
    """The number that each draws with."""

    @classmethod
    def of(cls, sequences: Seq[Sequence], vocab_size: int, device: torch.device) -> Self:
        """Brings all of them to the device at once: a float keeps every row and rank."""
        values = [
            (
                sequence.row,
                # A logit divided by less would not be a number.
                max(params.repetition_penalty, 1e-6),
                params.presence_penalty,
                params.frequency_penalty,
                0 if params.is_greedy else params.temperature,
                min(params.top_k or vocab_size, vocab_size),
                params.top_p,
                params.min_p,
                0 if params.is_greedy else draw_uniform(params.seed, sequence.num_output_tokens),
            )
            for sequence in sequences
            for params in (sequence.params,)
        ]
        rows, *others = on_device(values, device, torch.float32).T.contiguous()
        return cls(rows.long(), *others)


class Drawn:
    """The tokens of a step. A GPU sends them to the host when they are drawn; it need not wait for them."""

    def __init__(self, sequences: Seq[Sequence], token_ids: Tensor, ranked: list[Tensor]) -> None:
        """
        Args:
            sequences: for which they are.
            token_ids: [sequences], on the sampler's device; -1 where none could be drawn.
            ranked: what `_rank` gives of them.
        """
        self.sequences = sequences
        self.token_ids = token_ids
        self._on_host = [tensor.to("cpu", non_blocking=True) for tensor in (token_ids, *ranked)]
        self._arrival: Any = torch.cuda.Event() if token_ids.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrival is not None:
            self._arrival.record()

    def read(self) -> list[int | None]:
        """Waits for them, and adds to each sequence that asks for it what the model made of its place.

        Returns:
            A token id for each sequence; None where the logits are not numbers, or no token is allowed: that
            sequence has failed, and no other.
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        drawn, *ranked = (tensor.tolist() for tensor in self._on_host)
        token_ids = [token_id if token_id >= 0 else None for token_id in drawn]
        for i, of_drawn, values, likeliest in zip(_reported(self.sequences), *ranked, strict=True):
            token_id, count = token_ids[i], self.sequences[i].params.logprobs
            if token_id is not None:
                top = [TokenLogprob(*pair) for pair in zip(likeliest, values, strict=True)][:count]
                self.sequences[i].logprobs.append(Logprobs(TokenLogprob(token_id, of_drawn), top))
        return token_ids


class Sampler:
    """Applies, in transformers' order, penalties, temperature, top-k, top-p and min-p, and then draws.

    Each running sequence owns a row, in which the tokens that its penalties look at are counted.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._owners: list[Sequence | None] = [None] * max_num_seqs
        self._in_prompt = torch.zeros(max_num_seqs, vocab_size, dtype=torch.bool, device=device)
        self._output_counts = torch.zeros(max_num_seqs, vocab_size, dtype=torch.int32, device=device)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> Drawn:
        """Draws the next token of each sequence.

        Args:
            logits: [sequences, vocab_size], float32; they are read no more when this has returned, or by what
                a GPU has been given to do before.
        """
        raw = logits
        knobs = Knobs.of(sequences, logits.shape[1], logits.device)
        penalizes = any(sequence.params.penalizes for sequence in sequences)
        if penalizes:
            logits = self._penalize(logits, knobs, sequences)
        if restricted := [i for i, sequence in enumerate(sequences) if sequence.is_restricted]:
            logits = _restrict(logits, restricted, sequences)
        token_ids = _choose(logits, knobs, sequences)
        if penalizes:  # where none was chosen, -1, a sequence has failed, and its row counts no more
            self._output_counts[knobs.rows, token_ids] += 1
        return Drawn(sequences, token_ids, _rank(raw, token_ids, sequences))

    def _penalize(self, logits: Tensor, knobs: Knobs, sequences: Seq[Sequence]) -> Tensor:
        """Repetition penalty as in transformers' RepetitionPenaltyLogitsProcessor; presence and frequency
        penalty as in OpenAI's API reference."""
        for sequence in sequences:
            self._claim_row(sequence)
        if logits.is_cuda:
            from engine.sample_kernels import penalize  # Triton comes with torch for CUDA only

            return penalize(
                logits, knobs.rows, self._in_prompt, self._output_counts,
                knobs.repetition, knobs.presence, knobs.frequency,
            )  # fmt: skip
        counts = self._output_counts[knobs.rows]
        seen = self._in_prompt[knobs.rows] | (counts > 0)
        factor, presence, frequency = (
            column.unsqueeze(1) for column in (knobs.repetition, knobs.presence, knobs.frequency)
        )
        logits = torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits)
        return logits - (frequency * counts + presence * (counts > 0))

    def _claim_row(self, sequence: Sequence) -> None:
        """Fills a sequence's row, if it was another's before. One that was preempted comes with an answer."""
        row = sequence.row
        if self._owners[row] is sequence:
            return
        self._owners[row] = sequence
        if not sequence.params.penalizes:  # its tokens are counted, but what is there means nothing
            return
        token_ids = on_device(sequence.token_ids, self._in_prompt.device)
        self._in_prompt[row] = False
        self._in_prompt[row, token_ids[: sequence.num_prompt_tokens]] = True
        output_ids = token_ids[sequence.num_prompt_tokens :]
        self._output_counts[row] = torch.bincount(output_ids, minlength=self._output_counts.shape[1])


def _restrict(logits: Tensor, restricted: list[int], sequences: Seq[Sequence]) -> Tensor:
    """Adds the biases, as OpenAI's API reference defines them, and rules out what may not come."""
    logits = logits.clone()
    masks: dict[int, Tensor] = {}
    for i in restricted:
        sequence, row = sequences[i], logits[i]
        if sequence.params.logit_bias:
            token_ids, biases = zip(*sequence.params.logit_bias, strict=True)
            row[on_device(token_ids, row.device)] += on_device(biases, row.device, torch.float32)
        if sequence.num_output_tokens < sequence.params.min_tokens:
            row.index_fill_(0, on_device(list(sequence.stop_token_ids), row.device), -torch.inf)
        if sequence.grammar is not None:
            try:
                masks[i] = sequence.grammar.allowed()
            except ValueError as error:
                sequence.error = str(error)
                row.fill_(-torch.inf)
    if masks:
        packed = torch.stack(list(masks.values()))
        packed = (packed.pin_memory() if logits.is_cuda else packed).to(logits.device, non_blocking=True)
        allowed = unpack(packed, logits.shape[1])
        index = on_device(list(masks), logits.device)
        logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return logits


def _reported(sequences: Seq[Sequence]) -> list[int]:
    """Which of them ask for logprobs."""
    return [i for i, sequence in enumerate(sequences) if sequence.params.logprobs is not None]


def _rank(logits: Tensor, token_ids: Tensor, sequences: Seq[Sequence]) -> list[Tensor]:
    """Of each sequence that is reported: the logprob of its token, [reported], and the likeliest tokens' and
    they themselves, [reported, tokens] each. Empty where there is none."""
    reported = _reported(sequences)
    if not reported:
        return []
    index = on_device(reported, logits.device)
    logprobs = logits[index].log_softmax(-1)
    top = logprobs.topk(max(sequences[i].params.logprobs or 0 for i in reported), dim=-1)
    of_drawn = logprobs.gather(1, token_ids[index].clamp(min=0).unsqueeze(1)).squeeze(1)
    return [of_drawn, top.values, top.indices]


def on_device(values: Seq[Any], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Brings numbers to a device. Other than with a list as an index, or with what `torch.tensor` puts there
    itself, nobody waits until a GPU has done all it was given before."""
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda" and len(values) > 0)
    return pinned.to(device, non_blocking=True)


def draw_uniform(seed: int, counter: int) -> float:
    """A number in (0, 1] that depends on nothing but its arguments."""
    digest = blake2b(struct.pack("<qQ", seed, counter), digest_size=4).digest()
    # 24 bits: as many as a float32 keeps.
    return ((int.from_bytes(digest, "little") >> 8) + 1) / (1 << 24)


def _choose(logits: Tensor, knobs: Knobs, sequences: Seq[Sequence]) -> Tensor:
    """Token ids, [sequences]; -1 where the logits are not numbers.

    The vocabulary is sorted only where somebody's parameters rank it, and on CUDA never.
    """
    if logits.is_cuda:
        from engine.sample_kernels import choose

        return choose(logits, knobs.temperature, knobs.top_k, knobs.top_p, knobs.min_p, knobs.uniform)
    highest, token_ids = logits.max(-1)
    if not all(sequence.params.is_greedy for sequence in sequences):
        # Where it is 0, these are no numbers, and not used.
        probs = (logits / knobs.temperature.unsqueeze(1)).softmax(-1)
        if any(sequence.params.truncates for sequence in sequences):
            probs *= probs >= _least_kept(probs, knobs.top_k.long(), knobs.top_p, knobs.min_p)
        token_ids = torch.where(knobs.temperature > 0, _invert(probs, knobs.uniform), token_ids)
    return token_ids.where(highest.isfinite(), -1)


def _least_kept(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The least probability that top-k, top-p and min-p leave.

    Args:
        probs: [n, vocab_size]; top_k, top_p, min_p: [n].

    Returns:
        [n, 1]
    """
    ranked = torch.from_numpy(numpy.sort(-probs.numpy())).neg_()  # several times as fast as torch's
    cumulated = ranked.cumsum(-1)
    last_of_top_k = top_k.unsqueeze(1) - 1
    # A sum of probabilities may round to 1 before its end: where top-p is off, nothing is to be cut.
    share = top_p.where(top_p < 1, 2.0).unsqueeze(1)
    last = torch.searchsorted(cumulated, share * cumulated.gather(1, last_of_top_k)).minimum(last_of_top_k)
    return ranked.gather(1, last).maximum(min_p.unsqueeze(1) * ranked[:, :1])


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulated `probs`, [n, m], reach the share `uniform`, [n], of their sum. Returns [n]."""
    cumulated = probs.cumsum(-1)
    index = torch.searchsorted(cumulated, uniform.unsqueeze(1) * cumulated[:, -1:])
    # Only where probs are not numbers, and the result is not used, does nothing reach it.
    return index.clamp(max=probs.shape[1] - 1).squeeze(1)
