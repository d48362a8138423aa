import pytest

from engine.block_pool import BlockPool, hash_block


def test_blocks_are_allocated_in_order_and_all_of_them() -> None:
    pool = BlockPool(4, 16)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    assert pool.num_unused == 0
    with pytest.raises(KeyError):
        pool.allocate()


def test_tokens_take_no_more_blocks_than_they_fill() -> None:
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(num_tokens) for num_tokens in (1, 16, 17, 32)] == [1, 1, 2, 2]


def test_a_block_is_free_when_its_last_user_has_released_it() -> None:
    pool = BlockPool(2, 16)
    block = pool.allocate()
    pool.share(block)
    pool.release(block)
    assert pool.num_unused == 1
    assert pool.is_used(block)
    pool.release(block)
    assert pool.num_unused == 2
    assert not pool.is_used(block)


def test_content_is_found_until_its_block_is_needed_the_oldest_first() -> None:
    pool = BlockPool(3, 2)
    blocks = [pool.allocate() for _ in range(3)]
    names = [hash_block(b"", [n]) for n in range(3)]
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
    for block in (blocks[1], blocks[2], blocks[0]):
        pool.release(block)
    assert pool.allocate() == blocks[1]
    assert [pool.find(name) for name in names] == [blocks[0], None, blocks[2]]


def test_a_block_that_holds_nothing_known_is_reused_first() -> None:
    pool = BlockPool(2, 2)
    known, unknown = pool.allocate(), pool.allocate()
    pool.publish(known, b"content")
    pool.release(known)
    pool.release(unknown)
    assert pool.allocate() == unknown
    assert pool.find(b"content") == known


def test_the_same_content_is_published_once() -> None:
    pool = BlockPool(2, 2)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, b"content")
    pool.publish(second, b"content")
    assert pool.find(b"content") == first
    pool.release(second)
    assert pool.allocate() == second
    assert pool.find(b"content") == first


def test_forgotten_content_is_not_found() -> None:
    pool = BlockPool(1, 2)
    pool.publish(pool.allocate(), b"content")
    pool.forget(0)
    assert pool.find(b"content") is None


def test_a_hash_names_the_tokens_and_all_before_them() -> None:
    last = 128_255  # the last id of Llama 3
    parent, other = hash_block(b"", [1, last]), hash_block(b"", [last, 1])
    assert len({parent, other, hash_block(parent, [3]), hash_block(other, [3]), hash_block(b"", [3])}) == 5
    assert hash_block(parent, [3]) == hash_block(hash_block(b"", [1, last]), [3])
