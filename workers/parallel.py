"""Which share of the model a rank holds (specification section 2.5): pure functions, no tensors.

Attention is cut by heads, feed-forward blocks and experts by width, the vocabulary by rows. When there
are fewer kv heads than ranks, neighbouring ranks hold the same kv head.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model_config import ModelConfig, check_tensor_parallel


@dataclass(frozen=True, slots=True)
class Share:
    """Half-open ranges of one rank; all counts are whole heads, columns or rows."""

    rank: int
    world: int
    q_heads: range
    kv_heads: range
    vocab: range  # rows of the padded vocabulary; the last rows of the last rank may be padding

    @property
    def num_q_heads(self) -> int:
        return len(self.q_heads)

    @property
    def num_kv_heads(self) -> int:
        return len(self.kv_heads)

    @property
    def padded_vocab_size(self) -> int:
        return len(self.vocab) * self.world

    def columns(self, width: int) -> range:
        """This rank's part of a feed-forward width; `share_of` has made sure that it divides."""
        return _even_part(width, self.rank, self.world)


def share_of(model: ModelConfig, rank: int, world: int) -> Share:
    """What rank `rank` of `world` holds. Raises ConfigError when the model does not divide."""
    check_tensor_parallel(model, world)
    vocab_rows = -(-model.vocab_size // world)
    return Share(
        rank=rank,
        world=world,
        q_heads=_even_part(model.num_heads, rank, world),
        kv_heads=_kv_part(model.num_kv_heads, rank, world),
        vocab=range(rank * vocab_rows, (rank + 1) * vocab_rows),
    )


def _even_part(count: int, rank: int, world: int) -> range:
    part = count // world
    return range(rank * part, (rank + 1) * part)


def _kv_part(num_kv_heads: int, rank: int, world: int) -> range:
    if num_kv_heads >= world:
        return _even_part(num_kv_heads, rank, world)
    head = rank // (world // num_kv_heads)
    return range(head, head + 1)
