"""What lies around the loop: settled settings, run directory, media files, progress, child processes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.channels import RunDirectory
from engine.config import ServerConfig
from engine.errors import ConfigError, RequestError
from engine.media_files import MediaFiles
from engine.messages import MediaItem
from engine.model_config import read_model_config
from engine.model_source import default_name
from engine.process import describe_exit
from engine.progress import LoadingProgress
from engine.run_directory import OwnedRunDirectory, choose_root, remove_stale
from engine.settle import settle
from engine.status_page import Heart, Phase, StatusPage
from tests.engine.processes import PRESET, ROOT, processes_naming, wait_until

# settings that depend on the model


def settled(**changes) -> ServerConfig:
    return settle(ServerConfig(**changes), read_model_config(PRESET), PRESET)[0]


def test_context_and_step_have_defaults_from_the_model():
    config = settled(model="baidu/ERNIE-4.5-VL-28B-A3B-PT")
    assert (config.max_model_len, config.max_num_batched_tokens) == (131072, 2048)
    assert (config.display_name, config.model) == ("ERNIE-4.5-VL-28B-A3B-PT", str(PRESET))
    assert config.served_model_name == ""


def test_the_model_that_comes_along_has_a_name():
    assert settled().display_name == default_name()


def test_context_beyond_the_models_is_refused():
    with pytest.raises(
        ConfigError, match="--max-model-len 200000 is more than the model's context of 131072"
    ):
        settled(max_model_len=200_000)


def test_ranks_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3 does not divide"):
        settled(tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("given", "effective", "num_notes"), [(0, 4096, 0), (384, 4096, 1), (4096, 4096, 0), (8192, 8192, 0)]
)
def test_without_chunks_a_step_holds_the_whole_context(given, effective, num_notes):
    config = ServerConfig(max_model_len=4096, max_num_batched_tokens=given, enable_chunked_prefill=False)
    config, notes = settle(config, read_model_config(PRESET), PRESET)
    assert (config.max_num_batched_tokens, len(notes)) == (effective, num_notes)


# the run directory


def test_run_directory_is_private_and_gone_afterwards():
    with OwnedRunDirectory() as run:
        assert run.root.stat().st_mode & 0o777 == 0o700 and run.media.is_dir()
        assert run.root.name.startswith(f"octet-{os.getpid()}-")
        (run.media / "left-over").write_bytes(b"x")
    assert not run.root.exists()


def test_directory_of_a_dead_server_is_removed_and_of_a_living_one_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale, alive, foreign = (
        tmp_path / name for name in (f"octet-{dead.pid}-aa", f"octet-{os.getpid()}-bb", "octet-x")
    )
    for path in (stale, alive, foreign):
        path.mkdir()
        (path / "lock").touch()
    assert remove_stale(tmp_path) == [stale]
    assert alive.exists() and foreign.exists() and not stale.exists()


def test_directory_whose_lock_is_held_is_kept_though_its_process_seems_dead(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / f"octet-{dead.pid}-aa"  # as of a server in another container
    path.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    code = f"{hold}; print(flush=True); input()"
    command = [sys.executable, "-c", code, str(path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert remove_stale(tmp_path) == []
        holder.communicate(b"\n")
    assert remove_stale(tmp_path) == [path]


def test_small_shared_memory_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("engine.run_directory._ENOUGH", 1 << 60)
    assert choose_root() == tmp_path


def test_too_long_a_temporary_folder_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("engine.run_directory.choose_root", lambda: tmp_path / ("x" * 120))
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter one"), OwnedRunDirectory():
        pass


# media files


def make_media(folder: Path, name: str = "m", size: int = 4 * 588) -> MediaItem:
    (folder / name).write_bytes(bytes(size))
    return MediaItem("image", "h", (1, 2, 2), 0, 1, name)


def test_file_goes_after_its_last_user_and_only_when_swept(tmp_path):
    media, item = MediaFiles(tmp_path, 588), make_media(tmp_path)
    media.hold([item])
    media.hold([item])
    media.release([item])
    media.sweep(0)
    assert (tmp_path / "m").exists()
    media.release([item])
    assert (tmp_path / "m").exists()
    media.sweep(0)
    assert not (tmp_path / "m").exists()


def test_file_stays_until_the_last_step_that_may_read_it_has_ended(tmp_path):
    media, item = MediaFiles(tmp_path, 588), make_media(tmp_path)
    media.hold([item])
    media.release([item], last_step=7)
    media.sweep(6)
    assert (tmp_path / "m").exists()
    media.sweep(7)
    assert not (tmp_path / "m").exists()


def test_file_that_found_a_new_user_before_the_sweep_stays(tmp_path):
    media, item = MediaFiles(tmp_path, 588), make_media(tmp_path)
    media.hold([item])
    media.release([item])
    media.hold([item])
    media.sweep(0)
    assert (tmp_path / "m").exists()


def test_files_of_a_refused_request_go_too(tmp_path):
    media, item = MediaFiles(tmp_path, 588), make_media(tmp_path, size=5)
    with pytest.raises(RequestError, match="has 5 bytes of patches, expected 2352"):
        media.hold([item])
    media.refuse([item])
    media.sweep(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a\0b"])
def test_names_that_lead_elsewhere_are_refused_and_not_deleted(tmp_path, name):
    folder = tmp_path / "media"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4 * 588))
    media, item = MediaFiles(folder, 588), MediaItem("image", "h", (1, 2, 2), 0, 1, name)
    with pytest.raises(RequestError, match="impossible file name"):
        media.hold([item])
    media.refuse([item])
    media.sweep(0)
    assert (tmp_path / "secret").exists()


# progress and processes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_tells_bytes_rate_and_time_left(tmp_path):
    page = StatusPage(tmp_path / "status", 2, create=True)
    hearts = [Heart(page, rank, 1) for rank in range(2)]
    progress = LoadingProgress(page)
    assert progress.describe(0.0) == "starting ranks, 0 of 2 ready to load"
    for heart in hearts:
        heart.beat(phase=Phase.LOADING, bytes_loaded=0, bytes_total=5_000_000_000)
    progress.describe(10.0)
    hearts[0].beat(bytes_loaded=4_000_000_000)
    assert progress.describe(12.0) == "weights 4.00 of 10.00 GB, 2.00 GB/s, 3 s left"
    page.close()


def test_terminal_gets_one_moving_line_that_is_cleared(tmp_path):
    page, terminal = StatusPage(tmp_path / "status", 1, create=True), Terminal()
    Heart(page, 0, 1).beat(phase=Phase.LOADING, bytes_loaded=50, bytes_total=100)
    progress = LoadingProgress(page, terminal)
    progress.show(1.0)
    progress.clear()
    assert "[##############..............] weights" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K") and "\n" not in terminal.getvalue()
    page.close()


def test_exits_are_told_in_words():
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV"


def test_child_of_a_parent_that_died_before_it_began_leaves(tmp_path):
    """The child starts slowly; its parent is gone by the time it asks who that was."""
    name = f"octet-test-{os.getpid()}"
    begin = "from engine.process import begin_child; begin_child('x')"
    child = f"import time; time.sleep(0.5); {begin}; time.sleep(60)"
    parent = (
        "import subprocess, sys; from engine.process import environment_for_child; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}, {name!r}], env=environment_for_child())"
    )
    subprocess.run([sys.executable, "-c", parent], cwd=ROOT, check=True)
    wait_until(lambda: not processes_naming(name), "the orphan to leave")


def test_run_directory_names_lie_inside():
    run = RunDirectory("/run/octet")
    assert {run.config.parent, run.media.parent, run.status_page.parent} == {Path("/run/octet")}
