"""The library of CUDA bodies is built once for all ranks, then only what changed; a failure says what failed.

The toolkit is a stand-in that writes down what it is asked: nvcc itself is asked in test_nvcc.py.
"""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from cuda_ops import build_gpu, device_library
from cuda_ops.build import BuildError
from cuda_ops.emulator import emulated_library_path

NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "release 12.4"; exit; }
for word; do
  case "$word" in *.cu) source="$word";; esac
  [ "$before" = -o ] && out="$word"
  before="$word"
done
[ -n "$source" ] && grep -q broken "$source" && { echo "$source(1): error: broken" >&2; exit 1; }
echo "${source:-link} $*" >>"{log}"
: >"$out"
"""


class Toolkit:
    """Two kernels that share a header, a boundary, and the nvcc that compiles them into `cache`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._log = folder, folder / "log"
        self.write("shared.cuh", "// shared\n")
        self.write("one.cu", '#include "shared.cuh"\n')
        self.write("two.cu", "// alone\n")
        self.write("boundary.cc", "int boundary;\n")
        nvcc = folder / "nvcc"
        nvcc.write_text(NVCC.replace("{log}", str(self._log)))
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        sources = [folder / name for name in ("one.cu", "two.cu", "boundary.cc")]
        monkeypatch.setattr(build_gpu, "_sources", lambda: sources)
        monkeypatch.setenv("OCTET_NVCC", str(nvcc))
        monkeypatch.setenv("OCTET_CACHE", str(folder / "cache"))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def asked(self) -> list[str]:
        """What nvcc compiled or linked since the last call, by name, sorted."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return sorted(Path(line.split()[0]).name for line in lines)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    return Toolkit(tmp_path, monkeypatch)


def test_library_is_built_with_progress_and_then_taken_from_the_cache(toolkit: Toolkit):
    lines: list[str] = []
    library = build_gpu.gpu_library_path(lines.append)
    assert library.exists()
    assert toolkit.asked() == ["link", "one.cu", "two.cu"]
    assert lines[0] == "building the CUDA bodies: 3 of 3 files to compile"
    assert [line.split()[0] for line in lines[1:]] == ["[1/3]", "[2/3]", "[3/3]"]
    assert build_gpu.gpu_library_path() == library
    assert toolkit.asked() == []


def test_only_what_includes_a_changed_header_is_compiled_again(toolkit: Toolkit):
    before = build_gpu.gpu_library_path()
    toolkit.asked()
    toolkit.write("shared.cuh", "// changed\n")
    assert build_gpu.gpu_library_path() != before
    assert toolkit.asked() == ["link", "one.cu"]


def test_other_architectures_are_another_library(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch):
    before = build_gpu.gpu_library_path()
    monkeypatch.setenv("OCTET_GPU_ARCHS", "90")
    assert build_gpu.gpu_library_path() != before


def test_ranks_that_start_together_build_it_once(toolkit: Toolkit):
    found: list[Path] = []
    ranks = [threading.Thread(target=lambda: found.append(build_gpu.gpu_library_path())) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(set(found)) == 1
    assert toolkit.asked() == ["link", "one.cu", "two.cu"]


def test_what_does_not_compile_is_told_with_the_command_and_may_be_mended(
    toolkit: Toolkit, capsys: pytest.CaptureFixture[str]
):
    toolkit.write("two.cu", "broken\n")
    with pytest.raises(BuildError, match=r"two\.cu\(1\): error: broken") as failure:
        build_gpu.gpu_library_path()
    assert str(failure.value).startswith("Compiling the CUDA bodies failed; the command was\n")
    assert build_gpu.main() == 1
    assert "error: broken" in capsys.readouterr().err
    toolkit.write("two.cu", "// mended\n")
    assert build_gpu.main() == 0
    assert "CUDA bodies ready in" in capsys.readouterr().out


def test_ops_on_a_gpu_come_from_the_library_that_was_built(monkeypatch: pytest.MonkeyPatch):
    """Any library with the functions will do; the emulator's is at hand."""
    monkeypatch.setattr(build_gpu, "gpu_library_path", emulated_library_path)
    monkeypatch.setattr(device_library, "_modules", {})
    ops = device_library.DeviceLibrary()
    assert callable(ops.moe_workspace_bytes)
    with pytest.raises(RuntimeError, match="on a GPU: it has no CUDA body"):
        ops.no_such_op  # noqa: B018
