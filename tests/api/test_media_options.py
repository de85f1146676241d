"""Pixel bounds and frame rules: what servers, checkpoints and requests may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from api.media.options import MediaPolicy
from engine.errors import ConfigError, RequestError

PARAM = "messages[0].content[1].image_url"


def test_wishes_are_clamped_to_the_servers_ceilings() -> None:
    policy = MediaPolicy({"video_max_frames": 64, "video_min_frames": 4})
    wishes = {"image_max_pixels": 10**9, "video_max_pixels": 10**9, "video_max_frames": 10**6}
    options = policy.resolve(wishes, {}, PARAM)
    assert options.image_max_pixels == 16384 * 784
    assert options.video_max_pixels == 1196 * 784
    assert options.video_max_frames == 64
    assert policy.resolve(None, {"max_frames": 32, "fps": 1}, PARAM).video_max_frames == 32


@pytest.mark.parametrize(
    "wishes, item, reason",
    [
        ({"video_fps": "2"}, {}, "video_fps"),
        ({"unknown": 1}, {}, "unknown"),
        ({}, {"fps": -1.0}, "video_fps"),
        ({}, {"target_frames": 20, "fps": 2.0}, "not both"),
        ({}, {"target_frames": 5}, "between 16 and 180"),
        ({}, {"target_frames": 200}, "between 16 and 180"),
        ({}, {"min_frames": 0}, "video_min_frames"),
        ({}, {"min_frames": 100, "max_frames": 50}, "video_min_frames"),
        ({}, {"frames_sample": "all"}, "frames_sample"),
        ({"image_min_pixels": 10**8}, {}, "image_min_pixels"),
        ({"image_max_pixels": 0}, {}, "image_min_pixels"),
        ({}, {"image_width": 100}, "together"),
        ({}, {"image_width": 10**6, "image_height": 10}, "between"),
        ({"video_fps": float("nan")}, {}, "video_fps"),
    ],
)
def test_a_wrong_option_is_named(wishes: dict[str, Any], item: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        MediaPolicy({}).resolve(wishes, item, PARAM)


def test_wrong_server_options_stop_the_server() -> None:
    for kwargs in (
        {"video_fps": "fast"},
        {"nonsense": 1},
        {"video_min_frames": 999},
        {"spatial_conv_size": 3},
    ):
        with pytest.raises(ConfigError, match="mm-processor-kwargs"):
            MediaPolicy(kwargs)
    assert MediaPolicy({"spatial_conv_size": 2, "video_fps": 1}).defaults.video_fps == 1


@pytest.mark.parametrize(
    "content",
    [
        '{"min_pixels": 6272, "max_pixels": 12845056}',
        '{"size": {"shortest_edge": 6272, "longest_edge": 12845056}}',
    ],
)
def test_the_checkpoint_may_set_the_pixel_bounds_and_the_operator_overrides_them(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    defaults = MediaPolicy({}, str(tmp_path)).defaults
    assert (defaults.image_min_pixels, defaults.image_max_pixels) == (6272, 12845056)
    assert MediaPolicy({"image_max_pixels": 784000}, str(tmp_path)).defaults.image_max_pixels == 784000
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        MediaPolicy({}, str(tmp_path))


def test_the_checkpoint_may_set_the_pixel_bounds_of_videos_apart(tmp_path: Path) -> None:
    content = {"min_pixels": 3136, "max_pixels": 78400, "video_min_pixels": 3136, "video_max_pixels": 28224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    options = MediaPolicy({}, str(tmp_path)).defaults
    assert (options.image_min_pixels, options.image_max_pixels) == (3136, 78400)
    assert (options.video_min_pixels, options.video_max_pixels) == (3136, 28224)
    policy = MediaPolicy({"video_max_pixels": 20000}, str(tmp_path))
    assert policy.resolve({"video_max_pixels": 10**9}, {}, PARAM).video_max_pixels == 20000
