"""Logits -> token ids, for all sequences of a step at once, each with its own parameters."""

import struct
from collections.abc import Sequence as Seq
from hashlib import blake2b

import numpy
import torch
from torch import Tensor

from engine.grammar import unpack
from engine.sequence import Logprobs, SamplingParams, Sequence, TokenLogprob


class Sampler:
    """Applies, in transformers' order, penalties, temperature, top-k, top-p and min-p, and then draws.

    Each running sequence owns a row, in which the tokens that its penalties look at are counted.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._owners: list[Sequence | None] = [None] * max_num_seqs
        self._in_prompt = torch.zeros(max_num_seqs, vocab_size, dtype=torch.bool, device=device)
        self._output_counts = torch.zeros(max_num_seqs, vocab_size, dtype=torch.int32, device=device)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
        """Draws the next token of each sequence.

        Args:
            logits: [sequences, vocab_size], float32.

        Returns:
            A token id for each sequence; None where the logits are not numbers, or no token is allowed: that
            sequence has failed, and no other.
        """
        raw = logits
        penalized = [i for i, sequence in enumerate(sequences) if sequence.params.penalizes]
        if penalized:
            logits = self._penalize(logits, penalized, sequences)
        if restricted := [i for i, sequence in enumerate(sequences) if sequence.is_restricted]:
            logits = _restrict(logits, restricted, sequences)
        is_number = logits.amax(-1).isfinite()
        token_ids = _choose(logits, sequences)
        if penalized:
            self._count(token_ids, penalized, sequences)
        sampled = [
            token_id if token_id >= 0 else None for token_id in token_ids.where(is_number, -1).tolist()
        ]
        if reported := [i for i, sequence in enumerate(sequences) if sequence.params.logprobs is not None]:
            _report(raw, sampled, reported, sequences)
        return sampled

    def _penalize(self, logits: Tensor, penalized: list[int], sequences: Seq[Sequence]) -> Tensor:
        """Repetition penalty as in transformers' RepetitionPenaltyLogitsProcessor; presence and frequency
        penalty as in OpenAI's API reference."""
        for i in penalized:
            self._claim_row(sequences[i])
        rows = torch.tensor([sequences[i].row for i in penalized], device=logits.device)
        index = torch.tensor(penalized, device=logits.device)
        params = [sequences[i].params for i in penalized]
        # A logit divided by less would not be a number.
        repetition = _column([max(p.repetition_penalty, 1e-6) for p in params], logits)
        presence = _column([p.presence_penalty for p in params], logits)
        frequency = _column([p.frequency_penalty for p in params], logits)

        counts = self._output_counts[rows]
        seen = self._in_prompt[rows] | (counts > 0)
        chosen = logits[index]
        chosen = torch.where(seen, torch.where(chosen < 0, chosen * repetition, chosen / repetition), chosen)
        chosen -= frequency * counts + presence * (counts > 0)
        return logits.index_copy(0, index, chosen)

    def _claim_row(self, sequence: Sequence) -> None:
        """Fills a sequence's row, if it was another's before. One that was preempted comes with an answer."""
        row = sequence.row
        if self._owners[row] is sequence:
            return
        self._owners[row] = sequence
        token_ids = torch.tensor(sequence.token_ids, device=self._in_prompt.device)
        self._in_prompt[row] = False
        self._in_prompt[row, token_ids[: sequence.num_prompt_tokens]] = True
        output_ids = token_ids[sequence.num_prompt_tokens :]
        self._output_counts[row] = torch.bincount(output_ids, minlength=self._output_counts.shape[1])

    def _count(self, token_ids: Tensor, penalized: list[int], sequences: Seq[Sequence]) -> None:
        rows = torch.tensor([sequences[i].row for i in penalized], device=token_ids.device)
        index = torch.tensor(penalized, device=token_ids.device)
        self._output_counts[rows, token_ids[index]] += 1


def _restrict(logits: Tensor, restricted: list[int], sequences: Seq[Sequence]) -> Tensor:
    """Adds the biases, as OpenAI's API reference defines them, and rules out what may not come."""
    logits = logits.clone()
    masks: dict[int, Tensor] = {}
    for i in restricted:
        sequence, row = sequences[i], logits[i]
        if sequence.params.logit_bias:
            token_ids, biases = zip(*sequence.params.logit_bias, strict=True)
            row[list(token_ids)] += torch.tensor(biases, device=row.device)
        if sequence.num_output_tokens < sequence.params.min_tokens:
            row[list(sequence.stop_token_ids)] = -torch.inf
        if sequence.grammar is not None:
            try:
                masks[i] = sequence.grammar.allowed()
            except ValueError as error:
                sequence.error = str(error)
                row.fill_(-torch.inf)
    if masks:
        allowed = unpack(torch.stack(list(masks.values())).to(logits.device), logits.shape[1])
        index = torch.tensor(list(masks), device=logits.device)
        logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return logits


