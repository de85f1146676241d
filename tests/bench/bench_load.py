"""How long a rank takes to load: from a -Paddle checkpoint (cold), and from the weight cache (warm).

Method        A checkpoint of real shapes, the 21B preset cut to --layers, is written to a temporary folder
              with random bf16 values. Then fresh processes load it: without a cache, with an empty one (which
              is written meanwhile), and with the entry there. Files stay in the system's page cache, so this
              measures our work and not the disk; --drop takes both out of the page cache first.
Bytes         cold: the checkpoint once. warm: the final weights once, for their checksums.
How to read   GB/s is of what is read in that row. peak is the growth of the process's anonymous memory;
              mapped weights are file pages and do not count.
Run           ./run.sh bench load [--layers 3] [--quant wint4] [--tp 1] [--drop] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import ServerConfig
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import preset_file
from tests.bench.result_files import save, save_option
from workers.checkpoint_inventory import Role, model_tensors
from workers.weight_source import decide_without_tensors

_PRESET = "ernie-4.5-21b-a3b"
_BLOCK = 1 << 24  # random values, repeated from a different start in every tensor


def main() -> None:
    given = _parse()
    if given.child:
        _load_once(json.loads(given.child))
        return
    with tempfile.TemporaryDirectory(prefix="octet-load-") as scratch:
        folder, cache = Path(scratch) / "model", Path(scratch) / "cache"
        num_bytes = write_checkpoint(folder, given.layers)
        print(
            f"{_PRESET}, {given.layers} layers, {num_bytes / 1e9:.2f} GB bf16, {given.quant}, "
            f"rank 0 of {given.tp}"
        )
        settings = {"model": str(folder), "quantization": given.quant, "tensor_parallel_size": given.tp}
        figures = {
            "cold, no cache": _report("cold, no cache", settings | {"weight_cache": "off"}, given.drop),
            "cold, cache written": _report(
                "cold, cache written", settings | {"weight_cache": str(cache)}, given.drop
            ),
            "warm": _report("warm", settings | {"weight_cache": str(cache)}, given.drop),
        }
    if given.save:
        settings = {"layers": given.layers, "quantization": given.quant, "tp": given.tp, "drop": given.drop}
        save("load", figures, settings)


def write_checkpoint(folder: Path, num_layers: int) -> int:
    """A -Paddle checkpoint of random values in one file per layer; returns its bytes."""
    folder.mkdir()
    raw = json.loads(preset_file(_PRESET).read_text()) | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(raw))
    model = decide_without_tensors(read_model_config(folder))
    shards: dict[str, list[tuple[str, tuple[int, ...], bool]]] = {}
    for tensor in model_tensors(model):
        layer = tensor.name.split(".")[1] if tensor.name.startswith("layers.") else "rest"
        is_float32 = tensor.role in (Role.ROUTER, Role.CORRECTION)
        for name, shape in tensor.stored("A").items():
            shards.setdefault(layer, []).append((f"ernie.{name}", shape, is_float32))
    bits = _random_bits()
    return sum(
        _write_shard(folder / f"model-{layer}.safetensors", shard, bits) for layer, shard in shards.items()
    )


def _write_shard(file: Path, tensors: list[tuple[str, tuple[int, ...], bool]], bits: np.ndarray) -> int:
    header: dict[str, Any] = {}
    end = 0
    for name, shape, is_float32 in tensors:
        start, end = end, end + int(np.prod(shape)) * (4 if is_float32 else 2)
        kind = "F32" if is_float32 else "BF16"
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for index, (_, shape, is_float32) in enumerate(tensors):
            count = int(np.prod(shape))
            for start in range(0, count, _BLOCK // 2):
                first = index * 977 % (_BLOCK // 2)
                part = bits[first : first + min(_BLOCK // 2, count - start)]
                out.write((part.astype(np.uint32) << 16 if is_float32 else part).tobytes())
    return file.stat().st_size


def _random_bits() -> np.ndarray:
    """bf16 bits of normal values of the size that trained weights have."""
    values = np.random.default_rng(1).standard_normal(_BLOCK, np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def drop_pages(*folders: Path) -> None:
    """Take weight files out of the system's page cache."""
    for folder in folders:
        for file in folder.glob("*.*s"):
            _drop(file)


def _report(name: str, settings: dict[str, Any], drop: bool) -> dict[str, float]:
    """Load in a fresh process, print a line and return its figures."""
    if drop:
        drop_pages(Path(settings["model"]), Path(settings["weight_cache"]))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.bench.bench_load",
        "--child",
        json.dumps(settings),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rate = found["read"] / 1e9 / found["seconds"]
    line = f"{name:<20} {found['seconds']:7.2f} s   {found['read'] / 1e9:6.2f} GB read   {rate:5.2f} GB/s"
    print(f"{line}   weights {found['weights'] / 1e9:.2f} GB   peak {found['peak'] / 1e9:.2f} GB", flush=True)
    sizes = {f"{key}_gb": found[key] / 1e9 for key in ("read", "weights", "peak")}
    return {"seconds": found["seconds"], "gb_per_second": rate} | sizes


def _drop(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _load_once(settings: dict[str, Any]) -> None:
    """In a process of its own: time and memory of one load_weights; ops and framework come before."""
    import cuda_ops
    from workers.device.paddle import PaddleCpu
    from workers.loader import load_weights
    from workers.model.weights import resident_bytes

    config = ServerConfig(**settings)
    model: ModelConfig = read_model_config(config.model)
    world = config.tensor_parallel_size
    device = PaddleCpu()
    cuda_ops.set_num_threads(max(len(os.sched_getaffinity(0)) // world, 1))
    tensor = device.zeros((64, 64), "float32")
    cuda_ops.quantize_int8(tensor, device.empty((64, 64), "int8"), device.empty((64,), "bfloat16"))
    totals: list[int] = [0]
    before = _anonymous("RssAnon")
    peak = [before]
    watching = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, watching))
    watcher.start()
    began = time.monotonic()
    weights = load_weights(config, model, device, 0, world, lambda loaded, total: totals.append(total))
    seconds = time.monotonic() - began
    watching.set()
    watcher.join()
    found = {
        "seconds": seconds,
        "read": totals[-1],
        "weights": resident_bytes(weights),
        "peak": peak[0] - before,
    }
    for thread in threading.enumerate():
        if thread.name == "weight-cache":
            thread.join()
    print(json.dumps(found))


def _watch(peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.02):
        peak[0] = max(peak[0], _anonymous("RssAnon"))


def _anonymous(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--quant", default="wint4", choices=("bfloat16", "wint8", "wint4"))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--drop", action="store_true", help="read from the disk, not from the page cache")
    save_option(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
