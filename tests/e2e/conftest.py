"""Servers shared by the end-to-end tests; each starts once and stops at the end of the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, running_server

# The command of the reference server's ERNIE-4.5-VL-424B guide, without the model and the ports.
GUIDE_FLAGS = [
    "--engine-worker-queue-port", "8182",
    "--tensor-parallel-size", "8",
    "--max-model-len", "131072",
    "--max-num-seqs", "16",
    "--limit-mm-per-prompt", '{"image": 100, "video": 100}',
    "--reasoning-parser", "ernie-45-vl",
    "--gpu-memory-utilization", "0.85",
    "--enable-chunked-prefill",
    "--max-num-batched-tokens", "384",
    "--quantization", "wint4",
    "--enable-mm",
]  # fmt: skip


@pytest.fixture(scope="session")
def guide_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Eight ranks, wint4, every flag of the guide; the embedded model."""
    with running_server(tmp_path_factory.mktemp("guide"), *GUIDE_FLAGS) as server:
        yield server
