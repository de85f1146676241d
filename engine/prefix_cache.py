"""Which KV blocks hold the start of which token sequence, so that a request need not compute it again.

A full block has a key: the hash of its parent's key, its tokens and the media it covers. Equal keys mean
equal KV, as a row's bits depend on what comes before it and on nothing else (design D5). Who owns a
block and which one is reused next is in block_pool.py; sequences meet this cache in kv_manager.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

from engine.block_pool import BlockId
from engine.errors import EngineError
from engine.messages import MediaItem
from engine.sequence import Sequence

_TOKEN_BYTES = array("i").itemsize


class BlockKey(NamedTuple):
    """What a full block holds. Compared as a whole: an equal hash alone proves nothing."""

    hash: bytes  # sha256 over the two below
    parent: bytes  # hash of the block before it; of the salt for the first
    content: bytes  # its token ids, then what media it covers and from which offset


class PrefixCache:
    """Full blocks by key, whether a sequence holds them or not."""

    def __init__(self) -> None:
        self._by_hash: dict[bytes, tuple[BlockKey, BlockId]] = {}
        self._by_block: dict[BlockId, BlockKey] = {}
        self.num_evictions = 0  # blocks that were reused for something else

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block_id: BlockId) -> bool:
        return block_id in self._by_block

    def find(self, keys: Iterable[BlockKey]) -> list[BlockId]:
        """The blocks of the longest known beginning of `keys`."""
        found = []
        for key in keys:
            entry = self._by_hash.get(key.hash)
            if entry is None or entry[0] != key:
                break
            found.append(entry[1])
        return found

    def key_of(self, block_id: BlockId) -> BlockKey | None:
        return self._by_block.get(block_id)

    def enter(self, key: BlockKey, block_id: BlockId) -> None:
        """`block_id` holds what `key` says. The first block that does is the one that gets shared."""
        if key.hash not in self._by_hash and block_id not in self._by_block:
            self._by_hash[key.hash] = key, block_id
            self._by_block[block_id] = key

    def forget(self, block_ids: Iterable[BlockId]) -> None:
        """The blocks are about to be overwritten."""
        for block_id in block_ids:
            if key := self._by_block.pop(block_id, None):
                del self._by_hash[key.hash]
                self.num_evictions += 1

    def recount(self, sequences: Iterable[Sequence]) -> None:
        """Raise EngineError unless both books agree with each other and with what the sequences hold."""
        if {block_id: key for key, block_id in self._by_hash.values()} != self._by_block:
            raise EngineError("the prefix cache knows other blocks by hash than by number")
        for sequence in sequences:
            for block_id, key in zip(sequence.block_ids, sequence.block_keys, strict=False):
                if self._by_block.get(block_id, key) != key:
                    raise EngineError(
                        f"KV block {block_id} of request {sequence.request_id} is cached as something else"
                    )


def extend_keys(sequence: Sequence, block_size: int) -> None:
    """Make the keys of all blocks that the sequence's tokens fill and that have none yet."""
    keys: list[BlockKey] = sequence.block_keys
    begin, end = len(keys) * block_size, len(sequence.token_ids) // block_size * block_size
    if begin >= end:
        return
    packed, width = array("i", sequence.token_ids[begin:end]).tobytes(), block_size * _TOKEN_BYTES
    parent = keys[-1].hash if keys else sha256(sequence.cache_salt.encode()).digest()
    has_media = bool(sequence.media) and begin < _end_of(sequence.media[-1])
    for index in range((end - begin) // block_size):
        content = packed[index * width : (index + 1) * width]
        if has_media:
            content += _media_part(sequence.media, begin + index * block_size, block_size)
        key = BlockKey(sha256(parent + content).digest(), parent, content)
        keys.append(key)
        parent = key.hash


def _media_part(media: list[MediaItem], start: int, block_size: int) -> bytes:
    """Which media lie in the block that begins at token `start`, and where they begin from there."""
    inside = [item for item in media if item.offset < start + block_size and _end_of(item) > start]
    parts = [f"{item.kind} {item.content_hash} {item.grid} {item.offset - start};" for item in inside]
    return "".join(parts).encode()


def _end_of(item: MediaItem) -> int:
    return item.offset + item.num_tokens
