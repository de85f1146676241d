"""What every part of the model needs to run: the device, the shapes, the activation dtype, scratch memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cuda_ops
from engine.model_config import ModelConfig
from workers.device.base import Device, DtypeName, Tensor
from workers.model.workspace import Workspace
from workers.parallel import Share


def no_progress(allowance: float = 0.0) -> None:
    """For callers without a heart to beat."""


@dataclass(frozen=True, slots=True)
class Context:
    """Shared by the parts of one rank's model."""

    device: Device
    model: ModelConfig
    share: Share
    dtype: DtypeName  # of activations: "float32" or "bfloat16"
    workspace: Workspace
    # Called as the computation advances. The argument is how many seconds the next piece may take beyond
    # the ordinary before the rank counts as stuck.
    on_progress: Callable[[float], None] = no_progress

    def take(self, name: str, *shape: int) -> Tensor:
        """A scratch buffer of the activation dtype."""
        return self.workspace.take(name, shape, self.dtype)

    def begin_work(self, flops: float) -> None:
        """Say that the rank advances, and that its next piece has this many additions and multiplications.

        Counted over all ranks: on a CPU they share the machine.
        """
        self.on_progress(flops / self.device.slowest_flops)


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[i] = source[rows[i]]: the lookup of embed_tokens with a table that is not cut."""
    cuda_ops.embed_tokens(rows, source, 0, out)
