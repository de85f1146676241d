"""Which rows and columns of each tensor a rank reads: parallel.py's shares applied to the inventory.

Fused linears are cut inside each of their blocks (Q, K, V; gate, up), never across the fused axis. Source:
model specification section 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model_config import ModelConfig
from workers.checkpoint_inventory import LogicalTensor, Role
from workers.parallel import Share


@dataclass(frozen=True, slots=True)
class Part:
    """Half-open ranges of a LogicalTensor's rows (its first axis), and of its columns if it has two axes."""

    rows: tuple[range, ...]
    columns: range | None = None

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.rows))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows,) if self.columns is None else (self.num_rows, len(self.columns))

    @property
    def num_elements(self) -> int:
        return self.num_rows if self.columns is None else self.num_rows * len(self.columns)


def part_of(tensor: LogicalTensor, model: ModelConfig, share: Share) -> Part:
    """The part of `tensor` that the rank of `share` holds."""
    rows, columns = tensor.shape[0], range(tensor.shape[1]) if len(tensor.shape) == 2 else None
    match tensor.role:
        case Role.VOCAB:
            vocab = share.vocab  # of the padded vocabulary; what the checkpoint lacks stays zero
            return Part((range(min(vocab.start, rows), min(vocab.stop, rows)),), columns)
        case Role.QKV:
            return Part(_qkv_rows(model, share), columns)
        case Role.ATTENTION_OUT:
            return Part((range(rows),), _scaled(share.q_heads, model.head_dim))
        case Role.DENSE_UP | Role.SHARED_UP | Role.EXPERT_UP:
            gate = share.columns(rows // 2)
            return Part((gate, range(gate.start + rows // 2, gate.stop + rows // 2)), columns)
        case Role.DENSE_DOWN | Role.SHARED_DOWN | Role.EXPERT_DOWN:
            return Part((range(rows),), share.columns(tensor.shape[1]))
        case _:
            return Part((range(rows),), columns)


def _qkv_rows(model: ModelConfig, share: Share) -> tuple[range, ...]:
    keys_start = model.num_heads * model.head_dim
    values_start = keys_start + model.num_kv_heads * model.head_dim
    kv = _scaled(share.kv_heads, model.head_dim)
    return (
        _scaled(share.q_heads, model.head_dim),
        range(keys_start + kv.start, keys_start + kv.stop),
        range(values_start + kv.start, values_start + kv.stop),
    )


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
