"""What a caller reads after passing the wrong tensor: the op, the argument, what it must be, what it is."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuda_ops
from tests.cuda_ops.builders import bf16, make_weight, unwritten

ROOT = Path(__file__).parents[2]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_wrong_shape_names_the_bound_dimension():
    with pytest.raises(
        ValueError, match=r"rms_norm: weight must be \[H=64\] float32\|bfloat16, got \[65\] float32"
    ):
        cuda_ops.rms_norm(ones(2, 64), ones(65), 1e-5, ones(2, 64))


def test_a_wrong_rank_shows_both_shapes():
    with pytest.raises(
        ValueError, match=r"linear: x must be \[M, K\] float32\|bfloat16, got \[2, 3, 4\] float32"
    ):
        cuda_ops.linear(ones(2, 3, 4), cuda_ops.Weight("float32", ones(5, 4)), ones(2, 5))


def test_a_wrong_type_is_named():
    with pytest.raises(ValueError, match=r"embed_tokens: ids must be \[M\] int32, got \[3\] int64"):
        cuda_ops.embed_tokens(np.zeros(3, np.int64), ones(4, 2), 0, ones(3, 2))


def test_mixed_activation_types_are_named():
    with pytest.raises(
        ValueError, match="silu_mul: gate_up is bfloat16 but out is float32: both must have one type"
    ):
        cuda_ops.silu_mul(bf16(ones(2, 8)), ones(2, 4))


def test_a_strided_tensor_is_refused():
    with pytest.raises(ValueError, match="rms_norm: x must be contiguous: copy it first"):
        cuda_ops.rms_norm(ones(4, 16)[:, ::2], ones(8), 1e-5, ones(4, 8))


def test_a_weight_that_does_not_fit_x_is_named():
    with pytest.raises(
        ValueError, match=r"linear: weight.data must be \[N, K=8\] float32, got \[5, 9\] float32"
    ):
        cuda_ops.linear(ones(2, 8), cuda_ops.Weight("float32", ones(5, 9)), ones(2, 5))


def test_an_int4_group_that_does_not_divide_the_width_is_refused(rand):
    weight, _ = make_weight(rand, "int4", 4, 48, 16)
    wrong = cuda_ops.Weight("int4", weight.data, weight.scales, 20)
    with pytest.raises(ValueError, match=r"linear: weight.group must be even and divide K=48, got 20"):
        cuda_ops.linear(ones(2, 48), wrong, ones(2, 4))


def test_a_quantised_weight_without_scales_is_refused():
    with pytest.raises(ValueError, match=r"linear: weight.scales are missing"):
        cuda_ops.linear(ones(2, 8), cuda_ops.Weight("int8", np.ones((4, 8), np.int8)), ones(2, 4))


def test_a_plain_weight_with_scales_is_refused():
    weight = cuda_ops.Weight("float32", ones(4, 8), bf16(ones(4)))
    with pytest.raises(ValueError, match=r"linear: weight.scales belong to int8 and int4 weights only"):
        cuda_ops.linear(ones(2, 8), weight, ones(2, 4))


def test_an_unknown_weight_kind_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Weight.kind is 'int3'; it must be one of float32, bfloat16, int8, int4"
    ):
        cuda_ops.Weight("int3", ones(2, 2))


def test_cast_wants_one_shape():
    with pytest.raises(ValueError, match="cast: x and out must have one shape"):
        cuda_ops.cast(ones(2, 3), unwritten((3, 2), "bfloat16"))


def test_zero_threads_are_refused():
    with pytest.raises(ValueError, match="the number of threads must be 1 to 1024, got 0"):
        cuda_ops.set_num_threads(0)


def test_weight_reports_its_size_in_every_format(rand):
    sizes = {
        "float32": 6 * 32 * 4,
        "bfloat16": 6 * 32 * 2,
        "int8": 6 * 32 + 6 * 2,
        "int4": 6 * 16 + 6 * 2 * 2,
    }
    for kind, num_bytes in sizes.items():
        weight, _ = make_weight(rand, kind, 6, 32, 16)
        assert (weight.out_features, weight.in_features, weight.num_bytes) == (6, 32, num_bytes), kind


def test_the_first_op_imports_no_framework():
    script = """
import sys
import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import cuda_ops
assert "tvm_ffi" not in sys.modules, "importing cuda_ops must stay cheap"
cuda_ops.cast(np.ones(3, np.float32), np.ones(3, np.float32))
print(sorted({"torch", "paddle"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_torch_tensors_are_accepted_when_torch_comes_later():
    pytest.importorskip("torch", reason="needs a second framework: OCTET_EXTRAS=compare")
    script = """
import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import cuda_ops
cuda_ops.cast(np.ones(3, np.float32), np.ones(3, np.float32))
import torch
out = torch.zeros(3, dtype=torch.bfloat16)
cuda_ops.cast(torch.tensor([1.0, 2.0, 3.0]), out)
print(out.tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[1.0, 2.0, 3.0]", done.stderr


class OnCuda:
    """A CPU array that says through DLPack that it is on the second GPU."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, **options: object) -> object:
        capsule = self.values.__dlpack__()
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        device = (ctypes.c_int32 * 2).from_address(
            pointer_of(capsule, b"dltensor") + 8
        )  # after the data pointer
        device[:] = self.__dlpack_device__()
        return capsule


def test_a_tensor_on_a_gpu_among_tensors_on_the_cpu_is_named_with_its_device():
    with pytest.raises(
        ValueError, match="cast: out is on cuda:1 but the first tensor is on the CPU: move one of them"
    ):
        cuda_ops.cast(ones(4), OnCuda(ones(4)))
