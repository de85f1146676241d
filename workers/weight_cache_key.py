"""The name of a rank's entry in the weight cache: a digest of everything that decides its bytes.

Names, sizes, modification times and headers of the checkpoint's files, the model's configuration, formats,
ranks, the kind of device and processor, and the source files that cut, quantise and lay out. The weights
themselves are not hashed, which would cost a full read: who rewrites a file in place with the same size,
header and modification time has to clear the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec

from engine.config import ServerConfig
from engine.model_config import ModelConfig

# Raise it when the meaning of stored bytes changes in a place that _SOURCES does not cover.
LAYOUT_VERSION = 1

_ROOT = Path(__file__).resolve().parents[1]
_SOURCES = (  # who cuts, quantises and lays out
    "workers/checkpoint*.py",
    "workers/loader.py",
    "workers/parallel.py",
    "workers/quant.py",
    "workers/shards.py",
    "workers/weight_source.py",
    "workers/model/weights.py",
    "cuda_ops/weight.py",
    "cuda_ops/quantize.py",
    "cuda_ops/*pack*.py",
    "cuda_ops/csrc/*/quantize.*",
    "cuda_ops/csrc/*/*pack*",
    "cuda_ops/csrc/cpu/int8_panels.h",
)
# Weights may be laid out for the widest of these.
_PROCESSOR_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def cache_key(config: ServerConfig, model: ModelConfig, device_name: str, rank: int, world: int) -> str:
    """32 hex digits; quantization is settled. `device_name`: of "gpu:0 ..." only the kind counts."""
    hasher = hashlib.blake2b(digest_size=16)
    parts = [
        str(LAYOUT_VERSION),
        _sources_digest(),
        msgspec.json.encode(model).decode(),
        config.load_format,
        str(config.seed) if config.load_format == "dummy" else "",
        config.quantization,
        config.dtype,
        device_name.partition(":")[0],
        _processor_features(),
        f"{rank}/{world}",
        *(_checkpoint_identity(Path(config.model)) if config.load_format != "dummy" else ()),
    ]
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part.encode())
    return hasher.hexdigest()


def _checkpoint_identity(folder: Path) -> Iterator[str]:
    """Name, size, modification time and header of every weight file, and the index."""
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        with path.open("rb") as file:
            start = file.read(8)
            header = file.read(min(int.from_bytes(start, "little"), status.st_size))
        digest = hashlib.blake2b(start + header, digest_size=16).hexdigest()
        yield f"{path.name} {status.st_size} {status.st_mtime_ns} {digest}"
    for path in sorted(folder.glob("*.index.json")):
        yield hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@cache
def _sources_digest() -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for pattern in _SOURCES:
        for path in sorted(_ROOT.glob(pattern)):
            hasher.update(path.name.encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


@cache
def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return " ".join(feature for feature in _PROCESSOR_FEATURES if feature in flags)
