import random
from itertools import accumulate

from engine.block_pool import BlockPool
from engine.scheduler import Chunk, Scheduler, only_decodes
from engine.sequence import SamplingParams, Sequence

BLOCK = 4


def make_scheduler(
    num_blocks: int = 64, max_batch_tokens: int = 16, max_num_seqs: int = 8, max_drafts: int = 0
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, BLOCK),
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_drafts=max_drafts,
        max_drafted_tokens=12,
    )


def make_sequence(num_tokens: int, max_tokens: int = 4, first: int = 0) -> Sequence:
    return Sequence(list(range(first, first + num_tokens)), SamplingParams(max_tokens=max_tokens))


def step(scheduler: Scheduler, token_id: int | None = 7) -> list[Chunk]:
    batch = scheduler.schedule()
    compute(scheduler, batch, token_id)
    return batch


def compute(scheduler: Scheduler, batch: list[Chunk], token_id: int | None = 7) -> None:
    for chunk in batch:
        if chunk.samples:
            chunk.sequence.append(token_id)
            while chunk.can_go_on:
                chunk.sequence.append(token_id)
    scheduler.postprocess(batch)


def attend(batch: list[Chunk], cache: dict[tuple[int, int], int]) -> None:
    """Keeps in the cache what a step computes, and checks that each sequence finds there what is its own."""
    for is_read in (False, True):
        for chunk in batch:
            token_ids = chunk.sequence.token_ids[: chunk.end] + chunk.drafts
            # A token's keys and values are of all the tokens before it too.
            computed = accumulate(token_ids, lambda before, token_id: hash((before, token_id)))
            for position, value in enumerate(computed):
                slot = chunk.sequence.block_table[position // BLOCK], position % BLOCK
                if is_read:
                    assert cache[slot] == value
                elif position in chunk.positions:
                    cache[slot] = value


def drafts(batch: list[Chunk]) -> int:
    return sum(len(chunk.drafts) for chunk in batch)


def sizes(batch: list[Chunk]) -> list[int]:
    return [chunk.num_tokens for chunk in batch]


def test_prompts_are_taken_in_the_order_of_arrival_within_the_budget() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    first, second, third = (make_sequence(10, first=100 * n) for n in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    batch = scheduler.schedule()
    assert [(chunk.sequence, chunk.num_tokens, chunk.samples) for chunk in batch] == [
        (first, 10, True),
        (second, 6, False),
    ]


def test_who_decodes_gets_a_token_in_every_step_while_a_long_prompt_is_prefilled() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    stream = make_sequence(4, max_tokens=100)
    scheduler.add(stream)
    step(scheduler)
    prompt = make_sequence(150, first=1000)
    scheduler.add(prompt)
    while prompt.num_output_tokens == 0:
        before = stream.num_output_tokens
        batch = step(scheduler)
        assert stream.num_output_tokens == before + 1
        assert sum(sizes(batch)) <= 16
    assert stream.num_output_tokens == 1 + -(-150 // 15)


def test_a_step_with_one_token_of_a_prompt_does_not_only_decode() -> None:
    scheduler = make_scheduler(max_batch_tokens=5, max_drafts=3)
    for n in range(4):
        scheduler.add(make_sequence(1, max_tokens=9, first=100 * n))
    step(scheduler)
    assert only_decodes(scheduler.schedule())
    scheduler.add(make_sequence(20, first=1000))
    batch = scheduler.schedule()
    assert sizes(batch) == [1] * 5
    assert not only_decodes(batch)


def decoding(scheduler: Scheduler, *sequences: Sequence) -> list[Chunk]:
    """A step in which all of them decode."""
    for sequence in sequences:
        scheduler.add(sequence)
    while any(sequence.num_output_tokens == 0 for sequence in sequences):
        step(scheduler)
    return scheduler.schedule()


def test_the_step_ahead_goes_on_with_those_that_do_not_end_whatever_they_get() -> None:
    scheduler = make_scheduler()
    first, last, full = make_sequence(4), make_sequence(5, 2, first=100), make_sequence(7, first=200)
    batch = decoding(scheduler, first, last, full)
    ahead = scheduler.schedule_ahead(batch)
    assert [(chunk.sequence, chunk.positions) for chunk in ahead] == [
        (first, range(5, 6)),
        (full, range(8, 9)),
    ]
    assert only_decodes(ahead)
    assert [len(sequence.block_table) for sequence in (first, last, full)] == [2, 2, 3]
    compute(scheduler, batch)
    assert [chunk.input_ids for chunk in ahead] == [[7], [7]]
    compute(scheduler, ahead)
    assert [sequence.num_output_tokens for sequence in (first, last, full)] == [3, 2, 3]


def test_no_step_is_launched_ahead_where_more_than_its_tokens_is_open() -> None:
    scheduler = make_scheduler(max_batch_tokens=8)
    stream = make_sequence(4, max_tokens=100)
    assert decoding(scheduler, stream)
    scheduler.add(make_sequence(20))
    assert scheduler.schedule_ahead([Chunk(stream, 1)]) == []  # who waits might be let in
    assert scheduler.schedule_ahead(scheduler.schedule()) == []  # a prompt is being computed
    scheduler = make_scheduler(max_batch_tokens=8, max_drafts=2)
    assert scheduler.schedule_ahead(decoding(scheduler, make_sequence(4))) == []  # what to guess
    scheduler = make_scheduler(num_blocks=5)
    batch = decoding(scheduler, *(make_sequence(7, max_tokens=9, first=100 * n) for n in range(2)))
    assert scheduler.pool.num_unused == 1
    assert scheduler.schedule_ahead(batch) == []  # who is preempted
    assert scheduler.pool.num_unused == 1


def test_who_can_not_be_let_in_keeps_no_step_from_being_launched_ahead_until_somebody_leaves() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    running = [make_sequence(4, max_tokens=50, first=100 * n) for n in range(2)]
    batch = decoding(scheduler, *running)
    late, later = make_sequence(4), make_sequence(4)
    scheduler.add(late)
    assert scheduler.schedule_ahead(batch) == []
    compute(scheduler, batch)
    batch = scheduler.schedule()
    scheduler.add(later)
    for _ in range(5):
        ahead = scheduler.schedule_ahead(batch)
        assert len(ahead) == 2
        compute(scheduler, batch)
        batch = ahead
    scheduler.remove(late)
    assert scheduler.schedule_ahead(batch) == []  # it was not tried whether the next can be let in
    compute(scheduler, batch)
    batch = scheduler.schedule()
    assert scheduler.schedule_ahead(batch)
    compute(scheduler, batch)
    batch = scheduler.schedule()
    scheduler.remove(running[0])
    batch = batch[1:]
    assert scheduler.schedule_ahead(batch) == []
    compute(scheduler, batch)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [running[1], later]


def test_blocks_of_a_known_beginning_are_shared_but_the_last_token_is_computed() -> None:
    scheduler = make_scheduler()
    first = make_sequence(12, max_tokens=20)
    scheduler.add(first)
    step(scheduler)
    second = make_sequence(12, max_tokens=20)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert sizes(batch) == [1, 4]
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]


def test_an_answer_is_found_again_in_the_next_turn() -> None:
    scheduler = make_scheduler()
    first = make_sequence(6, max_tokens=7)
    scheduler.add(first)
    while scheduler.has_work:
        step(scheduler)
    turn = Sequence([*first.token_ids, 50, 51, 52, 53], SamplingParams())
    scheduler.add(turn)
    assert sizes(scheduler.schedule()) == [len(turn.token_ids) - 12]


def test_different_prompts_share_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(12))
    step(scheduler)
    other = make_sequence(12, first=1)
    scheduler.add(other)
    assert sizes(scheduler.schedule()) == [1, 12]


def test_of_a_prompt_in_the_cache_the_end_is_the_first_to_go() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for sequence in (make_sequence(12, max_tokens=1), make_sequence(5, max_tokens=1, first=100)):
        scheduler.add(sequence)
        step(scheduler)
    scheduler.add(make_sequence(12, max_tokens=1))
    assert sizes(scheduler.schedule()) == [4]


def test_who_goes_on_as_another_that_decodes_is_let_in_beside_it() -> None:
    scheduler = make_scheduler()
    stream, late = make_sequence(7, max_tokens=50), make_sequence(9)
    scheduler.add(stream)
    step(scheduler)
    assert stream.token_ids == late.token_ids[:8]
    scheduler.add(late)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [stream, late]


def test_who_is_let_in_is_not_preempted_for_those_that_run_already() -> None:
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(make_sequence(7, max_tokens=9))
    step(scheduler)
    scheduler.add(make_sequence(12, first=100))
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions == 0


def test_when_blocks_run_out_the_youngest_waits_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=8)
    old, young = make_sequence(8, max_tokens=24), make_sequence(8, max_tokens=20, first=100)
    late = make_sequence(24, first=200)
    for sequence in (old, young, late):
        scheduler.add(sequence)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert list(scheduler.waiting) == [young, late]
    finished: list[Sequence] = []
    while scheduler.has_work:
        finished += [chunk.sequence for chunk in step(scheduler) if chunk.sequence.is_finished]
    assert finished == [old, young, late]
    assert (old.num_output_tokens, young.num_output_tokens) == (24, 20)
    assert scheduler.pool.num_unused == 8


