"""The real engine core over fake ranks: `python -m tests.engine.fake_core <behaviour> <run_dir>`."""

from __future__ import annotations

import sys

from engine.core import main

if __name__ == "__main__":
    behaviour, run_directory = sys.argv[1:]
    sys.exit(main(run_directory, [sys.executable, "-m", "tests.engine.fake_rank", behaviour]))
