"""Blocks of KV positions: reference counts and a prefix cache keyed by prompt token ids."""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

NULL_BLOCK = 0  # never written by a sequence: padding reads it, so stale values reach no one
_ROOTS = (b"\0" * 16, b"\1" * 16)  # of prompts, and of prompts of long sequences


@dataclass(frozen=True, slots=True)
class _Published:
    """What a cached block holds; the ids are compared on a hit, so a hash collision is a miss."""

    key: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class BlockPool:
    """Hands out blocks and keeps those of finished prompts until they are needed.

    A block is free, used (reference count > 0) or cached (count 0 but published). Only full blocks
    of prompt token ids are ever published: a fed-back vector has no id to be found by
    (invariant 3). Allocation takes free blocks first, once used ones before untouched memory; then
    the least recently used cached one.
    """

    def __init__(self, num_blocks: int, block_size: int, *, has_prefix_cache: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError("a pool needs the null block and at least one more")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._has_prefix_cache = has_prefix_cache
        self._free: deque[int] = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * num_blocks
        self._published: dict[int, _Published] = {}  # block -> content
        self._by_key: dict[bytes, int] = {}  # chain hash -> block
        self.num_queries = 0  # prompt tokens looked up
        self.num_hits = 0  # of these, found

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses but that hold a known prefix."""
        return len(self._cached)

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_usable - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, or None and nothing taken."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: SequenceOf[int]) -> None:
        """Add a reference to blocks in use or cached."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: SequenceOf[int]) -> None:
        """Drop one reference each. Later blocks of a chain are evicted before earlier ones."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            assert self._references[block] == 0, f"block {block} released twice"
            if block in self._published:
                self._cached[block] = None
            else:
                self._free.appendleft(block)

    def match(self, token_ids: SequenceOf[int], is_long: bool = False) -> list[int]:
        """Find the cached blocks that hold the longest known prefix, without taking them.

        Prefixes of long and short sequences are kept apart. The last token is never covered: its
        hidden state is needed to go on.
        """
        if not self._has_prefix_cache:
            return []
        found: list[int] = []
        parent = _ROOTS[is_long]
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            ids = tuple(token_ids[start : start + self.block_size])
            key = _chain_hash(parent, ids)
            block = self._by_key.get(key)
            if block is None or self._published[block] != _Published(key, parent, ids):
                break
            found.append(block)
            parent = key
        return found

    def publish(
        self, blocks: SequenceOf[int], token_ids: SequenceOf[int], is_long: bool = False
    ) -> None:
        """Make full blocks of computed prompt ids findable.

        Args:
            blocks: The sequence's blocks from position 0.
            token_ids: The prompt ids computed so far, from position 0; a partial block at the end
                is ignored.
            is_long: Whether the sequence is a long one.
        """
        if not self._has_prefix_cache:
            return
        parent = _ROOTS[is_long]
        for index in range(len(token_ids) // self.block_size):
            ids = tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])
            key = _chain_hash(parent, ids)
            block = blocks[index]
            if key not in self._by_key and block not in self._published:
                self._by_key[key] = block
                self._published[block] = _Published(key, parent, ids)
            parent = key

    def _forget(self, block: int) -> None:
        published = self._published.pop(block, None)
        if published is not None:
            del self._by_key[published.key]

    def check_integrity(self, held: dict[int, int]) -> None:
        """Raise AssertionError unless free + cached + used blocks are all blocks (invariant 2).

        Args:
            held: Block -> how many sequences hold it.
        """
        free, cached = set(self._free), set(self._cached)
        used = {b for b in range(1, self.num_blocks) if self._references[b] > 0}
        assert len(free) == len(self._free), "a block is free twice"
        total = len(free) + len(cached) + len(used)
        assert total == self.num_usable, "a block is lost or in two states"
        assert free | cached | used == set(range(1, self.num_blocks)), "a block is lost"
        counts = {b: self._references[b] for b in used}
        assert counts == held, f"references {counts} differ from holders {held}"
        assert cached <= set(self._published), "a cached block is not findable"


def _chain_hash(parent: bytes, token_ids: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
