"""How fast each op is, as a share of what the memory and the tensor cores of this GPU give.

Method
    The ceilings are measured first: reading memory (a sum over 1 GiB), copying it, and a bf16 product of
    8192^3. Each op runs alone, captured in a graph, after the cache was flushed; the median of its times.
    What PyTorch or Triton offers for the same runs the same way.
Bytes and flops
    Those that the op must move and multiply once (cases_*.py): weights of the experts met, KV, rows.
How to read it
    share: the larger of bytes / time / read bandwidth and flops / time / peak. Small ops are bound by
    launching (about 3 us), not by either.
Reference
    tests/gpu/results/
Run
    python -m tests.gpu.speed [--small] [--emulated] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch

from tests.gpu.case import Case
from tests.gpu.figures import Figures, add_options, show
from tests.gpu.machine import Machine, Work, open_machine
from tests.gpu.plan import measured_cases


@dataclass(frozen=True)
class Ceilings:
    """Of this GPU, measured, per second."""

    read_bytes: float
    copy_bytes: float
    bf16_flops: float

    @classmethod
    def measure(cls, machine: Machine, is_small: bool) -> Ceilings:
        size, side = (1 << 12, 64) if is_small else (1 << 28, 8192)
        values = torch.ones(size, device=machine.device)
        into = torch.empty_like(values)
        a, b = (torch.randn(side, side, device=machine.device).to(torch.bfloat16) for _ in range(2))
        product = torch.empty_like(a)
        read = machine.seconds(lambda: torch.sum(values))
        copy = machine.seconds(lambda: into.copy_(values))
        multiply = machine.seconds(lambda: torch.mm(a, b, out=product), is_warm=True)
        return cls(4 * size / read, 8 * size / copy, 2.0 * side**3 / multiply)

    def share(self, num_bytes: float, flops: float, seconds: float) -> float:
        return max(num_bytes / self.read_bytes, flops / self.bf16_flops) / seconds


def measure_ops(machine: Machine, is_small: bool) -> Figures:
    """{"op, shape": {measure: number}}, the ceilings first."""
    ceilings = Ceilings.measure(machine, is_small)
    figures: Figures = {
        "ceilings": {
            "read_gb_per_second": ceilings.read_bytes / 1e9,
            "copy_gb_per_second": ceilings.copy_bytes / 1e9,
            "bf16_tflops": ceilings.bf16_flops / 1e12,
        }
    }
    for case in measured_cases(machine, is_small):
        figures[f"{case.op}, {case.shape}"] = _measure(machine, case, ceilings)
    return figures


def _measure(machine: Machine, case: Case, ceilings: Ceilings) -> dict[str, Any]:
    seconds = machine.seconds(machine.captured(case.run), is_warm=case.is_warm)
    found: dict[str, Any] = {
        "us": seconds * 1e6,
        "gb_per_second": case.num_bytes / seconds / 1e9,
        "share": ceilings.share(case.num_bytes, case.flops, seconds),
    }
    if case.flops:
        found["tflops"] = case.flops / seconds / 1e12
    for name, peer in case.peers.items():
        found[f"{name}_us"] = _peer_us(machine, peer, case.is_warm)
    if case.anchor:
        found["anchor"] = case.anchor
    return found


def _peer_us(machine: Machine, peer: Work, is_warm: bool) -> float | None:
    """None where this version of the peer cannot do it: that is no failure of ours."""
    try:
        return machine.seconds(machine.captured(peer), is_warm=is_warm) * 1e6
    except (RuntimeError, NotImplementedError) as error:
        print(f"a peer failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    add_options(parser)
    asked = parser.parse_args()
    with open_machine(asked.emulated) as machine:
        show(measure_ops(machine, asked.small), asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
