"""Packed weights: the order of their bytes, and products with the very bits of the row-major weight."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_same_bits
from tests.cuda_ops.builders import make_weight, read, tensor, unwritten

# kind, n, k, int4 group: one panel pair and several, spans of 64 and of 32, groups of several spans
SHAPES = (
    ("int8", 32, 64, 0),
    ("int8", 96, 192, 0),
    ("int4", 32, 64, 64),
    ("int4", 64, 96, 32),
    ("int4", 96, 256, 128),
)


def copied(weight: cuda_ops.Weight) -> cuda_ops.Weight:
    return cuda_ops.Weight(weight.kind, weight.data.copy(), weight.scales.clone(), weight.group)


@pytest.mark.parametrize(("kind", "n", "k", "group"), SHAPES)
def test_a_packed_weight_gives_every_batch_the_bits_of_its_rows(rand, kind, n, k, group):
    weight, _ = make_weight(rand, kind, n, k, group)
    packed = cuda_ops.pack_panels(copied(weight))
    for m in (0, 1, 2, 3, 8, 9, 24, 25, 60):
        x = tensor(rand.normal(m, k), "bfloat16")
        expected, found = unwritten((m, n), "float32"), unwritten((m, n), "float32")
        cuda_ops.linear(x, weight, expected)
        cuda_ops.linear(x, packed, found)
        assert_same_bits(found, expected, f"{kind} {m}x{k}x{n}")


def test_words_of_sixteen_rows_lie_side_by_side_as_unsigned_numbers(rand):
    weight, _ = make_weight(rand, "int8", 64, 128)
    words = (weight.data.copy().view(np.uint8) ^ 0x80).reshape(4, 16, 32, 4)
    packed = cuda_ops.pack_panels(copied(weight))
    assert_same_bits(packed.data.view(np.uint8).reshape(4, 32, 16, 4), words.transpose(0, 2, 1, 3).copy())

    weight, _ = make_weight(rand, "int4", 64, 128, 32)
    words = (weight.data ^ 0x88).reshape(4, 16, 16, 4)
    scales = read(weight.scales).reshape(4, 16, 4)
    packed = cuda_ops.pack_panels(copied(weight))
    assert_same_bits(packed.data.reshape(4, 16, 16, 4), words.transpose(0, 2, 1, 3).copy())
    assert_same_bits(read(packed.scales).reshape(4, 4, 16), scales.transpose(0, 2, 1).copy())


@pytest.mark.parametrize("kinds", [("int4", "int4"), ("int8", "int8"), ("int4", "bfloat16")])
def test_packed_experts_give_the_bits_of_their_rows(rand, kinds):
    experts, hidden, width = 5, 128, 96
    weights = [
        make_weight(rand, kind, *shape, 32, stack=(experts,))[0]
        for kind, shape in zip(kinds, ((2 * width, hidden), (hidden, width)), strict=True)
    ]
    packed = [cuda_ops.pack_panels(copied(w)) if w.kind == "int4" else w for w in weights]
    ids = rand.numpy.integers(0, experts, (40, 3)).astype(np.int32)
    routing = rand.numpy.uniform(0.1, 1.0, (40, 3)).astype(np.float32)
    x = tensor(rand.normal(40, hidden), "bfloat16")
    expected, found = unwritten((40, hidden), "bfloat16"), unwritten((40, hidden), "bfloat16")
    cuda_ops.moe_experts(x, ids, routing, [tuple(weights)], expected)
    cuda_ops.moe_experts(x, ids, routing, [tuple(packed)], found)
    assert_same_bits(read(found), read(expected), str(kinds))


def test_only_shapes_of_whole_panels_and_spans_are_packed(rand):
    assert cuda_ops.can_pack("int8", 64, 128) and cuda_ops.can_pack("int4", 32, 96, 32)
    for kind, n, k, group in (
        ("int8", 48, 64, 0),
        ("int8", 32, 96, 0),
        ("int4", 32, 64, 16),
        ("float32", 32, 64, 0),
    ):
        assert not cuda_ops.can_pack(kind, n, k, group)
    weight, _ = make_weight(rand, "int8", 48, 64)
    with pytest.raises(ValueError, match="are packed"):
        cuda_ops.pack_panels(weight)


def test_a_packed_weight_refuses_fp32_activations_and_a_second_packing(rand):
    packed = cuda_ops.pack_panels(make_weight(rand, "int8", 32, 64)[0])
    with pytest.raises(ValueError, match="bfloat16 activations only"):
        cuda_ops.linear(rand.normal(2, 64), packed, unwritten((2, 32), "float32"))
    with pytest.raises(ValueError, match="packed already"):
        cuda_ops.pack_panels(packed)
