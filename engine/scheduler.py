"""Who runs in the next step. No tensors."""

from collections import deque
from dataclasses import dataclass, field

from engine.block_pool import BlockPool, hash_block
from engine.sequence import Sequence


@dataclass(eq=False)
class Chunk:
    """The part of a sequence that a step computes: the first `num_tokens` of its pending tokens."""

    sequence: Sequence
    num_tokens: int
    drafts: list[int] = field(default_factory=list)
    """Guesses of the tokens behind them, computed too: the step draws a token behind each that is right."""
    end: int = field(init=False)
    """The position behind the pending tokens that are computed."""
    samples: bool = field(init=False)
    """Whether the step computes the last token there is, and so can tell the next."""

    def __post_init__(self) -> None:
        self.end = self.sequence.num_computed + self.num_tokens
        self.samples = self.end == len(self.sequence.token_ids)

    @property
    def input_ids(self) -> list[int]:
        """The tokens that the forward pass reads."""
        return self.sequence.token_ids[self.end - self.num_tokens : self.end] + self.drafts

    @property
    def positions(self) -> range:
        """Where they stand in the sequence."""
        return range(self.end - self.num_tokens, self.end + len(self.drafts))

    @property
    def sampled(self) -> list[int]:
        """The tokens that the step has drawn."""
        return self.sequence.token_ids[self.end :] if self.samples else []

    def following(self) -> "Chunk":
        """Of the token that this one draws, which need not be known yet."""
        chunk = Chunk(self.sequence, 1)
        chunk.end, chunk.samples = self.end + 1, True
        return chunk

    @property
    def can_go_on(self) -> bool:
        """Whether the token drawn last is the one that was guessed: another can be drawn behind it."""
        sampled = self.sampled
        place = len(sampled) - 1
        return not self.sequence.is_finished and sampled[place:] == self.drafts[place : place + 1]


def only_decodes(batch: list[Chunk]) -> bool:
    """Whether a step computes of each sequence the last token, and its guesses, alone."""
    return all(chunk.samples and chunk.num_tokens == 1 for chunk in batch)


