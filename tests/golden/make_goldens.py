"""Writes the golden files beside this one; needs torch and transformers, the tests that read them do not.

    .venv/bin/python -m tests.golden.make_goldens

Run it again after changing cases.py or models/tiny_weights.py. Each file holds one case's inputs and what
transformers 5.23.0 answered in fp32: some rows of logits and 32 greedy tokens. The weights are not
stored: models/tiny.py writes the same bits everywhere, and their sha256 is in each file.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from models.tiny import write_tiny_checkpoint
from tests.golden.cases import (
    CASE_SEED,
    FOLDER,
    PRESETS,
    WEIGHT_SEED,
    Case,
    Golden,
    make_cases,
    media_ids,
    save_golden,
)
from tests.golden.transformers_reference import TransformersReference

_NUM_ROWS = 8


def main() -> None:
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_tiny_checkpoint(Path(scratch), "pt", WEIGHT_SEED, preset)
            digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            reference = TransformersReference(folder)
            for case in make_cases(media_ids(preset), CASE_SEED):
                file = FOLDER / preset / f"{case.name}.npz"
                file.parent.mkdir(exist_ok=True)
                save_golden(file, answer(reference, case, digest))
                print(file.relative_to(FOLDER), file.stat().st_size, "bytes")


def answer(reference: TransformersReference, case: Case, digest: str) -> Golden:
    """Logits of rows spread over the prompt, the last one among them, and the greedy continuation.

    No row lies inside a media item, so that a test can ask for each as the end of a shorter prompt.
    """
    logits = reference.logits(case)
    between = np.flatnonzero(~case.is_media)
    rows = between[np.unique(np.linspace(0, len(between) - 1, _NUM_ROWS).round().astype(np.int32))]
    return Golden(case, rows, logits[rows], reference.greedy(case), digest)


if __name__ == "__main__":
    main()