def _report(logits: Tensor, sampled: list[int | None], reported: list[int], sequences: Seq[Sequence]) -> None:
    """Adds to each sequence that asks for it what the model made of the place that was just filled."""
    logprobs = logits[reported].log_softmax(-1)
    most = max(sequences[i].params.logprobs or 0 for i in reported)
    top = logprobs.topk(most, dim=-1)
    drawn = logprobs.gather(1, torch.tensor([[sampled[i] or 0] for i in reported], device=logprobs.device))
    for i, of_drawn, values, token_ids in zip(
        reported, drawn[:, 0].tolist(), top.values.tolist(), top.indices.tolist(), strict=True
    ):
        token_id, count = sampled[i], sequences[i].params.logprobs
        if token_id is not None:
            ranked = [TokenLogprob(*pair) for pair in zip(token_ids, values, strict=True)][:count]
            sequences[i].logprobs.append(Logprobs(TokenLogprob(token_id, of_drawn), ranked))


def draw_uniform(seed: int, counter: int) -> float:
    """A number in (0, 1] that depends on nothing but its arguments."""
    digest = blake2b(struct.pack("<qQ", seed, counter), digest_size=4).digest()
    # 24 bits: as many as a float32 keeps.
    return ((int.from_bytes(digest, "little") >> 8) + 1) / (1 << 24)


def _choose(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Token ids, [sequences]. The vocabulary is sorted only for those whose parameters rank it."""
    token_ids = logits.argmax(-1)
    for draw, truncates in ((_draw, False), (_draw_truncated, True)):
        chosen = [
            i
            for i, sequence in enumerate(sequences)
            if not sequence.params.is_greedy and sequence.params.truncates == truncates
        ]
        if chosen:
            index = torch.tensor(chosen, device=logits.device)
            params = [sequences[i].params for i in chosen]
            uniform = _column(
                [draw_uniform(sequences[i].params.seed, sequences[i].num_output_tokens) for i in chosen],
                logits,
            )
            scaled = logits[index] / _column([p.temperature for p in params], logits)
            token_ids[index] = draw(scaled, uniform, params)
    return token_ids


def _draw(logits: Tensor, uniform: Tensor, params: list[SamplingParams]) -> Tensor:
    """Draws from the whole vocabulary. logits: [n, vocab_size]; uniform: [n, 1]. Returns [n]."""
    return _invert(logits.softmax(-1), uniform)


def _draw_truncated(logits: Tensor, uniform: Tensor, params: list[SamplingParams]) -> Tensor:
    """Draws from what top-k, top-p and min-p leave. logits: [n, vocab_size]; uniform: [n, 1]. Returns [n]."""
    vocab_size = logits.shape[1]
    # A sum of probabilities may round to 1 before its end: where top-p is off, nothing is to be cut.
    top_p = _column([p.top_p if p.top_p < 1 else 2.0 for p in params], logits)
    top_k = torch.tensor([[min(p.top_k or vocab_size, vocab_size)] for p in params], device=logits.device)
    min_p = _column([p.min_p for p in params], logits)

    probs = logits.softmax(-1)
    ranked = _sort_descending(probs)
    rank = torch.arange(vocab_size, device=logits.device)
    cumulated = ranked.cumsum(-1)
    of_top_k = cumulated.gather(1, top_k - 1)
    num_kept = ((rank < top_k) & (cumulated - ranked < top_p * of_top_k)).sum(-1, keepdim=True).clamp(min=1)
    least = ranked.gather(1, num_kept - 1).maximum(min_p * ranked[:, :1])
    return _invert(probs * (probs >= least), uniform)


def _sort_descending(values: Tensor) -> Tensor:
    """Sorts each row."""
    if values.is_cuda:
        return values.sort(descending=True).values
    return torch.from_numpy(numpy.sort(values.numpy())).flip(-1)  # several times as fast as torch's


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulated `probs`, [n, m], reach the share `uniform`, [n, 1], of their sum. Returns [n]."""
    cumulated = probs.cumsum(-1)
    index = torch.searchsorted(cumulated, uniform * cumulated[:, -1:])
    # Only where probs are not numbers, and the result is not used, does nothing reach it.
    return index.clamp(max=probs.shape[1] - 1).squeeze(1)


def _column(values: list[float], like: Tensor) -> Tensor:
    """[n, 1], of the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
