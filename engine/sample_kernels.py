"""The sampler's work on CUDA, as Triton kernels: each reads the logits where they are, and sorts nothing.

They compute what `engine.sampler` does in plain PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 4096
"""Of the vocabulary, read at a time."""
# Parts of one tensor, which begin where the number of sequences has them begin: one kernel for all numbers.
_KNOBS = ["repetition", "presence", "frequency", "temperature", "top_k", "top_p", "min_p", "uniform"]


def penalize(
    logits: Tensor,
    rows: Tensor,
    in_prompt: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """
    Args:
        logits: [sequences, vocab_size], float32.
        rows: [sequences], of the next two.
        in_prompt, output_counts: [rows, vocab_size], bool and int32.
        repetition, presence, frequency: [sequences].

    Returns:
        [sequences, vocab_size]
    """
    num_seqs, vocab_size = logits.shape
    output = torch.empty_like(logits)
    _penalize[(num_seqs, triton.cdiv(vocab_size, _TOKENS))](
        logits, rows, in_prompt.view(torch.uint8), output_counts, repetition, presence, frequency, output,
        vocab_size, TOKENS=_TOKENS, num_warps=8,
    )  # fmt: skip
    return output


def choose(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """
    Args:
        logits: [sequences, vocab_size], float32.
        temperature: [sequences]; 0 is greedy.
        top_k: [sequences]; the vocabulary's size is off.
        top_p: [sequences]; 1 is off.
        min_p: [sequences]; 0 is off.
        uniform: [sequences], in (0, 1].

    Returns:
        [sequences], int64: token ids, -1 where the logits are not numbers.
    """
    num_seqs, vocab_size = logits.shape
    weights = torch.empty_like(logits)
    token_ids = torch.empty(num_seqs, dtype=torch.long, device=logits.device)
    _choose[(num_seqs,)](
        logits, temperature, top_k, top_p, min_p, uniform, weights, token_ids,
        vocab_size, TOKENS=_TOKENS, num_warps=16,
    )  # fmt: skip
    return token_ids


@triton.jit(do_not_specialize_on_alignment=_KNOBS)
def _penalize(
    logits, rows, in_prompt, output_counts, repetition, presence, frequency, output,
    vocab_size, TOKENS: tl.constexpr,
):  # fmt: skip
    """A part of one sequence's vocabulary."""
    seq = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + seq)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < vocab_size
    logit = tl.load(logits + seq * vocab_size + token, mask=is_token)
    count = tl.load(output_counts + row * vocab_size + token, mask=is_token, other=0)
    seen = (tl.load(in_prompt + row * vocab_size + token, mask=is_token, other=0) > 0) | (count > 0)
    factor = tl.load(repetition + seq)
    logit = tl.where(seen, tl.where(logit < 0, logit * factor, logit / factor), logit)
    logit -= tl.load(frequency + seq) * count + tl.load(presence + seq) * (count > 0).to(tl.float32)
    tl.store(output + seq * vocab_size + token, logit, mask=is_token)


@triton.jit(do_not_specialize_on_alignment=_KNOBS)
def _choose(
    logits, temperature, top_k, top_p, min_p, uniform, weights, token_ids, vocab_size, TOKENS: tl.constexpr
):  # fmt: skip
    """One sequence. A token's weight is its probability over that of the likeliest."""
    seq = tl.program_id(0).to(tl.int64)
    logits += seq * vocab_size
    weights += seq * vocab_size
    highest, chosen = _find_highest(logits, vocab_size, TOKENS)
    degree = tl.load(temperature + seq)
    if highest == float("inf") or highest == -float("inf"):
        chosen = tl.full([], -1, tl.int32)
    elif degree > 0:
        _weigh(logits, weights, highest, degree, vocab_size, TOKENS)
        least = tl.load(min_p + seq)
        kept = tl.load(top_k + seq)
        of_top_k = tl.full([], 0.0, tl.float32)
        if kept < vocab_size:
            of_top_k = _find_least(weights, of_top_k, kept, vocab_size, True, TOKENS)
        share = tl.load(top_p + seq)
        of_top_p = tl.full([], 0.0, tl.float32)
        if share < 1:
            mass = share * _sum(weights, of_top_k, vocab_size, TOKENS)
            of_top_p = _find_least(weights, of_top_k, mass, vocab_size, False, TOKENS)
        least = tl.maximum(least, tl.maximum(of_top_k, of_top_p))
        mass = tl.load(uniform + seq) * _sum(weights, least, vocab_size, TOKENS)
        chosen = _find_mass(weights, least, mass, vocab_size, TOKENS)
    tl.store(token_ids + seq, chosen.to(tl.int64))


