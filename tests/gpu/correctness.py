"""Every op on the device against float64, on fresh random inputs.

Run   python -m tests.gpu.correctness [--small] [--emulated] [--seed N]
"""

from __future__ import annotations

import argparse
import random
import sys

import torch

from tests.gpu.figures import add_options, show
from tests.gpu.machine import open_machine
from tests.gpu.plan import checked_cases


def check_ops(is_small: bool, is_emulated: bool, seed: int) -> tuple[int, list[str]]:
    """How many cases there were, and what was wrong, one line each."""
    torch.manual_seed(seed)
    wrong, count = [], 0
    with open_machine(is_emulated) as machine:
        for case in checked_cases(machine, is_small):
            case.run()
            machine.synchronize()
            complaints = [answer.complaint() for answer in case.answers()]
            wrong += [f"{case.op} {case.shape}: {words}" for words in complaints if words]
            count += 1
    return count, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes for compute-sanitizer and the emulator")
    add_options(parser)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    asked = parser.parse_args()
    count, wrong = check_ops(asked.small, asked.emulated, asked.seed)
    show({"correctness": {"cases": count, "wrong": wrong, "seed": asked.seed}}, asked.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