def test_a_sequence_that_fills_the_cache_alone_is_finished() -> None:
    scheduler = make_scheduler(num_blocks=4)
    sequence = make_sequence(10, max_tokens=6)
    scheduler.add(sequence)
    while scheduler.has_work:
        step(scheduler)
    assert sequence.finish_reason == "length"


def test_what_a_failed_sequence_left_in_the_cache_is_not_found() -> None:
    scheduler = make_scheduler()
    bad, good = make_sequence(12), make_sequence(12)
    scheduler.add(bad)
    step(scheduler, token_id=None)
    assert bad.error is not None
    scheduler.add(good)
    assert sizes(scheduler.schedule()) == [12]


def test_any_mix_of_arrivals_aborts_and_failures_gives_all_blocks_and_rows_back() -> None:
    generator = random.Random(5)
    num_drafts = num_right_drafts = num_ahead = 0
    for _ in range(40):
        blocks = generator.randrange(12, 40)
        scheduler = make_scheduler(
            blocks, max_batch_tokens=generator.choice([5, 12, 40]), max_drafts=generator.choice([0, 5])
        )
        alive: list[Sequence] = []
        ahead: list[Chunk] = []
        cache: dict[tuple[int, int], int] = {}
        for _ in range(200):
            if generator.random() < 0.3:
                length = generator.randrange(1, 30)
                alive.append(
                    make_sequence(
                        length, max_tokens=generator.randrange(1, 18), first=generator.choice([0, 0, 99])
                    )
                )
                scheduler.add(alive[-1])
            if alive and generator.random() < 0.1:
                scheduler.remove(alive.pop(generator.randrange(len(alive))))
            batch = [chunk for chunk in ahead if chunk.sequence.row >= 0] or scheduler.schedule()
            assert bool(batch) == scheduler.has_work
            assert len({id(chunk.sequence) for chunk in batch}) == len(batch)
            assert all(0 < chunk.num_tokens <= chunk.sequence.num_pending for chunk in batch)
            ahead = scheduler.schedule_ahead(batch) if generator.random() < 0.8 else []
            num_ahead += len(ahead)
            assert all(
                chunk.positions.stop <= len(chunk.sequence.block_table) * BLOCK
                and len(chunk.sequence.block_hashes) * BLOCK <= len(chunk.sequence.token_ids)
                and len(chunk.drafts) < chunk.sequence.num_missing
                for chunk in batch
            )
            attend(batch, cache)
            assert sum(sizes(batch)) + drafts(batch) <= scheduler.max_batch_tokens
            assert not drafts(batch) or sum(sizes(batch)) + drafts(batch) <= 12
            failing = generator.random() < 0.05
            if failing and generator.random() < 0.5:
                for chunk in batch:
                    scheduler.remove(chunk.sequence)
            else:
                compute(scheduler, batch, None if failing else generator.choice([7, 7, 7, 8]))
        while scheduler.has_work:
            step(scheduler)
        assert scheduler.pool.num_unused == blocks
        assert sorted(scheduler._free_rows) == list(range(min(8, scheduler.max_batch_tokens)))
        assert not any(scheduler.pool.is_used(block) for block in range(blocks))
        num_drafts += scheduler.num_drafts
        num_right_drafts += scheduler.num_right_drafts
    assert 0 < num_right_drafts < num_drafts
    assert num_ahead
