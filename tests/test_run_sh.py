"""run.sh: what comes before a verb stays out of its output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A virtual environment whose pip and builds only say that they ran.
PYTHON = """#!/bin/sh
case "$2" in
  pip | cuda_ops.build*) echo "$2 ran" ;;
  *) exec {python} "$@" ;;
esac
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    environment = {"OCTET_VENV": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [str(ROOT / "run.sh"), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def test_json_of_a_plan_is_all_that_its_first_call_writes_to_stdout(tmp_path: Path):
    plan = ("plan", "--model", "ernie-4.5-vl-424b-a47b", "--tp", "8", "--quant", "wint4",
            "--device", "a100-80g", "--json")  # fmt: skip
    first, second = run(tmp_path, *plan), run(tmp_path, *plan)
    assert json.loads(first.stdout)["fits"] is True
    assert first.stdout == second.stdout
    assert ("pip ran" in first.stderr, "pip ran" in second.stderr) == (True, False)


def test_help_of_a_verb_is_all_that_its_first_call_writes_to_stdout(tmp_path: Path):
    first = run(tmp_path, "quality", "--help")
    assert first.stdout.startswith("usage: ./run.sh quality"), first.stdout
    assert "cuda_ops.build ran" in first.stderr


def test_an_unknown_verb_is_named_and_nothing_is_installed(tmp_path: Path):
    result = run(tmp_path, "sevre")
    assert result.returncode == 1
    assert "there is no verb 'sevre'" in result.stderr and "pip ran" not in result.stderr