@triton.jit
def _find_highest(logits, vocab_size, TOKENS: tl.constexpr):
    """The highest logit, infinite if one is not a number, and the first token that has it."""
    highest = tl.full([TOKENS], -float("inf"), tl.float32)
    chosen = tl.zeros([TOKENS], tl.int32)
    for first in range(0, vocab_size, TOKENS):
        token = first + tl.arange(0, TOKENS)
        logit = tl.load(logits + token, mask=token < vocab_size, other=-float("inf"))
        logit = tl.where(logit != logit, float("inf"), logit)
        chosen = tl.where(logit > highest, token, chosen)
        highest = tl.maximum(highest, logit)
    of_all = tl.max(highest, 0)
    return of_all, tl.min(tl.where(highest == of_all, chosen, vocab_size), 0)


@triton.jit
def _weigh(logits, weights, highest, degree, vocab_size, TOKENS: tl.constexpr):
    for first in range(0, vocab_size, TOKENS):
        token = first + tl.arange(0, TOKENS)
        logit = tl.load(logits + token, mask=token < vocab_size, other=-float("inf"))
        tl.store(weights + token, tl.exp((logit - highest) / degree), mask=token < vocab_size)
    tl.debug_barrier()  # what one thread has written, another may read


@triton.jit
def _load(weights, first, least, vocab_size, TOKENS: tl.constexpr):
    """Some tokens' weights, 0 for those that weigh less than `least`."""
    token = first + tl.arange(0, TOKENS)
    weight = tl.load(weights + token, mask=token < vocab_size, other=0.0)
    return tl.where(weight >= least, weight, 0.0)


@triton.jit
def _sum(weights, least, vocab_size, TOKENS: tl.constexpr):
    total = tl.zeros([TOKENS], tl.float32)
    for first in range(0, vocab_size, TOKENS):
        total += _load(weights, first, least, vocab_size, TOKENS)
    return tl.sum(total, 0)


@triton.jit
def _find_least(weights, least, target, vocab_size, COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """The highest weight at which the tokens of that weight or more, and of `least`, come to `target`: by
    their number, or by the sum of their weights.

    It is found two bits at a time: positive floats are in the same order as the integers of the same bits.
    """
    low = tl.full([], 0, tl.int32)
    high = tl.full([], 0x3F800001, tl.int32)  # just above 1, the weight of the likeliest
    while high - low > 1:
        quarter = tl.maximum(1, (high - low) // 4)
        one = tl.maximum(least, (low + quarter).to(tl.float32, bitcast=True))
        two = tl.maximum(least, (low + 2 * quarter).to(tl.float32, bitcast=True))
        three = tl.maximum(least, (low + 3 * quarter).to(tl.float32, bitcast=True))
        of_one = tl.zeros([TOKENS], tl.float32)
        of_two = tl.zeros([TOKENS], tl.float32)
        of_three = tl.zeros([TOKENS], tl.float32)
        for first in range(0, vocab_size, TOKENS):
            token = first + tl.arange(0, TOKENS)
            weight = tl.load(weights + token, mask=token < vocab_size, other=0.0)
            share = tl.full([TOKENS], 1.0, tl.float32) if COUNT else weight
            of_one += tl.where(weight >= one, share, 0.0)
            of_two += tl.where(weight >= two, share, 0.0)
            of_three += tl.where(weight >= three, share, 0.0)
        steps = (tl.sum(of_one, 0) >= target).to(tl.int32)
        steps += (tl.sum(of_two, 0) >= target).to(tl.int32)
        steps += (tl.sum(of_three, 0) >= target).to(tl.int32)
        low = tl.minimum(low + steps * quarter, high - 1)
        if steps < 3:
            high = low + quarter
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _find_mass(weights, least, mass, vocab_size, TOKENS: tl.constexpr):
    """The first token with which the weights, in the order of the vocabulary, come to `mass`."""
    before = tl.full([], 0.0, tl.float32)
    first_of = tl.full([], 0, tl.int32)
    before_of = tl.full([], 0.0, tl.float32)
    for first in range(0, vocab_size, TOKENS):
        here = tl.sum(_load(weights, first, least, vocab_size, TOKENS), 0)
        if before < mass and here > 0:
            first_of, before_of = first, before
        before += here
    token = first_of + tl.arange(0, TOKENS)
    weight = _load(weights, first_of, least, vocab_size, TOKENS)
    is_there = (before_of + tl.cumsum(weight, 0) >= mass) & (weight > 0)
    chosen = tl.min(tl.where(is_there, token, vocab_size), 0)
    # Summed in another order, the weights may come to a little less than their sum.
    return tl.where(chosen < vocab_size, chosen, tl.max(tl.where(weight > 0, token, 0), 0))
