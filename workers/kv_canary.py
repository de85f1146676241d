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


class Chain:
    """Digests of a sequence's full blocks, each of everything up to the block's end; made when asked for."""

    def __init__(self, sequence: LiveSequence, block_size: int) -> None:
        self._tokens, self._media = sequence.tokens, sequence.media  # outlive the sequence
        self._block_size = block_size
        self._digests: list[bytes] = []

    def digest(self, index: int) -> bytes:
        """Of block `index`, all of whose tokens are known by now."""
        size = self._block_size
        tokens = self._tokens.view()[: (index + 1) * size]
        for begin in range(len(self._digests) * size, len(tokens), size):
            digest = blake2b(self._digests[-1] if begin else b"", digest_size=_DIGEST_BYTES)
            digest.update(tokens[begin : begin + size].tobytes())
            digest.update(_media_inside(self._media, begin, begin + size))
            self._digests.append(digest.digest())
        return self._digests[index]


Note = tuple[Chain, int]  # what a block was filled with: that block of that chain


class KvCanary:
    """Notes of one rank. Call `check` when a plan was applied to the mirror, `note` when it was computed.

    Digests are made at the comparison: a token that was just sampled may be known to the device alone.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._device: dict[int, Note] = {}  # of full blocks
        self._host: dict[int, Note] = {}  # of places in host memory
        self._chains: dict[int, Chain] = {}  # of live sequences

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
        end, chain = sequence.num_computed_tokens, self._chains[sequence.seq_id]
        first, num_full = (end - num_tokens) // self._block_size, end // self._block_size
        table = sequence.block_table.view()
        for index in range(first, -(-end // self._block_size)):
            block = int(table[index])
            if index < num_full:
                self._device[block] = chain, index
            else:
                self._device.pop(block, None)  # what it held is partly overwritten

    def _check_beginning(self, sequence: LiveSequence) -> None:
        chain = self._chains[sequence.seq_id] = Chain(sequence, self._block_size)
        num_cached = sequence.num_computed_tokens // self._block_size
        for index, block in enumerate(sequence.block_table.view()[:num_cached].tolist()):
            note = self._device.get(block)
            if note is None or note[0].digest(note[1]) != chain.digest(index):
                begin = index * self._block_size
                raise EngineError(
                    f"KV block {block} was given to sequence {sequence.seq_id} as its tokens {begin} to "
                    f"{begin + self._block_size - 1}, but was filled with others: the engine's books are "
                    "wrong, and no answer is made from them. Until that is repaired, "
                    "--no-enable-prefix-caching avoids it"
                )

    @staticmethod
    def _follow(copies: Iterable[Sequence[int]], source: dict[int, Note], target: dict[int, Note]) -> None:
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
