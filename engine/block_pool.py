"""The KV cache's blocks: who uses which, and what a block that nobody uses still holds. No tensors."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from hashlib import blake2b


def hash_block(parent: bytes, token_ids: Seq[int]) -> bytes:
    """Names the content of a full block: its tokens, and through `parent` all tokens before it.

    A cryptographic hash, because whoever finds two prompts that collide reads another client's cache.
    """
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """A fixed number of blocks, shared by reference count.

    A block whose content is named (`publish`) can be found and shared (`find`) by whoever needs that
    content, also after its last user has released it, until it is allocated for something else: those
    unused for longest go first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """
        Args:
            num_blocks: blocks in the pool.
            block_size: tokens a block holds.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._users = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_unused(self) -> int:
        """Blocks that can be allocated."""
        return len(self._unused)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def is_used(self, block: int) -> bool:
        return self._users[block] > 0

    def allocate(self) -> int:
        """Takes a block for new content.

        Raises:
            KeyError: if all blocks are in use.
        """
        block, _ = self._unused.popitem(last=False)
        self.forget(block)
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """Adds a user to a block that `find` found."""
        self._unused.pop(block, None)
        self._users[block] += 1

    def release(self, block: int) -> None:
        """Takes away a user. A block without users keeps its content as long as it can."""
        self._users[block] -= 1
        if self._users[block] == 0:
            self._unused[block] = None
            if self._hash_of[block] is None:
                self._unused.move_to_end(block, last=False)

    def publish(self, block: int, content: bytes) -> None:
        """Names the content of a block that is computed and full, so that `find` finds it."""
        if content not in self._block_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def find(self, content: bytes) -> int | None:
        """The block that holds `content`, in use or not; None if there is none."""
        return self._block_of.get(content)

    def forget(self, block: int) -> None:
        """Nobody finds the content of this block any more."""
        content = self._hash_of[block]
        if content is not None:
            del self._block_of[content]
            self._hash_of[block] = None
