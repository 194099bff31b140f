import pytest

from coconut_serve.engines.native import block_pool
from coconut_serve.engines.native.block_pool import BlockPool

pytestmark = pytest.mark.torch


def test_allocation_is_all_or_nothing_and_never_the_null_block() -> None:
    pool = BlockPool(5, 4)
    assert pool.allocate(5) is None
    assert pool.num_available == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert block_pool.NULL_BLOCK not in blocks
    pool.check_integrity(dict.fromkeys(blocks, 1))


def test_published_prefix_is_found_until_it_is_evicted_oldest_use_first() -> None:
    pool = BlockPool(5, 2)
    a, b = pool.allocate(2), pool.allocate(2)
    assert a is not None
    assert b is not None
    pool.publish(a, [1, 2, 3, 4])
    pool.publish(b, [5, 6, 7, 8])
    pool.release(a)
    pool.release(b)
    assert pool.match([1, 2, 3, 4, 9]) == a
    assert pool.match([1, 2, 3, 4]) == a[:1], "the last token is always computed"
    pool.allocate(1)
    assert pool.match([1, 2, 3, 4, 9]) == a[:1], "the end of the oldest chain went first"
    assert pool.match([5, 6, 7, 8, 9]) == b


def test_hash_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pool, "_chain_hash", lambda parent, ids: b"same")
    pool = BlockPool(5, 2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks, [1, 2])
    assert pool.match([3, 4, 5]) == []
    assert pool.match([1, 2, 5]) == blocks


def test_block_shared_by_two_is_free_after_both_released_it() -> None:
    pool = BlockPool(3, 2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_disabled_prefix_cache_keeps_nothing() -> None:
    pool = BlockPool(3, 2, has_prefix_cache=False)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks, [1, 2])
    pool.release(blocks)
    assert pool.match([1, 2, 3]) == []
    assert pool.num_free == 2
