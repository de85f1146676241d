"""A second opinion about cached KV blocks: what each was filled with, by the rank's own record.

The engine says which blocks hold the beginning of a prompt. With `--kv-canary` a rank notes for every block
it fills a digest of all tokens and media up to the block's end, carries the note along when the block is
copied, and compares when a sequence begins with blocks that it has not computed itself. A difference ends the
server with a sentence that names the block; an answer is never made from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from engine.errors import EngineError
from engine.messages import MediaItem, StepPlan
from workers.sequences import LiveSequence, Sequences

_DIGEST_BYTES = 16


class KvCanary:
    """Notes of one rank. Call `check` when a plan was applied to the mirror, `note` when it was computed."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._device: dict[int, bytes] = {}  # full block -> digest of everything up to its end
        self._host: dict[int, bytes] = {}  # place in host memory -> the same of what was copied there
        self._chains: dict[int, list[bytes]] = {}  # seq_id -> digests of its blocks so far

    def check(self, plan: StepPlan, sequences: Sequences) -> None:
        """Raise EngineError unless all blocks that new sequences begin with hold their tokens."""
        for seq_id in plan.dropped:
            self._chains.pop(seq_id, None)
        self._follow(plan.swap_out, self._device, self._host)
        self._follow(plan.swap_in, self._host, self._device)
        for new in plan.added:
            self._check_beginning(sequences[new.seq_id])

    def note(self, sequence: LiveSequence, num_tokens: int) -> None:
        """The last `num_tokens` of the computed tokens were written by the step that just ended."""
        end = sequence.num_computed_tokens
        first = (end - num_tokens) // self._block_size
        table = sequence.block_table.view()
        chain = self._extend_chain(sequence, end // self._block_size)
        for index in range(first, -(-end // self._block_size)):
            block = int(table[index])
            if index < len(chain):
                self._device[block] = chain[index]
            else:
                self._device.pop(block, None)  # what it held is partly overwritten

    def _check_beginning(self, sequence: LiveSequence) -> None:
        num_cached = sequence.num_computed_tokens // self._block_size
        chain = self._extend_chain(sequence, num_cached)
        for index, block in enumerate(sequence.block_table.view()[:num_cached].tolist()):
            if self._device.get(block) != chain[index]:
                begin = index * self._block_size
                raise EngineError(
                    f"KV block {block} was given to sequence {sequence.seq_id} as its tokens {begin} to "
                    f"{begin + self._block_size - 1}, but was filled with others: the engine's books are "
                    "wrong, and no answer is made from them. Until that is repaired, "
                    "--no-enable-prefix-caching avoids it"
                )

    def _extend_chain(self, sequence: LiveSequence, num_blocks: int) -> list[bytes]:
        """The digests of the sequence's first `num_blocks` blocks, or more."""
        chain = self._chains.setdefault(sequence.seq_id, [])
        tokens, size = sequence.tokens.view(), self._block_size
        for begin in range(len(chain) * size, num_blocks * size, size):
            digest = blake2b(chain[-1] if chain else b"", digest_size=_DIGEST_BYTES)
            digest.update(tokens[begin : begin + size].tobytes())
            digest.update(_media_inside(sequence.media, begin, begin + size))
            chain.append(digest.digest())
        return chain

    @staticmethod
    def _follow(copies: Iterable[Sequence[int]], source: dict[int, bytes], target: dict[int, bytes]) -> None:
        """Blocks are copied with their notes; a block without one leaves none."""
        for origin, copy in copies:
            if origin in source:
                target[copy] = source[origin]
            else:
                target.pop(copy, None)


def _media_inside(media: Sequence[MediaItem], begin: int, end: int) -> bytes:
    """Which media lie among the tokens [begin, end), and where they start from there."""
    return "".join(
        f"{item.kind} {item.content_hash} {item.grid} {item.offset - begin};"
        for item in media
        if item.offset < end and item.offset + item.num_tokens > begin
    ).encode()
