"""Weights on a GPU: dummy ones are made there and are those of a CPU; the decoder's are tiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import cuda_ops
from engine.config import ServerConfig
from tests.checks import assert_same_bits
from tests.workers.checkpoints import arrays_of
from tests.workers.fake_cuda import FakePaddleGpu, streamed_ops
from tests.workers.gpu_ranks import make_gpu_config
from workers.device.paddle import PaddleCpu
from workers.loader import load_weights
from workers.model.weights import resident_bytes
from workers.tiling import tile_decoder


@pytest.fixture
def stream() -> Iterator[None]:
    with streamed_ops():
        yield


@pytest.mark.parametrize(("quantization", "world"), [("bfloat16", 1), ("wint8", 2), ("wint4", 1)])
def test_dummy_weights_made_on_a_gpu_are_those_of_a_cpu(quantization: str, world: int):
    model = make_gpu_config(vocab_size=80_000)
    config = ServerConfig(load_format="dummy", quantization=quantization, load_threads=2)  # type: ignore[arg-type]
    expected = arrays_of(load_weights(config, model, PaddleCpu(), world - 1, world))
    with streamed_ops():
        gpu = FakePaddleGpu()
        weights = load_weights(config, model, gpu, world - 1, world)
        gpu.synchronize()
        made = arrays_of(weights)
    assert len(made) > 40
    for name in made.keys() & expected.keys():
        if "lm_head" not in name:  # a CPU's head is int8
            assert_same_bits(made[name], expected[name], name)
    assert gpu.cuda.num_uploaded < resident_bytes(weights) / 2, "blocks travel, not weights"


def test_tiling_keeps_the_bytes_and_gives_the_rows_back(stream: None):
    config = ServerConfig(load_format="dummy", quantization="wint4", load_threads=1)
    gpu, progress = FakePaddleGpu(), []
    weights = load_weights(config, make_gpu_config(), gpu, 0, 1)
    before = resident_bytes(weights)
    tile_decoder(weights.decoder, gpu, lambda: progress.append(1))
    assert len(progress) == make_gpu_config().num_layers
    assert before <= resident_bytes(weights) < 1.3 * before, "tiles are padded to 16 rows and 64 columns"
    layer = weights.decoder.layers[1]
    tiled = [layer.qkv, layer.o_proj, weights.decoder.lm_head, *layer.mlp.pools[1], layer.mlp.shared.down]  # type: ignore[union-attr]
    assert all(isinstance(one, cuda_ops.TiledWeight) for one in tiled)
    assert [one.is_gated for one in layer.mlp.pools[0]] == [True, False]  # type: ignore[union-attr]
