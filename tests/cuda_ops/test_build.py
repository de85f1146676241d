"""The build: which level is chosen, one build for many ranks, and words when it cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_ops import build, includes

ROOT = Path(__file__).parents[2]
FULL = frozenset(build.AVX512 + build.EXTRA["avx512"] + build.AVX2 + build.EXTRA["avx2"])


def test_the_best_level_that_the_cpu_has_is_chosen():
    assert build.choose_target(None, FULL).isa == "avx512"
    assert build.choose_target(None, FULL - {"avx512dq"}).isa == "avx2"
    assert build.choose_target(None, FULL - {"avx512dq", "fma"}).isa == "generic"
    assert build.choose_target(None, frozenset()).flags == ()


def test_bfloat16_dot_products_are_used_only_where_present():
    assert "-mavx512bf16" in build.choose_target(None, FULL).flags
    assert "-mavx512bf16" not in build.choose_target(None, FULL - {"avx512_bf16"}).flags


def test_dot_products_of_bytes_are_used_only_where_present():
    assert "-mavx512vnni" in build.choose_target(None, FULL).flags
    assert "-mavx512vnni" not in build.choose_target(None, FULL - {"avx512_vnni"}).flags
    assert "-mavxvnni" in build.choose_target("avx2", FULL).flags
    assert "-mavxvnni" not in build.choose_target("avx2", FULL - {"avx_vnni"}).flags


def test_an_unknown_or_unsupported_level_is_refused():
    with pytest.raises(build.BuildError, match="it must be one of avx512, avx2, generic"):
        build.choose_target("sse9", FULL)
    with pytest.raises(build.BuildError, match="but this CPU lacks avx2"):
        build.choose_target("avx2", FULL - {"avx2"})


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        build.BuildError, match="'no-such-compiler' was not found: install g\\+\\+ 11 or newer"
    ):
        build.find_compiler()


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A source tree of two files in place of csrc/, with its own cache."""
    source = tmp_path / "csrc"
    for folder in ("include", "common", "cpu", "boundary"):
        (source / folder).mkdir(parents=True)
    (source / "include" / "two.h").write_text("#define TWO 2\n")
    (source / "cpu" / "one.cc").write_text('extern "C" int one() { return 1; }\n')
    (source / "cpu" / "two.cc").write_text(
        '#include "../include/two.h"\nextern "C" int two() { return TWO; }\n'
    )
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("OCTET_CACHE", str(tmp_path / "cache"))
    return source


def test_a_second_start_uses_the_library_that_is_there(small_source):
    lines: list[str] = []
    first = build.library_path("generic", lines.append)
    assert first.exists() and any("[2/2]" in line for line in lines)
    lines.clear()
    assert build.library_path("generic", lines.append) == first and lines == []


def test_a_changed_file_recompiles_what_includes_it_and_nothing_else(small_source):
    first = build.library_path("generic")
    (small_source / "cpu" / "one.cc").write_text('extern "C" int one() { return 11; }\n')
    lines: list[str] = []
    second = build.library_path("generic", lines.append)
    assert second != first and "1 of 2 files to compile" in lines[0]
    (small_source / "include" / "two.h").write_text("#define TWO 22\n")
    lines.clear()
    build.library_path("generic", lines.append)
    assert "1 of 2 files to compile" in lines[0]


def test_an_object_depends_on_headers_of_headers_and_on_those_of_an_include_folder(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (tmp_path / "a.cc").write_text('#include <vector>\n#  include "b.h"\n// #include "unrelated.h"\n')
    (tmp_path / "b.h").write_text("#pragma once\n#include <far.h>\n")
    (folder / "far.h").write_text('#include "../b.h"\n')  # a circle ends
    (tmp_path / "unrelated.h").write_text("")
    names = [path.name for path in includes.files_behind(tmp_path / "a.cc", [folder])]
    assert sorted(names) == ["a.cc", "b.h", "far.h"]


def test_every_header_of_the_ops_is_included_by_some_source():
    sources = build._files(build.SOURCES, "*.cc")
    behind = {path for source in sources for path in includes.files_behind(source)}
    assert not set(build._files(build.HEADERS, "*.h")) - behind


def test_a_broken_source_reports_the_compilers_words_and_leaves_nothing_half_built(small_source):
    (small_source / "cpu" / "one.cc").write_text("int one() { return nonsense; }\n")
    with pytest.raises(build.BuildError, match=r"(?s)Compiling cuda_ops failed.*nonsense"):
        build.library_path("generic")
    left = sorted(path.name for path in build.cache_folder().iterdir())
    assert left == ["build.lock", "objects"]


BUILD_ONCE = """
import sys
from pathlib import Path
from cuda_ops import build
build.SOURCE = Path(sys.argv[1])
lines = []
build.library_path("generic", lines.append)
print(len(lines) > 0)
"""


def test_ranks_that_start_together_build_once(small_source):
    command = [sys.executable, "-c", BUILD_ONCE, str(small_source)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in range(4)]
    built = [process.communicate(timeout=60)[0].strip() for process in ranks]
    assert sorted(built) == ["False", "False", "False", "True"]


SMALL_SUITE = """
import sys
import numpy as np
import cuda_ops
rng = np.random.default_rng(7)
x = rng.standard_normal((9, 80)).astype(np.float32)
weight = rng.standard_normal((37, 80)).astype(np.float32)
out = np.zeros((9, 37), np.float32)
cuda_ops.linear(x, cuda_ops.Weight("float32", weight), out, None, "quick_gelu")
normed = np.zeros_like(x)
cuda_ops.rms_norm(x, np.ones(80, np.float32), 1e-5, normed)
qkv = rng.standard_normal((70, 3, 2, 20)).astype(np.float32)
seen = np.zeros((70, 40), np.float32)
cuda_ops.segment_attention(qkv, np.array([0, 20, 70], np.int32), 0.2, seen)
np.savez(sys.argv[1], out=out, normed=normed, seen=seen)
"""


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_another_instruction_set_agrees_within_rounding(tmp_path, isa):
    import numpy as np

    from tests.checks import assert_close

    try:
        build.choose_target(isa, build.cpu_flags())
    except build.BuildError as error:
        pytest.skip(str(error))
    results = []
    for level in (isa, ""):
        file = tmp_path / f"{level}.npz"
        environment = {**os.environ, "OCTET_OPS_ISA": level}
        subprocess.run([sys.executable, "-c", SMALL_SUITE, str(file)], cwd=ROOT, env=environment, check=True)
        results.append(dict(np.load(file)))
    for name, expected in results[1].items():
        assert_close(results[0][name], expected, 1e-4, f"{name} on {isa}")