class Scheduler:
    """Fills each step's token budget: who decodes first, then prompts, in the order of their arrival.

    A sequence that is admitted owns blocks for all tokens it has; while it decodes it takes more, one at
    a time. When there are none left, the youngest is preempted: it gives back its blocks and waits, first
    in the queue, to be computed again.

    A step that only decodes, and is small, has room for guesses: it reads all weights for few tokens.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        max_drafts: int = 0,
        max_drafted_tokens: int = 0,
    ) -> None:
        """
        Args:
            pool: the KV cache's blocks.
            max_batch_tokens: the most tokens a step computes.
            max_num_seqs: the most sequences that run at once; each takes a token of a step, so there are no
                more than `max_batch_tokens`.
            max_drafts: the most guesses of a sequence in a step.
            max_drafted_tokens: the most tokens of a step with guesses, these included.
        """
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_drafts = max_drafts
        self.max_drafted_tokens = min(max_drafted_tokens, max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        """Those of all sequences that were admitted, and how many of them were in the cache."""
        self.num_cached_tokens = 0
        self.num_drafts = 0
        """Guesses that were computed, and how many of them were right."""
        self.num_right_drafts = 0
        self._free_rows = list(reversed(range(min(max_num_seqs, max_batch_tokens))))
        self._refused: Sequence | None = None
        """Who waits first and could not be admitted: nobody can, until one that runs leaves."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, whatever its state, and frees what it holds."""
        if sequence in self.running:
            self._stop_running(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step. Empty only when there is nothing to do."""
        batch = self._schedule_decodes()
        budget = self.max_batch_tokens - len(batch)
        for sequence in self.running:
            if sequence.num_pending > 1:  # one at most: who comes behind it is not admitted yet
                batch.append(Chunk(sequence, min(sequence.num_pending, budget)))
                budget -= batch[-1].num_tokens
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            batch.append(Chunk(sequence, min(sequence.num_pending, budget)))
            budget -= batch[-1].num_tokens
        self._refused = self.waiting[0] if self.waiting else None
        if self.max_drafts and only_decodes(batch):
            self._draft(batch)
        return batch

    def schedule_ahead(self, batch: list[Chunk]) -> list[Chunk]:
        """The step behind `batch`, whose tokens are not known yet: each sequence goes on, but for those that
        end whatever they get. Empty if more must be known, or if somebody who waits might be admitted.

        Whoever is finished by `batch` all the same, or removed, is to be left out of it again.
        """
        if self.max_drafts or not only_decodes(batch):
            return []
        if self.waiting and self.waiting[0] is not self._refused:
            return []
        going_on = [chunk for chunk in batch if chunk.sequence.num_missing > 1]
        tables = [chunk.sequence.block_table for chunk in going_on if self._is_full(chunk)]
        if len(tables) > self.pool.num_unused:
            return []
        for table in tables:
            table.append(self.pool.allocate())
        return [chunk.following() for chunk in going_on]

    def postprocess(self, batch: list[Chunk]) -> None:
        """Takes in what a step has computed. Sequences that are finished by it leave."""
        for chunk in batch:
            sequence = chunk.sequence
            self._advance(chunk)
            if sequence.error is not None:  # what it left in the cache must not reach anybody else
                for block in sequence.block_table:
                    self.pool.forget(block)
            if sequence.is_finished:
                self._stop_running(sequence)

    def _draft(self, batch: list[Chunk]) -> None:
        """Adds guesses, as long as the step stays small and there are blocks that nobody uses."""
        room = self.max_drafted_tokens - len(batch)
        for chunk in batch:
            sequence, table = chunk.sequence, chunk.sequence.block_table
            count = min(self.max_drafts, room, sequence.num_missing - 1)
            if count > 0 and (drafts := sequence.lookup.propose(sequence.token_ids, count)):
                num_new = self.pool.blocks_for(chunk.end + count) - len(table)
                table += [self.pool.allocate() for _ in range(min(num_new, self.pool.num_unused))]
                chunk.drafts = drafts[: len(table) * self.pool.block_size - chunk.end]
                room -= len(chunk.drafts)

    def _is_full(self, chunk: Chunk) -> bool:
        """Whether there is no room behind a chunk."""
        return chunk.end == len(chunk.sequence.block_table) * self.pool.block_size

    def _schedule_decodes(self) -> list[Chunk]:
        batch: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.num_pending == 1 and self._grow(sequence):
                batch.append(Chunk(sequence, 1))
        return batch

    def _grow(self, sequence: Sequence) -> bool:
        """Makes room for the pending token. False if `sequence` itself had to be preempted, now or before."""
        if sequence.num_computed < len(sequence.block_table) * self.pool.block_size:
            return True
        while sequence.row >= 0 and self.pool.num_unused == 0:
            self._preempt(self.running[-1])
        if sequence.row >= 0:
            sequence.block_table.append(self.pool.allocate())
        return sequence.row >= 0

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the blocks for all its tokens, if there are enough.

        Blocks that hold the beginning of it already are shared. The last token is always left to compute:
        it is what the first logits come from.
        """
        if not self._free_rows:
            return False
        cached = self._find_cached(sequence)
        if self._is_coming(sequence, len(cached)):
            return False
        num_new = self.pool.blocks_for(len(sequence.token_ids)) - len(cached)
        num_unused = self.pool.num_unused - sum(not self.pool.is_used(block) for block in cached)
        # One block is left to each that runs, or the newcomer would soon be preempted for them.
        if num_new + len(self.running) > num_unused:
            return False
        for block in cached:
            self.pool.share(block)
        sequence.block_table = cached + [self.pool.allocate() for _ in range(num_new)]
        sequence.num_computed = len(cached) * self.pool.block_size
        sequence.row = self._free_rows.pop()
        self.running.append(sequence)
        self.num_prompt_tokens += len(sequence.token_ids)
        self.num_cached_tokens += sequence.num_computed
        return True

    def _find_cached(self, sequence: Sequence) -> list[int]:
        cached: list[int] = []
        for index in range((len(sequence.token_ids) - 1) // self.pool.block_size):
            block = self.pool.find(self._hash(sequence, index))
            if block is None:
                break
            cached.append(block)
        return cached

    def _is_coming(self, sequence: Sequence, index: int) -> bool:
        """Whether another prompt is being computed that begins with the same blocks, number `index` too: so
        that prompts which arrive together, as for several answers to one, are computed once."""
        end = (index + 1) * self.pool.block_size
        return end < len(sequence.token_ids) and any(
            other.num_pending > 1
            and other.num_computed < end <= len(other.token_ids)
            and index <= len(other.block_hashes)
            and self._hash(other, index) == self._hash(sequence, index)
            for other in self.running
        )

    def _advance(self, chunk: Chunk) -> None:
        """Counts as computed a chunk and its guesses that were right, and lets others find the blocks that
        are filled."""
        sequence, size = chunk.sequence, self.pool.block_size
        first_filled = sequence.num_computed // size
        # The token drawn last is pending now; those drawn before it were guessed, and are computed.
        num_right = max(0, len(chunk.sampled) - 1)
        sequence.num_computed = chunk.end + num_right
        self.num_drafts += len(chunk.drafts)
        self.num_right_drafts += num_right
        for index in range(first_filled, sequence.num_computed // size):
            self.pool.publish(sequence.block_table[index], self._hash(sequence, index))

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """The hash of a sequence's full block number `index`; those before it were asked for already."""
        hashes, size = sequence.block_hashes, self.pool.block_size
        if index == len(hashes):
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, sequence.token_ids[index * size : (index + 1) * size]))
        return hashes[index]

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        # Last block first: the tail of a prefix is worth less than its beginning, and is reused before it.
        for block in reversed(sequence.block_table):
            self.pool.release(block)
        self._free_rows.append(sequence.row)
        self._refused = None
        sequence.block_table = []
        sequence.num_computed = 0
        sequence.row = -1
