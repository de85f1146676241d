"""From what the operator typed after --model to a folder on this machine.

    nothing              the trained demo model, models/demo; where that is missing, octet-tiny
    octet-tiny           a tiny random checkpoint for tests, written once into the cache
    a path               used as it is
    a preset's name      with --load-format dummy: the preset's config and a stand-in tokenizer
    org/name             downloaded from the hub into its own cache; resumed when it was cut off

A cached folder appears under its final name only when it is complete, and one process at a time writes.
Nothing downloaded is ever executed: only the file kinds below are fetched. Reading the config is in
model_config.py, reading weights is the workers' business.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.errors import ConfigError
from engine.model_config import read_json_object

TINY_NAME = "octet-tiny"  # the random checkpoint
DEMO_NAME = "octet-demo"  # what models/demo is served as

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "spm.model", "ernie_token_100k.model")
_CONFIG_PATTERNS = [
    "*.json",
    "*.model",
    "*.jinja",
    "*.ttf",
]  # of a hub repository; never .bin, .py, .pdparams
_WEIGHT_PATTERNS = ["*.safetensors"]
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_ROOT = Path(__file__).resolve().parents[1]
_PRESETS = _ROOT / "models" / "presets"
DEMO = _ROOT / "models" / "demo"


def resolve_model(
    model: str,
    *,
    load_format: str = "auto",
    offline: bool = False,
    needs_tokenizer: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """The folder that holds config.json and, unless told otherwise, tokenizer and weights.

    `load_format` "dummy" needs no weights; `needs_tokenizer` is false when --tokenizer names another folder.
    `say` gets a line before anything that takes time. Raises ConfigError that says what is missing.
    """
    needs_weights = load_format != "dummy"
    if not model and has_demo():
        return DEMO
    if not model or model == TINY_NAME:
        return _tiny(say)
    path = Path(model).expanduser()
    if path.exists():
        check_model_folder(path, needs_weights=needs_weights, needs_tokenizer=needs_tokenizer)
        return path.resolve()
    if model in preset_names():
        if needs_weights:
            raise ConfigError(
                f"{model} is a preset without weights; add --load-format dummy or give a folder"
            )
        return _preset(model, say)
    if _HUB_ID.fullmatch(model):
        folder = _from_hub(model, needs_weights, offline, say)
        check_model_folder(folder, needs_weights=needs_weights, needs_tokenizer=needs_tokenizer)
        return folder
    near = difflib.get_close_matches(model, preset_names(), n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"--model {model} is no folder here, no preset (the nearest is {near}) and no hub id like org/name"
    )


def has_demo() -> bool:
    """Whether the trained model is part of this checkout."""
    return (DEMO / "config.json").is_file()


def default_name() -> str:
    """Of the model that is served when the operator names none."""
    return DEMO_NAME if has_demo() else TINY_NAME


def preset_names() -> list[str]:
    return sorted(file.stem for file in _PRESETS.glob("*.json"))


def preset_file(name: str) -> Path:
    """The config of a preset; nothing is written, unlike by resolve_model."""
    return _PRESETS / f"{name}.json"


def cache_folder() -> Path:
    """Where generated checkpoints live: $OCTET_CACHE, else ~/.cache/octet."""
    return Path(os.environ.get("OCTET_CACHE") or "~/.cache/octet").expanduser()


def check_model_folder(folder: Path, *, needs_weights: bool = True, needs_tokenizer: bool = True) -> None:
    """Raise ConfigError naming everything the folder lacks."""
    if not folder.is_dir():
        raise ConfigError(f"--model {folder} is a file; give the folder that holds config.json")
    lacks = [] if (folder / "config.json").is_file() else ["config.json"]
    if needs_tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        lacks.append("a tokenizer (tokenizer.model or tokenizer.json)")
    if needs_weights:
        lacks += _missing_weights(folder)
    if lacks:
        raise ConfigError(f"{folder} lacks {', '.join(lacks)}")


def _missing_weights(folder: Path) -> list[str]:
    """Weight files that should be there: those of the index, or at least one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [] if any(folder.glob("*.safetensors")) else ["weights (*.safetensors)"]
    weight_map = read_json_object(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    missing = [str(name) for name in names if not (folder / str(name)).is_file()]
    more = f" and {len(missing) - 3} more shards" if len(missing) > 3 else ""
    return [", ".join(missing[:3]) + more] if missing else []


# the hub ------------------------------------------------------------------------------------------


def _from_hub(model: str, needs_weights: bool, offline: bool, say: Callable[[str], None]) -> Path:
    if offline:
        # The library reads this at import; it also silences its own requests for telemetry.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants, snapshot_download

    patterns = _CONFIG_PATTERNS + (_WEIGHT_PATTERNS if needs_weights else [])
    offline = offline or constants.HF_HUB_OFFLINE
    if not offline:
        say(f"downloading {model} from {constants.ENDPOINT} (resumes where it was cut off)")
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the library raises many kinds, of its own and of its HTTP client
        if offline:
            raise ConfigError(
                f"{model} is not in the cache {constants.HF_HUB_CACHE}, and --offline forbids a download; "
                "start once without --offline or give a folder"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{model} could not be downloaded: {reason}") from None


# generated folders --------------------------------------------------------------------------------


def _tiny(say: Callable[[str], None]) -> Path:
    """The tiny checkpoint in both layouts; the -Paddle one is served."""
    folder = cache_folder() / f"tiny-{_digest()}"
    _make_once(folder, ["--layout", "both"], lambda: say(f"writing the tiny random model to {folder}"))
    return folder / "paddle"


def _preset(name: str, say: Callable[[str], None]) -> Path:
    file = _PRESETS / f"{name}.json"
    folder = cache_folder() / "presets" / _digest(file) / name
    _make_once(folder, ["--tokenizer-only"], lambda: say(f"preparing the preset {name} in {folder}"), file)
    return folder


def _make_once(
    folder: Path, arguments: list[str], on_start: Callable[[], None], config: Path | None = None
) -> None:
    """Run models/tiny.py into `folder` unless it is there; `config` becomes its config.json."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / ".lock"):
        if folder.is_dir():  # another process was faster
            return
        on_start()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
            unfinished = Path(scratch) / folder.name
            _run_writer(unfinished, arguments)
            if config is not None:
                shutil.copyfile(config, unfinished / "config.json")
            unfinished.rename(folder)


def _run_writer(folder: Path, arguments: list[str]) -> None:
    """In a process of its own: the engine never imports numpy."""
    command = [sys.executable, "-m", "models.tiny", str(folder), *arguments]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        detail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"could not write the model files to {folder.parent.parent}: {detail}")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on `file`; the system releases it when the process dies."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _digest(*files: Path) -> str:
    """Of everything that decides what the writer writes, so that a new version makes a new folder."""
    template = _ROOT / "api" / "templates" / "ernie_vl.jinja"
    writer = sorted((_ROOT / "models").glob("tiny*"))
    hasher = hashlib.sha256()
    for file in (*writer, template, *files):
        hasher.update(file.name.encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()[:12]
