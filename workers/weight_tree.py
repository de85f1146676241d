"""Loaded weights as a list of tensors and a JSON description that puts them together again.

For the weight cache: only the dataclasses named here come back, nothing in a description is executed.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from cuda_ops import Weight
from workers.device.base import Tensor
from workers.model import weights as kinds

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Weight, *vars(kinds).values())
    if isinstance(kind, type) and is_dataclass(kind)
}
_PLAIN = (str, int, float, bool, type(None))


def take_apart(weights: Any) -> tuple[Any, list[Tensor]]:
    """(description, tensors): a tensor that several fields hold is listed once."""
    tensors: list[Tensor] = []
    indices: dict[int, int] = {}

    def describe(part: Any) -> Any:
        if isinstance(part, _PLAIN):
            return {"value": part}
        if isinstance(part, list | tuple):
            return {type(part).__name__: [describe(item) for item in part]}
        if _KINDS.get(type(part).__name__) is type(part):
            return {
                "kind": type(part).__name__,
                "fields": {
                    field.name: describe(getattr(part, field.name))
                    for field in fields(_KINDS[type(part).__name__])
                },
            }
        if not hasattr(part, "__dlpack__"):
            raise TypeError(f"weights hold a {type(part).__name__}, which weight_tree.py does not know")
        if id(part) not in indices:
            indices[id(part)] = len(tensors)
            tensors.append(part)
        return {"tensor": indices[id(part)]}

    return describe(weights), tensors


def put_together(description: Any, tensors: list[Tensor]) -> Any:
    """The inverse of take_apart. Raises ValueError for a description that it did not make."""
    match description:
        case {"value": value} if isinstance(value, _PLAIN):
            return value
        case {"tensor": int(index)} if 0 <= index < len(tensors):
            return tensors[index]
        case {"list": list(items)}:
            return [put_together(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(put_together(item, tensors) for item in items)
        case {"kind": str(name), "fields": dict(parts)} if name in _KINDS:
            kind = _KINDS[name]
            if set(parts) == {field.name for field in fields(kind)}:
                return kind(**{field: put_together(part, tensors) for field, part in parts.items()})
    raise ValueError("the description of the weights is not one of ours")
