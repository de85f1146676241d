"""The tokenizer folder that encoding and training tests share; training it takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.demo_training.tokenizer import write_tokenizer_folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_folder(folder, samples_per_skill=120)
    return folder
