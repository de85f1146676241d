"""Pixel bounds and frame rules: the server's defaults and ceilings, a request's wishes, one item's wishes.

Names are those of the reference server's mm_processor_kwargs. A wish beyond a ceiling is clamped;
a wish of the wrong type is an error that names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from api.media.geometry import FACTOR
from engine.errors import ConfigError, RequestError

TOKEN_PIXELS = FACTOR**2
FramesSample = Literal["leading", "middle", "rand"]


class MediaOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one image or video is resized and sampled; pixels are of the resized image or frame."""

    image_min_pixels: int = 4 * TOKEN_PIXELS
    image_max_pixels: int = 6177 * TOKEN_PIXELS
    video_min_pixels: int = 299 * TOKEN_PIXELS
    video_max_pixels: int = 1196 * TOKEN_PIXELS
    video_fps: float = 2.0
    video_min_frames: int = 16
    video_max_frames: int = 180
    video_target_frames: int = -1  # > 0 overrides the rate
    video_frames_sample: FramesSample = "leading"
    image_width: int = 0  # with image_height: resize to this before the rules above; only per item
    image_height: int = 0


# What a request may ask for although the server's default is smaller; a default set by the operator is
# its own ceiling.
_CEILINGS = {
    "image_max_pixels": 16384 * TOKEN_PIXELS,
    "video_max_pixels": 1196 * TOKEN_PIXELS,
    "video_max_frames": 180,
    "video_fps": 120.0,
}
_ITEM_NAMES = {
    "fps": "video_fps",
    "min_frames": "video_min_frames",
    "max_frames": "video_max_frames",
    "target_frames": "video_target_frames",
    "frames_sample": "video_frames_sample",
}
_PIXEL_NAMES = ("image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels")
_SIZE_NAMES = ("image_width", "image_height")
_MAX_SIDE = 16384
# Accepted because the reference server's operators set them; the model has one value for each.
_FIXED = {"spatial_conv_size": 2, "temporal_conv_size": 2}


class MediaPolicy:
    """The server's side of the options."""

    def __init__(self, server_kwargs: dict[str, Any], model_folder: str = "") -> None:
        """Defaults are the checkpoint's where it has any, under what the operator sets.

        Raises ConfigError when mm_processor_kwargs has an unknown name or a wrong type.
        """
        wishes = {name: value for name, value in server_kwargs.items() if name not in _FIXED}
        for name, value in _FIXED.items():
            if server_kwargs.get(name, value) != value:
                raise ConfigError(f"--mm-processor-kwargs: {name} must be {value} for this model.")
        try:
            own = _checkpoint_options(Path(model_folder)) if model_folder else {}
            self.defaults = _checked(msgspec.convert({**own, **wishes}, MediaOptions))
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(f"--mm-processor-kwargs: {error}.") from None
        self._ceilings = {**_CEILINGS, **{name: wishes[name] for name in _CEILINGS if name in wishes}}

    def resolve(
        self, request_kwargs: dict[str, Any] | None, item_kwargs: dict[str, Any], param: str
    ) -> MediaOptions:
        """Options of one item; `item_kwargs` are the fields of its `image_url` or `video_url` object.

        Raises RequestError whose param is `mm_processor_kwargs` or the item's field.
        """
        merged = msgspec.to_builtins(self.defaults)
        wishes = self._convert(request_kwargs or {}, "mm_processor_kwargs")
        item = {_ITEM_NAMES.get(name, name): value for name, value in item_kwargs.items() if _is_option(name)}
        wishes |= self._convert(item, param)
        _refuse_target_with_fps(wishes, param)
        merged |= {name: self._clamp(name, value) for name, value in wishes.items()}
        try:
            return _checked(msgspec.convert(merged, MediaOptions))
        except (msgspec.ValidationError, ValueError) as error:
            raise RequestError(f"Media options: {error}.", param=param) from None

    def _convert(self, wishes: dict[str, Any], param: str) -> dict[str, Any]:
        wishes = {name: value for name, value in wishes.items() if name not in _FIXED and value is not None}
        try:
            msgspec.convert(wishes, MediaOptions)
        except msgspec.ValidationError as error:
            raise RequestError(f"Media options: {error}.", param=param) from None
        return wishes

    def _clamp(self, name: str, value: Any) -> Any:
        return min(value, self._ceilings[name]) if name in self._ceilings else value


def _checkpoint_options(folder: Path) -> dict[str, int]:
    """Pixel bounds of images, in either of their spellings, and of videos in preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size = content.get("size") or {}
        low = content.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        high = content.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        found = {"image_min_pixels": low, "image_max_pixels": high}
        found |= {name: content.get(name) for name in ("video_min_pixels", "video_max_pixels")}
        return {name: int(value) for name, value in found.items() if value}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Download the file again.") from None


def _is_option(name: str) -> bool:
    return name in _ITEM_NAMES or name in _PIXEL_NAMES or name in _SIZE_NAMES


def _refuse_target_with_fps(wishes: dict[str, Any], param: str) -> None:
    if wishes.get("video_target_frames", -1) > 0 and "video_fps" in wishes:
        raise RequestError("Give either fps or target_frames, not both.", param=param)


def _checked(options: MediaOptions) -> MediaOptions:
    for kind in ("image", "video"):
        low, high = getattr(options, f"{kind}_min_pixels"), getattr(options, f"{kind}_max_pixels")
        if not 0 < low <= high:
            raise ValueError(f"{kind}_min_pixels {low} must be positive and at most {kind}_max_pixels {high}")
        if high < TOKEN_PIXELS:
            raise ValueError(f"{kind}_max_pixels {high} is less than one token, {TOKEN_PIXELS} pixels")
    if (options.image_width > 0) != (options.image_height > 0):
        raise ValueError("image_width and image_height must be given together")
    if not (0 <= options.image_width <= _MAX_SIDE and 0 <= options.image_height <= _MAX_SIDE):
        raise ValueError(f"image_width and image_height must lie between 1 and {_MAX_SIDE}")
    if not 0 < options.video_fps < float("inf"):
        raise ValueError(f"video_fps {options.video_fps} must be a positive number")
    low, high = options.video_min_frames, options.video_max_frames
    if not 0 < low <= high:
        raise ValueError(f"video_min_frames {low} must be positive and at most video_max_frames {high}")
    target = options.video_target_frames
    if target > 0 and not low <= target <= high:
        raise ValueError(f"video_target_frames {target} must lie between {low} and {high}")
    return options
